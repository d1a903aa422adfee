"""What an edit shall leave as it is: answers about images, and texts. Made once, used for any number of edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Literal, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmneurons import pocket
from mmneurons.data.pictures import Picture
from mmneurons.editing import kept_references
from mmneurons.editing.answers import (
    TracedAnswers,
    TracedSteps,
    join,
    occurrences,
    trace_answers,
    trace_texts,
)
from mmneurons.errors import ModelError, SettingError
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question, QuestionOptions, settled
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.teacher_forcing import Batch, Given, Reader
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Tagger, find_nouns


@dataclass(frozen=True, eq=False)
class Reference:
    """Steps of answers and texts of the unedited model; from `make_reference`."""

    answers: TracedAnswers | None
    images: tuple[Picture, ...]
    """Those that `answers` are about, to be captioned again with an edit."""
    question: Question
    """How they were asked about."""
    texts: tuple[str, ...]
    text_steps: TracedSteps | None
    text_counts: Int[Tensor, "positions"]
    """For each of `text_steps`, at how many positions of all texts the same has been read; 0 but at the first."""
    seconds: Int[Tensor, "steps"]
    """For each of `steps`, what would be said but for what is."""
    weights_hash: str
    """Of the model that answered, without patches."""

    @cached_property
    def steps(self) -> TracedSteps:
        """Of the answers, then of the texts."""
        parts = [] if self.answers is None else [self.answers.steps]
        return join(parts if self.text_steps is None else [*parts, self.text_steps])

    @property
    def facts(self) -> dict[str, object]:
        """What a patch says of it."""
        return {
            "images": len(self.images),
            "texts": len(self.texts),
            "prompt": self.question.prompt,
            "steps": len(self.steps),
            "answer_prefix": self.question.prefix,
            "weights_hash": self.weights_hash,
        }

    def says(self, vlm: VLM, word: str) -> Bool[Tensor, "steps"]:
        """Which of `steps` write a word."""
        rows = torch.zeros(len(self.steps), dtype=torch.bool)
        if self.answers is not None:
            for answer, found in occurrences(vlm, self.answers, word):
                rows[[self.answers.row(answer, step) for step in found.steps]] = True
        return rows

    def mean_at_other_nouns(self, vlm: VLM, lemma: str, tagger: Tagger | None = None) -> list[Float[Tensor, "_"]]:
        """Per FFN the mean activation of each neuron where the answers begin to say a noun that is not `lemma`.

        What fires for any noun of any picture: the baseline of `find(..., baseline=reference)`.

        Raises:
            SettingError: there is no answer with another noun.
            ModelError: the model has other weights than when it answered.
        """
        if vlm.facts["weights_hash"] != self.weights_hash:
            raise ModelError(
                "This reference was made with other weights.",
                seen=f"{self.weights_hash}, and the model has {vlm.facts['weights_hash']}.",
                fix="Make it anew: make_reference(vlm, images)",
            )

        def decode(ids: Sequence[int]) -> str:
            return vlm.tokenizer.decode(ids, skip_special_tokens=True)

        rows = list[int]()
        if self.answers is not None:
            for i, (text, ids) in enumerate(zip(self.answers.texts, self.answers.token_ids, strict=True)):
                nouns = find_nouns(text, ids, decode, answer_prefix=self.question.prefix, tagger=tagger)
                rows += [self.answers.row(i, noun.steps[0]) for noun in nouns if noun.lemma != lemma]
        if not rows:
            raise SettingError(
                f"The reference says no noun but '{lemma}': there is nothing to compare with.",
                fix="Make it of images that show other things: make_reference(vlm, images)",
            )
        steps = self.steps
        return [part[rows].float().mean(0) for part in steps.activations]

    def without(self, vlm: VLM, word: str) -> TracedSteps:
        """The steps that do not write a word."""
        return self.steps.at(~self.says(vlm, word))

    def given(self, vlm: VLM, word: str | None) -> list[Given]:
        """The answers, all of whose steps are to stay as they are, but for those that write a word, if there is one."""
        if self.answers is None:
            return []
        # Steps are counted through all answers, one after the other.
        left = [False] * len(self.steps) if word is None else self.says(vlm, word).tolist()
        made, start = list[Given](), 0
        for ids in self.answers.token_ids:
            made.append(Given([*ids], {}, {step: -1 for step in range(len(ids)) if not left[start + step]}))
            start += len(ids)
        return made

    def read(self, reader: Reader, word: str | None) -> list[Batch]:
        """Answers and texts, to be read again: all steps that do not write a word, if there is one."""
        answers = reader.read(self.images, self.question, self.given(reader.vlm, word))
        return [*answers, *reader.read_texts(self.texts)]

    def by_image(self, vlm: VLM, word: str, values: Float[Tensor, "steps"]) -> list[float]:
        """For each image the largest of the values of its answer's steps; minus infinity where it says a word."""
        assert self.answers is not None
        # An answer that says the word has an infinite value, which marks it whatever its other steps are.
        values = values.clone()
        values[self.says(vlm, word)[: len(values)]] = torch.inf
        worst = torch.full((len(self.images),), -torch.inf, dtype=torch.float32)
        worst = worst.scatter_reduce(0, self.answers.steps.answer_ids, values, "amax")
        return [-torch.inf if value == torch.inf else value for value in worst.tolist()]

    def positions(self, values: Float[Tensor, "steps"], n: int) -> list[int]:
        """The `n` of `text_steps` with the largest values, of those alike the first; none of minus infinity."""
        # Texts come behind the answers; of positions that read the same, the first stands for all.
        mine = values[len(self.steps) - len(self.text_counts) :]
        mine = mine.where(self.text_counts > 0, -torch.inf)
        return [row for row in mine.argsort(descending=True)[:n].tolist() if mine[row] > -torch.inf]

    def places_of(self, positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """Where some of `text_steps` stand: the text, the position in it, and how many positions read the same."""
        if self.text_steps is None:
            return []
        # Rows of one text stand together: where its first is, the text begins.
        answers, rows = self.text_steps.answer_ids, torch.tensor(positions, dtype=torch.long)
        steps = rows - torch.searchsorted(answers, answers[rows])
        return list(zip(answers[rows].tolist(), steps.tolist(), self.text_counts[rows].tolist(), strict=True))


@by_one_thread
def make_reference(
    vlm: VLM,
    images: Sequence[Picture] = (),
    texts: Sequence[str] = (),
    *,
    question: Question | None = None,
    progress: Progress = untold,
    **options: Unpack[QuestionOptions],
) -> Reference:
    """Let the model answer about images and read texts, unedited.

    What it said and read is kept in the cache folder, and used again by whoever asks for the same of the same model.

    Args:
        vlm: The model, from `load`, without patches.
        images: Unlike each other and like what the edited model will see; 100 and more.
        texts: Sentences, read without an image.
        question: What the model is asked about each image.
        progress: Told how many images are done.
        **options: Fields of `Question`, such as `prompt="What is this?"`, over those of `question`.

    Raises:
        SettingError: neither image nor text.
        ModelError: texts for an encoder-decoder.
    """
    if not images and not texts:
        raise SettingError("A reference needs images or texts.", fix="make_reference(vlm, [image, ...])")
    question = settled(Question, question, options)

    def tell(done: int) -> None:
        progress("answers to leave as they are", done, len(images))

    # What another edit of the same model has worked out already is on disk.
    place = kept_references.place_of(vlm, images, texts, question)
    known = None if place is None else kept_references.load(place, vlm, images, texts, question)
    if known is None:
        said = trace_answers(vlm, images, question, progress=tell) if images else None
        read = trace_texts(vlm, texts) if texts else None
        if place is not None:
            kept_references.save(place, said, read)
    else:
        said, read = known
    counts = torch.tensor(_counts(vlm, texts), dtype=torch.long)
    seconds = torch.cat([_seconds(vlm, steps) for steps in (said and said.steps, read) if steps is not None])
    made_by = str(vlm.facts["weights_hash"])
    return Reference(said, tuple(images), question, tuple(texts), read, counts, seconds, made_by)


def default_reference(vlm: VLM, question: Question | None = None, *, progress: Progress = untold) -> Reference | None:
    """Make the reference that `edit` takes where none is given: what the model reads in the shipped sentences.

    For the pocket model it is also what it says of `pocket:reference-400`, and every fourth of the facts that it knows.

    Args:
        vlm: The model, from `load`, without patches.
        question: What the model is asked about each image, if there are any.
        progress: Told how many images are done.

    Returns:
        The reference; None for an encoder-decoder, which reads no texts.
    """
    if vlm.is_encoder_decoder:
        return None
    images, facts = list[Picture](), tuple[str, ...]()
    if vlm.is_pocket:
        images, facts = [scene.image for scene in pocket.evaluation_set("reference-400")], pocket.facts()[::4]
    return make_reference(vlm, images, [*facts, *sentences()], question=question, progress=progress)


def reference_of(vlm: VLM, given: Reference | Literal["own"] | None, question: Question) -> Reference | None:
    """Return what an edit is to leave as it is, of what it was given: made where that is None, none for "own"."""
    return default_reference(vlm, question) if given is None else None if given == "own" else given


def sentences() -> tuple[str, ...]:
    """Return the sentences that the package ships: plain English about anything, unlike each other."""
    text = resources.files("mmneurons.editing").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _counts(vlm: VLM, texts: Sequence[str]) -> list[int]:
    """For each position of the texts at how many the same has been read; 0 where an earlier one has read it."""
    # What is predicted at a position depends on all that is before it, and on nothing else.
    ids = [vlm.tokenizer(text).input_ids for text in texts]
    read = [tuple(mine[: i + 1]) for mine in ids for i in range(len(mine))]
    left = Counter(read)
    return [left.pop(prefix, 0) for prefix in read]


def _seconds(vlm: VLM, steps: TracedSteps) -> Int[Tensor, "n"]:
    """The likeliest token but for the one that is said."""
    found = []  # some steps at a time: logits are wide
    for residual, said in zip(steps.residual.split(256), steps.token_ids.split(256), strict=True):
        logits = vlm.anatomy.logits(residual)[:, : vlm.n_tokens].float().cpu()
        found.append(logits.scatter(1, said[:, None], -torch.inf).argmax(-1))
    return torch.cat(found)
