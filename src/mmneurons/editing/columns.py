"""Which columns move, along which direction, and how far against each other: a patch of strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.editing.answers import TracedSteps
from mmneurons.editing.request import TokenGoal
from mmneurons.errors import SettingError
from mmneurons.maths.edits import selective, smallest
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.settings import Blocks
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.paths import Directions, frozen_rows
from mmneurons.vlm.columns import Columns, column_hashes, lowest_block
from mmneurons.vlm.vlm import VLM

SPARE = 0.001
"""Of a direction, for all tokens: of the mean diagonal of their second moment."""
NEAR = 2.0
"""Logits; steps at which what is wanted is nearer count alike."""


def writers(vlm: VLM, goals: Sequence[TokenGoal], top: int, blocks: Blocks) -> Columns:
    """The columns that write most of what is said at the goals' steps: mean contribution, as of `find`.

    Args:
        vlm: The model.
        goals: Where what is said.
        top: How many columns.
        blocks: Of so many of the last blocks, or of all.
    """
    anatomy = vlm.anatomy
    first = lowest_block(anatomy, blocks)
    scores = {i: torch.zeros(ffn.size, dtype=torch.float32) for i, ffn in enumerate(anatomy.ffns) if ffn.layer >= first}
    n = sum(len(goal.steps) for goal in goals)
    for goal in goals:
        said = anatomy.unembed[goal.said].float().cpu()
        directions = goal.steps.directions(said.expand(len(goal.steps), -1))
        for i in scores:
            ffn, read = anatomy.ffns[i], directions.at(anatomy.ffns[i].path)
            experts = [None] if ffn.n_experts is None else range(ffn.n_experts)
            pushed = torch.cat([weights.project(read, ffn.module, expert).cpu() for expert in experts], dim=1)
            scores[i] += (goal.steps.activations[i].float() * pushed).sum(0) / n
    return Columns.best(anatomy, scores, top)


@dataclass(frozen=True, eq=False)
class Move:
    """How columns move for one goal."""

    goal: TokenGoal
    row: Float[Tensor, "hidden"]
    """What the logit of the token that is wanted, less that of the token that is said, reads."""
    columns: Columns
    along: dict[int, Float[Tensor, "hidden"]]
    """For each FFN the direction."""
    coefficients: Float[Tensor, "columns"]

    def effect(self, steps: TracedSteps) -> Float[Tensor, "steps"]:
        """What it does at steps to the difference of the two logits, to first order; mean 1 at the goal's own."""
        return self.adds(steps, self.row.expand(len(steps), -1))

    def adds(self, steps: TracedSteps, rows: Float[Tensor, "steps hidden"]) -> Float[Tensor, "steps"]:
        """What it adds at each step to what a row of its own reads of the logits, to first order."""
        directions, total = steps.directions(rows), torch.zeros(len(steps), dtype=torch.float32)
        parts = self.coefficients.split([len(mine) for mine in self.columns.indices.values()])
        for (i, mine), part in zip(self.columns.indices.items(), parts, strict=True):
            reach = directions.at(self.columns.anatomy.ffns[i].path) @ self.along[i] / self.along[i].pow(2).sum()
            total += (steps.activations[i][:, mine].float() @ part) * reach
        return total


def features(
    steps: TracedSteps, row: Float[Tensor, "hidden"], columns: Columns, along: dict[int, Tensor]
) -> Float[Tensor, "steps columns"]:
    """What one unit of change of each column along its direction adds to `row`'s logit at each step, to first order."""
    directions = steps.directions(row.expand(len(steps), -1))
    found = []
    for i, mine in columns.indices.items():
        reach = directions.at(columns.anatomy.ffns[i].path) @ along[i] / along[i].pow(2).sum()
        found.append(steps.activations[i][:, mine].float() * reach[:, None])
    return torch.cat(found, dim=1)


def lead(steps: TracedSteps, rows: Float[Tensor, "steps hidden"]) -> Float[Tensor, "steps"]:
    """How far what is said at each step is ahead of the token whose unembedding row is given, in logits."""
    said = steps.anatomy.unembed[steps.token_ids.to(steps.anatomy.unembed.device)].float().cpu()
    return (steps.directions(said - rows).at(None) * steps.residual).sum(1)


