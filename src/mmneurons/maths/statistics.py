"""Means with intervals, and how far two rankings agree. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over units (images, nouns) and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Units."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float] | Float[np.ndarray, "units"], seed: int = 0) -> Estimate | None:
    """Mean and percentile bootstrap interval over units; None without any.

    Args:
        values: One number a unit, finite.
        seed: Of the bootstrap: the same values give the same interval.
    """
    units = np.asarray(values, dtype=np.float64)
    if not len(units):
        return None
    picks = np.random.default_rng(seed).integers(len(units), size=(DRAWS, len(units)))
    low, high = np.percentile(units[picks].mean(1), [2.5, 97.5])
    return Estimate(float(units.mean()), float(low), float(high), len(units))


def ratio(
    above: Sequence[float] | Float[np.ndarray, "units"],
    below: Sequence[float] | Float[np.ndarray, "units"],
    seed: int = 0,
) -> Estimate | None:
    """Ratio of the means of two numbers of each unit, resampled together; None if nothing lies below."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (above, below))
    if not len(b) or b.mean() == 0:
        return None
    picks = np.random.default_rng(seed).integers(len(a), size=(DRAWS, len(a)))
    means = b[picks].mean(1)
    shares = a[picks].mean(1)[means != 0] / means[means != 0]
    low, high = np.percentile(shares, [2.5, 97.5])
    return Estimate(float(a.mean() / b.mean()), float(low), float(high), len(a))


def ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    found = np.empty(len(values))
    found[order] = np.repeat(first + (counts - 1) / 2, counts)
    return found


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float | None:
    """Rank correlation of two scores of the same things; None if either tells none apart."""
    x, y = (r - r.mean() for r in (ranks(np.asarray(a)), ranks(np.asarray(b))))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else None


def auroc(scores: Float[np.ndarray, "n"], positive: np.ndarray) -> float | None:
    """How often a positive scores above a negative, ties counting half; None if there are not both."""
    positive = np.asarray(positive, dtype=bool).ravel()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    above = ranks(np.asarray(scores).ravel())[positive].sum() - n_positive * (n_positive - 1) / 2
    return float(above / (n_positive * n_negative))
