"""MEMIT: what is missing behind the last of a few blocks is written by all of them, to compare with."""

from __future__ import annotations

from dataclasses import asdict

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.baselines.rome import RIDGE, WRITE, learn_writes, second_moment
from mmneurons.baselines.task import Facts, Task, dense_ffn
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.vlm.hooks.deltas import Deltas, all_columns

BLOCKS = 3
"""The last blocks, over which the change is spread."""
WEIGHT = 0.1
"""Of the reference's second moment, against that of the edit's own keys."""


def memit(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """Block after block writes its share of what is still missing from the stream behind the last of them.

    What the stream shall be is found by gradient. Block l, of those up to L, adds R K^T (w C + K K^T)^-1 to its
    `w_out`: K are its activations at each place where TARGET is wanted, R what is missing there / (L - l + 1), both
    measured with the blocks below it changed already.

    Args:
        task: What is to be said where.
        block: The last that changes; None: the model's last.

    Returns:
        The patch: a part for each block, as many directions as places and blocks.

    Raises:
        SettingError: no such block.
        ModelError: one of them has no dense FFN.

    Source: MEMIT (Meng et al., ICLR 2023), section 4.3, with each place of the edit's captions for one of their facts.
    """
    vlm = task.vlm
    last = len(vlm.anatomy.blocks) - 1 if block is None else block
    layers = range(max(0, last - BLOCKS + 1), last + 1)
    ffns = {dense_ffn(vlm, layer)[0]: layer for layer in (last, *layers)}
    columns, stream = all_columns(vlm.anatomy, sorted(ffns)), vlm.anatomy.blocks[last].module
    # What the stream is to be, where each token of TARGET is wanted.
    lessons = task.lessons(layers[0])
    change, of, steps = learn_writes(task, lessons, stream, last)
    goal, n = lessons.at(stream, inputs=False) + change[of], len(of)
    # From the lowest block up: what is missing still, and how much of it this one is to write.
    coefficients = {
        i: torch.zeros(vlm.anatomy.ffns[i].size, n * len(layers), dtype=torch.float32) for i in columns.indices
    }
    values, so_far = list[Tensor](), dict[int, Tensor]()
    for k, (i, mine) in enumerate(coefficients.items()):
        with Deltas(columns, so_far).added():
            missing = goal - lessons.at(stream, inputs=False)
            keys = lessons.at(vlm.anatomy.ffns[i].module, inputs=True)
        mine[:, k * n : (k + 1) * n] = spread(keys, second_moment(task, i), WEIGHT).float()
        values.append(missing / (last - ffns[i] + 1))
        so_far[i] = (mine[:, k * n : (k + 1) * n] @ values[-1]).to(vlm.device)
    patch = patch_of(vlm, Deltas(columns, coefficients, torch.cat(values)))
    facts = {"blocks": list(layers), "weight": WEIGHT, "ridge": RIDGE}
    return patch, {**facts, "steps": steps, "schedule": asdict(WRITE)}


def spread(
    keys: Float[Tensor, "g neurons"], moment: Float[Tensor, "neurons neurons"], weight: float
) -> Float[Tensor, "neurons g"]:
    """(w C + K^T K)^-1 K^T: `carried`, but only as far as the moment of everything else allows.

    Source: MEMIT (Meng et al., ICLR 2023), equation 14; w is here in units of the number of keys.
    """
    rows = keys.double()
    return torch.linalg.solve(weight * len(rows) * moment + rows.T @ rows, rows.T)
