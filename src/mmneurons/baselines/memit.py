"""MEMIT: what is missing behind the last of a few blocks is written by all of them, to compare with."""

from __future__ import annotations

from dataclasses import asdict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.baselines.rome import RIDGE, WRITE, learn_writes, second_moment
from mmneurons.baselines.task import Facts, Lessons, Task, dense_ffn
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
    # What the stream behind the last block is to be, where each token of TARGET is wanted.
    lessons, stream = task.lessons(layers[0]), vlm.anatomy.blocks[last].module
    change, of, steps = learn_writes(task, lessons, stream, last)
    wanted = lessons.at(stream, inputs=False) + change[of]
    # From the lowest block up, each writes its share of what is still missing.
    written = _shares(task, lessons, stream, wanted, {i: last - layer + 1 for i, layer in sorted(ffns.items())})
    facts = {"blocks": list(layers), "weight": WEIGHT, "ridge": RIDGE}
    return patch_of(vlm, written), {**facts, "steps": steps, "schedule": asdict(WRITE)}


def _shares(
    task: Task, lessons: Lessons, stream: nn.Module, wanted: Float[Tensor, "n hidden"], left: dict[int, int]
) -> Deltas:
    """The change of each FFN, by its number, of which `left` says how many blocks are to write from there on."""
    anatomy, n = task.vlm.anatomy, len(wanted)
    columns, values, so_far = all_columns(anatomy, [*left]), list[Tensor](), dict[int, Tensor]()
    coefficients = {i: torch.zeros(anatomy.ffns[i].size, n * len(left), dtype=torch.float32) for i in left}
    for k, i in enumerate(left):
        # Keys and what is missing are measured with the blocks below changed already.
        with Deltas(columns, so_far).added():
            missing = wanted - lessons.at(stream, inputs=False)
            keys = lessons.at(anatomy.ffns[i].module, inputs=True)
        mine = coefficients[i][:, k * n : (k + 1) * n]
        mine.copy_(spread(keys, second_moment(task, i), WEIGHT))
        values.append(missing / left[i])
        so_far[i] = (mine @ values[-1]).to(task.vlm.device)
    return Deltas(columns, coefficients, torch.cat(values))


def spread(
    keys: Float[Tensor, "g neurons"], moment: Float[Tensor, "neurons neurons"], weight: float
) -> Float[Tensor, "neurons g"]:
    """(w C + K^T K)^-1 K^T: `carried`, but only as far as the moment of everything else allows.

    Source: MEMIT (Meng et al., ICLR 2023), equation 14; w is here in units of the number of keys.
    """
    rows = keys.double()
    return torch.linalg.solve(weight * len(rows) * moment + rows.T @ rows, rows.T)
