"""A patch against naming absent objects is made in steps: images and their true objects -> lessons -> columns -> patch.

    patch = dehallucinate(vlm, images, objects, reference=make_reference(vlm, others))

Some columns of `w_out` learn, by gradients, to name what is there, or else a word that names nothing: the model
declines. It repairs what it can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from mmneurons.data.content import image_hash, key_of
from mmneurons.data.pictures import Picture, open_row
from mmneurons.data.store import lock_of, one_writer
from mmneurons.editing.abstention import (
    Named,
    lessons,
    losses,
    objects_named,
    read_lessons,
    read_questions,
    shuffled,
)
from mmneurons.editing.answers import Answered, answers
from mmneurons.editing.checkpoint import Training
from mmneurons.editing.fit import fit
from mmneurons.editing.low_rank import low_rank, slopes
from mmneurons.editing.reference import Reference
from mmneurons.errors import SettingError, WordError
from mmneurons.metrics.chair import Chair, Vocabulary, chair, chair_of
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import DehallucinateOptions, DehallucinateSettings, Question, settled
from mmneurons.vlm import provenance
from mmneurons.vlm.columns import Columns, lowest_block
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.teacher_forcing import Batch, Reader
from mmneurons.vlm.tokens import tokens_of
from mmneurons.vlm.vlm import VLM

RATE = 0.15
"""Of Adam; shares and directions are of the order of 1. Reached after `WARM` steps, from where it falls to nothing."""
WARM = 20
ROWS, REFERENCES = 50, 25
"""Answers about the images, and as many of the reference as of the questions, read at each step."""
PASSES = 30
"""Over few images, at most."""
ROUNDS = 12
"""What is learned is kept on disk after each."""
SAMPLE = 1000
"""Answers by which columns are chosen."""


@by_one_thread
def dehallucinate(
    vlm: VLM,
    images: Sequence[Picture],
    objects: Sequence[Collection[str]],
    *,
    vocabulary: Vocabulary | None = None,
    reference: Reference | None = None,
    settings: DehallucinateSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = untold,
    **options: Unpack[DehallucinateOptions],
) -> Patch:
    """Make the model name what is there, and say `settings.say` rather than what is not.

    Args:
        vlm: The model, from `load`.
        images: Thousands, of which the model names some objects that are there and some that are not.
        objects: What is there, image by image.
        vocabulary: The nouns that count; None: those of any of these lists.
        reference: Answers and texts that are to stay as they are, from `make_reference`.
        settings: How; None: the defaults.
        checkpoint: A file that the run goes on from if it is stopped; to be deleted once the patch is saved. One run
            writes it at a time.
        progress: Told what is being done.
        **options: Fields of `DehallucinateSettings`, over those of `settings`.

    Returns:
        The patch. What it does is to be seen on other images: `chair_change`.

    Raises:
        SettingError: settings out of range, lists that do not fit the images, no noun that is absent or present; a
            checkpoint of another run, or one that another run writes.
        FormatError: the checkpoint is damaged.
        WordError: the word has more than one token, or none of its own to begin with.
        ModelError: columns of an expert, or that cannot be written.

    Source: ours. The loss is that of Deep Gamblers (see `losses.abstention`); CHAIR is Rohrbach et al.'s (EMNLP 2018).
    """
    settings = settled(DehallucinateSettings, settings, options)
    settings = replace(settings, answer_prefix=settings.question.prefix)
    if len(images) != len(objects):
        raise SettingError("Each image needs its list of objects.", seen=f"{len(images)} images, {len(objects)} lists.")
    lowest = lowest_block(vlm.anatomy, settings.blocks)
    if settings.rank > (hidden := vlm.anatomy.hidden):
        raise SettingError(
            f"Columns of {hidden} numbers move along {hidden} directions at most.",
            seen=f"rank={settings.rank}",
            fix="rank=32    CLI: --rank 32",
        )
    # 1. The model's own answers, and which of the objects that they name are not there.
    vocabulary, say = vocabulary or Vocabulary(objects), _token(vlm, settings.say)
    there = [sorted(vocabulary.objects(one)) for one in objects]
    said = answers(vlm, images, settings.question, progress=lambda done: progress("answering", done, len(images)))
    named = _named(vlm, said, there, vocabulary)
    # 2. The answers as lessons, and a checkpoint that belongs to exactly these.
    taught = lessons(vlm, said, there, named, say)
    path = None if checkpoint is None else Path(checkpoint)
    key = "" if path is None else _key(vlm, settings, images, there, vocabulary, said, reference)
    alone = nullcontext() if path is None else one_writer(path, lock_of(path))
    with alone, torch.inference_mode(False), frozen(vlm.model), evaluating(vlm.model):
        # 3. All that is to be learned and to stay is read once, up to the lowest block that moves.
        training = None if path is None else Training.resumed(path, key, vlm)
        reader = Reader(vlm, lowest, True, settings.batch_size)
        own = read_lessons(
            reader, images, settings.question, taught, lambda done: progress("reading", done, len(taught))
        )
        others = _read_others(reader, images, there, vocabulary, reference, settings, progress)
        # 4. The columns that matter most begin to move, or go on where an earlier run was stopped.
        if training is None:
            columns = _steepest(reader, own, lowest, settings)
            training = Training.begun(low_rank(vlm, columns, settings.rank))
        keep = None if path is None else partial(training.keep, path, key)
        _train(training, reader, own, others, settings, keep, progress)
        patch = patch_of(vlm, training.change)
    return replace(
        patch,
        provenance={
            "source": None,
            "target": settings.say,
            "settings": asdict(settings),
            "images": len(images),
            "named": len(named),
            "absent": sum(one.absent for one in named),
            "reference": None if reference is None else reference.facts,
            "model": dict(vlm.facts),
            "packages": provenance.versions(),
        },
    )


def _named(vlm: VLM, said: Answered, there: Sequence[Sequence[str]], vocabulary: Vocabulary) -> list[Named]:
    """Find the objects that the answers name.

    Raises:
        SettingError: all of them are there, or none is.
    """
    named = objects_named(vlm, said, there, vocabulary)
    n_absent = sum(one.absent for one in named)
    if n_absent in (0, len(named)):
        raise SettingError(
            f"The objects that the model names are all {'absent' if n_absent else 'present'}, or it names none.",
            seen=f"{len(named)} nouns named, {n_absent} of them absent.",
            fix="Give more images, with what is truly in them.",
        )
    return named


def _read_others(
    reader: Reader,
    images: Sequence[Picture],
    there: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    reference: Reference | None,
    settings: DehallucinateSettings,
    progress: Progress,
) -> list[list[list[Batch]]]:
    """Read what is to stay: of the reference, and of yes-or-no questions, the batches of each step."""
    few = replace(reader, batch_size=min(reader.batch_size, REFERENCES))
    asked = np.random.default_rng(0).permutation(len(images))[: settings.n_asked].tolist()
    others = [
        [] if reference is None else reference.read(few, None),
        read_questions(
            few, [images[i] for i in asked], [there[int(i)] for i in asked], vocabulary.nouns, settings.max_new_tokens,
            lambda done: progress("asking", done, len(asked)),
        ),
    ]  # fmt: skip
    return [shuffled(batches, REFERENCES) for batches in others if batches]


def _token(vlm: VLM, say: str) -> int:
    tokens = tokens_of(vlm.tokenizer, say)
    if len(tokens) > 1:
        raise WordError(
            f"'{say}' has {len(tokens)} tokens, and one must do.",
            seen=f"The tokenizer writes it as {vlm.tokenizer.convert_ids_to_tokens(tokens)}.",
            fix="Choose another word that names nothing: thing, object, something.",
        )
    return tokens[0]


def _key(
    vlm: VLM,
    settings: DehallucinateSettings,
    images: Sequence[Picture],
    there: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    said: Answered,
    reference: Reference | None,
) -> str:
    """Make the key of a run from everything that it depends on."""
    facts: list[Any] = [dict(vlm.facts), provenance.versions(), asdict(settings), sorted(vocabulary.nouns), there]
    facts += [said.token_ids, [vocabulary.places(text) for text in said.texts], list(map(_pixels, images))]
    if reference is not None:
        answered = None if reference.answers is None else reference.answers.token_ids
        facts += [reference.facts, reference.texts, answered, list(map(_pixels, reference.images))]
    return key_of(*facts)


def _pixels(image: Picture) -> list[str]:
    return [image_hash(one.image) for one in open_row(image)]


def _steepest(reader: Reader, own: Sequence[Batch], lowest: int, settings: DehallucinateSettings) -> Columns:
    """Select the columns along which the loss of a sample of the answers falls most steeply."""
    # Steepest by a sample: the order of the best columns is clear after some hundred answers.
    layers = range(lowest, len(reader.vlm.anatomy.blocks))
    sample = own[: -(-SAMPLE // reader.batch_size)]
    steep = slopes(reader.vlm, layers, losses(reader, [sample], settings.payoff))
    return Columns.best(reader.vlm.anatomy, steep, settings.top)


def _train(
    training: Training,
    reader: Reader,
    own: Sequence[Batch],
    others: Sequence[Sequence[Sequence[Batch]]],
    settings: DehallucinateSettings,
    keep: Callable[[], None] | None,
    progress: Progress,
) -> None:
    """Train round by round; each pass takes the answers in an order of its own."""
    # Whole rounds of whole steps; few images are gone through at most `PASSES` times.
    per_step = max(1, ROWS // reader.batch_size)
    per_pass = -(-len(own) // per_step)
    per_round = max(1, min(settings.steps, PASSES * per_pass) // ROUNDS)
    n_steps = per_round * ROUNDS

    def parts(step: int) -> Iterator[Tensor]:
        # A pass goes through all answers, in an order that depends on nothing but its number: a run can go on anywhere.
        order = np.random.default_rng(step // per_pass).permutation(len(own))
        first = step % per_pass * per_step
        group = [own[i] for i in order[first : first + per_step]]
        return losses(reader, [group, *(part[step % len(part)] for part in others)], settings.payoff)

    def after(step: int, loss: float) -> None:
        progress("learning", step / per_round, ROUNDS)
        if step % per_round == 0:
            training.rounds += 1
            if keep is not None:
                keep()

    with training.change.added():
        fit(
            training.adam,
            parts,
            range(training.rounds * per_round, n_steps),
            rate=lambda step: RATE * min((step + 1) / WARM, 1 - step / n_steps),
            after=after,
        )


@dataclass(frozen=True)
class ChairChange:
    """A ChairChange is CHAIR on images that a patch was not made with: before, after, and of the cheap baseline."""

    before: Chair
    after: Chair
    rival: Chair
    """The captions before, without as many of their least likely nouns as are named less with the patch."""
    texts: tuple[tuple[str, str], ...]
    """What is said of each image, before and after."""
    absent: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Objects named there that are not, before and after."""


