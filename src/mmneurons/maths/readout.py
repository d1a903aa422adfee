"""Read-out directions: what a vector written into the residual stream does to the logit of a token.

The functions take the final norm as data (`Norm`) and rows of the unembedding; see docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm as data, in float32: the one between the last block and the unembedding, or one that writes pass.

    RMSNorm: y = weight * x / sqrt(mean(x^2) + eps). LayerNorm (`centred`): the same on x - mean(x), plus bias.
    """

    weight: Float[Tensor, "hidden"]
    """gamma as it acts (1 + w where the module stores w)."""
    bias: Float[Tensor, "hidden"]
    """Zero in an RMSNorm."""
    eps: float
    centred: bool

    def scale(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch 1"]:
        """Sigma, the number that the norm divides by at x."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """The vector x without its mean over hidden (LayerNorm), or x as it is (RMSNorm)."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def unscaled(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """The vector x through everything in the norm that does not depend on the position: no scale, no bias."""
        return self.centre(x) * self.weight.to(x.device)

    def to(self, device: torch.device) -> Norm:
        """The same on another device."""
        if self.weight.device == device:
            return self
        return Norm(self.weight.to(device), self.bias.to(device), self.eps, self.centred)

    def __call__(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """What the unembedding reads of x."""
        return self.weight * self.centre(x) / self.scale(x) + self.bias


def frozen_direction(
    rows: Float[Tensor, "nouns hidden"], x: Float[Tensor, "nouns hidden"], norm: Norm
) -> Float[Tensor, "nouns hidden"]:
    """Direction of `score="logit"`: with the norm's scale frozen at x, a write w adds direction . w to rows . y.

    Args:
        rows: Unembedding rows (or differences of rows), float32.
        x: Residual stream before the final norm at the position that predicts, float32.
        norm: The final norm.

    Returns:
        weight * rows / sigma, for a LayerNorm minus its mean over hidden. Linear in the write, so contributions of
        everything that writes into x add up to the logit, biases apart.

    Source: Pan et al., Findings of ACL 2024, section 3; they leave out the final norm (`score="paper"`).
    """
    return norm.centre(norm.weight * rows) / norm.scale(x)


def jacobian_direction(
    rows: Float[Tensor, "nouns hidden"], x: Float[Tensor, "nouns hidden"], norm: Norm
) -> Float[Tensor, "nouns hidden"]:
    """Direction of `score="logprob"`: the gradient of rows . norm(x) with respect to x.

    `frozen_direction` without what lies along x: growing x itself only grows sigma.
    """
    direction = frozen_direction(rows, x, norm)
    unit = norm.centre(x) / norm.scale(x)
    return direction - unit * (unit * direction).mean(-1, keepdim=True)


def expected_row(
    probabilities: Float[Tensor, "nouns vocab"], unembed: Tensor, chunk: int = 16384
) -> Float[Tensor, "nouns hidden"]:
    """sum_v p_v u_v, the unembedding row the model expects; `unembed` (vocab, hidden) of any dtype, read in chunks."""
    total = torch.zeros(len(probabilities), unembed.shape[1], device=unembed.device, dtype=torch.float32)
    for start in range(0, len(unembed), chunk):
        total += probabilities[:, start : start + chunk] @ unembed[start : start + chunk].float()
    return total
