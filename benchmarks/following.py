"""A score that follows the later blocks without autograd, against the true effects: tables of docs/theory.md.

python benchmarks/following.py

What a neuron writes at the predicting position reaches the logits there through that position's own stream only: so
the read-out direction is carried down from the top block, through each block's FFN, attention and norms at that
position, by products with their weights. Llama-like blocks only.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from gradients import gradient_cached, log_p, prefix
from jaxtyping import Float, Int
from models import LARGE, build, pictures, side_of
from PIL import Image
from rivals import Said
from timing import say
from torch import Tensor, nn

from mmneurons.finding.finder import targets_of
from mmneurons.finding.result import Score
from mmneurons.finding.scoring import Choices, read_out, unembed_rows
from mmneurons.inspection.items import read_items
from mmneurons.maths.ranking import top_k
from mmneurons.maths.readout import Norm, frozen_direction, jacobian_direction
from mmneurons.maths.statistics import Estimate, estimate, spearman
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.norms import measure_norm
from mmneurons.vlm.moments import Moments, pick_moments
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.recording import Recording, record
from mmneurons.vlm.replay import Replay, replays
from mmneurons.vlm.vlm import VLM

SIZES = (10, 50, 100)
"""How many top neurons are silenced together."""
POOLS = (128, 512)
"""Of how many neurons that `logprob` ranks first the true effect is measured, to rank them again."""
EXACT = 1e-4
"""How far the whole recursion may be from autograd, over the largest score of a noun."""
SLOW_ROUNDS = 2
"""Ranking again takes long enough to be timed this often."""
STEP = 1e-4
"""For the slope of the activation function, by a symmetric difference in float64."""


@dataclass(frozen=True)
class Parts:
    """What of the later blocks is followed."""

    ffn: bool = False
    own: bool = False
    """Attention of the position to itself, its pattern held."""
    query: bool = False
    """What the position's query changes in the pattern."""
    key: bool = False
    """What its key changes there."""
    jacobian: bool = True
    """The norms before FFN and attention to first order; their scale held otherwise."""


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


class Watched:
    """What one Llama-like block is made of, and what it saw at the last position of each forward pass."""

    def __init__(self, block: Any, hidden: int) -> None:
        self.attention, self.ffn = block.self_attn, block.mlp
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        self.norms: tuple[Norm, Norm] = (measure_norm(self.before, hidden), measure_norm(self.between, hidden))
        self.head: int = self.attention.head_dim
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.cache: Any = None
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Set the hooks that see it."""

        def entered(name: str) -> Callable:
            return lambda module, args: self.seen[name].append(args[0][0, -1].clone())

        def left(name: str) -> Callable:
            return lambda module, args, output: self.seen[name].append(output[0, -1].clone())

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.cache = kwargs["past_key_values"]
            for name, part in zip(("cos", "sin"), kwargs["position_embeddings"], strict=True):
                self.seen[name].append(part[0, -1])

        return [
            self.before.register_forward_pre_hook(entered("stream")),
            self.between.register_forward_pre_hook(entered("middle")),
            self.attention.q_proj.register_forward_hook(left("query")),
            self.attention.register_forward_pre_hook(called, with_kwargs=True),
            self.ffn.gate_proj.register_forward_hook(left("gate")),
            self.ffn.up_proj.register_forward_hook(left("up")),
        ]

    def at(self, name: str, steps: Int[Tensor, "n"]) -> Float[Tensor, "n _"]:
        """What was seen where each of these tokens was predicted."""
        return torch.stack([self.seen[name][step] for step in steps.tolist()]).float()

    def through_ffn(
        self, read: Float[Tensor, "n neurons"], steps: Int[Tensor, "n"], jacobian: bool
    ) -> Float[Tensor, "n hidden"]:
        """The FFN's answer: `read` is what each column says along the directions above it."""
        gate, up = self.at("gate", steps).double(), self.at("up", steps)
        act = self.ffn.act_fn
        slope = ((act(gate + STEP) - act(gate - STEP)) / (2 * STEP)).float()
        back = (read * up * slope) @ self.ffn.gate_proj.weight.float()
        back = back + (read * act(gate).float()) @ self.ffn.up_proj.weight.float()
        return _through_norm(back, self.at("middle", steps), self.norms[1], jacobian)

    def looked(
        self, steps: Int[Tensor, "n"], n_prompt: int
    ) -> tuple[Float[Tensor, "n groups heads width"], Float[Tensor, "n groups heads keys"], Int[Tensor, "n 1 1 1"]]:
        """The rotated queries, the pattern, and which key is the position's own."""
        n, keys = len(steps), self.cache.layers[self.attention.layer_idx].keys[0].float()
        query = self.at("query", steps).view(n, -1, self.head)
        query = query * self.at("cos", steps)[:, None] + _turned(query) * self.at("sin", steps)[:, None]
        query = query.view(n, len(keys), -1, self.head)
        places = (n_prompt - 1 + steps)[:, None, None, None]
        scores = self.attention.scaling * torch.einsum("ngmd,gpd->ngmp", query, keys)
        alpha = scores.masked_fill(torch.arange(keys.shape[1]) > places, -torch.inf).softmax(-1)
        return query, alpha, places

    def through_attention(
        self, directions: Float[Tensor, "n hidden"], steps: Int[Tensor, "n"], n_prompt: int, parts: Parts
    ) -> Float[Tensor, "n hidden"]:
        """The attention's answer."""
        layer = self.cache.layers[self.attention.layer_idx]
        keys, values = layer.keys[0].float(), layer.values[0].float()  # groups, positions, head
        cos, sin = self.at("cos", steps)[:, None], self.at("sin", steps)[:, None]
        query, alpha, places = self.looked(steps, n_prompt)
        itself = places.expand(*alpha.shape[:3], 1)
        read = (directions @ self.attention.o_proj.weight.float()).view_as(query)
        back = torch.zeros(len(steps), self.norms[0].weight.shape[0])
        if parts.own:
            value = (alpha.gather(-1, itself) * read).sum(2)
            back = back + value.flatten(1) @ self.attention.v_proj.weight.float()
        if parts.query or parts.key:
            said = torch.einsum("ngmd,gpd->ngmp", read, values)
            moved = self.attention.scaling * alpha * (said - (alpha * said).sum(-1, keepdim=True))
            asked = torch.einsum("ngmp,gpd->ngmd", moved, keys).flatten(1, 2)
            offered = (moved.gather(-1, itself) * query).sum(2)
            for followed, turned, module in (
                (parts.query, asked, self.attention.q_proj),
                (parts.key, offered, self.attention.k_proj),
            ):
                if followed:
                    straight = turned * cos - _turned(turned * sin)  # the rotation's transpose
                    back = back + straight.flatten(1) @ module.weight.float()
        return _through_norm(back, self.at("stream", steps), self.norms[0], parts.jacobian)


