"""The specificity experiment asks whether different things have different neurons, and the same thing the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float

from mmneurons.data.dataset import Item
from mmneurons.errors import SettingError
from mmneurons.finding.batch import targets_of
from mmneurons.finding.scoring import Scored, recorder_for, score_targets
from mmneurons.inspection.rows import IMAGES, IN_BLOCK, OWN_SHARE, SHARED, SpecificityRow
from mmneurons.maths.statistics import Estimate, estimate, over_pairs
from mmneurons.settings import FindSettings, Question, Score, settled
from mmneurons.vlm.asking import ask
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM

SIZES = (10, 100)


@dataclass(frozen=True, eq=False)
class NounScores:
    """A noun of an image has the scores that every neuron of the model has for it."""

    image: str
    lemma: str
    scores: Float[np.ndarray, "neurons"]
    """float32, FFN after FFN, experts one after the other; 0 for neurons of experts that were not asked."""
    step: int
    """Its place in the answer: how many tokens stand before it."""


@dataclass(frozen=True)
class Overlap:
    """An overlap is the share of the top k that two nouns have in common, mean over pairs; intervals resample images.

    Those of `concepts` resample concepts.
    """

    k: int
    within: Estimate | None
    """Pairs of images that say the same noun; None if no noun was said twice."""
    between: Estimate | None
    """Pairs of images, and of different nouns that they say; None if there is no such pair."""
    alike: Estimate | None
    """Those of them whose nouns are said as often and stand at the same place of the answer; None if there are none."""
    concepts: Estimate | None
    """Pairs of nouns, the top k of each by its mean scores."""
    chance: float
    """k / neurons."""


@dataclass(frozen=True, eq=False)
class Specificity:
    """The specificity of a model's neurons is what all nouns of all images say together."""

    concepts: tuple[str, ...]
    """In order of name."""
    counts: tuple[int, ...]
    """How many images say each."""
    overlaps: tuple[Overlap, ...]
    matrix: Float[np.ndarray, "concepts concepts"]
    """Share of the top 10 that two concepts have in common, by their mean scores."""
    own_share: Estimate | None
    """Mean over a concept's top 10 of their mean score for it, over the sum of their positive mean scores for all."""
    own_shares: tuple[float | None, ...]
    """Per concept; None where a top neuron gives nothing to any concept."""
    layers: dict[int, Float[np.ndarray, "blocks"]]
    """For k = 10, 100: share of the top k of all nouns that lies in each block."""

    def rows(self) -> Iterator[SpecificityRow]:
        """Yield a row for each concept, each two of them, and each block; columns: docs/reference/format.md."""
        for measure, k, concept, other, block, value in self._measures():
            yield SpecificityRow(measure=measure, k=k, concept=concept, other=other, block=block, value=value)

    def _measures(self) -> Iterator[tuple[str, int | None, str | None, str | None, int | None, float | None]]:
        """Yield measure, k, concept, the other one, block and value of each row."""
        for concept, count, own_share in zip(self.concepts, self.counts, self.own_shares, strict=True):
            yield IMAGES, None, concept, None, None, float(count)
            yield OWN_SHARE, SIZES[0], concept, None, None, own_share
        for (i, concept), (j, other) in combinations(enumerate(self.concepts), 2):
            yield SHARED, SIZES[0], concept, other, None, float(self.matrix[i, j])
        for k, shares in self.layers.items():
            for block, share in enumerate(shares):
                yield IN_BLOCK, k, None, None, block, float(share)


@by_one_thread
def noun_scores(
    vlm: VLM,
    items: Sequence[Item],
    *,
    score: Score = "logit",
    question: Question = Question(),
) -> list[NounScores]:
    """Score every neuron for every noun that the model says of these images; one batch where it allows one."""
    if not items:
        return []
    if len({item.caption is None for item in items}) > 1:  # some answers are given, others not
        parts = [[item for item in items if (item.caption is None) == own] for own in (True, False)]
        return [one for part in parts for one in noun_scores(vlm, part, score=score, question=question)]
    # The model gives all answers of a batch, or reads them all.
    captions = None if items[0].caption is None else [str(item.caption) for item in items]
    choices = settled(FindSettings, None, asdict(question) | {"batch_size": len(items), "top": 1, "score": score})
    recorder = recorder_for(vlm, choices)
    found = []
    for batch in ask(vlm, [item.image() for item in items], choices.question, captions=captions, recorder=recorder):
        n_rows = len(batch.rows)
        targets = [t for row in range(n_rows) for t in targets_of(vlm, batch.answers, row, choices)]
        if targets:
            scored = score_targets(vlm, batch.recording, batch.answers, targets, choices, inputs=batch.inputs)
            names = [items[batch.first + t.row].name for t in targets]
            found += [
                NounScores(name, t.word.lemma, row, t.step)
                for name, t, row in zip(names, targets, _of_neurons(vlm, scored), strict=True)
            ]
    return found


