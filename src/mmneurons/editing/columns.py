"""Which columns move, along which direction, and how far against each other: a patch of strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.editing.goals import Goal
from mmneurons.editing.ledger import ledger_of
from mmneurons.editing.patch import Patch, PatchPart, column_hashes
from mmneurons.editing.steps import Steps
from mmneurons.errors import SettingError
from mmneurons.maths.edits import selective, smallest
from mmneurons.maths.ranking import top_k
from mmneurons.neurons import Neuron
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of `w_out` in order, FFN after FFN."""

    anatomy: Anatomy
    indices: dict[int, Int[Tensor, "n"]]
    """Per FFN, by its number, counted through all its experts; rising."""

    @property
    def neurons(self) -> list[Neuron]:
        """Whose they are."""
        return [self.anatomy.ffns[i].neuron(index) for i, mine in self.indices.items() for index in mine.tolist()]

    @staticmethod
    def of(anatomy: Anatomy, neurons: Sequence[Neuron]) -> Columns:
        """Those of given neurons.

        Raises:
            SettingError: the model has no such neuron, or none is given.
        """
        if not neurons:
            raise SettingError("No neuron is given whose column could move.")
        found: dict[int, list[int]] = {}
        for neuron in set(neurons):
            ffn = anatomy.find(neuron)
            if ffn is None:
                raise SettingError(f"The model has no neuron {neuron}.")
            found.setdefault(anatomy.ffns.index(ffn), []).append((neuron.expert or 0) * ffn.n_neurons + neuron.index)
        return Columns(anatomy, {i: torch.tensor(sorted(mine)) for i, mine in sorted(found.items())})


def writers(vlm: VLM, goals: Sequence[Goal], top: int, blocks: int | None) -> Columns:
    """The columns that write most of what is said at the goals' steps: mean contribution, as of `find`.

    Args:
        vlm: The model.
        goals: Where what is said.
        top: How many columns.
        blocks: Of so many of the last blocks; None: of all.
    """
    anatomy = vlm.anatomy
    first = 0 if blocks is None else len(anatomy.blocks) - blocks
    scores = {i: torch.zeros(ffn.size) for i, ffn in enumerate(anatomy.ffns) if ffn.layer >= first}
    n = sum(len(goal.steps) for goal in goals)
    for goal in goals:
        said = anatomy.unembed[goal.said].float().cpu()
        ways = goal.steps.directions(said.expand(len(goal.steps), -1))
        for i in scores:
            ffn, read = anatomy.ffns[i], ways.at(anatomy.ffns[i].way)
            experts = [None] if ffn.n_experts is None else range(ffn.n_experts)
            pushed = torch.cat([weights.project(read, ffn.module, expert).cpu() for expert in experts], dim=1)
            scores[i] += (goal.steps.activations[i].float() * pushed).sum(0) / n
    whole = torch.cat(list(scores.values()))
    ranked = top_k(whole, min(top, int((whole > 0).sum())))
    ends = torch.tensor([len(part) for part in scores.values()]).cumsum(0)
    of = torch.bucketize(ranked, ends, right=True)
    starts = torch.nn.functional.pad(ends, (1, 0))
    return Columns(
        anatomy, {i: (ranked[of == j] - starts[j]).sort().values for j, i in enumerate(scores) if bool((of == j).any())}
    )


@dataclass(frozen=True, eq=False)
class Move:
    """How columns move for one goal."""

    goal: Goal
    row: Float[Tensor, "hidden"]
    """What the logit of the token that is wanted, less that of the token that is said, reads."""
    columns: Columns
    along: dict[int, Float[Tensor, "hidden"]]
    """For each FFN the direction: what `row` reads of its writes, mean over the goal's steps."""
    coefficients: Float[Tensor, "columns"]

    def effect(self, steps: Steps) -> Float[Tensor, "steps"]:
        """What it does at steps to the difference of the two logits, to first order; mean 1 at the goal's own."""
        return features(steps, self.row, self.columns, self.along) @ self.coefficients


def features(
    steps: Steps, row: Float[Tensor, "hidden"], columns: Columns, along: dict[int, Tensor]
) -> Float[Tensor, "steps columns"]:
    """What one unit of change of each column along its direction adds to `row`'s logit at each step, to first order."""
    ways = steps.directions(row.expand(len(steps), -1))
    found = []
    for i, mine in columns.indices.items():
        reach = ways.at(columns.anatomy.ffns[i].way) @ along[i] / along[i].pow(2).sum()
        found.append(steps.activations[i][:, mine].float() * reach[:, None])
    return torch.cat(found, dim=1)


def moves_for(
    vlm: VLM, columns: Columns, goals: Sequence[Goal], kept: Sequence[Steps], ridge: float | None
) -> list[Move]:
    """For each goal the change that does 1 at its steps, in the mean, and little elsewhere.

    Args:
        vlm: The model.
        columns: What moves.
        goals: Where what shall be said instead of what.
        kept: Steps that shall stay as they are; so shall those of the other goals.
        ridge: See `selective`; None: the smallest change, whatever it does elsewhere.

    Raises:
        SettingError: no column is active at a goal's steps.
    """
    moves = []
    for goal in goals:
        row = goal.row(vlm.anatomy.unembed)
        ways = goal.steps.directions(row.expand(len(goal.steps), -1))
        along = {i: ways.at(vlm.anatomy.ffns[i].way).mean(0) for i in columns.indices}
        wanted = features(goal.steps, row, columns, along).mean(0)
        if not bool(wanted.any()):
            raise SettingError("None of these columns is active where SOURCE is said.", fix="Choose other neurons.")
        others = [*kept, *(other.steps for other in goals if other is not goal)]
        if ridge is None:
            coefficients = smallest(wanted)
        else:
            shared = torch.cat([features(steps, row, columns, along) for steps in others])
            coefficients = selective(wanted, shared, ridge)
        moves.append(Move(goal, row, columns, along, coefficients))
    return moves


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
        coefficients = torch.zeros(len(mine), n_directions)
        for number, c in moves[i]:
            coefficients[:, number] += c
        for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
            here = mine // ffn.n_neurons == (expert or 0)
            if bool(here.any()):
                inside = mine[here] % ffn.n_neurons
                hashes = column_hashes(ledger.pristine((ffn.layer, expert), inside))
                parts.append(PatchPart(ffn.layer, expert, inside, hashes, coefficients=coefficients[here]))
    return parts
