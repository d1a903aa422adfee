"""Training answers and loss teach a model to name only what is there, or to say a word that names nothing.

The model reads its own answers again. Where they name an object, it may name any object that is there and was not
named yet, or say the word that names nothing, at a price; everything else is to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmneurons.data.pictures import Picture
from mmneurons.editing.answers import Answered, answers
from mmneurons.editing.losses import abstention, divergence, log_p
from mmneurons.metrics.chair import Vocabulary
from mmneurons.settings import Question
from mmneurons.vlm.teacher_forcing import Batch, Given, Reader
from mmneurons.vlm.tokens import tokens_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word, inflected, words_at

FOLLOW, KEEP = 0.3, 1.0
"""Weights of how a changed answer goes on and of divergence elsewhere, beside 1 for the objects."""


@dataclass(frozen=True)
class Named:
    """A Named is an object that an answer names, at the place where the answer names it first."""

    answer: int
    noun: str
    """Singular."""
    word: Word
    absent: bool


def objects_named(vlm: VLM, said: Answered, objects: Sequence[Collection[str]], vocabulary: Vocabulary) -> list[Named]:
    """Find the objects that each answer names, each object once, in order."""

    def decode(ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(ids, skip_special_tokens=True)

    found = []
    for answer, (text, ids, there) in enumerate(zip(said.texts, said.token_ids, objects, strict=True)):
        # Synonyms are one object: what counts is the noun that they stand for.
        true = vocabulary.objects(there)
        for word in words_at(vocabulary.places(text), text, ids, decode):
            found.append(Named(answer, word.lemma, word, word.lemma not in true))
    return found


def lessons(
    vlm: VLM,
    said: Answered,
    objects: Sequence[Collection[str]],
    named: Sequence[Named],
    say: int,
    seed: int = 0,
) -> list[tuple[int, Given]]:
    """Make a lesson of each answer, and a repaired one where it names an absent object, with the number of its image.

    Tokens of a step at which an object is named: `say`, then the first of every object that may be named there. Of
    a step behind a repair: -1, then the token that follows.
    """
    # Answers that name nothing teach nothing here: the reference keeps them as they are.
    random, of, made = np.random.default_rng(seed), dict[int, list[Named]](), []
    for one in named:
        of.setdefault(one.answer, []).append(one)
    for answer, mine in sorted(of.items()):
        ids, there = said.token_ids[answer], sorted(Vocabulary([objects[answer]]).nouns)
        made.append((answer, _lesson(vlm, ids, mine, there, say, None)))
        if any(one.absent for one in mine):
            made.append((answer, _lesson(vlm, ids, mine, there, say, random)))
    return made


def _lesson(
    vlm: VLM,
    ids: Sequence[int],
    named: Sequence[Named],
    there: Sequence[str],
    say: int,
    repair: np.random.Generator | None,
) -> Given:
    """Make one answer's lesson; with `repair`, half of its absent objects become a present one, the others the word."""
    # Built token by token: `left` are the objects that no word before has named, `read` the tokens that are copied.
    new, turn, kept, left, read = list[int](), dict[int, tuple[int, ...]](), dict[int, int](), [*there], 0
    changed = False

    def go_on(tokens: Sequence[int]) -> None:
        # Up to the first repair the answer is the model's own; behind it there is nothing to keep, but to follow.
        for token in tokens:
            if changed:
                turn[len(new)] = (-1, token)
            else:
                kept[len(new)] = -1
            new.append(token)

    for one in named:
        steps = one.word.steps
        go_on(ids[read : steps[0]])
        read = steps[-1] + 1
        # What may be said here: any object that is there and was not named yet, in this word's form, or the word.
        said = list(ids[steps[0] : read])
        ways = {noun: tokens_of(vlm.tokenizer, inflected(noun, one.word.text), like=said[0]) for noun in left}
        if one.noun in ways:
            ways[one.noun] = said
        turn[len(new)] = (say, *(tokens[0] for tokens in ways.values()))
        # A repair takes the place of what is absent, and counts as named.
        if one.absent and repair is not None:
            noun = str(repair.choice([*ways])) if ways and repair.random() < 0.5 else None
            said, changed = [say] if noun is None else ways[noun], True
        else:
            noun = one.noun
        left = [other for other in left if other != noun]
        new.append(said[0])
        go_on(said[1:])
    go_on(ids[read:])
    return Given(new, turn, kept)