def _of_neurons(vlm: VLM, scored: Scored) -> Float[np.ndarray, "targets neurons"]:
    """Spread the scores of slots over all neurons, float32."""
    parts = []
    start = 0
    for i, ffn in enumerate(vlm.anatomy.ffns):
        width = scored.trace.activations[i].shape[1]
        mine = scored.scores[:, start : start + width].cpu()
        start += width
        # Slots of a mixture are of the experts that were asked; the others get 0.
        if ffn.n_experts is None:
            parts.append(mine)
        else:
            parts.append(
                torch.zeros(len(mine), ffn.size, dtype=torch.float32).scatter_add(
                    1, scored.trace.neurons(i).cpu(), mine
                )
            )
    return torch.cat(parts, dim=1).float().numpy()


def specificity(
    found: Sequence[NounScores], layer_of: Sequence[int], *, at_least: int = 1, seed: int = 0
) -> Specificity:
    """Compare nouns and images.

    Args:
        found: From `noun_scores`, of all images.
        layer_of: The block of each neuron.
        at_least: Nouns said of fewer images are left out.
        seed: Of intervals.

    Raises:
        SettingError: no noun was said of `at_least` images.
    """
    # 1. Who said what.
    by_noun = _by_noun(found, at_least)
    concepts = tuple(by_noun)
    kept = [(lemma, one) for lemma, ones in by_noun.items() for one in ones]
    # 2. The top neurons of each noun of each image, and of each concept by its mean scores.
    means = np.stack([np.mean([one.scores for one in by_noun[lemma]], axis=0) for lemma in concepts])
    n_neurons = means.shape[1]
    sizes = [k for k in SIZES if k <= n_neurons]
    if not sizes:
        raise SettingError(f"The model has {n_neurons} neurons: too few for a top {SIZES[0]}.")
    tops = {k: [_top(one.scores, k) for _, one in kept] for k in sizes}
    said = [(lemma, one.image) for lemma, one in kept]
    classes = [(one.step, len(by_noun[lemma]).bit_length()) for lemma, one in kept]
    concept_tops = {k: [_top(row, k) for row in means] for k in sizes}
    # 3. How much of what they write is for their own concept, what they share, and in which blocks they lie.
    own = tuple(_own_share(means, c, top) for c, top in enumerate(concept_tops[sizes[0]]))
    layers = np.asarray(layer_of)
    return Specificity(
        concepts=concepts,
        counts=tuple(len(by_noun[lemma]) for lemma in concepts),
        overlaps=tuple(_overlap(k, said, classes, tops[k], concept_tops[k], n_neurons, seed) for k in sizes),
        matrix=_matrix(concept_tops[sizes[0]]),
        own_share=estimate([share for share in own if share is not None], seed),
        own_shares=own,
        layers={
            k: np.bincount(layers[np.concatenate(tops[k])], minlength=int(layers.max()) + 1) / (k * len(kept))
            for k in sizes
        },
    )


def _by_noun(found: Sequence[NounScores], at_least: int) -> dict[str, list[NounScores]]:
    """Group scores by noun, in order of name: each noun once an image, however often it was said of it."""
    once: dict[tuple[str, str], NounScores] = {}
    for one in found:
        once.setdefault((one.lemma, one.image), one)
    by_noun: dict[str, list[NounScores]] = defaultdict(list)
    for one in once.values():
        by_noun[one.lemma].append(one)
    often = {lemma: by_noun[lemma] for lemma in sorted(by_noun) if len(by_noun[lemma]) >= at_least}
    if not often:
        raise SettingError(
            f"No noun was said of {at_least} images.",
            seen=f"{len({one.image for one in found})} images, {len(by_noun)} nouns",
            fix="Give more images of the same things.",
        )
    return often


