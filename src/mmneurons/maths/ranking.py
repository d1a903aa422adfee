"""Which neurons come first, and what their columns say."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(scores: Float[Tensor, "neurons"], k: int) -> Int[Tensor, "k"]:
    """Indices of the k highest scores, highest first, equal scores in order of index.

    `torch.topk` leaves the order of equal scores open. k is cut to the number of scores.
    """
    k = min(k, len(scores))
    threshold = torch.topk(scores, k).values[-1]
    candidates = torch.nonzero(scores >= threshold).squeeze(1)  # in order of index
    order = torch.sort(scores[candidates], descending=True, stable=True).indices
    return candidates[order[:k]]


def said_tokens(
    columns: Float[Tensor, "neurons hidden"],
    unembed: Tensor,
    n_promoted: int = 10,
    n_suppressed: int = 3,
    chunk: int = 64,
) -> tuple[Int[Tensor, "neurons promoted"], Int[Tensor, "neurons suppressed"]]:
    """The tokens that each column pushes up and down most when it is added to the residual stream.

    Args:
        columns: Columns of `w_out`, with the sign of their activation, already through the weight of the final norm.
        unembed: (vocab, hidden), any dtype.
        n_promoted: How many tokens to give of those pushed up.
        n_suppressed: And of those pushed down.
        chunk: Columns at a time, so that vocab x neurons is never held at once.

    Returns:
        Token ids, strongest first.
    """
    up, down = [], []
    for part in columns.split(chunk):
        logits = part.to(unembed.dtype) @ unembed.T
        up.append(logits.topk(min(n_promoted, len(unembed)), dim=-1).indices)
        down.append(logits.topk(min(n_suppressed, len(unembed)), dim=-1, largest=False).indices)
    return torch.cat(up), torch.cat(down)
