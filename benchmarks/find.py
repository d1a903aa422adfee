"""What `find` costs: against `generate` alone, the released algorithm and gradients; memory; growth with nouns.

    python benchmarks/find.py                      about ten minutes on two cores, no download
    python benchmarks/find.py --quick --out FILE   toy sizes: shows that it runs, measures nothing

Writes its tables between the markers of docs/benchmarks.md, which says what each number means.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from cases import NEW_TOKENS, Case, check_baseline, check_gradients, check_released, choices_of, target_at
from models import LARGE, NOUNS_PER_CAPTION, TINY, Geometry, build, nouns_of, pictures
from rivals import Said, gradient_cached, gradient_whole, project_all, released
from timing import Ratio, rounds, say, stopwatch

import mmneurons as mmn
from mmneurons.finding import finder
from mmneurons.finding.scoring import describe, score_targets
from mmneurons.vlm import provenance

BATCHES = (1, 8)
NOUNS = (1, 3, 10, 30, 100)
BEGIN, END = "<!-- begin: benchmarks/find.py -->", "<!-- end: benchmarks/find.py -->"
PLACES = {
    "processor": (mmn.VLM, "encode"),
    "generation": (mmn.VLM, "generate"),
    "words": (finder, "find_nouns"),
    "scoring": (finder, "score_targets"),
    "describing": (finder, "describe"),
    "picture": (finder, "model_view"),
    "versions": (provenance, "versions"),
}
"""The parts of `find`, each a function it calls."""

Table = defaultdict[str, dict[str, str]]
"""Row name -> column name -> cell."""


@dataclass(frozen=True)
class Effort:
    """How often things are repeated."""

    pairs: int
    """Rounds of `find` and `generate` for one image."""
    others: int
    """Rounds of all else."""


FULL = {"pocket": Effort(25, 9), "random": Effort(9, 5)}
QUICK = {"pocket": Effort(2, 1), "random": Effort(2, 1)}


@dataclass(frozen=True)
class Tables:
    """What was measured."""

    cost: Table = field(default_factory=lambda: Table(dict))
    memory: Table = field(default_factory=lambda: Table(dict))
    rivals: Table = field(default_factory=lambda: Table(dict))
    growth: Table = field(default_factory=lambda: Table(dict))


def measure_pairs(case: Case, n: int, tables: Tables) -> None:
    """`find` next to `generate`, and where its extra time goes."""
    found = check_baseline(case)  # runs both once; the first time, the tagger loads and the weights are hashed
    plain_parts: list[dict[str, float]] = []
    find_parts: list[dict[str, float]] = []

    def watched(run: Callable[[], object], log: list[dict[str, float]]) -> None:
        with stopwatch(PLACES) as spent:
            run()
        log.append(spent)

    seconds = rounds(
        {"generate": partial(watched, case.generate, plain_parts), "find": partial(watched, case.find, find_parts)}, n
    )
    plain, whole = seconds["generate"], seconds["find"]
    parts = {name: [spent[name] for spent in find_parts] for name in PLACES}
    parts["rest"] = [total - sum(spent.values()) for total, spent in zip(whole, find_parts, strict=True)]
    for name in ("processor", "generation"):  # what `generate` alone needs for them is no extra
        parts[name] = [more - less[name] for more, less in zip(parts[name], plain_parts, strict=True)]
    parts["recording"] = parts.pop("generation")
    parts["rest"] = [a + b for a, b in zip(parts["rest"], parts.pop("processor"), strict=True)]

    column, table = case.column, tables.cost
    table["nouns scored"][column] = str(sum(len(finding.nouns) for finding in found))
    table["`generate`, seconds"][column] = f"{statistics.median(plain):.3f}"
    table["`find`, seconds"][column] = f"{statistics.median(whole):.3f}"
    table["**`find` / `generate`**"][column] = f"**{Ratio.of(whole, plain)}**"
    for name in ("recording", "words", "scoring", "describing", "picture", "versions", "rest"):
        share = 100 * statistics.median(part / total for part, total in zip(parts[name], plain, strict=True))
        table[f"- {name}, % of `generate`"][column] = f"{share:.1f}"


def measure_rivals(case: Case, n: int, tables: Tables) -> None:
    """Maps, the released algorithm and gradient x activation, next to `find`, for the same nouns of one image."""
    (finding,) = case.find()
    image, vlm = case.images[0], case.vlm
    said = [Said(noun.step, noun.token_id) for noun in finding.nouns]
    check_gradients(case, said)
    start = time.perf_counter()
    projections = project_all(vlm)
    built = time.perf_counter() - start
    held = sum(part.nbytes for part in projections)
    check_released(case, projections)
    case.find(maps=True, blank=True)
    seconds = rounds(
        {
            "generate": case.generate,
            "find": case.find,
            "maps": partial(case.find, maps=True),
            "blank": partial(case.find, blank=True),
            "hash": partial(provenance.weights_hash, vlm.model),
            "released": partial(released, vlm, image, said, projections, NEW_TOKENS),
            "gradient": partial(gradient_whole, vlm, image, said, NEW_TOKENS),
            "cached": partial(gradient_cached, vlm, image, said, NEW_TOKENS),
        },
        n,
    )
    tables.cost["`find` with maps / without"][case.column] = str(Ratio.of(seconds["maps"], seconds["find"]))
    tables.cost["`find` with a blank image / without"][case.column] = str(Ratio.of(seconds["blank"], seconds["find"]))
    tables.cost["weights hash, once per model, seconds"][case.column] = f"{statistics.median(seconds['hash']):.3f}"
    column, weights_bytes = case.name, sum(part.nbytes for part in vlm.model.parameters())
    table = tables.rivals
    table["nouns of the image"][column] = str(len(said))
    table["released algorithm / `find`"][column] = str(Ratio.of(seconds["released"], seconds["find"]))
    table["- its projections, built once, seconds"][column] = f"{built:.2f}"
    table["- their size, MiB (and over that of the weights)"][column] = (
        f"{held / 2**20:.0f} ({held / weights_bytes:.2f})"
    )
    for name, row in (("gradient", "gradient x activation, whole prefix"), ("cached", "gradient x activation, cached")):
        beyond = [(a - b) / len(said) for a, b in zip(seconds[name], seconds["generate"], strict=True)]
        table[f"{row} / `find`"][column] = str(Ratio.of(seconds[name], seconds["find"]))
        table[f"- {row}: ms for each noun"][column] = f"{1000 * statistics.median(beyond):.1f}"


def measure_growth(case: Case, n: int, tables: Tables) -> None:
    """Scoring and describing against the number of nouns, next to one read of every `w_out`."""
    vlm, (recording, answers) = case.vlm, case.recorded("logit")
    n_steps = len(recording.residual)
    choices = choices_of("logit")
    torch.manual_seed(0)
    token_ids = torch.randperm(vlm.anatomy.vocab)[: max(NOUNS)].tolist()

    def score(n_nouns: int) -> None:
        score_targets(vlm, recording, answers, targets[:n_nouns], choices)

    def tell(n_nouns: int) -> None:
        describe(vlm, scored[n_nouns])

    def read() -> None:
        for block in vlm.anatomy.blocks:
            block.w_out.get_parameter("weight").sum()

    targets = [target_at(i % n_steps, token_id) for i, token_id in enumerate(token_ids)]
    scored = {k: score_targets(vlm, recording, answers, targets[:k], choices) for k in NOUNS}
    arms: dict[str, Callable[[], object]] = {"read": read}
    arms |= {f"score {k}": partial(score, k) for k in NOUNS} | {f"tell {k}": partial(tell, k) for k in NOUNS}
    seconds = rounds(arms, n)
    column, table = case.name, tables.growth
    table["one read of every `w_out`, ms"][column] = f"{1000 * statistics.median(seconds['read']):.2f}"
    for k in NOUNS:
        table[f"{k} nouns: scoring, ms (over that read)"][column] = (
            f"{1000 * statistics.median(seconds[f'score {k}']):.2f} "
            f"({Ratio.of(seconds[f'score {k}'], seconds['read']).median:.3g})"
        )
        table[f"{k} nouns: describing, ms"][column] = f"{1000 * statistics.median(seconds[f'tell {k}']):.2f}"
    few, many = ([a + b for a, b in zip(seconds[f"score {k}"], seconds[f"tell {k}"], strict=True)] for k in (1, 10))
    further = statistics.median((b - a) / 9 for a, b in zip(few, many, strict=True))
    tables.rivals["- `find`: ms for each further noun"][column] = f"{1000 * further:.1f}"


def measure_memory(names: Sequence[str], batches: Sequence[int], geometry: Geometry, tables: Tables) -> None:
    """Peaks of fresh processes, one that generates and one that finds.

    First of all: on Linux a child's peak counts what this process held when the child was started.
    """
    for name in names:
        for batch in batches:
            size = ["tiny"] if geometry is TINY else []
            numbers = [str(batch), str(NEW_TOKENS), str(_side(name, geometry)), *size]
            script = str(Path(__file__).with_name("peak.py"))
            started = [
                subprocess.Popen(
                    [sys.executable, script, name, what, *numbers], stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                for what in ("generate", "find")
            ]
            peaks = []
            for process in started:
                out, err = process.communicate()
                if process.returncode:
                    raise RuntimeError(err.decode())
                peaks.append(float(out.split()[1]))
            say(f"  peak of {name}, batch {batch}: {peaks} MiB")
            column = f"{_title(name)}, batch {batch}"
            ratio, extra = peaks[1] / peaks[0], peaks[1] - peaks[0]
            tables.memory["peak memory, `find` / `generate`"][column] = f"{ratio:.3f} (+{extra:.0f} MiB)"


def _side(name: str, geometry: Geometry) -> int:
    """Pixels of the images given: the random model's processor shrinks them, as photographs are."""
    return mmn.pocket.SIDE if name == "pocket" else 3 * geometry.side