def _top(scores: Float[np.ndarray, "neurons"], k: int) -> np.ndarray:
    """Choose the k highest, ties in order of index."""
    return np.argsort(-scores, kind="stable")[:k]


def _share(a: np.ndarray, b: np.ndarray) -> float:
    """Take the share of the neurons of one top k that are in another."""
    return len(np.intersect1d(a, b, assume_unique=True)) / len(a)


def _own_share(means: Float[np.ndarray, "concepts neurons"], c: int, top: np.ndarray) -> float | None:
    """Take the share a concept has of what its top neurons write; None where one of them gives nothing to any."""
    total = means[:, top].clip(0).sum(0)  # what speaks against a concept takes nothing from the others
    return float((means[c, top] / total).mean()) if (total > 0).all() else None


def _matrix(tops: list[np.ndarray]) -> Float[np.ndarray, "concepts concepts"]:
    """Compare the top k of each two concepts."""
    return np.array([[_share(a, b) for b in tops] for a in tops])


def _overlap(
    k: int,
    said: list[tuple[str, str]],
    classes: list[tuple[int, int]],
    tops: list[np.ndarray],
    concept_tops: list[np.ndarray],
    n_neurons: int,
    seed: int,
) -> Overlap:
    """Compare every pair of two images, once for each pair of nouns they say.

    Args:
        k: How many top neurons.
        said: Noun and image of each of `tops`.
        classes: Of each of them the place in the answer and how often its noun is said, in powers of two.
        tops: The top neurons of each noun of each image.
        concept_tops: The top neurons of each noun.
        n_neurons: How many neurons the model has.
        seed: Of intervals.
    """
    # All pairs of nouns, of which those of the same noun are taken away: what is left are pairs of different ones.
    images = {image: i for i, image in enumerate(dict.fromkeys(image for _, image in said))}
    nouns = [lemma for lemma, _ in said]

    def pairs_of_one(kinds: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
        """Add up what pairs of one kind share, for each two images, and count them."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, kind in enumerate(kinds):
            groups[kind].append(i)
        total, number = np.zeros((len(images),) * 2), np.zeros((len(images),) * 2)
        for group in groups.values():
            found = _between(group, said, tops, images)
            total, number = total + found[0], number + found[1]
        return total, number

    shared, counts = _between(range(len(said)), said, tops, images)
    same, same_counts = pairs_of_one(nouns)
    # The same of those alone that share place and frequency: what these bring about, nouns of one class have in common.
    of_class, class_counts = pairs_of_one(classes)
    same_of_class, same_class_counts = pairs_of_one(list(zip(classes, nouns, strict=True)))
    # Concepts are units themselves: each pair of them is there once.
    matrix = _matrix(concept_tops)
    return Overlap(
        k,
        within=over_pairs(same / k, same_counts, seed),
        between=over_pairs((shared - same) / k, counts - same_counts, seed),
        alike=over_pairs((of_class - same_of_class) / k, class_counts - same_class_counts, seed),
        concepts=over_pairs(matrix, np.ones_like(matrix), seed),
        chance=k / n_neurons,
    )


def _between(
    chosen: Sequence[int], said: list[tuple[str, str]], tops: list[np.ndarray], images: dict[str, int]
) -> tuple[Float[np.ndarray, "images images"], Float[np.ndarray, "images images"]]:
    """Count, for each two images, the neurons that pairs of the chosen nouns share, and how many pairs there are."""
    from scipy.sparse import csr_array

    # How often each image holds each neuron; the product counts, for two images, every pair of nouns at once.
    rows = np.repeat([images[said[i][1]] for i in chosen], [len(tops[i]) for i in chosen])
    neurons = np.concatenate([tops[i] for i in chosen])
    held = csr_array((np.ones(len(rows), dtype=np.float32), (rows, neurons)), shape=(len(images), neurons.max() + 1))
    n_nouns = np.bincount([images[said[i][1]] for i in chosen], minlength=len(images)).astype(np.float32)
    return (held @ held.T).toarray(), np.outer(n_nouns, n_nouns)
