"""Check captions, of any origin, for nouns that the picture does not support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Unpack

from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.errors import ModelError
from mmneurons.finding.batch import ScoredBatch, name_of, targets_of
from mmneurons.finding.calibration import Calibration
from mmneurons.finding.finder import UNCALIBRATED, captions_for
from mmneurons.finding.grounded import Grounded
from mmneurons.finding.grounding import calibration_for, ground
from mmneurons.finding.scoring import probabilities_of
from mmneurons.progress import Progress
from mmneurons.settings import FindSettings, Question, QuestionOptions, settled
from mmneurons.vlm.asking import AnswerBatch, ask
from mmneurons.vlm.grid import find_grids
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True)
class CheckedNoun:
    """One noun of a caption, and whether the picture supports it."""

    word: str
    """As the caption writes it."""
    lemma: str
    start: int
    """Offset of the word's first character in the caption."""
    n_tokens: int
    """How many tokens wrote it; of several the first is looked for."""
    probability: float
    """The model's next-token probability of the noun's first token there."""
    grounded: Grounded


@dataclass(frozen=True)
class Checked:
    """A Checked is one caption with its nouns; those that the picture does not support are `unseen`."""

    images: tuple[str, ...]
    answer_prefix: str
    """Words that the caption was made to begin with; it does not have them itself."""
    caption: str
    nouns: tuple[CheckedNoun, ...]
    calibrated: bool
    """Whether there was a calibration for the model; without one, no noun is called unseen."""
    notes: tuple[str, ...]
    """What a reader should be told."""

    @property
    def unseen(self) -> tuple[CheckedNoun, ...]:
        """The nouns that are called not seen in the picture."""
        return tuple(noun for noun in self.nouns if noun.grounded.seen is False)

    def rows(self) -> list[dict[str, object]]:
        """One flat row for each noun, for a data frame."""
        return [
            {
                "images": self.images,
                "caption": self.caption,
                "word": noun.word,
                "lemma": noun.lemma,
                "start": noun.start,
                "n_tokens": noun.n_tokens,
                "probability": noun.probability,
                "internal_confidence": noun.grounded.confidence,
                "layer": noun.grounded.layer,
                "picture": noun.grounded.picture,
                "row": noun.grounded.row,
                "column": noun.grounded.column,
                "grounded": noun.grounded.probability,
                "seen": noun.grounded.seen,
            }
            for noun in self.nouns
        ]


def check(
    vlm: VLM,
    images: Picture | Pictures,
    *,
    caption: str | Sequence[str] | None = None,
    calibration: Calibration | None = None,
    settings: Question | None = None,
    progress: Progress | None = None,
    **options: Unpack[QuestionOptions],
) -> list[Checked]:
    """Check of each noun of a caption whether the model's own image tokens say it.

    Args:
        vlm: The model.
        images: A path, PIL image or array, or a list of them, one prompt each; as `find`.
        caption: Captions of any origin, read as if the model had said them: one for each prompt, or one for all. None:
            the model's own.
        calibration: From `calibrate`, for this model. None: that of the pocket model, which is shipped; for another
            model, none: confidences are told as they are, and no noun is called unseen.
        settings: What is asked; None: the defaults.
        progress: Told how many prompts are done.
        **options: Fields of `Question`.

    Returns:
        One entry for each prompt.

    Raises:
        ModelError: the model's sequence has no image tokens that stand for patches, with the reason.
        SettingError: a calibration of another model, or as many captions as there are no prompts for.
    """
    question = settled(Question, settings, options)
    prompts = as_list(images)
    texts = None if caption is None else captions_for(len(prompts), caption, question)
    calibration = calibration_for(vlm, calibration)
    found: list[Checked] = []
    for batch in ask(vlm, prompts, question, captions=texts):
        found += _checked(vlm, batch, question, calibration, given=texts is not None)
        if progress is not None:
            progress("prompts", len(found), len(prompts))
    return found


def _checked(
    vlm: VLM, asked: AnswerBatch, question: Question, calibration: Calibration | None, *, given: bool
) -> list[Checked]:
    """Check one batch."""
    grids = find_grids(vlm.model, asked.inputs, len(asked.rows[0]))
    if isinstance(grids, str):
        raise ModelError("What the picture supports cannot be told of this model.", seen=f"No grid: {grids}.")
    # 1. The nouns, as `find` takes them, and what image tokens say of each.
    choices = settled(FindSettings, None, {**asdict(question), "top": 1})
    targets = [t for row in range(len(asked.rows)) for t in targets_of(vlm, asked.answers, row, choices)]
    likely = probabilities_of(asked.answers, targets).tolist()
    grounds = ground(vlm, asked.inputs, grids, targets, asked.answers.texts, calibration)
    nouns = [
        CheckedNoun(t.word.text, t.word.lemma, t.word.start, len(t.word.steps), p, grounded)
        for t, p, grounded in zip(targets, likely, grounds, strict=True)
    ]
    # 2. What a reader should be told, as of a finding.
    batch = ScoredBatch(vlm, choices, asked.rows, asked.answers, given, targets, None, None)
    shared = [*batch.notes(), *([] if calibration is not None else [UNCALIBRATED])]
    return [
        Checked(
            tuple(map(name_of, opened)),
            question.prefix,
            asked.answers.texts[row],
            tuple(noun for noun, t in zip(nouns, targets, strict=True) if t.row == row),
            calibration is not None,
            batch.notes_of(row, shared),
        )
        for row, opened in enumerate(asked.rows)
    ]
