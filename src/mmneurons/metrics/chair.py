"""Metrics of hallucination, of naming objects that are not there: CHAIR of captions, POPE of yes-or-no questions."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from mmneurons.data.pictures import Picture
from mmneurons.errors import FormatError
from mmneurons.files import read_text
from mmneurons.maths.statistics import Estimate, estimate, share, share_of
from mmneurons.settings import Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Phrases, Place, singular

Synonyms = Mapping[str, Sequence[str]]
"""The other words for each object; words listed under the empty name stand for no object ("home plate" is no plate)."""


@dataclass(frozen=True)
class Chair:
    """A Chair compares the objects that captions name with those that are there; each counts once in a caption.

    Source: Rohrbach et al., EMNLP 2018.
    """

    chair_i: Estimate | None
    """CHAIR-i: the share of the objects named that are not there."""
    chair_s: Estimate | None
    """CHAIR-s: the share of the captions that name such an object."""
    recall: Estimate | None
    """The share of the objects there that are named."""
    named: Estimate | None
    """The number of objects that a caption names, mean over captions."""
    n_absent: int
    """How many objects named are not there, in all captions together."""
    n_found: int
    """How many objects named are there, in all captions together."""


@dataclass(frozen=True)
class Pope:
    """A Pope holds figures of answers to questions such as "Is there a dog in the image?", as `yes_or_no` reads them.

    Source: Li et al., EMNLP 2023. Their code takes every answer without "no" or "not" for a yes; here one that is
        neither is counted apart: wrong in the accuracy, missed in the recall, no yes in the precision.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    """The share of answers that are yes."""
    neither: float
    """The share of answers that are neither yes nor no."""
    n: int
    """The number of questions."""


class Vocabulary:
    """A Vocabulary holds the objects that count; other nouns of a caption are not judged.

    Args:
        lists: The objects that are there, image by image: every object that any of the lists names counts.
        synonyms: Other words for objects, such as `coco_synonyms()`; every object of the table counts.
    """

    def __init__(self, lists: Iterable[Iterable[str]], synonyms: Synonyms | None = None) -> None:
        table = synonyms or {}
        self._names = {singular(word): singular(name) for name, words in table.items() for word in (name, *words)}
        # A synonym in a list stays the synonym of its object; only words that the table does not have are new objects.
        for noun in (singular(noun) for nouns in lists for noun in nouns):
            self._names.setdefault(noun, noun)
        self.nouns = frozenset(self._names.values()) - {""}
        self.words = frozenset(word for word, name in self._names.items() if name)  # synonyms, too
        self._phrases = Phrases(self._names)

    def objects(self, nouns: Iterable[str]) -> frozenset[str]:
        """The objects of a list that count, by the names that `named` gives them."""
        return frozenset(self._names.get(singular(noun), "") for noun in nouns) - {""}

    def places(self, caption: str) -> list[Place]:
        """The place where a caption first names each object, in order; of "hot dog" and "dog" the longer counts."""
        first: dict[str, Place] = {}
        for place in self._phrases.places(caption):
            first.setdefault(place[2], place)
        # Phrases under the empty name are looked for, so that "home plate" is taken, and dropped here.
        return [place for noun, place in first.items() if noun]

    def named(self, caption: str) -> tuple[str, ...]:
        """The objects that a caption names, in the singular, each once, in order of appearance."""
        return tuple(noun for _, _, noun in self.places(caption))


@functools.cache
def coco_synonyms() -> Synonyms:
    """Return the words that captions use for the 80 objects of MSCOCO, so that CHAIR compares with published figures.

    Source: Rohrbach et al., EMNLP 2018. Left out are their misspellings, and their rule by which no seat is a chair in
        a caption that says "toilet" anywhere; "toilet seat" is a toilet in both.
    """
    table = resources.files("mmneurons.metrics").joinpath("data/coco.txt")
    return _synonyms(table.read_text(encoding="utf-8"), "coco")


def read_synonyms(path: str | os.PathLike[str]) -> Synonyms:
    """Read a table of synonyms: one object a line, its name and its other words, separated by commas; # is a comment.

    Raises:
        FormatError: the file cannot be read, names no object, or gives one word to two objects.
    """
    return _synonyms(read_text(path), os.fspath(path))


