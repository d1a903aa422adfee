"""What the cache of lower blocks saves in the optimised edit: one step of Adam with it and without, side by side.

    python -m benchmarks.cost.edit_optimised

The pocket model, 100 columns of its last block, and of its last two. That both ways find the same gradient is checked.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing import gradient
from mmneurons.editing.answers import occurrences, trace_answers
from mmneurons.editing.closed_form import select_columns
from mmneurons.editing.fit import descend
from mmneurons.editing.reference import make_reference
from mmneurons.editing.request import EditRequest, given, token_goals
from mmneurons.patches.parts import pristine_columns
from mmneurons.settings import Question
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.teacher_forcing import Reader

from .timing import Ratio, rounds

SOURCE, TARGET, TOP = "dog", "cat", 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    n = parser.parse_args().rounds
    vlm = mmn.load(dtype="float32", device="cpu")
    images = [scene.image for scene in pocket.edit_set(SOURCE).edit]
    said = trace_answers(vlm, images)
    asked = EditRequest(images, Question(), said, occurrences(vlm, said, SOURCE))
    goals = token_goals(vlm, [asked], TARGET)
    reference = make_reference(vlm, [pocket.scene(650_000_000 + i).image for i in range(gradient.SAMPLE)])
    print("| columns of | cached, ms a step | whole model, ms a step | whole / cached |\n| --- | --- | --- | --- |")
    for blocks in (1, 2):
        columns = select_columns(vlm, goals, TOP, blocks)
        arms, changes = {}, []
        with frozen(vlm.model), evaluating(vlm.model):
            for name, cache in (("cached", True), ("whole", False)):
                reader = Reader(vlm, len(vlm.anatomy.blocks) - blocks, cache, 8)
                own = reader.read(images, Question(), given(vlm, asked, TARGET))
                others = reference.read(reader, SOURCE)
                changes.append(Deltas.zero(columns))
                for delta in changes[-1].parameters:
                    delta.requires_grad_()
                pristine = pristine_columns(vlm, columns)
                arms[name] = partial(step, gradient.Objective(reader, changes[-1], pristine, own, others, True))
                arms[name]()
            for cached, whole in zip(*(change.parameters for change in changes), strict=True):
                torch.testing.assert_close(cached.grad, whole.grad, rtol=1e-3, atol=1e-6)
            seconds = rounds(arms, n)
        cached, whole = (1000 * statistics.median(seconds[name]) for name in ("cached", "whole"))
        where = "the last block" if blocks == 1 else f"the last {blocks} blocks"
        print(f"| {where} | {cached:.0f} | {whole:.0f} | {Ratio.of(seconds['whole'], seconds['cached'])} |")


def step(objective: gradient.Objective) -> None:
    """One loss and its gradient."""
    for delta in objective.change.parameters:
        delta.grad = None
    with objective.change.added():
        descend(objective.losses(objective.others), objective.change.parameters)


if __name__ == "__main__":
    main()