def moves_for(
    vlm: VLM, columns: Columns, goals: Sequence[TokenGoal], kept: Sequence[TracedSteps], ridge: float | None
) -> list[Move]:
    """For each goal the change that does 1 at its steps, in the mean, and little elsewhere.

    Args:
        vlm: The model.
        columns: What moves.
        goals: Where what shall be said instead of what.
        kept: Steps that shall stay as they are; so shall those of the other goals.
        ridge: See `selective`; None: the smallest change, whatever it does elsewhere, along what `row` reads.

    Raises:
        SettingError: no column is active at a goal's steps.
    """
    moves, alike = [], None if ridge is None else _alike(vlm)
    for goal in goals:
        row = goal.row(vlm.anatomy.unembed)
        along = sparing(goal.steps, row, columns, alike)
        wanted = features(goal.steps, row, columns, along).mean(0)
        if not bool(wanted.any()):
            raise SettingError("None of these columns is active where SOURCE is said.", fix="Choose other neurons.")
        others = [*kept, *(other.steps for other in goals if other is not goal)]
        if ridge is None:
            coefficients = smallest(wanted)
        else:
            shared = torch.cat([features(steps, row, columns, along) for steps in others])
            weights = torch.cat([_endangered(vlm, steps, goal) for steps in others])
            coefficients = selective(wanted, shared, weights, ridge)
        moves.append(Move(goal, row, columns, along, coefficients))
    return moves


def sparing(
    steps: TracedSteps, row: Float[Tensor, "hidden"], columns: Columns, alike: Float[Tensor, "hidden hidden"] | None
) -> dict[int, Tensor]:
    """For each FFN the direction that adds to what `row` reads, and least to the logits of all tokens.

    Along what `row` itself reads, tokens whose rows are like it would rise as well.

    Args:
        steps: Where; how every token reads a write is taken from the one in the middle.
        row: What is to rise.
        columns: Of which FFNs.
        alike: Second moment of the unembedding rows of all tokens; None: along what `row` itself reads.
    """
    anatomy, hidden = steps.anatomy, len(row)
    wanted = steps.directions(row.expand(len(steps), -1))
    found = {i: wanted.at(anatomy.ffns[i].path).mean(0) for i in columns.indices}
    if alike is None:
        return found
    residual, *norms = (part[len(steps) // 2].expand(hidden, -1) for part in (steps.residual, *steps.norms))
    every = Directions(anatomy, frozen_rows(anatomy, torch.eye(hidden, dtype=torch.float32), residual), norms)
    for i, mean in found.items():
        reads = every.at(anatomy.ffns[i].path)
        moment = (reads.T @ alike @ reads).double()
        r = SPARE * moment.diagonal().mean()
        found[i] = torch.linalg.solve(moment + r * torch.eye(hidden, dtype=torch.float32), mean.double()).float()
    return found


def _alike(vlm: VLM) -> Float[Tensor, "hidden hidden"]:
    tokens = vlm.anatomy.unembed[: vlm.n_tokens]
    total = torch.zeros(vlm.anatomy.hidden, vlm.anatomy.hidden, device=tokens.device, dtype=torch.float32)
    for part in tokens.split(8192):
        total += part.float().T @ part.float()
    return total.cpu() / len(tokens)


def _endangered(vlm: VLM, steps: TracedSteps, goal: TokenGoal) -> Float[Tensor, "steps"]:
    """How much what is said at each step is in danger: 1 / the square of its lead over what is wanted."""
    wanted = set(goal.runners_up) if goal.wanted is None else {goal.wanted}
    rows = vlm.anatomy.unembed[sorted(wanted)].float().cpu()
    leads = torch.stack([lead(steps, each.expand(len(steps), -1)) for each in rows]).amin(0)
    return leads.clamp_min(NEAR).pow(-2)


def patch_of(vlm: VLM, columns: Columns, moves: Sequence[Move]) -> Patch:
    """The moves together, as a patch of strength 1."""
    directions: list[Tensor] = []
    rows: dict[int, list[tuple[int, Tensor]]] = {i: [] for i in columns.indices}
    for move in moves:
        parts = move.coefficients.split([len(mine) for mine in columns.indices.values()])
        for i, part in zip(columns.indices, parts, strict=True):
            scaled = move.along[i] / move.along[i].pow(2).sum()
            number = next((j for j, known in enumerate(directions) if torch.equal(known, scaled)), len(directions))
            if number == len(directions):
                directions.append(scaled)
            rows[i].append((number, part))
    return Patch(vlm.anatomy.hidden, tuple(_parts(vlm, columns, rows, len(directions))), torch.stack(directions))


def _parts(
    vlm: VLM, columns: Columns, moves: dict[int, list[tuple[int, Tensor]]], n_directions: int
) -> list[PatchPart]:
    """One part for each FFN or expert, with the hashes of its columns before any edit."""
    ledger, parts = ledger_of(vlm), []
    for i, mine in columns.indices.items():
        ffn = columns.anatomy.ffns[i]
        coefficients = torch.zeros(len(mine), n_directions, dtype=torch.float32)
        for number, c in moves[i]:
            coefficients[:, number] += c
        for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
            here = mine // ffn.n_neurons == (expert or 0)
            if bool(here.any()):
                inside = mine[here] % ffn.n_neurons
                hashes = column_hashes(ledger.pristine((ffn.layer, expert), inside))
                parts.append(PatchPart(ffn.layer, expert, inside, hashes, coefficients=coefficients[here]))
    return parts
