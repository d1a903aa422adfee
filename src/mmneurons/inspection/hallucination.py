"""Does the model say things that are not there? CHAIR of captions, POPE of questions (METRICS, Hallucination)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmneurons.maths.statistics import Estimate, estimate, share, share_of
from mmneurons.vlm.prompts import MAX_NEW_TOKENS
from mmneurons.vlm.vlm import VLM, Picture
from mmneurons.words import singular


@dataclass(frozen=True)
class Chair:
    """What captions name, against what is there; objects are counted once a caption.

    Source: Rohrbach et al., EMNLP 2018.
    """

    chair_i: Estimate | None
    """Share of the objects named that are not there."""
    chair_s: Estimate | None
    """Share of the captions that name such an object."""
    recall: Estimate | None
    """Share of the objects there that are named."""
    named: Estimate | None
    """Objects named in a caption."""
    n_absent: int
    """Objects named that are not there."""
    n_found: int
    """Objects named that are."""


@dataclass(frozen=True)
class Pope:
    """Answers to "Is there a dog in the image?".

    Source: Li et al., EMNLP 2023.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    """Share of answers that are yes; anything else counts as no."""
    n: int


class Vocabulary:
    """The objects that count: those that any image's list names; other nouns of a caption are not judged."""

    def __init__(self, lists: Iterable[Iterable[str]]) -> None:
        self.nouns = frozenset(singular(noun) for nouns in lists for noun in nouns)
        self._longest = max((len(noun.split()) for noun in self.nouns), default=0)

    def named(self, caption: str) -> tuple[str, ...]:
        """The objects that a caption names, singular, each once, in order; of "hot dog" and "dog" the longer."""
        words = re.findall(r"[\w'-]+", caption)
        found: dict[str, None] = {}
        i = 0
        while i < len(words):
            for n in range(min(self._longest, len(words) - i), 0, -1):
                noun = singular(" ".join(words[i : i + n]))
                if noun in self.nouns:
                    found[noun] = None
                    i += n - 1
                    break
            i += 1
        return tuple(found)


def chair(captions: Sequence[str], objects: Sequence[Iterable[str]], vocabulary: Vocabulary) -> Chair:
    """Judge captions; intervals over images.

    Args:
        captions: What was said.
        objects: What is there, image by image.
        vocabulary: The objects that count.
    """
    return chair_of([vocabulary.named(caption) for caption in captions], objects)


def chair_of(named: Sequence[Sequence[str]], objects: Sequence[Iterable[str]]) -> Chair:
    """The same of the objects that captions name."""
    there = [{singular(noun) for noun in nouns} for nouns in objects]
    absent = [sum(noun not in true for noun in mine) for mine, true in zip(named, there, strict=True)]
    found = [len(mine) - n for mine, n in zip(named, absent, strict=True)]
    n_named, n_there = ([float(len(nouns)) for nouns in lists] for lists in (named, there))
    return Chair(
        chair_i=share_of([float(n) for n in absent], n_named),
        chair_s=share([float(n > 0) for n in absent]),
        recall=share_of([float(n) for n in found], n_there),
        named=estimate(n_named),
        n_absent=sum(absent),
        n_found=sum(found),
    )


def pope(
    vlm: VLM, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[bool], *, batch_size: int = 8
) -> Pope:
    """Ask yes-or-no questions, one about each image.

    Args:
        vlm: The model.
        images: One for each question.
        questions: Such as "Is there a dog in the image?".
        answers: What is true.
        batch_size: Images in one batch of equal questions.
    """
    said = [False] * len(questions)
    for question in dict.fromkeys(questions):
        mine = [i for i, one in enumerate(questions) if one == question]
        texts = vlm.caption(
            [images[i] for i in mine], question, "", max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size
        )
        for i, text in zip(mine, texts, strict=True):
            said[i] = bool(re.match(r"\W*yes\b", text, flags=re.IGNORECASE))
    hits = sum(a and b for a, b in zip(said, answers, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(answers))
    return Pope(
        accuracy=sum(a == b for a, b in zip(said, answers, strict=True)) / max(1, len(said)),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / max(1e-9, precision + recall),
        yes=sum(said) / max(1, len(said)),
        n=len(said),
    )
