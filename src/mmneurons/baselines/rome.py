"""ROME: one block's `w_out` changes by rank one, to compare with.

Restated for captions: what is wanted is TARGET at the steps that write SOURCE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.baselines.task import Facts, Lessons, Schedule, Task, dense_ffn, learn
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.vlm.context import hooked
from mmneurons.vlm.hooks.deltas import Deltas, all_columns
from mmneurons.vlm.locking import restored
from mmneurons.vlm.teacher_forcing import Batch

WRITE = Schedule(rate=0.1, steps=25, keep=0.0625)
"""How what a block shall write is learned (ROME and MEMIT); the rate in units of the stream behind the block."""
SURE = 0.01
"""It is learned when -log p of the target is below this in the mean. (Theirs: 0.05, which turned fewer captions.)"""
DECAY = 0.005
"""Weight of its mean square, in the same units."""
RIDGE = 0.1
"""Added to the second moment, in units of its mean diagonal: a reference has fewer steps than a block has columns."""


def rome(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """One block's `w_out` W becomes W + (v - W k) (C^-1 k)^T / (k^T C^-1 k).

    k is the mean activation where TARGET is wanted, v what the block must write there for the model to say it (found by
    gradient), C the second moment of activations at steps that are to stay. Several forms of TARGET (cat, cats), or
    tokens of it, have a key each, and all are carried exactly.

    Args:
        task: What is to be said where.
        block: Which; None: the last but one.

    Returns:
        The patch: coefficients of one direction for each form.

    Raises:
        SettingError: no such block.
        ModelError: it has no dense FFN.

    Source: ROME (Meng et al., NeurIPS 2022), section 3.1. Theirs takes the key at the last token of a subject, where a
        caption has none: ours is the step that writes the word. Their C is of 100,000 tokens of text.
    """
    vlm = task.vlm
    layer = max(0, len(vlm.anatomy.blocks) - 2) if block is None else block
    i, ffn = dense_ffn(vlm, layer)
    # What the block is to write, by gradient; then the weights that write it at the mean key, in closed form.
    lessons = task.lessons(layer)
    change, of, steps = learn_writes(task, lessons, ffn.module, layer)
    fired = lessons.at(ffn.module, inputs=True)
    keys = torch.stack([fired[of == j].mean(0) for j in range(len(change))])
    coefficients = carried(keys, second_moment(task, i)).float()
    patch = patch_of(vlm, Deltas(all_columns(vlm.anatomy, [i]), {i: coefficients}, change))
    return patch, {"block": layer, "steps": steps, "schedule": asdict(WRITE), "ridge": RIDGE}


def carried(keys: Float[Tensor, "g neurons"], moment: Float[Tensor, "neurons neurons"]) -> Float[Tensor, "neurons g"]:
    """The c with keys @ c = 1 that does least to activations of this second moment: C^-1 K (K^T C^-1 K)^-1.

    Args:
        keys: Activations, linearly independent.
        moment: Positive definite; float64.

    Returns:
        float64. Added to W^T, `c @ values` makes W map key j to what it was plus value j.

    Source: ROME (Meng et al., NeurIPS 2022), equation 2, there for one key.
    """
    # float64: the moment is nearly singular.
    weighed = torch.linalg.solve(moment, keys.T.double())
    return weighed @ torch.linalg.inv(keys.double() @ weighed)


def second_moment(task: Task, i: int) -> Float[Tensor, "neurons neurons"]:
    """Second moment of one FFN's activations at the steps that are to stay, with a ridge; float64."""
    # A reference has fewer steps than a block has columns: without a ridge there is no inverse.
    rows = torch.cat([steps.activations[i] for steps in task.kept]).double()
    moment = rows.T @ rows / len(rows)
    return moment + max(RIDGE * float(moment.diagonal().mean()), 1e-12) * torch.eye(len(moment), dtype=moment.dtype)


def learn_writes(
    task: Task, lessons: Lessons, module: nn.Module, layer: int
) -> tuple[Float[Tensor, "tokens hidden"], Int[Tensor, "n"], int]:
    """What a module must write more where each token is wanted, for the model to say it: one vector for each token.

    Args:
        task: What is to be said where.
        lessons: The same, read from this block or below.
        module: What writes.
        layer: The block that holds it, or that it is.

    Returns:
        The vectors, float32; for each place, which of the tokens is wanted there; steps of Adam taken.
    """
    # A vector for each token of TARGET, whichever caption wants it: forms and further tokens have vectors of their own.
    tokens, of = lessons.wanted.unique(return_inverse=True)
    stream = lessons.at(task.vlm.anatomy.blocks[layer].module, inputs=False)
    # In units of the stream behind the block: models differ in these by orders of magnitude.
    unit = stream.pow(2).mean().sqrt().item()
    change = torch.zeros(len(tokens), stream.shape[1], device=task.vlm.device, requires_grad=True, dtype=torch.float32)

    def within(batch: Batch) -> AbstractContextManager[None]:
        mine = torch.searchsorted(tokens, batch.tokens[batch.turn, 0].contiguous()).to(change.device)
        return _writing(batch, module, lambda like: unit * change[mine].to(like))

    steps = learn(
        task,
        replace(lessons, reminders=[]),
        [change],
        WRITE,
        stop=lambda step, missing: missing < SURE,
        within=within,
        penalty=lambda: DECAY * change.pow(2).mean(),
    )
    return unit * change.detach().cpu(), of, steps


@restored
def _writing(batch: Batch, module: nn.Module, rows: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it a module writes more where a token of TARGET is wanted: rows made like the tensor that it writes."""

    def write(module: nn.Module, args: tuple, output: Any) -> Any:
        # A block gives its stream alone, or first of several things.
        whole = output if isinstance(output, Tensor) else output[0]
        places = tuple(each[batch.turn].to(whole.device) for each in batch.places)
        new = batch.rows_of(whole).index_put(places, rows(whole), accumulate=True).view_as(whole)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    with hooked([partial(module.register_forward_hook, write)]):
        yield
