"""Fine-tuning of one block's `w_out`, to compare with."""

from __future__ import annotations

from dataclasses import asdict

from mmneurons.baselines.task import Facts, Schedule, Task, dense_ffn, learn
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.vlm.hooks.deltas import Deltas, all_columns

FINETUNE = Schedule(rate=5e-3, steps=60, keep=100.0)


def finetune(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """All of one block's `w_out` by Adam, stopped when all images of the edit turn.

    The loss is -log p of TARGET where SOURCE is written, and the divergence from the unedited model at the other steps
    of the same captions and, 8 images at a time, of the reference's.

    Args:
        task: What is to be said where.
        block: Which; None: the last.

    Returns:
        The patch, of full deltas.

    Raises:
        SettingError: no such block.
        ModelError: it has no dense FFN.

    Source: the baseline FT of ROME (Meng et al., NeurIPS 2022), which bounds the change of each weight where this one
        bounds what is said elsewhere.
    """
    vlm = task.vlm
    layer = len(vlm.anatomy.blocks) - 1 if block is None else block
    # All columns of one FFN, each with a change of its own.
    i, _ = dense_ffn(vlm, layer)
    lessons, change = task.lessons(layer), Deltas.zero(all_columns(vlm.anatomy, [i]), vlm.device)
    change.rows[i].requires_grad_()
    # The change acts while it is learned, and while captions are generated to see whether it is enough.
    with change.added():
        steps = learn(task, lessons, change.parameters, FINETUNE, stop=task.turned)
    return patch_of(vlm, change), {"block": layer, "steps": steps, "schedule": asdict(FINETUNE)}
