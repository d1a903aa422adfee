"""A low-rank change moves columns along a few directions that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

from mmneurons.editing.fit import Losses, descend
from mmneurons.errors import ModelError
from mmneurons.patches.parts import pristine_columns
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.hooks.deltas import Deltas, all_columns
from mmneurons.vlm.vlm import VLM


def low_rank(vlm: VLM, columns: Columns, rank: int) -> Deltas:
    """Make a low-rank change that changes nothing yet: its shares are 0, its directions random but always the same.

    Shares and directions are of the order of 1, so that one learning rate fits both.

    Raises:
        ModelError: a column is one of an expert, or cannot be written.
    """
    anatomy = vlm.anatomy
    if any(anatomy.ffns[i].n_experts is not None for i in columns.indices):
        raise ModelError("Changes are learned of dense FFNs only; some of these columns are an expert's.")
    # Shares begin at zero, directions do not: else neither would have a gradient.
    pristine = pristine_columns(vlm, columns)
    shares = {i: torch.zeros(len(held), rank, device=held.device, dtype=torch.float32) for i, held in pristine.items()}
    directions = torch.randn(rank, anatomy.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    # Shares and directions of 1 make a change about as long as the columns of its FFN are.
    length = directions.numel() ** 0.5
    units = {i: float(held.float().norm(dim=1).mean()) / length for i, held in pristine.items()}
    return Deltas(columns, shares, directions.to(next(iter(shares.values())).device), units)


def slopes(vlm: VLM, layers: Sequence[int], losses: Losses) -> dict[int, Float[torch.Tensor, "neurons"]]:
    """Compute for each FFN how steeply a loss falls as each column changes by a share of its length, in any direction.

    Args:
        vlm: The model.
        layers: The blocks whose dense FFNs count.
        losses: Parts of the loss.

    Raises:
        ModelError: these blocks have no dense FFN, or one that cannot be written.
    """
    # Experts are left out: which of them a step asks is not differentiable.
    ffns = [i for i, ffn in enumerate(vlm.anatomy.ffns) if ffn.layer in layers and ffn.n_experts is None]
    if not ffns:
        raise ModelError("Changes are learned of dense FFNs only; these blocks have none.", seen=f"layers {layers}")
    columns = all_columns(vlm.anatomy, ffns)
    pristine = pristine_columns(vlm, columns)
    # At no change the gradient is that of the weights themselves, without a copy of them.
    change = Deltas(
        columns, {i: torch.zeros_like(held, dtype=torch.float32).requires_grad_() for i, held in pristine.items()}
    )
    with change.added():
        descend(losses, change.parameters)
    found = {}
    for i, delta in change.rows.items():
        # An FFN that no step of the answers goes through has no gradient.
        steep = torch.zeros(len(delta), dtype=torch.float32) if delta.grad is None else delta.grad.norm(dim=1).cpu()
        found[i] = steep * pristine[i].float().norm(dim=1).cpu()
    return found