def read_lessons(
    reader: Reader,
    images: Sequence[Picture],
    question: Question,
    taught: Sequence[tuple[int, Given]],
    progress: Callable[[int], None],
) -> list[Batch]:
    """Read lessons in batches, in a random order that is always the same."""
    # Answers of one image, as it was and repaired, are not to come in one batch.
    order = np.random.default_rng(0).permutation(len(taught)).tolist()
    made = []
    for start in range(0, len(order), reader.batch_size):
        mine = [taught[i] for i in order[start : start + reader.batch_size]]
        made += reader.read([images[i] for i, _ in mine], question, [given for _, given in mine])
        progress(min(len(order), start + reader.batch_size))
    return made


def shuffled(batches: Sequence[Batch], rows: int) -> list[list[Batch]]:
    """Group batches, in a random order that is always the same, so that each group holds `rows` answers or more."""
    groups, room = list[list[Batch]](), 0
    for i in np.random.default_rng(0).permutation(len(batches)).tolist():
        if room <= 0:
            groups.append([])
            room = rows
        groups[-1].append(batches[i])
        room -= batches[i].n_rows
    return groups


def read_questions(
    reader: Reader,
    images: Sequence[Picture],
    objects: Sequence[Collection[str]],
    nouns: Collection[str],
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[Batch]:
    """Ask the model whether objects are there, and read its answers as they are, all of them to stay.

    For each image it is asked about one object that is there and one that is not, drawn at random, always the same.
    """
    # One question of each kind, so that yes and no are kept alike.
    random, asked = np.random.default_rng(0), dict[str, list[Picture]]()
    for image, there in zip(images, objects, strict=True):
        true = Vocabulary([there]).nouns & set(nouns)
        for pool in (true, set(nouns) - true):
            if pool:
                asked.setdefault(str(random.choice(sorted(pool))), []).append(image)
    made, done, total = list[Batch](), 0, sum(map(len, asked.values()))
    # Images with the same question are read together.
    for noun, mine in sorted(asked.items()):
        prompt = f"Is there {'an' if noun[0] in 'aeiou' else 'a'} {noun} in the image?"
        question = Question(prompt, "", max_new_tokens, reader.batch_size)
        said = answers(reader.vlm, mine, question)
        made += reader.read(mine, question, [Given.as_said(ids) for ids in said.token_ids])
        done += len(mine)
        progress(done * len(images) // total)
    return made


def losses(reader: Reader, groups: Sequence[Sequence[Batch]], payoff: float) -> Iterator[Tensor]:
    """Compute what each batch of some groups adds to the loss.

    The loss of a group: that of `abstention`, mean over the objects; `FOLLOW` times -log p of what follows a repair;
    `KEEP` times the divergence from the unedited model, mean over the other steps.
    """
    for group in groups:
        # Means over the steps of each kind in the whole group, however it is cut into batches.
        kinds = [
            (batch.turn & (batch.tokens[:, 0] >= 0), batch.turn & (batch.tokens[:, 0] < 0), batch.stay)
            for batch in group
        ]
        n = [max(1, sum(int(kind[k].sum()) for kind in kinds)) for k in range(3)]
        for batch, (nouns, follows, kept) in zip(group, kinds, strict=True):
            logits = reader.logits(batch)
            tokens = batch.tokens.to(logits.device)
            loss = KEEP * divergence(logits[kept], reader.base(batch)[kept]) / n[2]
            if bool(nouns.any()):
                loss = loss + abstention(logits[nouns], tokens[nouns], payoff) / n[0]
            if bool(follows.any()):
                loss = loss - FOLLOW * log_p(logits[follows], tokens[follows, 1]).sum() / n[1]
            yield loss
