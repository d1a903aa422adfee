"""Findings as a flat table: one row for each neuron of each noun.

The columns are those of docs/reference/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from mmneurons.finding.result import Finding


class Row(TypedDict):
    """One neuron of one noun of one finding."""

    images: tuple[str, ...]
    prompt: str
    answer_prefix: str
    caption: str
    score_name: str
    against: str | None
    says: str
    baseline: str
    noun: int
    """Place of the noun among those of its finding, from 0: a word can be said twice."""
    word: str
    lemma: str
    start: int
    token: str
    token_id: int
    step: int
    n_tokens: int
    probability: float
    logit: float
    rank: int
    """Place of the neuron among those of its noun; 0 is the highest score."""
    neuron: str
    layer: int
    expert: int | None
    index: int
    score: float
    activation: float
    baseline_activation: float | None
    tokens: tuple[str, ...]
    suppressed: tuple[str, ...]
    lost_without_image: float | None
    internal_confidence: float | None
    grounded: float | None
    """Calibrated: the probability that the noun's object is in the picture."""


def rows_of(finding: Finding) -> Iterator[Row]:
    """Noun by noun, highest score first."""
    for place, noun in enumerate(finding.nouns):
        for rank, found in enumerate(noun.neurons):
            yield Row(
                images=finding.images,
                prompt=finding.prompt,
                answer_prefix=finding.answer_prefix,
                caption=finding.caption,
                score_name=finding.score,
                against=finding.against,
                says=finding.says,
                baseline=finding.baseline,
                noun=place,
                word=noun.word,
                lemma=noun.lemma,
                start=noun.start,
                token=noun.token,
                token_id=noun.token_id,
                step=noun.step,
                n_tokens=noun.n_tokens,
                probability=noun.probability,
                logit=noun.logit,
                rank=rank,
                neuron=str(found.neuron),
                layer=found.neuron.layer,
                expert=found.neuron.expert,
                index=found.neuron.index,
                score=found.score,
                activation=found.activation,
                baseline_activation=found.baseline,
                tokens=found.tokens,
                suppressed=found.suppressed,
                lost_without_image=found.lost_without_image,
                internal_confidence=None if noun.grounded is None else noun.grounded.confidence,
                grounded=None if noun.grounded is None else noun.grounded.probability,
            )
