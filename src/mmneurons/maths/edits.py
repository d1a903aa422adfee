"""Which columns move how far, in closed form: coefficients of one direction.

`features[p, i]` is what one unit of change of column i, along the direction, does at step p to the logit of the word
that is wanted less that of the word that is said: an edit c does `features @ c` there. It shall be 1 where SOURCE is
said and 0 elsewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def smallest(wanted: Float[Tensor, "columns"]) -> Float[Tensor, "columns"]:
    """The shortest c with wanted . c = 1.

    Args:
        wanted: Mean features where SOURCE is said, not all zero.
    """
    return wanted / wanted.pow(2).sum()


def selective(
    wanted: Float[Tensor, "columns"],
    reference: Float[Tensor, "steps columns"],
    weights: Float[Tensor, "steps"],
    ridge: float,
) -> Float[Tensor, "columns"]:
    """The c with wanted . c = 1 that does least at the reference steps: what they share is discounted.

    Minimises the weighted mean of (reference @ c)^2, plus r |c|^2, r = ridge * columns / steps * mean over columns of
    the weighted second moment: the fewer the steps, the less they say of each column.

    Args:
        wanted: Mean features where SOURCE is said, not all zero.
        reference: Features at steps that shall stay as they are; at least one.
        weights: How much each of them counts, above 0.
        ridge: From 0 (all that the reference allows) up; the larger, the nearer to `smallest`.

    Source: linear discriminants; ROME (Meng et al., NeurIPS 2022) discounts keys of text by their second moment alike.
    """
    rows, shares = reference.double(), weights.double() / weights.double().sum()
    moment = rows.T @ (rows * shares[:, None])
    r = max(ridge * rows.shape[1] / len(rows) * float(moment.diagonal().mean()), torch.finfo(torch.float32).tiny)
    weighed = torch.linalg.solve(moment + r * torch.eye(len(moment), dtype=moment.dtype), wanted.double())
    return (weighed / (weighed @ wanted.double())).float()