@by_one_thread
def chair_change(
    vlm: VLM,
    patch: Patch,
    images: Sequence[Picture],
    objects: Sequence[Collection[str]],
    vocabulary: Vocabulary,
    *,
    progress: Progress = untold,
) -> ChairChange:
    """Evaluate a patch of `dehallucinate` on other images; the model is left as it was."""
    made = patch.provenance["settings"]
    question = Question(made["prompt"], made["answer_prefix"], made["max_new_tokens"], made["batch_size"])

    def answered(share: int) -> Answered:
        done = share * len(images)
        return answers(vlm, images, question, progress=lambda n: progress("judging", done + n, 2 * len(images)))

    # The same question before and after.
    said = answered(0)
    with patch.applied(vlm):
        after = answered(1)
    there = [vocabulary.objects(mine) for mine in objects]
    now = [vocabulary.named(text) for text in after.texts]
    named = objects_named(vlm, said, there, vocabulary)
    kept = _likeliest_named(said, named, max(0, len(named) - sum(map(len, now))))
    texts = tuple(zip(said.texts, after.texts, strict=True))

    def absent(text: str, image: int) -> tuple[str, ...]:
        return tuple(noun for noun in vocabulary.named(text) if noun not in there[image])

    return ChairChange(
        chair(said.texts, objects, vocabulary),
        chair_of(now, there),
        chair_of(kept, there),
        texts,
        tuple((absent(before, i), absent(after, i)) for i, (before, after) in enumerate(texts)),
    )


def _likeliest_named(said: Answered, named: Sequence[Named], n_fewer: int) -> list[list[str]]:
    """Return the objects that each answer names, without the `n_fewer` least likely ones of all answers."""
    # The rival needs no edit: as many nouns are left out as the patch leaves out.
    least_likely = sorted(named, key=lambda one: said.log_p[one.answer][one.word.steps[0]])
    kept: list[list[str]] = [[] for _ in said.texts]
    for one in least_likely[n_fewer:]:
        kept[one.answer].append(one.noun)
    return kept
