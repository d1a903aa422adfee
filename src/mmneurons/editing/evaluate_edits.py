"""Patches are evaluated one after the other; each result is kept, so that a run that was stopped can go on.

A result is kept under a key made of the patch, of what it was asked and of all pixels and texts it was evaluated on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from mmneurons.data.content import image_hash, key_of
from mmneurons.data.dataset import Item
from mmneurons.data.store import LOCK, Store, one_writer
from mmneurons.editing.evaluate import Before, Bench, Evaluation, evaluate
from mmneurons.errors import SettingError
from mmneurons.patches.patch import Edit, Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question
from mmneurons.vlm import provenance
from mmneurons.vlm.vlm import VLM

DEFINITIONS = 2
"""Of the figures; where one of them changes meaning, what was measured before is measured anew."""


@dataclass(frozen=True, eq=False)
class Case:
    """A Case is one edit to evaluate."""

    make: Callable[[], Edit]
    """Called when the edit is evaluated; not where its figures are known from an earlier run."""
    source: str
    target: str | None
    question: Question = Question()
    """How the model is asked; in batches as large as `evaluate_edits` is told."""
    key: str = ""
    """What tells it from all others: a patch's hash; "": its name does."""


class _Asked(msgspec.Struct):
    """These settings say how `edit` asked the model."""

    prompts: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    answer_prefix: str
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class _MadeFor(msgspec.Struct):
    """A patch's provenance says how to evaluate it; it comes from a file, and may say anything."""

    source: Annotated[str, msgspec.Meta(min_length=1)]
    settings: _Asked
    target: str | None = None


def cases(patches: Mapping[str, Patch]) -> dict[str, Case]:
    """Make the cases of patches that `edit` made, from their provenance.

    Raises:
        SettingError: a patch does not say what it was made for.
    """
    found = {}
    # Provenance comes from files: it is taken for what it says only where it fits.
    for name, patch in patches.items():
        try:
            made = msgspec.convert(dict(patch.provenance), _MadeFor)
        except msgspec.ValidationError as error:
            raise SettingError(
                f"{name} does not say which word it edits, or how the model was asked.",
                seen=str(error),
                fix="Evaluate patches that `mmneurons edit` made, one by one.",
            ) from error
        asked = made.settings
        question = Question(asked.prompts[0], asked.answer_prefix, asked.max_new_tokens)
        found[name] = Case(lambda patch=patch: patch, made.source, made.target, question, patch.hash)
    return found


def evaluate_edits(
    vlm: VLM,
    asked: Mapping[str, Case],
    folder: str | os.PathLike[str],
    *,
    edit: Callable[[str], Sequence[Item]],
    held_out: Callable[[str], Sequence[Item]],
    unrelated: Sequence[Item],
    texts: Sequence[str] = (),
    further: Mapping[str, Sequence[Item]] | None = None,
    further_texts: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress = untold,
) -> dict[str, Evaluation]:
    """Evaluate edits, each by itself.

    Args:
        vlm: The model, unedited.
        asked: By name; of patches, from `cases`.
        folder: Where results are kept; one run writes there at a time.
        edit: The images that an edit of a word was made with.
        held_out: Others that show it.
        unrelated: Images of which nothing is to change.
        texts: Texts of which nothing is to change.
        further: Images of other kinds, by what they are, of which nothing is to change either.
        further_texts: Texts of other kinds, likewise.
        limit: At most so many unrelated images for each edit: the first of which the unedited model does not say its
            source; None: all of these.
        batch_size: Images in one batch.
        progress: Told how many are evaluated, a share of one counts.

    Returns:
        By name.

    Raises:
        SettingError: the folder holds results of another model, or another run writes there.
        FormatError: what the folder holds is damaged.
        ImageError: an image cannot be read or used.
    """
    made_by = {"model": dict(vlm.facts), "packages": provenance.versions()}
    # What all edits share is opened and hashed once; so is, for each question, what the unedited model says.
    images = [item.image() for item in unrelated]
    more = {name: [item.image() for item in items] for name, items in (further or {}).items()}
    more_texts = {name: list(texts) for name, texts in (further_texts or {}).items()}
    more_hashes = {name: [image_hash(image) for image in images] for name, images in more.items()}
    hashes, bounds = [image_hash(image) for image in images], () if limit is None else (limit,)
    others = key_of(DEFINITIONS, hashes, list(texts), more_hashes, more_texts, *bounds)
    befores: dict[Question, Before] = {}
    found = {}

    def tell(done: float) -> None:
        progress("judging", done, len(asked))

    with one_writer(Path(folder), Path(folder) / LOCK):
        # What an earlier run worked out for the same pixels, texts and question is taken from there.
        store = Store(Path(folder) / "edits.jsonl", made_by, Evaluation)
        for done, (name, one) in enumerate(asked.items()):
            shown, beyond = ([item.image() for item in of(one.source)] for of in (edit, held_out))
            question = replace(one.question, answer_prefix=one.question.prefix, batch_size=batch_size)
            asks = (one.source, one.target, question.prompt, question.prefix, question.max_new_tokens)
            # Settings that change no answer, such as the batch size, are no part of it.
            key = key_of(
                one.key or name, *asks, *([image_hash(image) for image in of] for of in (shown, beyond)), others
            )
            if key not in store.found:
                bench = Bench(shown, beyond, images, texts, question, more, more_texts, limit=limit)
                before = befores.setdefault(question, Before(vlm, bench))
                evaluation = evaluate(
                    vlm,
                    one.make(),
                    before.on(bench),
                    source=one.source,
                    target=one.target,
                    progress=lambda stage, share, of, done=done: tell(done + share),
                )
                store.add(key, name, evaluation)
            found[name] = store.found[key]
            tell(done + 1)
    return found