def _turned(values: Float[Tensor, "*n head"]) -> Float[Tensor, "*n head"]:
    """Half of the rotation that marks positions; its transpose is its negative."""
    first, second = values.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _through_norm(
    rows: Float[Tensor, "n hidden"], x: Float[Tensor, "n hidden"], norm: Norm, jacobian: bool
) -> Float[Tensor, "n hidden"]:
    return (jacobian_direction if jacobian else frozen_direction)(rows, x, norm)


def watched_blocks(vlm: VLM) -> list[Watched]:
    """The blocks of a model that this file knows how to follow."""
    anatomy = vlm.anatomy
    if any(ffn.way is not None or ffn.n_experts is not None for ffn in anatomy.ffns) or not all(
        hasattr(block.module, name)
        for block in anatomy.blocks
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    ):
        raise SystemExit("Only Llama-like blocks are followed.")
    return [Watched(block.module, anatomy.hidden) for block in anatomy.blocks]


@contextmanager
def watch(blocks: Sequence[Watched]) -> Iterator[None]:
    """See what every block sees at the last position, while the `with` lasts."""
    hooks = []
    try:
        for block in blocks:
            block.clear()
            hooks += block.hooks()
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, eq=False)
class Traced:
    """One answer as it was generated once, and the nouns in it."""

    blocks: Sequence[Watched]
    moments: Moments
    token_ids: list[int]
    steps: Int[Tensor, "n"]
    n_prompt: int


def trace(blocks: Sequence[Watched], recording: Recording, said: Sequence[Said], n_prompt: int) -> Traced:
    """What was recorded, at the places of these nouns of one image."""
    steps = torch.tensor([noun.step for noun in said])
    moments = pick_moments(recording, torch.stack([torch.zeros_like(steps), steps], dim=1))
    return Traced(blocks, moments, [noun.token_id for noun in said], steps, n_prompt)


def final_direction(vlm: VLM, traced: Traced, score: Score) -> Float[Tensor, "n hidden"]:
    """At the input of the final norm, as `find` has it."""
    rows = unembed_rows(vlm.anatomy, traced.token_ids, traced.moments.residual)
    return read_out(vlm, traced.moments, traced.token_ids, rows, choices(score)).at(None)


def choices(score: Score) -> Choices:
    """What `find` is asked for."""
    return Choices(PROMPT, ANSWER_PREFIX, 1, score, None, None, None, False, False, MAX_NEW_TOKENS)


@torch.inference_mode()
def follow(traced: Traced, final: Float[Tensor, "n hidden"], parts: Parts) -> Float[Tensor, "n slots"]:
    """Scores of all neurons: the direction carried down from the top block."""
    found: list[Tensor] = []
    direction, anatomy = final, traced.moments.anatomy
    for i in reversed(range(len(traced.blocks))):
        block = traced.blocks[i]
        read = weights.project(direction, anatomy.ffns[i].module)
        found.append(traced.moments.activations[i] * read)
        if i and parts.ffn:
            direction = direction + block.through_ffn(read, traced.steps, parts.jacobian)
        if i and (parts.own or parts.query or parts.key):
            direction = direction + block.through_attention(direction, traced.steps, traced.n_prompt, parts)
    return torch.cat(found[::-1], dim=1)


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
        rows = unembed_rows(vlm.anatomy, traced.token_ids, traced.moments.residual)
        finals = {
            "logprob": final_direction(vlm, traced, "logprob"),
            "logit": jacobian_direction(rows, traced.moments.residual, vlm.anatomy.norm),
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
        print(f"{truth.n_nouns} nouns of {arguments.limit} images; means over images, 95 % bootstrap intervals\n")
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
