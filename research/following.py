"""Scores that follow later blocks without autograd, against the true effects: tables of docs/measurements/theory.md.

python -m research.following
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from benchmarks.cost.gradients import gradient_cached, log_p, prefix
from benchmarks.cost.models import LARGE, build, pictures, side_of
from benchmarks.cost.rivals import Said
from benchmarks.cost.timing import say
from mmneurons.attribution.ablation import Replay, replays
from mmneurons.data.dataset import read_items
from mmneurons.finding.batch import targets_of
from mmneurons.finding.scoring import unembed_rows
from mmneurons.maths.ranking import top_k
from mmneurons.maths.readout import jacobian_direction
from mmneurons.maths.statistics import Estimate, estimate, spearman
from mmneurons.settings import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT, Score
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.vlm import VLM

from .later_blocks import Parts, Watched, choices, final_direction, follow, trace, watch, watched_blocks

SIZES = (10, 50, 100)
"""How many top neurons are silenced together."""
POOLS = (128, 512)
"""Of how many neurons that `logprob` ranks first the true effect is measured, to rank them again."""
EXACT = 1e-4
"""How far the whole recursion may be from autograd, over the largest score of a noun."""
SLOW_ROUNDS = 2
"""Ranking again takes long enough to be timed this often."""
VARIANTS: dict[str, Parts] = {
    "nothing followed": Parts(),
    "FFNs, norms frozen": Parts(ffn=True, jacobian=False),
    "FFNs": Parts(ffn=True),
    "own attention, norms frozen": Parts(own=True, jacobian=False),
    "own attention": Parts(own=True),
    "FFNs + own attention, norms frozen": Parts(ffn=True, own=True, jacobian=False),
    "FFNs + own attention": Parts(ffn=True, own=True),
    "own attention + pattern": Parts(own=True, query=True, key=True),
    "FFNs + pattern by the query": Parts(ffn=True, query=True),
    "FFNs + own attention + pattern by the query": Parts(ffn=True, own=True, query=True),
    "FFNs + own attention + pattern, norms frozen": Parts(ffn=True, own=True, query=True, key=True, jacobian=False),
    "FFNs + own attention + pattern": Parts(ffn=True, own=True, query=True, key=True),
}
NOTHING, BOTH, WHOLE = "nothing followed", "FFNs + own attention", "FFNs + own attention + pattern"
SHORT = (NOTHING, "FFNs", BOTH, WHOLE)
"""Variants whose top neurons are looked at."""
GRADIENT, TRUE = "gradient x activation", "true effect"


def by_autograd(vlm: VLM, inputs: Any, sequences: Tensor, noun: Said) -> dict[Score, Float[Tensor, "slots"]]:
    """Gradient x activation of log p and of the logit, by autograd over the prompt and the caption so far."""
    held: list[Tensor] = []

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.append(args[0].detach().requires_grad_() if not held else args[0])
        return (held[-1],)

    hooks = [ffn.module.register_forward_pre_hook(hold) for ffn in vlm.anatomy.ffns]
    try:
        with torch.enable_grad():
            logits = cast(Any, vlm.model)(**prefix(inputs, sequences, noun), logits_to_keep=1).logits[0]
            asked = {"logprob": log_p(logits, [noun.token_id]), "logit": logits[:, noun.token_id]}
            slopes = {name: torch.autograd.grad(value.sum(), held, retain_graph=True) for name, value in asked.items()}
    finally:
        for hook in hooks:
            hook.remove()
    return {
        cast(Score, name): torch.cat([(a * g)[0, -1].detach() for a, g in zip(held, parts, strict=True)])
        for name, parts in slopes.items()
    }


class Truth:
    """Numbers of all nouns, by image, by the row and column of a table."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.n_nouns = 0
        self.apart: dict[str, list[float]] = defaultdict(list)
        """Largest difference of the whole recursion from autograd, over the largest score, by score."""
        self.itself: list[float] = []
        """How much a position attends to itself, mean over heads, by image and block."""

    def add(self, image: str, key: tuple[str, ...], value: float | None) -> None:
        """Note one number of one noun."""
        if value is not None:
            self.found[key][image].append(value)

    def of(self, key: tuple[str, ...]) -> Estimate | None:
        """Mean over images of the means over their nouns."""
        return estimate([float(np.mean(values)) for values in self.found[key].values()])

    def less(self, key: tuple[str, ...], other: tuple[str, ...]) -> Estimate | None:
        """The difference of two, image by image."""
        mine, theirs = self.found[key], self.found[other]
        return estimate([float(np.mean(mine[image]) - np.mean(theirs[image])) for image in mine if image in theirs])

    def measure(self, vlm: VLM, blocks: Sequence[Watched], name: str, image: Image.Image) -> None:
        """One image: every score of every neuron for each noun, and what silence does."""
        inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
        with watch(blocks), record(vlm.anatomy) as recording:
            answers = vlm.generate(inputs, MAX_NEW_TOKENS)
        said = [Said(t.step, t.token_id) for t in targets_of(vlm, answers, 0, choices("logit"))]
        if not said:
            return
        traced = trace(blocks, recording, said, answers.n_prompt)
        for block in blocks:
            _, alpha, places = block.looked(traced.steps, traced.n_prompt)
            self.itself.append(float(alpha.gather(-1, places.expand(*alpha.shape[:3], 1)).mean()))
        rows = unembed_rows(vlm.anatomy, traced.token_ids, traced.trace.residual)
        finals = {
            "logprob": final_direction(vlm, traced, "logprob"),
            "logit": jacobian_direction(rows, traced.trace.residual, vlm.anatomy.norm),
        }
        scores = {
            (start, variant): follow(traced, final, parts)
            for start, final in finals.items()
            for variant, parts in VARIANTS.items()
        }
        scores["logit", "`logit` (all norms frozen)"] = follow(traced, final_direction(vlm, traced, "logit"), Parts())
        kept = replays(vlm, inputs, [noun.step for noun in said]).replays
        for i, (noun, replay) in enumerate(zip(said, kept, strict=True)):
            mine = {key: row[i] for key, row in scores.items()}
            for start, exact in by_autograd(vlm, inputs, answers.sequences.clone(), noun).items():
                mine[start, GRADIENT] = exact
                self.apart[start].append(
                    float((mine[start, WHOLE] - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
                )
            self.noun(name, replay, mine)

    def noun(self, image: str, replay: Replay, scores: Mapping[tuple[str, str], Float[Tensor, "slots"]]) -> None:
        """One noun: agreement, deletion, and what is found when a pool is ranked again."""
        self.n_nouns += 1
        effects = replay.effects([torch.tensor([slot]) for slot in range(replay.n_slots)])
        true = {"logit": effects.logit, "logprob": effects.logprob}
        layers = torch.tensor([ffn.layer for ffn in replay.anatomy.ffns])
        layer_of = layers[torch.bucketize(torch.arange(replay.n_slots), replay.slot_starts, right=True) - 1]
        n_blocks = len(replay.anatomy.blocks)
        scopes = {"all blocks": layer_of >= 0, "last third": layer_of >= n_blocks - max(1, round(n_blocks / 3))}
        scopes |= {f"block {layer}": layer_of == layer for layer in range(n_blocks)}
        orders: dict[tuple[str, str], Tensor] = {}
        best = {k: set(top_k(effects.logprob, k).tolist()) for k in SIZES}
        for (start, variant), score in scores.items():
            for scope, here in scopes.items():
                rho = spearman(score[here].double().numpy(), true[start][here].double().numpy())
                self.add(image, ("rank", start, variant, scope), rho)
            if variant not in VARIANTS or variant in SHORT:
                orders[start, variant] = top_k(score, max(SIZES))
        direct = scores["logprob", NOTHING]
        for m in POOLS:
            pool = top_k(direct, m)
            orders["logprob", f"`logprob`, first {m} ranked again"] = pool[top_k(effects.logprob[pool], max(SIZES))]
        orders["logprob", TRUE] = top_k(effects.logprob, max(SIZES))
        sets = [order[:k] for order in orders.values() for k in SIZES]
        falls = replay.effects(sets).logprob.view(len(orders), len(SIZES)).tolist()
        for ((start, variant), order), fell in zip(orders.items(), falls, strict=True):
            for k, fall in zip(SIZES, fell, strict=True):
                self.add(image, ("fall", start, variant, str(k)), fall)
                self.add(image, ("share", start, variant, str(k)), len(best[k] & set(order[:k].tolist())) / k)

    def variants(self, kind: str, start: str) -> list[str]:
        """Rows of one table."""
        return list(dict.fromkeys(key[2] for key in self.found if key[:2] == (kind, start)))

    def show(self) -> None:
        """Print the tables."""
        for start, apart in self.apart.items():
            print(f"`{WHOLE}` against autograd, {start}: at most {max(apart):.1e} of the largest score apart")
        print(f"A position's attention to itself: {np.mean(self.itself):.4f}, mean over blocks, heads and nouns")
        for start, effect in (("logprob", "log p"), ("logit", "the logit")):
            self._agreement(start, effect)
        print("\n| followed | " + " | ".join(scope for scope in self._blocks()) + " |")
        print("| --- " * (1 + len(self._blocks())) + "|")
        for variant in self.variants("rank", "logprob"):
            cells = [_mean(self.of(("rank", "logprob", variant, scope))) for scope in self._blocks()]
            print(f"| {variant} | " + " | ".join(cells) + " |")
        print("\n| start | silent | " + " | ".join(f"top {k} | more than direct" for k in SIZES) + " |")
        print("| --- " * (2 + 2 * len(SIZES)) + "|")
        for start in ("logprob", "logit"):
            for variant in self.variants("fall", start):
                cells = []
                for k in map(str, SIZES):
                    key = ("fall", start, variant, k)
                    cells += [str(self.of(key)), str(self.less(key, ("fall", start, NOTHING, k)))]
                print(f"| {start} | {variant} | " + " | ".join(cells) + " |")
        print("\n| of the true top k, by | " + " | ".join(f"top {k}" for k in SIZES) + " |")
        print("| --- " * (1 + len(SIZES)) + "|")
        for variant in self.variants("share", "logprob"):
            cells = [str(self.of(("share", "logprob", variant, str(k)))) for k in SIZES]
            print(f"| {variant} | " + " | ".join(cells) + " |")

    def _blocks(self) -> list[str]:
        return sorted({key[3] for key in self.found if key[0] == "rank" and key[3].startswith("block")})

    def _agreement(self, start: str, effect: str) -> None:
        scopes = ("all blocks", "last third")
        heads = " | ".join(f"{scope} | more than direct | of the gap" for scope in scopes)
        print(f"\n| followed (effect on {effect}) | {heads} |")
        print("| --- " * 7 + "|")
        for variant in self.variants("rank", start):
            cells = []
            for scope in scopes:
                key, direct, ceiling = (("rank", start, name, scope) for name in (variant, NOTHING, GRADIENT))
                more, gap = self.less(key, direct), self.less(ceiling, direct)
                cells += [str(self.of(key)), str(more), f"{more.mean / gap.mean:.2f}" if more and gap else "-"]
            print(f"| {variant} | " + " | ".join(cells) + " |")


def _mean(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.mean:.3f}"


class Costs:
    """Seconds of every way to score the nouns of one image, `generate` included; nouns are given to all."""

    def __init__(
        self,
        vlm: VLM,
        blocks: Sequence[Watched],
        image: Image.Image,
        said: Sequence[Said],
        pools: Sequence[int] = POOLS,
    ) -> None:
        self.pools = pools
        self.vlm, self.blocks, self.image, self.said = vlm, blocks, image, said
        self.n_tokens = max(noun.step for noun in said) + 1

    def generate(self) -> None:
        """Nothing but the caption."""
        self.vlm.generate(self.vlm.encode([self.image], PROMPT, ANSWER_PREFIX), self.n_tokens)

    def recorded(self, blocks: Sequence[Watched]) -> tuple[Recording, int]:
        """The caption, with what is recorded on the way; of `blocks` more."""
        inputs = self.vlm.encode([self.image], PROMPT, ANSWER_PREFIX)
        with watch(blocks), record(self.vlm.anatomy) as recording:
            answers = self.vlm.generate(inputs, self.n_tokens)
        return recording, answers.n_prompt

    def score(self, parts: Parts) -> None:
        """Record and score."""
        recording, n_prompt = self.recorded(self.blocks if parts != Parts() else [])
        traced = trace(self.blocks, recording, self.said, n_prompt)
        follow(traced, final_direction(self.vlm, traced, "logprob"), parts)

    def gradient(self) -> None:
        """By autograd, at the predicting positions alone."""
        gradient_cached(self.vlm, self.image, self.said, self.n_tokens)

    def again(self, m: int) -> None:
        """Score by `logprob`, and measure the effects of the first m."""
        inputs = self.vlm.encode([self.image], PROMPT, ANSWER_PREFIX)
        kept = replays(self.vlm, inputs, [noun.step for noun in self.said])
        traced = trace(self.blocks, kept.recording, self.said, kept.answers.n_prompt)
        scores = follow(traced, final_direction(self.vlm, traced, "logprob"), Parts())
        for replay, row in zip(kept.replays, scores, strict=True):
            replay.effects(list(top_k(row, m)[:, None]))

    def arms(self) -> dict[str, Callable[[], object]]:
        """Every way that is quick, by name."""
        return {
            "generate": self.generate,
            "recorded for `logprob`, not scored": partial(self.recorded, []),
            "recorded for following, not scored": partial(self.recorded, self.blocks),
            "`logprob`": partial(self.score, Parts()),
            "FFNs followed": partial(self.score, VARIANTS["FFNs"]),
            f"{BOTH} followed": partial(self.score, VARIANTS[BOTH]),
            f"{WHOLE} followed": partial(self.score, VARIANTS[WHOLE]),
            "gradient x activation, cached": self.gradient,
        }

    def slow(self) -> dict[str, Callable[[], object]]:
        """Ranking again, next to `generate`."""
        again = {f"`logprob`, first {m} ranked again": partial(self.again, m) for m in self.pools}
        return {"generate": self.generate, **again}


def cpu_rounds(arms: Mapping[str, Callable[[], object]], n: int) -> dict[str, list[float]]:
    """Seconds of processor time of each arm in each of n rounds, every other round in reverse order.

    Not of the clock: some of the differences are milliseconds, and others may use the machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(n):
        for name in list(arms)[:: -1 if i % 2 else 1]:
            start = time.process_time()
            arms[name]()
            seconds[name].append(time.process_time() - start)
        say(f"  round {i}")
    return seconds


def show_costs(name: str, costs: Sequence[Costs], n: int) -> None:
    """Milliseconds of processor time a noun beyond `generate`, over rounds of all images."""
    beyond: dict[str, list[float]] = defaultdict(list)
    for cost in costs:
        for arms, times in ((cost.arms(), n), (cost.slow(), min(n, SLOW_ROUNDS))):
            for run in arms.values():
                run()
            seconds = cpu_rounds(arms, times)
            for arm in list(arms)[1:]:
                less = zip(seconds[arm], seconds["generate"], strict=True)
                beyond[arm] += [1000 * (a - b) / len(cost.said) for a, b in less]
    nouns = sum(len(cost.said) for cost in costs)
    print(f"\n{name}: {nouns} nouns of {len(costs)} images, {n} rounds each, {min(n, SLOW_ROUNDS)} of ranking again\n")
    print("| scored by | ms a noun beyond `generate` | of gradient x activation, cached |")
    print("| --- | --- | --- |")
    gradient = float(np.median(beyond["gradient x activation, cached"]))
    for arm, values in beyond.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"| {arm} | {middle:.2f} (middle half {low:.2f} to {high:.2f}) | {middle / gradient:.2f} |")


def pocket_costs(vlm: VLM, blocks: Sequence[Watched], images: Sequence[Image.Image]) -> list[Costs]:
    """The nouns of each image, as `find` finds them."""
    found = []
    for image in images:
        answers = vlm.generate(vlm.encode([image], PROMPT, ANSWER_PREFIX), MAX_NEW_TOKENS)
        said = [Said(t.step, t.token_id) for t in targets_of(vlm, answers, 0, choices("logit"))]
        if said:
            found.append(Costs(vlm, blocks, image, said))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="pocket:find-500")
    parser.add_argument("--limit", type=int, default=40, help="images for agreement and deletion")
    parser.add_argument("--timed", type=int, default=8, help="images that are timed; 0: none")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--large", action="store_true", help="also time a model of random weights, 24 x 1024")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm = build("pocket")
    blocks, truth = watched_blocks(vlm), Truth()
    items = read_items(arguments.images)
    for i, item in enumerate(items[: arguments.limit]):
        truth.measure(vlm, blocks, item.name, item.image())
        say(f"  image {i}: {truth.n_nouns} nouns")
    if truth.n_nouns:
        print(f"{truth.n_nouns} nouns of {arguments.limit} images; means over images, 95 % BCa intervals\n")
        truth.show()
        worst = max(max(apart) for apart in truth.apart.values())
        assert worst < EXACT, f"everything followed should be the gradient, and is {worst} off"
    if arguments.timed:
        timed = pocket_costs(vlm, blocks, [item.image() for item in items[: arguments.timed]])
        show_costs("Pocket model", timed, arguments.rounds)
    if arguments.large:
        large = build("llava")
        image = pictures(1, side_of("llava", LARGE))[0]
        answers = large.generate(large.encode([image], PROMPT, ANSWER_PREFIX), 12)
        said = [Said(step, answers.token_ids[0][step]) for step in (3, 7, 11)]
        show_costs("Random LLaVA", [Costs(large, watched_blocks(large), image, said, POOLS[:1])], arguments.rounds)


if __name__ == "__main__":
    main()
