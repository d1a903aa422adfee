"""Evidence for `grounded`: objects that a model names, whether they are there, and what its own numbers say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import numpy as np

from mmneurons.data.dataset import Item
from mmneurons.errors import ModelError, SettingError
from mmneurons.finding.calibration import FEWEST, Calibration, fit, log_odds, threshold_for
from mmneurons.finding.grounding import ground
from mmneurons.finding.scoring import Target, probabilities_of
from mmneurons.metrics.chair import Vocabulary
from mmneurons.progress import Progress
from mmneurons.settings import Question, QuestionOptions, settled
from mmneurons.vlm.asking import ask
from mmneurons.vlm.grid import find_grids
from mmneurons.vlm.vlm import VLM
from mmneurons.words import singular
from mmneurons.words.spans import words_at


@dataclass(frozen=True)
class NamedObject:
    """An object that a caption names: whether it is there, and what the model's own numbers say of it."""

    image: str
    noun: str
    present: bool
    probability: float
    """The model's next-token probability of its first token."""
    confidence: float
    """Its internal confidence."""
    layer: int
    """Where that was read: behind which block."""


def named_objects(
    vlm: VLM,
    items: Sequence[Item],
    vocabulary: Vocabulary,
    *,
    settings: Question | None = None,
    progress: Progress | None = None,
    **options: Unpack[QuestionOptions],
) -> list[NamedObject]:
    """Caption images whose objects are known, and tell of each object named what the model's own numbers say.

    Args:
        vlm: The model.
        items: Images with their true objects.
        vocabulary: The objects that count.
        settings: What is asked; None: the defaults.
        progress: Told how many images are done.
        **options: Fields of `Question`.

    Raises:
        ModelError: the model's sequence has no image tokens that stand for patches.
        SettingError: the objects of an image are not known.
    """
    question = settled(Question, settings, options)
    if unknown := [item.name for item in items if item.objects is None]:
        raise SettingError("The objects of an image are not known.", seen=unknown[0], fix="Give a manifest with them.")
    found: list[NamedObject] = []
    decode = partial(vlm.tokenizer.decode, skip_special_tokens=True)
    done = 0
    for batch in ask(vlm, [item.source for item in items], question):
        grids = find_grids(vlm.model, batch.inputs, 1)
        if isinstance(grids, str):
            raise ModelError("What the picture supports cannot be told of this model.", seen=f"No grid: {grids}.")
        # 1. Each object where a caption first names it, by the token that was said there.
        targets = [
            Target(row, word, word.steps[0], ids[word.steps[0]])
            for row, (text, ids) in enumerate(zip(batch.answers.texts, batch.answers.token_ids, strict=True))
            for word in words_at(set(vocabulary.places(text)), text, ids, decode)
        ]
        # 2. How likely it was, and how much of it the image tokens say.
        likely = probabilities_of(batch.answers, targets).tolist()
        # By the word that is said, as `check` does, not by the object's own name.
        said = [replace(t, word=replace(t.word, lemma=singular(t.word.text))) for t in targets]
        grounded = ground(vlm, batch.inputs, grids, said, batch.answers.texts, None)
        for target, p, one in zip(targets, likely, grounded, strict=True):
            item = items[batch.first + target.row]
            there = target.word.lemma in vocabulary.objects(item.objects or ())
            found.append(NamedObject(item.name, target.word.lemma, there, p, one.confidence, one.layer))
        done += len(batch.rows)
        if progress is not None:
            progress("images", done, len(items))
    return found


def calibrate(
    vlm: VLM,
    items: Sequence[Item],
    vocabulary: Vocabulary,
    *,
    recall_lost: float = 0.02,
    settings: Question | None = None,
    progress: Progress | None = None,
    **options: Unpack[QuestionOptions],
) -> Calibration:
    """Make the curve that turns internal confidence into the probability that an object is in the picture.

    Args:
        vlm: The model.
        items: Images with their true objects; not those that it will be judged on.
        vocabulary: The objects that count.
        recall_lost: The share of the objects truly named that may fall below the threshold of "not seen".
        settings: What is asked; None: the defaults.
        progress: Told how many images are done.
        **options: Fields of `Question`.

    Raises:
        ModelError, SettingError: as `named_objects`; or too little of what is named is there, or is not; or what is
            there is said by image tokens no more than what is not.
    """
    if not 0 <= recall_lost < 1:
        raise SettingError("The recall that may be lost is a share.", seen=f"{recall_lost}", fix="recall_lost=0.02")
    question = settled(Question, settings, options)
    found = named_objects(vlm, items, vocabulary, settings=question, progress=progress)
    made_by = {
        "model": vlm.facts,
        "images": len(items),
        "objects named": len(found),
        "of them there": sum(one.present for one in found),
        "prompt": question.prompt,
        "answer_prefix": question.prefix,
    }
    return curve(found, vocabulary, recall_lost, made_by)


def curve(
    found: Sequence[NamedObject], vocabulary: Vocabulary, recall_lost: float, made_by: dict[str, Any]
) -> Calibration:
    """Fit the curve to what was found already; see `calibrate`."""
    confidence = np.array([one.confidence for one in found])
    present = np.array([one.present for one in found], dtype=bool)
    n_there = int(present.sum())
    if min(n_there, len(found) - n_there) < FEWEST:
        raise SettingError(
            f"A calibration needs {FEWEST} objects that are there and {FEWEST} that are not, named by the model.",
            seen=f"Of {len(found)} objects named, {n_there} are there.",
            fix="More images, or harder ones.",
        )
    (slope,), intercept = fit(log_odds(confidence)[:, None], present)
    if slope <= 0:  # the less it is said, the likelier it would be there
        raise SettingError(
            "Internal confidence does not tell what is in these pictures from what is not: no calibration is made.",
            seen=f"Image tokens say the {n_there} objects that are there no more than the others.",
            fix="See that the objects given are those of the images; else this model cannot be calibrated so.",
        )
    made = Calibration(
        weights_hash=str(made_by["model"]["weights_hash"]),
        patches=tuple(made_by["model"].get("patches", ())),
        words=tuple(sorted(vocabulary.words)),
        slope=float(slope),
        intercept=intercept,
        threshold=0.0,
        recall_lost=0.0,
        made_by=made_by,
    )
    scores = np.array([made.probability(one.confidence) for one in found])
    threshold = threshold_for(scores, present, recall_lost)
    return replace(made, threshold=threshold, recall_lost=float((scores[present] < threshold).mean()))
