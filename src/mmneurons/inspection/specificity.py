"""Do different things have different neurons, and the same thing the same? (METRICS, Specificity and cross-image.)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float

from mmneurons.errors import SettingError
from mmneurons.finding.finder import targets_of
from mmneurons.finding.result import Score
from mmneurons.finding.scoring import Choices, score_targets
from mmneurons.inspection.items import Item
from mmneurons.maths.statistics import Estimate, estimate
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.recording import record
from mmneurons.vlm.vlm import VLM

SIZES = (10, 100)
PAIRS = 20_000
"""At most so many pairs of images are compared; of more, a random choice."""


@dataclass(frozen=True, eq=False)
class NounScores:
    """One noun of one image: what every neuron of the model gives to it."""

    image: str
    lemma: str
    scores: Float[np.ndarray, "neurons"]
    """float32, FFN after FFN, experts one after the other; 0 for neurons of experts that were not asked."""


@dataclass(frozen=True)
class Overlap:
    """Share of the top k that two nouns have in common, mean over pairs; with an interval over nouns or images."""

    k: int
    within: Estimate | None
    """Pairs of images that say the same noun; None if no noun was said twice."""
    between: Estimate | None
    """Pairs of images that say different nouns; None if there is but one noun."""
    concepts: Estimate | None
    """Pairs of nouns, the top k of each by its mean scores."""
    chance: float
    """k / neurons."""


@dataclass(frozen=True, eq=False)
class Specificity:
    """What all nouns of all images say together."""

    concepts: tuple[str, ...]
    """In order of name."""
    counts: tuple[int, ...]
    """How many images say each."""
    overlaps: tuple[Overlap, ...]
    matrix: Float[np.ndarray, "concepts concepts"]
    """Share of the top 10 that two concepts have in common, by their mean scores."""
    own_share: Estimate | None
    """Mean over a concept's top 10 of their mean score for it, over the sum of their positive mean scores for all."""
    own_shares: tuple[float, ...]
    """Per concept."""
    layers: dict[int, Float[np.ndarray, "blocks"]]
    """For k = 10, 100: share of the top k of all nouns that lies in each block."""


