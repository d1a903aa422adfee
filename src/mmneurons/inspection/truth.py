"""Is the ranking true? What silence does to the word, against what each finder says (METRICS, Finders)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.finding.finders import FINDERS, Finder, Judged, judge
from mmneurons.inspection.matching import column_norms, loudness, matched
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import spearman
from mmneurons.vlm.prompts import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.replay import Effects
from mmneurons.vlm.vlm import VLM, Picture

DELETED = (1, 2, 5, 10, 20, 50, 100)
"""How many top neurons are silenced together."""
DRAWS = 20
"""Matched random sets of each size."""
SMALL = 20_000
"""Up to this many neurons, every one of them is silenced; of more, a pool."""
POOL, POOL_TOP = 1000, 100
"""Of a pool: how many neurons are drawn evenly over blocks, and each finder's top ones beside them."""
SCOPES = ("all blocks", "last third")


@dataclass(frozen=True)
class Agreement:
    """Spearman of one finder's scores with the true effects; None where either tells none apart."""

    finder: Finder
    scope: str
    """One of `SCOPES`; "finders' top 100" for that part of a pool."""
    effect: str
    """On "logit" or "logprob"."""
    rho: float | None


@dataclass(frozen=True)
class Deletion:
    """How far log p falls when the top k of one finder are silent together, next to sets of random neurons."""

    finder: str
    """A finder; "true effect" for the neurons whose own silence does most."""
    k: int
    fall: float
    matched: float
    """Mean over the matched random sets."""
    unmatched: float
    """Of random neurons of any block and loudness."""


@dataclass(frozen=True)
class NounTruth:
    """One noun of one image."""

    word: str
    caption: str
    probability: float
    agreements: tuple[Agreement, ...]
    deletions: tuple[Deletion, ...]
    n_silenced: int
    """Neurons that were silenced one by one."""


def finder_truth(
    vlm: VLM,
    image: Picture,
    finders: Sequence[Finder] = FINDERS,
    *,
    words: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
    prompt: str = PROMPT,
    answer_prefix: str = ANSWER_PREFIX,
) -> list[NounTruth]:
    """Silence neurons one by one and top ones together, for each noun of the answer, and compare with each finder.

    Args:
        vlm: The model, from `load`.
        image: A path, PIL image or array.
        finders: Which to compare.
        words: Words of the answer instead of its nouns.
        seed: Of random neurons.
        batch_size: Silences computed at once.
        progress: Called with neurons silenced and neurons to silence.
        prompt: What the model is asked.
        answer_prefix: Words that the answer is made to begin with.

    Source: deletion as in Pan et al. (2024), section 4.4, at the scored position only; matched controls are ours.
    """
    norms = column_norms(vlm.anatomy)
    return [
        _truth(one, norms, seed + i, batch_size, progress)
        for i, one in enumerate(
            judge(vlm, image, finders, words=words, seed=seed, prompt=prompt, answer_prefix=answer_prefix)
        )
    ]


def _truth(
    judged: Judged,
    norms: list[Tensor],
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> NounTruth:
    replay = judged.replay
    even, tops = _pool(judged, seed)
    single = torch.cat([even, tops])

    def told(done: int) -> None:
        if progress is not None:
            progress(done, len(single))

    effects = replay.effects([slot[None] for slot in single], batch_size=batch_size, progress=told)
    return NounTruth(
        word=judged.word.text,
        caption=judged.caption,
        probability=float(replay.base.softmax(-1)[replay.token_id]),
        agreements=tuple(_agreements(judged, even, tops, effects)),
        deletions=tuple(_deletions(judged, norms, single, effects, seed, batch_size)),
        n_silenced=len(single),
    )


def _pool(judged: Judged, seed: int) -> tuple[Int[Tensor, "even"], Int[Tensor, "tops"]]:
    """Which neurons to silence one by one: all; or as many of each block, and the finders' top ones beside them."""
    replay = judged.replay
    if replay.n_slots <= SMALL:
        return torch.arange(replay.n_slots), torch.tensor([], dtype=torch.long)
    random = torch.Generator().manual_seed(seed)
    each = POOL // len(replay.activations)
    even = torch.cat(
        [
            start + torch.randperm(len(fired), generator=random)[:each]
            for start, fired in zip(replay.slot_starts, replay.activations, strict=True)
        ]
    )
    tops = torch.cat([top_k(scores, POOL_TOP) for scores in judged.scores.values()]).unique()
    return even.sort().values, tops[~torch.isin(tops, even)]


def _agreements(
    judged: Judged, even: Int[Tensor, "even"], tops: Int[Tensor, "tops"], effects: Effects
) -> list[Agreement]:
    replay = judged.replay
    layers = torch.tensor([ffn.layer for ffn in replay.anatomy.ffns])
    layer_of = layers[torch.bucketize(even, replay.slot_starts, right=True) - 1]
    n_blocks = len(replay.anatomy.blocks)
    n = len(even)
    parts = [
        ("all blocks", even, torch.arange(n)),
        ("last third", even, torch.nonzero(layer_of >= n_blocks - max(1, round(n_blocks / 3))).squeeze(1)),
    ]
    if len(tops):
        parts.append((f"finders' top {POOL_TOP}", torch.cat([even, tops]), torch.arange(n, n + len(tops))))
    return [
        Agreement(finder, scope, name, spearman(scores[slots[rows]].double().numpy(), values[rows].double().numpy()))
        for finder, scores in judged.scores.items()
        for scope, slots, rows in parts
        for name, values in (("logit", effects.logit), ("logprob", effects.logprob))
    ]


def _deletions(
    judged: Judged,
    norms: list[Tensor],
    single: Int[Tensor, "n"],
    effects: Effects,
    seed: int,
    batch_size: int,
) -> list[Deletion]:
    replay = judged.replay
    loud = loudness(replay, norms)
    random = torch.Generator().manual_seed(seed)
    orders = {finder: top_k(scores, max(DELETED)) for finder, scores in judged.scores.items()}
    orders["true effect"] = single[top_k(effects.logprob, max(DELETED))]
    sizes = [k for k in DELETED if k <= replay.n_slots // 2]
    sets: list[Tensor] = []
    for order in orders.values():
        for k in sizes:
            sets += [order[:k], *matched(replay, loud, order[:k], DRAWS, seed)]
    unmatched = [torch.randperm(replay.n_slots, generator=random)[:k] for k in sizes for _ in range(DRAWS)]
    falls = replay.effects([*sets, *unmatched], batch_size=batch_size).logprob.numpy()
    plain = _means(falls[len(sets) :], len(sizes))
    found = falls[: len(sets)].reshape(len(orders), len(sizes), 1 + DRAWS)
    return [
        Deletion(name, k, float(found[i, j, 0]), float(found[i, j, 1:].mean()), float(plain[j]))
        for i, name in enumerate(orders)
        for j, k in enumerate(sizes)
    ]


def _means(values: Float[np.ndarray, "n"], groups: int) -> Float[np.ndarray, "groups"]:
    return values.reshape(groups, -1).mean(1)
