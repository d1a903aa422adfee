"""From internal confidence to the probability that an object is in the picture: a logistic curve, made for one model.

`calibrate` makes it from images whose objects are known; the pocket model's is shipped with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit, logit

from mmneurons.errors import FormatError, SettingError
from mmneurons.files import check_facts, decode_json, json_bytes, read_text, write_whole

FEATURES = ("internal confidence", "probability", "frequency")
"""What the curve is of: log odds of the internal confidence and of the noun's probability, and log frequency."""
EDGE = 1e-7
"""Probabilities are kept so far from 0 and 1, where log odds have no end."""
RIDGE = 1e-3
"""What holds coefficients where classes are apart, over the mean loss."""
SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """How likely it is that an object which a model names is in the picture, by what the model's own numbers say.

    It holds for one model and the objects that it was made with: other nouns are not judged.
    """

    weights_hash: str
    """Of the model that it was made with."""
    counts: Mapping[str, int]
    """For each object that can be judged, in how many of the captions it was made with it was named."""
    n_captions: int
    means: tuple[float, ...]
    """Of the features, in the order of `FEATURES`."""
    deviations: tuple[float, ...]
    coefficients: tuple[float, ...]
    """Of the features, standardised."""
    intercept: float
    threshold: float
    """Where an object is less likely to be in the picture than this, it is called not seen."""
    recall_lost: float
    """The share of objects truly named that fell below the threshold where it was chosen."""
    made_by: Mapping[str, Any]
    """Model, images and settings."""

    def judges(self, lemma: str) -> bool:
        """Whether a noun is one of the objects that it was made with."""
        return lemma in self.counts

    def probability(self, lemma: str, confidence: float, probability: float) -> float:
        """The probability that an object is in the picture.

        Args:
            lemma: The noun.
            confidence: Its internal confidence.
            probability: The model's next-token probability of it.
        """
        x = features([confidence], [probability], [self.counts.get(lemma, 0)], self.n_captions)[0]
        standard = (x - np.array(self.means)) / np.array(self.deviations)
        return float(expit(standard @ np.array(self.coefficients) + self.intercept))

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
            FormatError: it is no calibration.
        """
        read = decode_json(read_text(path), _Document, str(path))
        check_facts(read.made_by, str(path))
        fields = msgspec.structs.asdict(read)
        fields.pop("schema")
        if any(len(fields[name]) != len(FEATURES) for name in ("means", "deviations", "coefficients")):
            raise FormatError(f"{path} is damaged.", seen=f"A calibration has {len(FEATURES)} features.")
        return Calibration(**fields)

    def check_model(self, weights_hash: str) -> None:
        """Refuse another model than the one it was made with.

        Raises:
            SettingError: the weights differ.
        """
        if weights_hash != self.weights_hash:
            raise SettingError(
                "This calibration was made with another model: its confidences mean something else.",
                seen=f"Made with weights {self.weights_hash[:12]}; this model's are {weights_hash[:12]}.",
                fix="mmneurons calibrate --images FOLDER --out FILE.json",
            )


_Finite = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """A `Calibration` as it is written."""

    schema: Literal[1]
    weights_hash: str
    counts: dict[str, _Count]
    n_captions: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    means: tuple[_Finite, ...]
    deviations: tuple[Annotated[float, msgspec.Meta(gt=0, le=1e9)], ...]
    coefficients: tuple[_Finite, ...]
    intercept: _Finite
    threshold: _Finite
    recall_lost: _Finite
    made_by: dict[str, Any]


def features(
    confidences: Sequence[float], probabilities: Sequence[float], counts: Sequence[int], n_captions: int
) -> Float[np.ndarray, "n features"]:
    """What the curve is of, for n nouns."""
    odds = [logit(np.clip(np.asarray(part, dtype=np.float64), EDGE, 1 - EDGE)) for part in (confidences, probabilities)]
    frequency = np.log((np.asarray(counts, dtype=np.float64) + 1) / (n_captions + 1))
    return np.stack([*odds, frequency], axis=1)


def fit(
    x: Float[np.ndarray, "n features"], present: np.ndarray
) -> tuple[Float[np.ndarray, "features"], Float[np.ndarray, "features"], Float[np.ndarray, "features"], float]:
    """Fit a logistic curve: means and deviations of the features, coefficients, intercept.

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
    return means, deviations, found[:-1], float(found[-1])


def threshold_for(scores: Float[np.ndarray, "n"], present: np.ndarray, recall_lost: float) -> float:
    """The largest threshold below which no more than a share of the objects that are there lie.

    Args:
        scores: Of each object named, larger where it is likelier to be there.
        present: Whether it is.
        recall_lost: The share, from 0 to 1.
    """
    there = np.sort(scores[np.asarray(present, dtype=bool)])
    return float(there[int(np.floor(recall_lost * len(there)))]) if len(there) else float("-inf")


def shipped(folder: Path) -> Calibration | None:
    """The calibration that lies in a model's folder, if there is one."""
    path = folder / "calibration.json"
    return Calibration.load(path) if path.is_file() else None
