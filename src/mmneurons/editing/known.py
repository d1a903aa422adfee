"""Known answers are those of the unedited model about images; they show which of them an edit changes.

    known = KnownAnswers(vlm, images, question)
    known.prepare(edit)
    with edit.applied(vlm):
        tops = known.tops()
        texts = known.texts(tops)

A model that decodes greedily says the same again exactly where, reading its own answer, it finds each token likeliest
where it stands. So answers are read, in one pass, and only those that an edit changes are generated anew. Of a patch no
block is run below the lowest that it changes: what enters that one is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.data.pictures import Picture
from mmneurons.editing.answers import answers, no_neurons
from mmneurons.patches.patch import Edit, Patch
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask, texts_of
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.teacher_forcing import Batch, Given, Reader
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

TOP = 10
"""Likeliest tokens at each step."""
MOST_KEPT = 2**30
"""Bytes of what enters a block that are kept at most; of more images or a larger model, each pass is a whole one."""


class KnownAnswers:
    """KnownAnswers are answers of the unedited model, which are compared with what it says under edits."""

    def __init__(self, vlm: VLM, images: Sequence[Picture], question: Question, limit: int | None = None) -> None:
        """Let the model answer about images; with a limit, about that many, and about more when `without` asks."""
        self.vlm, self.question, self.limit = vlm, question, limit
        self.images, self._waiting = images[:limit], images[len(images[:limit]) :]
        self.said = answers(vlm, self.images, question)
        self._read: tuple[Reader, list[Batch]] | None = None
        self._usual: list[Int[Tensor, "_ 10"]] = []

    def without(self, word: str) -> list[int]:
        """Return which answers do not say a word, up to the limit; to be called while the model is unedited."""
        while True:
            kept = [i for i, text in enumerate(self.said.texts) if not says(text, word)][: self.limit]
            if len(kept) == self.limit or not self._waiting:
                return kept
            more, self._waiting = self._waiting[: self.limit], self._waiting[self.limit :]
            new = answers(self.vlm, more, self.question)
            self.said.texts.extend(new.texts)
            self.said.token_ids.extend(new.token_ids)
            self.said.log_p.extend(new.log_p)
            self.images, self._read = [*self.images, *more], None

    def usual_tops(self) -> list[Int[Tensor, "_ 10"]]:
        """Return the likeliest tokens at each step of all answers so far; to be called while the model is unedited."""
        if len(self._usual) < len(self.images):
            self._usual = self.tops()
        return self._usual

    def prepare(self, edit: Edit) -> None:
        """Keep what enters the lowest block that a patch changes; to be called while the model is unedited."""
        parts = edit.parts if isinstance(edit, Patch) else ()
        lowest = min((part.layer for part in parts), default=0)
        if self._read is not None and self._read[0].lowest == lowest:
            return
        self._read = None
        if not lowest or self.vlm.is_encoder_decoder:
            return
        reader, read, kept = Reader(self.vlm, lowest, True, self.question.batch_size), list[Batch](), 0
        size = reader.batch_size
        for start in range(0, len(self.images), size):
            given = [Given.as_said(ids) for ids in self.said.token_ids[start : start + size]]
            for batch in reader.read(self.images[start : start + size], self.question, given):
                # Without what enters the block it would hold the whole prompt, pixels and all.
                if batch.entering is None:
                    return
                kept += batch.entering.nbytes
                read.append(batch)
            if kept > MOST_KEPT:
                return
        self._read = reader, read

    def tops(self) -> list[Int[Tensor, "_ 10"]]:
        """Return the likeliest tokens now, edited or not, at each step of the unedited answers, the likeliest first."""
        if self._read is None:
            logits = forced(self.vlm, self.images, self.said.token_ids, self.question)
            return [mine.topk(TOP).indices for mine in logits]
        reader, batches = self._read
        found, counts = list[Tensor](), iter([len(ids) for ids in self.said.token_ids])
        for batch in batches:
            with torch.no_grad():
                residual = reader.final(batch)
            # Answer by answer: logits of a batch would be large.
            for mine in residual.split([next(counts) for _ in range(batch.n_rows)]):
                logits = self.vlm.anatomy.logits(mine)[:, : self.vlm.n_tokens].float()
                found.append(logits.topk(TOP).indices.cpu())
        return found

    def texts(self, tops: Sequence[Int[Tensor, "_ 10"]]) -> list[str]:
        """Return what the model says now, edited or not; `tops` of the same moment tell which answers to generate."""
        same = [mine[:, 0].tolist() == list(ids) for mine, ids in zip(tops, self.said.token_ids, strict=True)]
        changed = [i for i, kept in enumerate(same) if not kept]
        new = iter(texts_of(self.vlm, [self.images[i] for i in changed], self.question))
        return [text if kept else next(new) for text, kept in zip(self.said.texts, same, strict=True)]


def forced(
    vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], question: Question
) -> Iterator[Float[Tensor, "steps vocab"]]:
    """Yield the logits at each step of answers that the model is given, image by image; float32, on the CPU."""
    recorder = partial(record, neurons=no_neurons(vlm.anatomy))
    # The residual stream is recorded, and the head run answer by answer: logits of a batch would be large.
    for batch in ask(vlm, images, question, given=token_ids, recorder=recorder):
        residual = batch.recording.stacked(batch.recording.residual)
        for row, mine in enumerate(batch.answers.token_ids):
            yield vlm.anatomy.logits(residual[row, : len(mine)])[:, : vlm.n_tokens].float().cpu()
