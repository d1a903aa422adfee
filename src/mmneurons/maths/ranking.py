"""Ranking of neurons by score, and the tokens that their columns promote."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOGITS_AT_ONCE = 1 << 22
"""How many logits (16 MiB in float32) `said_tokens` holds at once."""


def top_k(scores: Float[Tensor, "*rows neurons"], k: int) -> Int[Tensor, "*rows k"]:
    """Find the indices of the k highest scores of each row, highest first, equal scores in order of index.

    Args:
        scores: One number for each neuron, no NaN.
        k: How many are wanted; all of them if there are fewer.
    """
    # torch.topk leaves the order of equal scores open; it only gives the lowest score of each row that is taken. Of
    # those that are equal to it, as many come first as there is room for, and a stable sort gives the order.
    k = min(k, scores.shape[-1])
    lowest = torch.topk(scores, k).values[..., -1:]
    above, equal = scores > lowest, scores == lowest
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    taken = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    candidates = torch.nonzero(taken)[:, -1].view(*scores.shape[:-1], k)  # in order of index, k in each row
    order = torch.sort(scores.gather(-1, candidates), descending=True, stable=True).indices
    return candidates.gather(-1, order)


def said_tokens(
    columns: Float[Tensor, "neurons hidden"],
    unembed: Tensor,
    n_promoted: int = 10,
    n_suppressed: int = 3,
    *,
    deviations: Float[Tensor, "vocab"] | None = None,
) -> tuple[Int[Tensor, "neurons promoted"], Int[Tensor, "neurons suppressed"]]:
    """Find the tokens that each column pushes up and down most when it is added to the residual stream.

    Args:
        columns: Columns of `w_out`, with the sign of their activation, already through the weight of the final norm.
        unembed: The unembedding, shape (vocab, hidden), any dtype.
        n_promoted: How many of the tokens that are pushed up are returned.
        n_suppressed: How many of the tokens that are pushed down are returned.
        deviations: What the push of each token is divided by; None: nothing.

    Returns:
        Token ids of the promoted and of the suppressed tokens, strongest first.
    """
    up, down = [], []
    chunk = max(1, LOGITS_AT_ONCE // len(unembed))  # so that vocab x neurons is never held at once
    for part in columns.split(chunk):
        logits = token_pushes(part, unembed, deviations)
        up.append(_extreme(logits, n_promoted, largest=True))
        down.append(_extreme(logits, n_suppressed, largest=False))
    return torch.cat(up), torch.cat(down)


def token_pushes(
    columns: Float[Tensor, "n hidden"], unembed: Tensor, deviations: Float[Tensor, "vocab"] | None = None
) -> Float[Tensor, "n vocab"]:
    """How far each column pushes each token, in the dtype of `unembed`; divided by `deviations`, in float32."""
    pushes = columns.to(device=unembed.device, dtype=unembed.dtype) @ unembed.T
    return pushes if deviations is None else pushes.float() / deviations.to(pushes.device)


def _extreme(values: Float[Tensor, "rows width"], k: int, *, largest: bool, group: int = 128) -> Int[Tensor, "rows k"]:
    """Find the places of the k largest, or smallest, values of each row, the most extreme first.

    A row is cut into groups. The k most extreme values lie in the k groups whose own extremes are the most extreme, so
    that far fewer values are sorted than `torch.topk` would sort on the whole row.
    """
    rows, width = values.shape
    # Grouping pays only for rows much wider than what is left of them.
    k, whole = min(k, width), width // group * group
    if width < 4 * k * group:
        return values.topk(k, dim=-1, largest=largest).indices
    groups = values[:, :whole].view(rows, -1, group)
    best = (groups.amax(-1) if largest else groups.amin(-1)).topk(k, dim=-1, largest=largest).indices
    inside = torch.arange(group, device=values.device)
    places = (best[:, :, None] * group + inside).flatten(1)
    # Columns beyond the last whole group belong to none, and are looked at in any case.
    rest = torch.arange(whole, width, device=values.device).expand(rows, -1)
    places = torch.cat([places, rest], dim=1)
    return places.gather(1, values.gather(1, places).topk(k, dim=-1, largest=largest).indices)
