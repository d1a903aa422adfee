"""Traced answers hold what the neurons did at each step of many answers: edits are computed from them.

said = trace_answers(vlm, images)
for answer, word in occurrences(vlm, said, "dog"): said.steps.at([said.row(answer, word.steps[0])])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.data.pictures import Picture
from mmneurons.errors import ModelError, SettingError
from mmneurons.settings import Question
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.anatomy.paths import Directions, frozen_rows
from mmneurons.vlm.asking import ask
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.teacher_forcing import text_batches
from mmneurons.vlm.traces import Trace, pick_trace
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word, find_words, says


@dataclass(frozen=True, eq=False)
class Answered:
    """An Answered holds what the model said about images."""

    texts: list[str]
    token_ids: list[tuple[int, ...]]
    log_p: list[list[float]]
    """Of each token."""


def answers(
    vlm: VLM,
    images: Sequence[Picture],
    question: Question,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Answered:
    """Let the model answer about images."""
    said = Answered([], [], [])
    for batch in ask(vlm, images, question):
        made = batch.answers
        log_p = (made.logits - made.log_totals).tolist()
        said.texts.extend(made.texts)
        said.token_ids.extend(made.token_ids)
        said.log_p.extend(mine[: len(ids)] for mine, ids in zip(log_p, made.token_ids, strict=True))
        progress(len(said.texts))
    return said


@dataclass(frozen=True, eq=False)
class TracedSteps:
    """TracedSteps are positions that each predict a token, with what the model did there; on the CPU."""

    anatomy: Anatomy
    activations: tuple[Float[Tensor, "n neurons"], ...]
    """Per FFN, of all its experts (zero where the router did not ask one), in the model's dtype."""
    norms: tuple[Float[Tensor, "n hidden"], ...]
    """What entered each norm on the paths of the anatomy."""
    residual: Float[Tensor, "n hidden"]
    """The residual stream before the final norm, float32."""
    token_ids: Int[Tensor, "n"]
    """What the model said there."""
    logits: Float[Tensor, "n"]
    """Of that token, as the model gave it."""
    answer_ids: Int[Tensor, "n"]
    """Which answer, or which text, each belongs to, counted from 0."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def at(self, rows: Tensor) -> TracedSteps:
        """Pick some of the steps, by a mask or by their numbers."""
        return TracedSteps(
            self.anatomy,
            tuple(part[rows] for part in self.activations),
            tuple(part[rows] for part in self.norms),
            self.residual[rows],
            self.token_ids[rows],
            self.logits[rows],
            self.answer_ids[rows],
        )

    def directions(self, rows: Float[Tensor, "n hidden"]) -> Directions:
        """Compute how a write at each step reaches what `rows` (of the unembedding, or differences) read there.

        The scales of all norms are held at the values that they had (`score="logit"`).
        """
        final = frozen_rows(self.anatomy, rows.cpu(), self.residual)
        return Directions(self.anatomy, final, list(self.norms))


@dataclass(frozen=True, eq=False)
class TracedAnswers:
    """TracedAnswers are answers with every step of them."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    """Per answer, end-of-text included where it came."""
    steps: TracedSteps
    """Answer after answer, of each one step per token."""

    def row(self, answer: int, step: int) -> int:
        """Return the place in `steps` of one step of an answer."""
        return sum(map(len, self.token_ids[:answer])) + step


def trace_answers(
    vlm: VLM,
    images: Sequence[Picture],
    question: Question = Question(),
    *,
    progress: Callable[[int], None] | None = None,
) -> TracedAnswers:
    """Let the model answer, and keep what its neurons did at each step; one captioning run, no more.

    Args:
        vlm: The model, from `load`.
        images: Paths, PIL images or arrays.
        question: What the model is asked.
        progress: Called with images done.

    Raises:
        SettingError: no image is given.
        ImageError: something is not an image.
    """
    if not images:
        raise SettingError("There is no image.", fix="Give at least one.")
    # What is kept of a batch goes to the CPU before the next one is asked.
    parts: list[TracedSteps] = []
    texts: list[str] = []
    token_ids: list[tuple[int, ...]] = []
    for batch in ask(vlm, images, question, recorder=record):
        answers = batch.answers
        # Answers differ in length: steps behind an answer's end are left out.
        places = torch.tensor([(row, step) for row, ids in enumerate(answers.token_ids) for step in range(len(ids))])
        said = [token for ids in answers.token_ids for token in ids]
        of = [len(texts) + row for row in places[:, 0].tolist()]
        rows, steps = places.to(answers.logits.device).unbind(1)
        trace = pick_trace(batch.recording, places)
        parts.append(_traced(vlm, trace, torch.tensor(said), answers.logits[rows, steps], of))
        texts += answers.texts
        token_ids += answers.token_ids
        del batch  # its recording is not to live beside the next one
        if progress is not None:
            progress(len(texts))
    return TracedAnswers(tuple(texts), tuple(token_ids), join(parts))


def trace_given(vlm: VLM, image: Picture, ids: Sequence[int], question: Question = Question()) -> TracedSteps:
    """Trace what the model would say at each step of an answer that it is given: n tokens give n + 1 steps."""
    (batch,) = ask(vlm, [image], question, given=[ids], recorder=record)
    return _trace_all(vlm, batch.recording, [0])


def trace_texts(vlm: VLM, texts: Sequence[str]) -> TracedSteps:
    """Trace what the model would say at every position of texts, at least one, that it reads without an image.

    Raises:
        ModelError: the language model reads no text by itself (encoder-decoders).
    """
    if vlm.is_encoder_decoder:
        raise ModelError(
            "The texts of an encoder-decoder are read in its encoder, where no neuron of ours is.",
            fix="Give reference images only.",
        )
    # Texts of one length are read together; afterwards they are put back into their order.
    parts: dict[int, TracedSteps] = {}
    for numbers, inputs in text_batches(vlm, texts):
        with record(vlm.anatomy, lambda values: values) as recording:
            vlm.read(inputs)
        read = _trace_all(vlm, recording, numbers)
        parts |= {i: read.at(read.answer_ids == i) for i in numbers}
    return join([parts[i] for i in range(len(texts))])


def likeliest_tokens(vlm: VLM, texts: Sequence[str]) -> list[Int[Tensor, "positions"]]:
    """Find the likeliest next token at each position of each text, as `trace_texts` does, but record no neuron."""
    # The residual stream is all that logits need: no neuron is recorded.
    found: dict[int, Tensor] = {}
    for numbers, inputs in text_batches(vlm, texts):
        with record(vlm.anatomy, lambda values: values, neurons=no_neurons(vlm.anatomy)) as recording:
            vlm.read(inputs)
        for i, residual in zip(numbers, recording.residual[0], strict=True):
            found[i] = vlm.anatomy.logits(residual)[:, : vlm.n_tokens].argmax(-1).cpu()
    return [found[i] for i in range(len(texts))]


def no_neurons(anatomy: Anatomy) -> list[Int[Tensor, "0"]]:
    """Return the selection with which `record` keeps no neuron of any FFN, only the residual stream."""
    return [torch.empty(0, dtype=torch.long) for _ in anatomy.ffns]


def join(parts: Sequence[TracedSteps]) -> TracedSteps:
    """Join steps one after the other; there is at least one part."""
    if len(parts) == 1:
        return parts[0]
    return TracedSteps(
        parts[0].anatomy,
        tuple(torch.cat(each) for each in zip(*(part.activations for part in parts), strict=True)),
        tuple(torch.cat(each) for each in zip(*(part.norms for part in parts), strict=True)),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.answer_ids for part in parts]),
    )


def occurrences(vlm: VLM, said: TracedAnswers, phrase: str) -> list[tuple[int, Word]]:
    """Find wherever the answers say a word, in any case and number: which answer, and the word there."""

    def decode(ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(ids, skip_special_tokens=True)

    # `says` looks at the text first: finding a word's tokens is slow.
    return [
        (i, word)
        for i, (text, ids) in enumerate(zip(said.texts, said.token_ids, strict=True))
        if says(text, phrase)
        for word in find_words(phrase, text, ids, decode)
    ]


def _trace_all(vlm: VLM, recording: Recording, answers: Sequence[int]) -> TracedSteps:
    """Trace every recorded position, row after row, with the likeliest token of each."""
    n_steps = recording.residual[0].shape[1]
    places = torch.tensor([(row, step) for row in range(len(answers)) for step in range(n_steps)])
    trace = pick_trace(recording, places)
    logits = vlm.anatomy.logits(trace.residual)[:, : vlm.n_tokens].max(-1)
    return _traced(vlm, trace, logits.indices, logits.values, [i for i in answers for _ in range(n_steps)])


def _traced(vlm: VLM, trace: Trace, token_ids: Tensor, logits: Tensor, answers: list[int]) -> TracedSteps:
    """Make TracedSteps of a trace: off the device, and with the slots of experts put in their places."""
    fired = []
    for ffn, part, experts in zip(trace.anatomy.ffns, trace.activations, trace.experts, strict=True):
        if experts is not None:
            # The router asks other experts at each step: a neuron is at home in a slot of its own, zero elsewhere.
            width = ffn.n_neurons
            slots = (experts[:, :, None] * width + torch.arange(width, device=experts.device)).flatten(1)
            part = torch.zeros(len(part), ffn.size, device=part.device, dtype=torch.float32).scatter(1, slots, part)
        fired.append(part.to("cpu", vlm.anatomy.dtype))
    return TracedSteps(
        trace.anatomy,
        tuple(fired),
        tuple(part.cpu() for part in trace.norms),
        trace.residual.cpu(),
        token_ids.cpu(),
        logits.float().cpu(),
        torch.tensor(answers),
    )
