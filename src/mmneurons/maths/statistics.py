"""Means with 95 % intervals, and measures of how far two rankings agree.

Shares of yes and no have Wilson intervals, means over pairs resample the units that form the pairs, and everything else
has a BCa bootstrap interval over units (Efron, 1987). Where the units show no spread there is no interval: one of width
zero would promise too much.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DRAWS = 2000
"""How many bootstrap samples an interval takes."""
ALIKE = 1e-9
"""An interval narrower than this is taken for rounding, and left out."""

Values = Sequence[float] | Float[np.ndarray, "units"]


@dataclass(frozen=True)
class Estimate:
    """A mean over units (images, nouns) and its 95 % interval."""

    mean: float
    low: float | None
    """Lower end of the interval; None, like `high`, for one unit or for units all alike, which show no spread."""
    high: float | None
    """Upper end of the interval."""
    n: int
    """The number of units."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")


def estimate(values: Values, seed: int = 0) -> Estimate | None:
    """Estimate a mean over units, with its BCa interval; None without any unit.

    Args:
        values: One finite number for each unit.
        seed: The seed of the bootstrap: the same values give the same interval.
    """
    units = np.asarray(values, dtype=np.float64)
    if not len(units):
        return None
    return Estimate(float(units.mean()), *_bca(lambda x, axis: x.mean(axis), [units], seed), len(units))


def share(values: Iterable[bool | float], seed: int = 0) -> Estimate | None:
    """Estimate the mean of shares: with a Wilson interval where each is a plain yes or no (1 or 0), else as `estimate`.

    So none of 25 is 0 with an interval up to 0.13, not a certain 0.

    Args:
        values: One number from 0 to 1 for each unit.
        seed: The seed of the bootstrap.
    """
    units = np.asarray([float(value) for value in values])
    if not len(units) or not np.isin(units, (0, 1)).all():
        return estimate(units, seed)
    return Estimate(float(units.mean()), *_wilson(int(units.sum()), len(units)), len(units))


def ratio(above: Values, below: Values, seed: int = 0) -> Estimate | None:
    """Estimate the ratio of the means of two numbers of each unit, resampled together; None if the lower mean is 0."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (above, below))
    if not len(b) or b.mean() == 0:
        return None
    return Estimate(
        float(a.mean() / b.mean()), *_bca(lambda x, y, axis: x.mean(axis) / y.mean(axis), [a, b], seed), len(a)
    )


def share_of(hits: Values, counts: Values, seed: int = 0) -> Estimate | None:
    """Estimate the share of hits among all things counted, with the units resampled; None if nothing was counted.

    Where all or none are hits, the interval is Wilson's of as many units as have any: things of one unit are not
    independent.

    Args:
        hits: How many things of each unit are hits.
        counts: How many things each unit has.
        seed: The seed of the bootstrap.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (hits, counts))
    found = ratio(a, b, seed)
    if found is None or 0 < found.mean < 1:
        return found
    n = int((b > 0).sum())
    return Estimate(found.mean, *_wilson(n if found.mean else 0, n), found.n)


def over_pairs(
    sums: Float[np.ndarray, "units units"], counts: Float[np.ndarray, "units units"], seed: int = 0
) -> Estimate | None:
    """Estimate a mean over pairs of different units, with a BCa interval that resamples units; None without any pair.

    Pairs share units, so that pairs are not independent: resampling them would make the interval far too narrow. A unit
    that is drawn twice makes no pair with itself.

    Args:
        sums: For each pair of units, the sum over what is compared between them; symmetric, the diagonal is not read.
        counts: How many things that sum is over.
        seed: The seed of the bootstrap.

    Returns:
        An estimate whose n is the number of units that are part of a pair.
    """
    # Units without a pair tell nothing, and resamples full of them would have no value.
    apart = ~np.eye(len(counts), dtype=bool)
    used = ((counts > 0) & apart).any(1)
    total, number = ((matrix * apart)[np.ix_(used, used)] for matrix in (sums, counts))
    n = int(used.sum())
    if not n:
        return None

    def mean(picks: np.ndarray, axis: int) -> np.ndarray:
        # How often each unit was drawn (t) is all that counts: the sum over drawn pairs is t . total . t, and as the
        # diagonal is zero, a unit drawn twice makes no pair with itself.
        rows = picks.reshape(-1, picks.shape[-1]).astype(int)
        times = np.zeros((len(rows), n))
        np.add.at(times, (np.arange(len(rows))[:, None], rows), 1)
        found = ((times @ total) * times).sum(1) / ((times @ number) * times).sum(1)
        return found.reshape(picks.shape[:-1])

    return Estimate(float(total.sum() / number.sum()), *_bca(mean, [np.arange(n)], seed), n)


def _wilson(hits: int, n: int) -> tuple[float, float] | tuple[None, None]:
    """Compute Wilson's 95 % interval for a share; none of a single unit."""
    from scipy.stats import binomtest  # here and below: `import mmneurons` need not wait for it

    if n < 2:
        return None, None
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


def _bca(
    statistic: Callable[..., np.ndarray], data: Sequence[np.ndarray], seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Compute the BCa interval; none where it cannot be told: one unit, units all alike, resamples without a value."""
    from scipy.stats import bootstrap

    n = len(data[0])
    if n < 2:
        return None, None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # what is degenerate is told by its NaN
        low, high = bootstrap(
            data,
            statistic,
            paired=True,  # the numbers of one unit stay together
            vectorized=True,
            n_resamples=DRAWS,
            batch=max(1, 1_000_000 // n),  # so that about a million indices are held at once
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return (float(low), float(high)) if high - low > ALIKE else (None, None)


def ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Rank values from 0 upwards; equal values share the mean of their ranks."""
    # `first` is where a run of equal values begins in the sorted order, `counts` how long it is.
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    found = np.empty(len(values))
    found[order] = np.repeat(first + (counts - 1) / 2, counts)
    return found


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float | None:
    """Compute Spearman's rank correlation of two scores of the same things; None if either has all things equal."""
    x, y = (r - r.mean() for r in (ranks(np.asarray(a)), ranks(np.asarray(b))))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else None


def auroc(scores: Float[np.ndarray, "n"], positive: np.ndarray) -> float | None:
    """Compute how often a positive scores above a negative, ties counting half; None if there are not both.

    Args:
        scores: One number for each thing.
        positive: Which of them are positives, True or False.
    """
    positive = np.asarray(positive, dtype=bool).ravel()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    # The ranks of the positives, less what they would be if no negative lay below them, count the pairs (Mann-Whitney).
    above = ranks(np.asarray(scores).ravel())[positive].sum() - n_positive * (n_positive - 1) / 2
    return float(above / (n_positive * n_negative))
