"""Changes of columns as parts of a patch, with the hashes that the columns have before any edit."""

from __future__ import annotations

from torch import Tensor

from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.vlm.columns import Columns, column_hashes
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.vlm import VLM


def patch_of(vlm: VLM, change: Deltas) -> Patch:
    """Make a patch of a change as it is: in full, or as coefficients and directions.

    Raises:
        ModelError: columns that cannot be written.
    """
    parts = [part for i in change.rows for part in _parts(vlm, change, i)]
    directions = None if change.directions is None else change.directions.detach().cpu().clone()
    return Patch(vlm.anatomy.hidden, tuple(parts), directions)


def _parts(vlm: VLM, change: Deltas, i: int) -> list[PatchPart]:
    """Make one part for an FFN, or for each of its experts."""
    ffn, mine, rows, parts = vlm.anatomy.ffns[i], change.columns.indices[i], change.scaled(i).detach().cpu(), []
    for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
        # Neurons of all experts of an FFN are counted through; a patch has a part for each expert.
        here = mine // ffn.n_neurons == (expert or 0)
        if bool(here.any()):
            inside = mine[here] % ffn.n_neurons
            hashes = column_hashes(ledger_of(vlm).pristine((ffn.layer, expert), inside))
            change_of = {"deltas" if change.directions is None else "coefficients": rows[here]}
            parts.append(PatchPart(ffn.layer, expert, inside, hashes, **change_of))
    return parts


def pristine_columns(vlm: VLM, columns: Columns) -> dict[int, Tensor]:
    """Return columns of dense FFNs as they were before any edit: (n, hidden) per FFN."""
    ledger, ffns = ledger_of(vlm), vlm.anatomy.ffns
    return {i: ledger.pristine((ffns[i].layer, None), mine) for i, mine in columns.indices.items()}
