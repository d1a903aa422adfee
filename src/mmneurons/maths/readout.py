"""Read-out directions: what a vector that is written into the residual stream does to the logit of a token.

The functions take the final norm as data (`Norm`) and rows of the unembedding; see docs/reference/method.md.
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
    """The factor gamma as it acts (1 + w where the module stores w)."""
    bias: Float[Tensor, "hidden"]
    """The bias, zero in an RMSNorm."""
    eps: float
    """What is added to the mean square before its root is taken."""
    centred: bool
    """Whether the mean is subtracted first: True for a LayerNorm."""

    def scale(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch 1"]:
        """Compute sigma, the number that the norm divides x by."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Subtract from x its mean over hidden (LayerNorm), or return x as it is (RMSNorm)."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def unscaled(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply to x what of the norm is the same at every position: centring and weight, without scale and bias."""
        return self.centre(x) * self.weight.to(x.device)

    def to(self, device: torch.device) -> Norm:
        """Return the same norm on another device."""
        if self.weight.device == device:
            return self
        return Norm(self.weight.to(device), self.bias.to(device), self.eps, self.centred)

    def __call__(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply the norm: the result is what the unembedding reads of the residual stream x."""
        return self.weight * self.centre(x) / self.scale(x) + self.bias


def frozen_direction(
    rows: Float[Tensor, "nouns hidden"], x: Float[Tensor, "nouns hidden"], norm: Norm
) -> Float[Tensor, "nouns hidden"]:
    """Compute the read-out direction of `score="logit"`, with the scale of the norm frozen at x.

    A write w then adds direction . w to rows . y, where y is what the norm makes of x.

    Args:
        rows: Unembedding rows (or differences of rows), float32.
        x: The residual stream before the final norm at the position that predicts, float32.
        norm: The final norm.

    Returns:
        weight * rows / sigma, for a LayerNorm minus its mean over hidden. Linear in the write, so contributions of
        everything that writes into x add up to the logit, biases apart.

    Source: Pan et al., Findings of ACL 2024, section 3; they leave out the final norm (`score="paper"`).
    """
    # Centring is symmetric: it may as well be applied to the direction, once, as to every write.
    return norm.centre(norm.weight * rows) / norm.scale(x)


def jacobian_direction(
    rows: Float[Tensor, "nouns hidden"], x: Float[Tensor, "nouns hidden"], norm: Norm
) -> Float[Tensor, "nouns hidden"]:
    """Compute the read-out direction of `score="logprob"`: the gradient of rows . norm(x) with respect to x.

    It is `frozen_direction` without its part along x: what is written along x only makes sigma grow.

    Args:
        rows: Unembedding rows (or differences of rows), float32.
        x: The residual stream before the final norm at the position that predicts, float32.
        norm: The final norm.
    """
    direction = frozen_direction(rows, x, norm)
    unit = norm.centre(x) / norm.scale(x)
    return direction - unit * (unit * direction).mean(-1, keepdim=True)


def expected_row(
    probabilities: Float[Tensor, "nouns vocab"], unembed: Tensor, chunk: int = 16384
) -> Float[Tensor, "nouns hidden"]:
    """Compute the mean unembedding row under the model's next-token probabilities: sum over v of p_v u_v.

    Args:
        probabilities: The probability of each token, for each noun.
        unembed: The unembedding, shape (vocab, hidden), any dtype; never held in float32 as a whole.
        chunk: How many rows of it are read at once.
    """
    total = torch.zeros(len(probabilities), unembed.shape[1], device=unembed.device, dtype=torch.float32)
    for start in range(0, len(unembed), chunk):
        total += probabilities[:, start : start + chunk] @ unembed[start : start + chunk].float()
    return total
