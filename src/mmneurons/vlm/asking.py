"""Ask a model about pictures: they are opened batch by batch, encoded and answered, and what is wanted is recorded.

for batch in ask(vlm, images, Question("What is on the table?"), recorder=record):
    print(batch.answers.texts, batch.recording.n_passes)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmneurons.data.images import OpenedImage
from mmneurons.data.pictures import opened_batches
from mmneurons.errors import SettingError
from mmneurons.settings import Question
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.context import placeholder_ids
from mmneurons.vlm.hooks.recording import Keep, Recording, last_position
from mmneurons.vlm.tokens import continued

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM, Answers, Inputs

Recorder = Callable[[Anatomy, Keep], AbstractContextManager[Recording]]
"""Function that starts a recording: `record`, or `partial(record, ...)` with what is to be recorded."""
TAIL = 16
"""Number of tokens at a prompt's end that decide how the words behind them are written."""
TokenLists = Sequence[Sequence[int]]
"""Answers as token ids, one sequence per prompt."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch holds prompts that will be answered together."""

    first: int
    """Index of the first prompt among all that are asked, from 0."""
    rows: list[list[OpenedImage]]
    """The pictures of each prompt; every prompt of a batch has as many."""

    def inputs(self, vlm: VLM, question: Question) -> Inputs:
        """Encode the prompts as the model takes them."""
        return vlm.encode([[opened.image for opened in row] for row in self.rows], question.prompt, question.prefix)


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """An answered batch holds its prompts, the answers, and what was recorded on the way."""

    first: int
    """Index of the first prompt among all that are asked, from 0."""
    rows: list[list[OpenedImage]]
    inputs: Inputs
    answers: Answers
    recording: Recording
    """The recording; its step s is the position at which token s of the answer was predicted."""


def ask(
    vlm: VLM,
    images: Sequence[Any],
    question: Question,
    *,
    given: TokenLists | None = None,
    captions: Sequence[str] | None = None,
    recorder: Recorder | None = None,
) -> Iterator[AnswerBatch]:
    """Let the model answer prompts, or read answers that it is given, batch by batch.

    A caller that reads weights as well has to hold the model over both, by `vlm.alone`: see `batches_of` and `answer`.
    One that lets go of a batch (`del`) before it asks for the next has one recording in memory, not two.

    Args:
        vlm: The model.
        images: One prompt each, as `find` takes them; files are opened when their turn comes.
        question: What is asked, and how long an answer may be.
        given: Answers to read instead of generating, as tokens; their logits are not looked at.
        captions: Answers to read instead of generating, in words.
        recorder: What to record.

    Yields:
        The batches in order, each with its answers and its recording.

    Raises:
        ImageError: something is not an image; headers of files are looked at before the first batch.
    """
    for batch in batches_of(vlm, images, question):
        mine = slice(batch.first, batch.first + len(batch.rows))
        tokens, texts = given and given[mine], captions and captions[mine]
        yield _answered(vlm, batch, question, tokens, texts, recorder)


def _answered(
    vlm: VLM,
    batch: Batch,
    question: Question,
    given: TokenLists | None,
    captions: Sequence[str] | None,
    recorder: Recorder | None,
) -> AnswerBatch:
    """Encode and answer one batch.

    A function of its own, so that the generator `ask` itself holds no recording that its caller has let go of.
    """
    inputs = batch.inputs(vlm, question)
    if captions is not None:
        given = [tokens_of_answer(vlm, inputs, text) for text in captions]
    answers, recording = answer(vlm, inputs, question, given=given, recorder=recorder, scored=captions is not None)
    return AnswerBatch(batch.first, batch.rows, inputs, answers, recording)


def texts_of(vlm: VLM, images: Sequence[Any], question: Question) -> list[str]:
    """Return the texts that the model answers, one for each prompt."""
    return [text for batch in ask(vlm, images, question) for text in batch.answers.texts]


def batches_of(vlm: VLM, images: Sequence[Any], question: Question) -> Iterator[Batch]:
    """Iterate over the prompts in batches, in order and not yet asked; each batch is opened when its turn comes."""
    first = 0
    for rows in opened_batches(images, 1 if vlm.family.one_at_a_time else question.batch_size):
        yield Batch(first, rows)
        first += len(rows)


def answer(
    vlm: VLM,
    inputs: Inputs,
    question: Question,
    *,
    given: TokenLists | None = None,
    recorder: Recorder | None = None,
    scored: bool = True,
) -> tuple[Answers, Recording]:
    """Answer one encoded batch: the model generates, or reads the answers that it is given in one pass.

    Args:
        vlm: The model.
        inputs: From `VLM.encode`, or ready-made.
        question: How long an answer may be.
        given: Answers to read instead of generating, as tokens.
        recorder: What to record.
        scored: Whether the logits of answers that are given are wanted; those of generated ones are there anyway.
    """
    recorder = recorder or (lambda anatomy, keep: nullcontext(Recording.nothing(anatomy)))
    # Generated: every forward pass predicts one token at its last position.
    if given is None:
        with recorder(vlm.anatomy, last_position) as recording:
            answers = vlm.generate(inputs, question.max_new_tokens)
        return answers, recording
    answers = vlm.given(inputs, given)
    # Given: one forward pass over prompt and answer. Positions are counted from the end, since some models put the
    # picture before the first position. The position before the answer predicts its first token; the last one predicts
    # what would stand behind the answer.
    n_kept = answers.sequences.shape[1] - answers.n_prompt + 1
    with recorder(vlm.anatomy, lambda values: values[:, -n_kept:]) as recording:
        if scored:
            answers = vlm.scored(inputs, answers)
        else:
            vlm.read(inputs, answers)
    return answers, recording


def rendered_prompts(vlm: VLM, inputs: Inputs) -> tuple[str, ...]:
    """Return each encoded prompt as the model reads it: special tokens too, one for a picture, padding left out.

    For an encoder-decoder, the encoder's words come first, then those that the answer begins with, on a line of their
    own. Empty texts for a model without a tokenizer.
    """
    names = [name for name in ("input_ids", "decoder_input_ids") if name in inputs]
    if vlm.processor is None or not names:
        return ("",) * max(len(value) for value in inputs.values())
    parts = []
    for name in names:
        ids = inputs[name]
        mask = inputs.get("attention_mask") if name == "input_ids" else None
        kept = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
        parts.append([row[here.bool()].tolist() for row, here in zip(ids, kept, strict=True)])
    # A picture has as many tokens as patches: of neighbours, one is shown.
    pictures = {*placeholder_ids(vlm.model.config)}
    rows = []
    for row in zip(*parts, strict=True):
        shown = [[i for k, i in enumerate(part) if i not in pictures or part[k - 1 : k] != [i]] for part in row]
        rows.append("\n".join(vlm.tokenizer.decode(part) for part in shown))
    return tuple(rows)


def tokens_of_answer(vlm: VLM, inputs: Inputs, text: str) -> list[int]:
    """Return the tokens of an answer, as the model would write them behind encoded prompts, which all end alike.

    Raises:
        SettingError: a token of the answer is no text, but stands for a picture or for the end.
    """
    written = inputs["decoder_input_ids" if vlm.is_encoder_decoder else "input_ids"][0, -TAIL:].tolist()
    ids, special = continued(vlm.tokenizer, written, text), {*vlm.tokenizer.all_special_ids}
    if held := [vlm.token_text(token) for token in ids if token in special]:
        raise SettingError(
            f"The answer holds '{held[0]}', which is no text to this model.", seen=repr(text), fix="Leave it out."
        )
    return ids
