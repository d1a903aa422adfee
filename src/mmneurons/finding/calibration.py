"""From internal confidence to the probability that an object is in the picture: a logistic curve, made for one model.

`calibrate` makes it from images whose objects are known; the pocket model's is shipped with it. It is of the internal
confidence alone: how likely a noun is where it stands depends on who wrote the caption, what image tokens say does not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit, logit

from mmneurons.errors import FormatError, SettingError
from mmneurons.files import check_facts, decode_json, json_bytes, read_text, write_whole
from mmneurons.finding.grounded import Share
from mmneurons.words import Phrases, Word

EDGE = 1e-7
"""Probabilities are kept so far from 0 and 1, where log odds have no end."""
RIDGE = 1e-3
"""What holds coefficients where classes are apart, over the mean loss; of features in units of their deviations."""
FEWEST = 10
"""Objects that are there, and objects that are not, without which no curve is made: of fewer it would be chance."""
SCHEMA = 1
MAKE = "mmneurons calibrate --images MANIFEST.json --out FILE.json"
"""The command that makes a calibration; a folder of images does not say what is in them."""


@dataclass(frozen=True)
class Calibration:
    """A Calibration turns internal confidence into the probability that a named object is in the picture.

    It holds for one model and the words that it was made with: other nouns are not judged.
    """

    weights_hash: str
    """Of the model that it was made with."""
    patches: tuple[str, ...]
    """The patches that were applied to it."""
    words: tuple[str, ...]
    """The objects that can be judged, and other words for them; in the singular."""
    slope: float
    """Of the log odds of the internal confidence, above 0: the more image tokens say it, the likelier it is there."""
    intercept: float
    threshold: float
    """Where an object is less likely to be in the picture than this, it is called not seen."""
    recall_lost: float
    """The share of objects truly named that fell below the threshold where it was chosen."""
    made_by: Mapping[str, Any]
    """Model, images and settings."""

    def judges(self, lemma: str) -> bool:
        """Whether a noun is one of the words that it was made with."""
        return lemma in self.words

    def has_longer(self, noun: Word, caption: str) -> bool:
        """Whether a noun of a caption is a part of a longer word that it was made with: a hot dog is no dog."""
        return any(
            start <= noun.start and noun.stop <= stop and stop - start > noun.stop - noun.start
            for start, stop, _ in self._compounds.places(caption)
        )

    @cached_property
    def _compounds(self) -> Phrases:
        return Phrases({word: word for word in self.words if " " in word})

    def probability(self, confidence: float) -> float:
        """The probability that an object of this internal confidence is in the picture."""
        return float(expit(self.slope * log_odds(confidence) + self.intercept))

    def seen(self, probability: float) -> bool:
        """Whether an object of this probability is called seen."""
        return probability >= self.threshold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_whole(path, json_bytes({"schema": SCHEMA, **asdict(self)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FormatError: it is no calibration, or one of another schema.
        """
        text = read_text(path)
        schema = decode_json(text, _Schema, str(path)).schema
        if schema != SCHEMA:
            raise FormatError(
                f"This version reads calibrations of schema {SCHEMA}.",
                seen=f"{path} says schema {str(schema)[:40]}.",
                fix=MAKE,
            )
        read = decode_json(text, _Document, str(path))
        check_facts(read.made_by, str(path))
        fields = msgspec.structs.asdict(read)
        fields.pop("schema")
        return Calibration(**fields)

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Whether a model is the one that it was made with, by the model's facts."""
        return facts["weights_hash"] == self.weights_hash and tuple(facts.get("patches", ())) == self.patches

    def check_model(self, facts: Mapping[str, Any]) -> None:
        """Refuse another model than the one that it was made with.

        Raises:
            SettingError: the weights differ, or the patches that are applied.
        """
        if not self.fits(facts):
            raise SettingError(
                "This calibration was made with another model: its confidences mean something else.",
                seen=f"Made with {_named(self.weights_hash, self.patches)}; this model has "
                f"{_named(str(facts['weights_hash']), facts.get('patches', ()))}.",
                fix=MAKE,
            )


_Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Rising = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _Schema(msgspec.Struct):
    """The version, read first, so that a file of another version is not called damaged."""

    schema: Any = None


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """A `Calibration` as it is written."""

    schema: Literal[1]
    weights_hash: str
    patches: tuple[str, ...]
    words: tuple[str, ...]
    slope: _Rising
    intercept: _Finite
    threshold: Share
    recall_lost: Share
    made_by: dict[str, Any]


def _named(weights_hash: str, patches: Sequence[str]) -> str:
    """Name weights, and the patches that are applied to them, by their hashes."""
    return f"weights {weights_hash[:12]} and {' '.join(patch[:12] for patch in patches) or 'no'} patches"


def log_odds(probabilities: Any) -> Any:
    """Log odds of one probability or an array of them, kept away from 0 and 1."""
    return logit(np.clip(np.asarray(probabilities, dtype=np.float64), EDGE, 1 - EDGE))


def fit(
    x: Float[np.ndarray, "n features"], present: Bool[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "features"], float]:
    """Fit a logistic curve: the coefficient of each feature, and the intercept.

    Raises:
        SettingError: all are present, or none.
    """
    y = np.asarray(present, dtype=np.float64)
    if not 0 < y.sum() < len(y):
        raise SettingError(
            "A calibration needs objects that are there and objects that are not, named by the model.",
            seen=f"Of {len(y)} objects named, {int(y.sum())} are there.",
            fix="More images, or harder ones.",
        )
    means, deviations = x.mean(0), np.maximum(x.std(0), 1e-6)
    standard = (x - means) / deviations

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = standard @ w[:-1] + w[-1]
        value = np.logaddexp(0, z).mean() - (y * z).mean() + RIDGE * (w[:-1] ** 2).sum()
        error = (expit(z) - y) / len(y)
        return float(value), np.append(standard.T @ error + 2 * RIDGE * w[:-1], error.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    coefficients = found[:-1] / deviations
    return coefficients, float(found[-1] - means @ coefficients)


def threshold_for(scores: Float[np.ndarray, "n"], present: Bool[np.ndarray, "n"], recall_lost: float) -> float:
    """The largest threshold below which no more than a share of the objects that are there lie.

    Args:
        scores: Of each object named, larger where it is likelier to be there.
        present: Whether it is.
        recall_lost: The share, from 0 to less than 1.
    """
    there = np.sort(scores[np.asarray(present, dtype=bool)])
    return float(there[int(np.floor(recall_lost * len(there)))]) if len(there) else float("-inf")


def shipped(folder: Path) -> Calibration | None:
    """The calibration that lies in a model's folder, if there is one."""
    return Calibration.load(path) if (path := folder / "calibration.json").is_file() else None
