"""Text and image models tell how like captions are, and how near neurons' words are to noun, caption and image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmneurons.data.dataset import Item
    from mmneurons.inspection.causal import NounCausal
    from mmneurons.inspection.faithfulness import NounTruth
    from mmneurons.metrics.similarity import Meaning

BERT, BERT_NOUN, BERT_CAPTION, CLIP = (
    "BERTScore to the caption before",
    "BERTScore F1 to the noun",
    "BERTScore F1 to the caption",
    "CLIPScore to the image",
)
"""Measures that take a second model: they are in tables, not in the rows of an experiment."""


def caption_rows(found: Mapping[str, Sequence[NounCausal]], meaning: Meaning) -> Iterator[dict[str, Any]]:
    """Yield a row for each outcome: how like the caption before its captions are; None without a text model."""
    outcomes = [(image, one, outcome) for image, ones in found.items() for one in ones for outcome in one.outcomes]
    # Each pair of captions is compared once, however often it came.
    pairs = sorted({(one.caption, after) for _, one, outcome in outcomes for after in outcome.captions})
    scores: dict[tuple[str, str], float] = {}
    if meaning.bert is not None:
        alike = meaning.bert([after for _, after in pairs], [before for before, _ in pairs])
        scores = dict(zip(pairs, alike, strict=True))
    for image, one, outcome in outcomes:
        mine = [scores[one.caption, after] for after in outcome.captions] if scores else []
        yield {
            "image": image,
            "disturbance": outcome.how,
            "k": outcome.k,
            "neurons": outcome.neurons,
            "measure": BERT,
            "value": float(np.mean(mine)) if mine else None,
        }


def bert_rows(found: Mapping[str, Sequence[NounTruth]], meaning: Meaning) -> Iterator[dict[str, Any]]:
    """Yield two rows for each noun and finder, to the noun and to the caption; none without a text model."""
    nouns = [(image, one) for image, ones in found.items() for one in ones]
    if meaning.bert is None:
        return
    for finder in dict.fromkeys(finder for _, one in nouns for finder in one.says):
        for measure, field in ((BERT_NOUN, "word"), (BERT_CAPTION, "caption")):
            # The same tokens come again and again: each pair of texts is compared once.
            pairs = sorted({(_text(words), getattr(one, field)) for _, one in nouns for words in one.says[finder]})
            alike = meaning.bert([said for said, _ in pairs], [reference for _, reference in pairs])
            scores = dict(zip(pairs, alike, strict=True))
            for image, one in nouns:
                mine = [scores[_text(words), getattr(one, field)] for words in one.says[finder]]
                yield {"image": image, "finder": finder, "measure": measure, "value": float(np.mean(mine))}


def clip_rows(
    found: Mapping[str, Sequence[NounTruth]], meaning: Meaning, items: Sequence[Item]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each image and finder, of what the neurons of all its nouns say; none without a CLIP."""
    if meaning.clip is None:
        return
    # Image by image, so that one of them is open at a time.
    for item in items:
        ones = found.get(item.name, ())
        for finder in dict.fromkeys(finder for one in ones for finder in one.says):
            texts = [_text(words) for one in ones for words in one.says[finder]]
            alike = meaning.clip([item.image()] * len(texts), texts)
            yield {"image": item.name, "finder": finder, "measure": CLIP, "value": float(np.mean(alike))}


def _text(words: Sequence[str]) -> str:
    """Join tokens to a text, without the spaces that they begin with."""
    return " ".join(word.strip() for word in words)