def _synonyms(text: str, source: str) -> Synonyms:
    """Parse a table of synonyms; `source` is what error messages call it."""
    table: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, *words = (word.strip() for word in line.split(","))
        table.setdefault(name, []).extend(filter(None, words))
        for word in filter(None, (name, *words)):
            if owner.setdefault(singular(word), name) != name:
                raise FormatError(
                    f"In {source}, '{word}' stands for two objects.",
                    seen=f"'{owner[singular(word)]}' and '{name}'",
                    fix="Leave it in one line.",
                )
    if not any(table):
        raise FormatError(f"{source} names no object.", fix="Write one a line, and what else it is called: dog, puppy")
    return table


def chair(captions: Sequence[str], objects: Sequence[Iterable[str]], vocabulary: Vocabulary) -> Chair:
    """Compute CHAIR of captions, with intervals over images.

    Args:
        captions: What the model said of each image.
        objects: The objects that are truly there, image by image.
        vocabulary: The objects that count.
    """
    return chair_of([vocabulary.named(caption) for caption in captions], [vocabulary.objects(one) for one in objects])


def chair_of(named: Sequence[Sequence[str]], there: Sequence[frozenset[str]]) -> Chair:
    """Compute CHAIR from the objects that captions name, and from those there, as `Vocabulary.objects` gives them."""
    # An object counts once in a caption, however often it is named: `named` holds each once.
    # Counts for each image: shares are taken of all objects together, so that an image with many objects weighs more.
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


# Before the word may stand signs and a lead such as "A:" or "The answer to the question is". "Yes or no" and "no idea"
# only look like an answer; "there is no dog" and "there isn't" are a no.
_ANSWER = re.compile(
    r"""\W*
    (?: a: \W* | (?: (?:the|my|final|correct) \W+ )* answer
        (?: \W+ to \W+ (?:the|this|your) \W+ question )? (?: \W+ is )? \W+ )?
    (?: (?P<yes> yes ) \b (?! \s* (?: / | \b or \b | \b and \b ) \s* no \b )
      | no \b (?! \s* (?: / | \b or \b | \b and \b ) \s* yes \b | \s+ (?:idea|clue|way) \b )
      | there \s+ (?:is|are) (?: \s+ not? | n['\u2019]t ) \b )""",
    re.IGNORECASE | re.VERBOSE,
)


def yes_or_no(answer: str) -> bool | None:
    """Read an answer as yes (True) or no (False); None if it is neither.

    An answer is one of them if it begins with that word, whatever the case and the signs around it, alone or after
    "answer", "the answer is" and the like; "there is no ..." and "there are not ..." are no. All else is neither: "yes
    or no", "no idea", "I see a dog".
    """
    found = _ANSWER.match(answer)
    return None if found is None else found["yes"] is not None


def pope(
    vlm: VLM, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[bool], *, batch_size: int = 8
) -> Pope:
    """Ask the model yes-or-no questions, one about each image, and compute POPE of its answers.

    Args:
        vlm: The model.
        images: The images, one for each question.
        questions: The questions, such as "Is there a dog in the image?".
        answers: The true answer to each question.
        batch_size: How many images are in one batch, whose questions are the same.
    """
    # A batch has one prompt for all its images: equal questions are asked together, answers go back to their places.
    said: list[bool | None] = [None] * len(questions)
    for question in dict.fromkeys(questions):
        mine = [i for i, one in enumerate(questions) if one == question]
        texts = texts_of(vlm, [images[i] for i in mine], Question(question, "", batch_size=batch_size))
        for i, text in zip(mine, texts, strict=True):
            said[i] = yes_or_no(text)
    # Of no question at all every figure is 0, not a division by zero.
    n, n_yes = max(1, len(said)), said.count(True)
    hits = sum(a is True and bool(b) for a, b in zip(said, answers, strict=True))
    precision, recall = hits / max(1, n_yes), hits / max(1, sum(answers))
    return Pope(
        accuracy=sum(a == b for a, b in zip(said, answers, strict=True)) / n,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / max(1e-9, precision + recall),
        yes=n_yes / n,
        neither=said.count(None) / n,
        n=len(said),
    )