def noun_scores(
    vlm: VLM,
    items: Sequence[Item],
    *,
    score: Score = "logit",
    prompt: str = PROMPT,
    answer_prefix: str = ANSWER_PREFIX,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[NounScores]:
    """What every neuron gives to every noun that the model says of these images, run as one batch."""
    if not items:
        return []
    choices = Choices(prompt, answer_prefix, 1, score, None, None, None, False, False, max_new_tokens)
    inputs = vlm.encode([[item.image()] for item in items], prompt, answer_prefix)
    with record(vlm.anatomy, gates=score == "paper") as recording:
        answers = vlm.generate(inputs, max_new_tokens)
    targets = [t for row in range(len(items)) for t in targets_of(vlm, answers, row, choices)]
    if not targets:
        return []
    scored = score_targets(vlm, recording, answers, targets, choices)
    parts = []
    start = 0
    for i, ffn in enumerate(vlm.anatomy.ffns):
        width = scored.moments.activations[i].shape[1]
        mine = scored.scores[:, start : start + width].cpu()
        start += width
        if ffn.n_experts is None:
            parts.append(mine)
        else:
            parts.append(torch.zeros(len(targets), ffn.size).scatter_add(1, scored.moments.neurons(i).cpu(), mine))
    whole = torch.cat(parts, dim=1).float().numpy()
    return [NounScores(items[t.row].name, t.word.lemma, row) for t, row in zip(targets, whole, strict=True)]


def specificity(
    found: Sequence[NounScores], layer_of: Sequence[int], *, at_least: int = 1, seed: int = 0
) -> Specificity:
    """Compare nouns and images.

    Args:
        found: From `noun_scores`, of all images.
        layer_of: The block of each neuron.
        at_least: Nouns said of fewer images are left out.
        seed: Of the pairs that are compared where there are too many, and of intervals.

    Raises:
        SettingError: no noun was said of `at_least` images.
    """
    by_noun: dict[str, list[NounScores]] = {}
    for one in found:
        if all(
            one.image != other.image for other in by_noun.setdefault(one.lemma, [])
        ):  # said twice of one image: once
            by_noun[one.lemma].append(one)
    concepts = tuple(sorted(lemma for lemma, ones in by_noun.items() if len(ones) >= at_least))
    if not concepts:
        raise SettingError(
            f"No noun was said of {at_least} images.",
            seen=f"{len({one.image for one in found})} images, {len(by_noun)} nouns",
            fix="Give more images of the same things.",
        )
    kept = [(lemma, one) for lemma in concepts for one in by_noun[lemma]]
    means = np.stack([np.mean([one.scores for one in by_noun[lemma]], axis=0) for lemma in concepts])
    n_neurons = means.shape[1]
    sizes = [k for k in SIZES if k <= n_neurons]
    if not sizes:
        raise SettingError(f"The model has {n_neurons} neurons: too few for a top {SIZES[0]}.")
    tops = {k: [_top(one.scores, k) for _, one in kept] for k in sizes}
    names = [lemma for lemma, _ in kept]
    concept_tops = {k: [_top(row, k) for row in means] for k in sizes}
    own = [_own_share(means, c, concept_tops[sizes[0]][c]) for c in range(len(concepts))]
    shares = [share for share in own if share is not None]
    layers = np.asarray(layer_of)
    return Specificity(
        concepts=concepts,
        counts=tuple(len(by_noun[lemma]) for lemma in concepts),
        overlaps=tuple(_overlap(k, names, tops[k], concept_tops[k], n_neurons, seed) for k in sizes),
        matrix=_matrix(concept_tops[sizes[0]]),
        own_share=estimate(shares, seed),
        own_shares=tuple(shares),
        layers={
            k: np.bincount(layers[np.concatenate(tops[k])], minlength=int(layers.max()) + 1) / (k * len(kept))
            for k in sizes
        },
    )


def _top(scores: Float[np.ndarray, "neurons"], k: int) -> np.ndarray:
    """The k highest, ties in order of index."""
    return np.argsort(-scores, kind="stable")[:k]


def _share(a: np.ndarray, b: np.ndarray) -> float:
    return len(np.intersect1d(a, b, assume_unique=True)) / len(a)


def _own_share(means: Float[np.ndarray, "concepts neurons"], c: int, top: np.ndarray) -> float | None:
    """None where a top neuron gives nothing to any concept."""
    total = means[:, top].clip(0).sum(0)
    return float((means[c, top] / total).mean()) if (total > 0).all() else None


def _matrix(tops: list[np.ndarray]) -> Float[np.ndarray, "concepts concepts"]:
    return np.array([[_share(a, b) for b in tops] for a in tops])


def _overlap(
    k: int, names: list[str], tops: list[np.ndarray], concept_tops: list[np.ndarray], n_neurons: int, seed: int
) -> Overlap:
    """Pairs share an image or a noun, so intervals are over nouns and images, not over pairs: of each its mean."""
    random = np.random.default_rng(seed)
    within: dict[str, list[float]] = {}
    for lemma in dict.fromkeys(names):
        mine = [top for name, top in zip(names, tops, strict=True) if name == lemma]
        within[lemma] = [_share(a, b) for a, b in combinations(mine, 2)]
    same = [float(np.mean(shares)) for shares in within.values() if shares]
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names)) if names[i] != names[j]]
    if len(pairs) > PAIRS:
        pairs = [pairs[p] for p in random.choice(len(pairs), PAIRS, replace=False)]
    by_image: dict[int, list[float]] = {}
    for i, j in pairs:
        share = _share(tops[i], tops[j])
        by_image.setdefault(i, []).append(share)
        by_image.setdefault(j, []).append(share)
    matrix = _matrix(concept_tops)
    n = len(matrix)
    others = [float((matrix[c].sum() - 1) / (n - 1)) for c in range(n)] if n > 1 else []
    return Overlap(
        k,
        estimate(same, seed),
        estimate([float(np.mean(shares)) for shares in by_image.values()], seed),
        estimate(others, seed),
        k / n_neurons,
    )
