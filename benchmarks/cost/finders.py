"""What every finder of the package costs, side by side in one run: time beyond `generate`, and peak memory.

    python -m benchmarks.cost.finders                      about ten minutes on a busy core, no download
    python -m benchmarks.cost.finders --quick --out FILE   one round: shows that it runs, measures nothing

Writes its tables between the markers of docs/measurements/benchmarks.md, which says what each number means.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mmneurons.attribution import finders
from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.finders import FINDERS, Finder, FinderScores
from mmneurons.finding import batch
from mmneurons.settings import Question, Score

from . import gradients
from .cases import NEW_TOKENS, Case
from .models import build, pictures, side_of
from .peak import peak
from .tables import PAGE, Tables, markdown, report, write
from .timing import Ratio, rounds, say, stopwatch

ROUNDS, MEMORY_ROUNDS = 9, 3
SCORES: tuple[Score, ...] = ("logit", "logprob", "paper")
GENERATE, NONE, TRUE = "generate", "no finder", "true effect"
FIND = {score: f"`find`, {score}" for score in SCORES}
TITLES = {"gradient": "gradient x activation", "integrated": "integrated gradients"}
CHEAPEST = {
    f"{TITLES['gradient']}, cheapest": gradients.gradient_cached,
    f"{TITLES['integrated']}, cheapest": gradients.integrated_cached,
}
"""Not in the package: on the KV cache that the one generation left, nouns given."""
GOALS = {"gradient": 10, "integrated": 100}
"""How many times cheaper a score of ours is to be for each noun."""
OWN = {
    "scores": (finders, "score_targets"),
    "other finders": (finders, "_scores"),
    "true effect": (Replay, "effects"),
    "find": (batch, "score_targets"),
    "gradient, cheapest": (gradients, "_gradient_times_activation"),
    "integrated, cheapest": (gradients, "_scaled"),
}
"""Where a finder does what no other finder needs."""


@dataclass(frozen=True)
class Side(Tables):
    """Finders as rows, and the goals."""

    def markdown(self) -> list[str]:
        """Both."""
        return [markdown("pocket float32, one image", self.cost), markdown("own part for each noun", self.rivals)]


def arms_of(case: Case) -> dict[str, Callable[[], object]]:
    """The plain caption, and what the package has: every finder by their one interface, and `find`."""

    def judge(*which: Finder) -> list[FinderScores]:
        return finders.finder_scores(case.vlm, case.images[0], which, question=Question(max_new_tokens=NEW_TOKENS))

    def silence() -> None:
        """As `mmneurons inspect finders` has it: every neuron, one by one."""
        for one in judge():
            one.replay.effects([slot[None] for slot in torch.arange(one.replay.n_slots)])

    return {
        GENERATE: case.generate,
        NONE: judge,
        **{name: partial(judge, name) for name in FINDERS},
        TRUE: silence,
        **{title: partial(case.find, score=score) for score, title in FIND.items()},
    }


def measure_memory(names: Sequence[str], n: int, tables: Tables) -> None:
    """Peaks of fresh processes that load, run one of them once, and end; in turn.

    First of all: on Linux a child's peak counts what this process held when the child was started.
    """
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for i in range(n):
        for name in names[:: -1 if i % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.cost.finders", "--peak", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            peaks[name].append(float(done.stdout))
    say(f"  peaks: {peaks} MiB")
    for name in names:
        tables.memory[name]["peak memory / `generate`"] = str(Ratio.of(peaks[name], peaks[GENERATE]))


def measure_time(case: Case, n: int, tables: Tables) -> None:
    """All in turn; of each also the seconds of its own part."""
    said = case.said()
    arms = arms_of(case)
    arms |= {title: partial(run, case.vlm, case.images[0], said, NEW_TOKENS) for title, run in CHEAPEST.items()}
    own: dict[str, list[float]] = {name: [] for name in arms}

    def watched(name: str) -> None:
        with stopwatch(OWN) as spent:
            arms[name]()
        own[name].append(sum(spent.values()))

    for run in arms.values():
        run()
    seconds = rounds({name: partial(watched, name) for name in arms}, n)
    plain = seconds[GENERATE]
    beyond = {name: [a - b for a, b in zip(mine, plain, strict=True)] for name, mine in seconds.items()}
    for name in list(arms)[1:]:
        tables.cost[TITLES.get(name, name)] = {
            "own part, ms for each noun": _ms(own[name], len(said)) if name != NONE else "-",
            "all beyond `generate`, ms for each noun": _ms(beyond[name], len(said)),
            "whole / `generate`": str(Ratio.of(seconds[name], plain)),
        } | tables.memory.get(name, {})
    for name, goal in GOALS.items():
        for rival in (name, f"{TITLES[name]}, cheapest"):
            ratios = {score: Ratio.of(own[rival], own[score]) for score in SCORES}
            met = [score for score, ratio in ratios.items() if ratio.median >= goal]
            tables.rivals[TITLES.get(rival, rival)] = {
                "aimed at": f"at least {goal}",
                **{f"over `{score}`": str(ratio) for score, ratio in ratios.items()},
                "met": "yes" if len(met) == len(SCORES) else f"by {', '.join(met)}" if met else "no",
                "all beyond `generate`, over that of `find`": str(
                    f"{statistics.median(beyond[rival]) / statistics.median(beyond[FIND['logit']]):.3g}"
                ),
            }


def _ms(seconds: Sequence[float], n_nouns: int) -> str:
    """Median and range, for each noun."""
    middle, low, high = (
        f"{1000 * one / n_nouns:.3g}" for one in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{middle} ({low} to {high})"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and the peak of one finder")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--peak", metavar="NAME", help="run this once and print the peak of the process, MiB")
    asked = parser.parse_args()
    names, tables = [GENERATE, NONE, *FINDERS, TRUE, *FIND.values()], Side()
    if asked.peak is None:
        measure_memory(names[:3] if asked.quick else names, 1 if asked.quick else MEMORY_ROUNDS, tables)
    case = Case(build("pocket"), pictures(1, side_of("pocket", {})), "pocket")
    if asked.peak is not None:
        arms_of(case)[asked.peak]()
        print(f"{peak():.1f}")
        return
    measure_time(case, 1 if asked.quick else ROUNDS, tables)
    n_neurons = sum(ffn.size for ffn in case.vlm.anatomy.ffns)
    facts = [f"{len(case.said())} nouns; at most {NEW_TOKENS} new tokens; {n_neurons} neurons."]
    measured = report("finders", tables, facts, toy=asked.quick)
    write(asked.out, "finders", measured)
    print(measured)


if __name__ == "__main__":
    main()