def _title(name: str, dtype: str = "float32") -> str:
    return f"{name} {dtype}"


def machine() -> str:
    """Where this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = provenance.versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "mmneurons"))
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {packages}"


def markdown(title: str, table: Table) -> str:
    """One table; a cell that was not measured is a dash."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | {' | '.join(row.get(column, '-') for column in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


def write(page: Path, measured: str) -> None:
    """Put the tables between the page's markers; a page without them becomes the tables alone."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before if rest else ''}{BEGIN}\n{measured}\n{END}{after or chr(10)}", encoding="utf-8")


def page(tables: Tables, sizes: dict[str, int], geometry: Geometry) -> str:
    """All that was measured so far."""
    toy = " (toy sizes: no measurement)" if geometry is TINY else ""
    millions = ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in sizes.items())
    return "\n\n".join(
        [
            f"Command: `{shlex.join(['python', *sys.argv])}`{toy}",
            f"Machine: {machine()}.",
            f"Parameters: {millions}. Random model: {geometry}; {NOUNS_PER_CAPTION} nouns a caption. "
            f"At most {NEW_TOKENS} new tokens.",
            markdown("`find` and `generate`", Table(dict, tables.cost | tables.memory)),
            markdown("Rivals, one image", tables.rivals),
            markdown("Growth, one image", tables.growth),
        ]
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks.md")
    parser.add_argument("--bfloat16", action="store_true", help="the random model also in bfloat16")
    asked = parser.parse_args()
    geometry = TINY if asked.quick else LARGE
    efforts = QUICK if asked.quick else FULL
    tables, sizes = Tables(), {}
    measure_memory(
        ["random"] if asked.quick else list(efforts), BATCHES[: 1 if asked.quick else None], geometry, tables
    )
    for name, effort in efforts.items():
        vlm = build(name, geometry)
        sizes[name] = sum(part.numel() for part in vlm.model.parameters())
        images = pictures(max(BATCHES), _side(name, geometry))
        for dtype in ("float32", "bfloat16") if asked.bfloat16 and not vlm.is_pocket else ("float32",):
            vlm.model.to(getattr(torch, dtype))
            for batch in BATCHES:
                case = Case(vlm, images[:batch], _title(name, dtype))
                say(case.column)
                with nouns_of(vlm):
                    measure_pairs(case, effort.pairs if batch == 1 else effort.others, tables)
                    if dtype == "float32" and batch == 1:
                        measure_rivals(case, effort.others, tables)
                        measure_growth(case, effort.others, tables)
                write(asked.out, page(tables, sizes, geometry))  # a run cut short leaves what it measured
    print(page(tables, sizes, geometry))


if __name__ == "__main__":
    main()
