"""Mean and covariance of many vectors that come in parts, and how far products with them spread."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-10
"""A variance below this share of the largest that a vector of the same length could have is rounding: no deviation."""
MEAN_ROUNDING = 1e-12
"""And so is one below this share of the square of the mean: about ten times what float32 leaves of equal numbers."""


class Moments:
    """Running mean and covariance of vectors in float32, each part read once and none of them kept.

    Parts are centred on their own mean before their products are summed (Chan, Golub and LeVeque, 1979): vectors that
    are all alike have a covariance of zero, and not what is left when two large numbers are subtracted.
    """

    def __init__(self, hidden: int, device: torch.device) -> None:
        """Begin with no vector; `hidden` is their width."""
        self.count = 0
        self.mean = torch.zeros(hidden, device=device, dtype=torch.float32)
        self._products = torch.zeros(hidden, hidden, device=device, dtype=torch.float32)

    def add(self, rows: Float[Tensor, "n hidden"]) -> None:
        """Take in vectors; their products are summed on the device where they are."""
        n, total = len(rows), self.count + len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        shift = mean.to(self.mean.device) - self.mean
        self._products += (centred.T @ centred).to(self._products.device)
        self._products.addr_(shift, shift, alpha=n * self.count / total)
        self.mean += shift * (n / total)
        self.count = total

    @property
    def covariance(self) -> Float[Tensor, "hidden hidden"]:
        """Mean of the products of what is left of the vectors without their mean."""
        return self._products / max(self.count, 1)

    def deviations(self, rows: Tensor, chunk: int = 8192) -> Float[Tensor, "n"]:
        """Standard deviation, over all vectors taken in, of their dot product with each of some rows.

        Args:
            rows: (n, hidden), any dtype, such as an unembedding.
            chunk: How many of them are converted to float32 at a time.

        Returns:
            sqrt(row . covariance . row). Infinite where it cannot be told from zero, because the products with a row
            are all alike: whatever is divided by it is then 0.
        """
        covariance = self.covariance
        # No variance along a vector of length 1 is above the trace.
        floor = ROUNDING * covariance.trace() + MEAN_ROUNDING * self.mean.pow(2).sum()
        found = []
        for part in rows.split(chunk):
            part = part.to(covariance.device).float()
            variance = ((part @ covariance) * part).sum(-1)
            is_spread = variance > floor * part.pow(2).sum(-1)
            found.append(torch.where(is_spread, variance.clamp_min(0).sqrt(), torch.inf))
        return torch.cat(found)
