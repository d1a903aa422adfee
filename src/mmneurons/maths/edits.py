"""Closed-form edits: how far each column moves along one direction that all columns share.

`features[p, i]` is what one unit of change of column i, along that direction, does at step p to the logit of the word
that is wanted less that of the word that is said. An edit with the coefficients c therefore changes that difference by
`features @ c`, which is to be 1 where SOURCE is said and 0 elsewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def smallest(wanted: Float[Tensor, "columns"]) -> Float[Tensor, "columns"]:
    """Compute the smallest edit: the shortest c with wanted . c = 1.

    Args:
        wanted: Mean features where SOURCE is said, not all zero.

    Returns:
        The coefficient of each column.
    """
    return wanted / wanted.pow(2).sum()


def selective(
    wanted: Float[Tensor, "columns"],
    reference: Float[Tensor, "steps columns"],
    weights: Float[Tensor, "steps"],
    ridge: float,
    lengths: Float[Tensor, "columns"] | None = None,
) -> Float[Tensor, "columns"]:
    """Compute the selective edit: the c with wanted . c = 1 that changes the reference steps least.

    It minimises the weighted mean of (reference @ c)^2, plus r |c / lengths|^2, where r = ridge * columns / steps *
    mean over columns of the weighted second moment: the fewer the steps, the less they say of each column.

    With the columns' own lengths, each is charged for the share of its length by which it changes. Charged for the
    change itself, a short column would move by many times its length, and act wherever its neuron is active.

    Args:
        wanted: Mean features where SOURCE is said, not all zero.
        reference: Features at steps that are to stay as they are; at least one step.
        weights: How much each of these steps counts, above 0.
        ridge: 0 or more: with 0 the reference is spared as far as possible; the larger, the nearer to the smallest.
        lengths: Of each column, in units of its coefficient, 0 or more, above 0 somewhere where `wanted` is not 0;
            None: all 1.

    Returns:
        The coefficient of each column, float32.

    Source: linear discriminants; ROME (Meng et al., NeurIPS 2022) discounts keys of text by their second moment alike.
    """
    # Counted in its own length, each column is like any other: solved there, and counted back.
    own = torch.ones_like(wanted) if lengths is None else lengths
    wanted, reference = own * wanted, own * reference
    # float64: with fewer steps than columns the second moment is singular, and only the ridge makes it invertible.
    rows, shares = reference.double(), weights.double() / weights.double().sum()
    moment = rows.T @ (rows * shares[:, None])
    r = max(ridge * rows.shape[1] / len(rows) * float(moment.diagonal().mean()), torch.finfo(torch.float32).tiny)
    # The minimum under the constraint lies along (moment + r I)^-1 wanted (Lagrange); scaled so that wanted . c = 1.
    weighed = torch.linalg.solve(moment + r * torch.eye(len(moment), dtype=moment.dtype), wanted.double())
    return (own * weighed / (weighed @ wanted.double())).float()
