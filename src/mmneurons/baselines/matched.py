"""The closed form of `edit` on random columns, which write as much as those that it would have taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.controls import column_norms, loudness, matched
from mmneurons.baselines.task import Facts, Task
from mmneurons.editing.closed_form import select_columns
from mmneurons.editing.edit import edit
from mmneurons.editing.request import TokenGoal, token_goals
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.vlm import VLM


def random(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """An edit of matched random columns; `block` does not count.

    Raises:
        SettingError: there are not as many columns beside those that `edit` would take.
    """
    # As many as `edit` would take, from the same blocks, then its closed form on these.
    goals = token_goals(task.vlm, task.requests, task.target)
    chosen = select_columns(task.vlm, goals, task.settings.top, task.settings.blocks)
    stand_ins = matched_neurons(task.vlm, goals, chosen, task.seed)
    if len(stand_ins) < (n := len(chosen.neurons)):
        raise SettingError(
            f"There are no {n} other columns that could stand in for those of the edit.",
            seen=f"{len(stand_ins)} are left in its blocks.",
            fix=f"Compare smaller edits: EditSettings(top={n // 2})",
        )
    patch = edit(
        task.vlm,
        list(task.requests[0].images),
        source=task.source,
        target=task.target,
        reference=task.reference or "own",
        neurons=stand_ins,
        settings=replace(task.settings, method="selective", block=None),
        progress=lambda stage, done, total: task.tell(stage),
    )
    return patch, {"steps": 0, "search": patch.provenance["search"]}


def matched_neurons(vlm: VLM, goals: Sequence[TokenGoal], chosen: Columns, seed: int) -> list[Neuron]:
    """Random neurons for others: for each one of the same FFN, about as loud where SOURCE is said, in the mean."""
    n = sum(len(goal.steps) for goal in goals)
    mean = [
        sum(
            (goal.steps.activations[i].float().abs().sum(0) for goal in goals),
            torch.zeros(ffn.size, dtype=torch.float32),
        )
        / n
        for i, ffn in enumerate(vlm.anatomy.ffns)
    ]
    # One step that stands for all; every expert's neurons have slots, in order.
    step = Replay(vlm.anatomy, goals[0].said, torch.empty(0, dtype=torch.float32), mean, [None] * len(mean), [])
    slots = torch.cat([mine + int(step.slot_starts[i]) for i, mine in chosen.indices.items()])
    loud = loudness(step.activations, step.experts, column_norms(vlm.anatomy))
    (drawn,) = matched(step.slot_starts, loud, slots, 1, seed, as_many=True).sets  # edits of one size
    return [step.neuron(slot) for slot in drawn.unique().tolist()]
