"""Ask a model about pictures: opened batch by batch, encoded, answered, and what was asked for recorded on the way.

for batch in ask(vlm, images, Question("What is on the table?"), recorder=record):
batch.answers.texts, batch.recording
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmneurons.errors import ModelError, SettingError
from mmneurons.settings import Question
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.images import OpenedImage
from mmneurons.vlm.pictures import opened_batches
from mmneurons.vlm.prompts import continued, prompt_text
from mmneurons.vlm.recording import Keep, Recording, last_position

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM, Answers, Inputs

Recorder = Callable[[Anatomy, Keep], AbstractContextManager[Recording]]
"""`record`, or `partial(record, ...)` with what is to be recorded."""
TokenLists = Sequence[Sequence[int]]
"""Answers as tokens, one prompt after the other."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that are answered together."""

    first: int
    """How many prompts were asked before."""
    rows: list[list[OpenedImage]]
    """The pictures of each prompt, as many in each."""
    given: TokenLists | None
    """The answers that the model is given to read; None: it chooses them itself."""

    def inputs(self, vlm: VLM, question: Question) -> Inputs:
        """The prompts as the model takes them."""
        return vlm.encode([[opened.image for opened in row] for row in self.rows], question.prompt, question.prefix)


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts that were answered together."""

    first: int
    """How many prompts were asked before."""
    rows: list[list[OpenedImage]]
    inputs: Inputs
    answers: Answers
    recording: Recording
    """Step s of it is where token s of the answer was chosen, or read."""


def ask(
    vlm: VLM,
    images: Sequence[Any],
    question: Question,
    *,
    given: TokenLists | None = None,
    recorder: Recorder | None = None,
) -> Iterator[AnswerBatch]:
    """Let the model answer, or read answers that it is given, batch by batch.

    Whoever reads weights as well has to hold the model over both, by `vlm.alone`: see `batches_of` and `answer`.

    Args:
        vlm: The model.
        images: One prompt each, as `find` takes them; files are opened when their turn comes.
        question: What is asked.
        given: Answers to read instead of generating.
        recorder: What to record.

    Raises:
        ImageError: something is not an image; headers of files are looked at before the first batch.
    """
    for batch in batches_of(vlm, images, question, given):
        inputs = batch.inputs(vlm, question)
        answers, recording = answer(vlm, inputs, question, given=batch.given, recorder=recorder)
        yield AnswerBatch(batch.first, batch.rows, inputs, answers, recording)


def texts_of(vlm: VLM, images: Sequence[Any], question: Question) -> list[str]:
    """What the model answers."""
    return [text for batch in ask(vlm, images, question) for text in batch.answers.texts]


def batches_of(vlm: VLM, images: Sequence[Any], question: Question, given: TokenLists | None = None) -> Iterator[Batch]:
    """Prompts in batches, in order, not yet asked; each batch is opened when its turn comes."""
    first = 0
    for rows in opened_batches(images, 1 if vlm.family.one_at_a_time else question.batch_size):
        yield Batch(first, rows, None if given is None else given[first : first + len(rows)])
        first += len(rows)


def answer(
    vlm: VLM,
    inputs: Inputs,
    question: Question,
    *,
    given: TokenLists | None = None,
    recorder: Recorder | None = None,
) -> tuple[Answers, Recording]:
    """Answer one encoded batch: the model generates, or reads the answers that it is given in one pass."""
    recorder = recorder or (lambda anatomy, keep: nullcontext(Recording.nothing(anatomy)))
    if given is None:
        with recorder(vlm.anatomy, last_position) as recording:
            answers = vlm.generate(inputs, question.max_new_tokens)
        return answers, recording
    answers = vlm.given(inputs, given)
    # Counted from the end: some models put the picture before the first position. The last one predicts what is
    # behind the answer.
    n_kept = answers.sequences.shape[1] - answers.n_prompt + 1
    with recorder(vlm.anatomy, lambda values: values[:, -n_kept:]) as recording:
        answers = vlm.scored(inputs, answers)
    return answers, recording


def tokens_of_answer(vlm: VLM, question: Question, text: str, n_images: int = 1) -> list[int]:
    """The tokens of an answer, as the model would write them behind the question.

    Raises:
        SettingError: the answer is empty.
        ModelError: the model came without a processor, which alone knows tokens.
    """
    if vlm.processor is None:
        raise ModelError(
            "This model came without a processor: an answer in words cannot be turned into tokens.",
            fix="load(model, processor=...)",
        )
    if not text.strip():
        raise SettingError("There is no word in the answer that is to be scored.", seen=repr(text))
    before = question.prefix
    if not vlm.is_encoder_decoder:  # whose decoder reads nothing but the answer
        before = prompt_text(vlm.processor, question.prompt, question.prefix, n_images)
    return continued(vlm.tokenizer, before, text.strip())
