"""The closed form says which columns move, along which direction and how far: a patch of strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.editing.answers import TracedSteps
from mmneurons.editing.reference import Reference
from mmneurons.editing.request import TokenGoal
from mmneurons.errors import SettingError
from mmneurons.finding.reading import columns_of
from mmneurons.maths.edits import selective, smallest
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.settings import Blocks
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.paths import Directions, frozen_rows
from mmneurons.vlm.columns import Columns, lowest_block
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.vlm import VLM

SPARE = 0.001
"""Of a direction, for all tokens: of the mean diagonal of their second moment."""
NEAR = 2.0
"""Logits; steps at which what is wanted is nearer count alike."""


def select_columns(vlm: VLM, goals: Sequence[TokenGoal], top: int, blocks: Blocks) -> Columns:
    """Select the columns with the largest mean contribution, as in `find`, to the tokens said at the goals' steps.

    Args:
        vlm: The model.
        goals: The steps, and the token that is said at each.
        top: How many columns.
        blocks: Of so many of the last blocks, or of all.
    """
    anatomy = vlm.anatomy
    # Every goal adds to the same scores, so that a column that writes two forms of SOURCE counts for both.
    first = lowest_block(anatomy, blocks)
    scores = {i: torch.zeros(ffn.size, dtype=torch.float32) for i, ffn in enumerate(anatomy.ffns) if ffn.layer >= first}
    n = sum(len(goal.steps) for goal in goals)
    for goal in goals:
        # Each column read along the direction that the token's logit reads of it, step by step.
        said = anatomy.unembed[goal.said].float().cpu()
        directions = goal.steps.directions(said.expand(len(goal.steps), -1))
        for i in scores:
            ffn, read = anatomy.ffns[i], directions.at(anatomy.ffns[i].path)
            experts = [None] if ffn.n_experts is None else range(ffn.n_experts)
            pushed = torch.cat([weights.project(read, ffn.module, expert).cpu() for expert in experts], dim=1)
            scores[i] += (goal.steps.activations[i].float() * pushed).sum(0) / n
    # Columns that write against SOURCE come last, but they come: the more columns, the better others can be spared.
    return Columns.best(anatomy, scores, top, above=-torch.inf)


@dataclass(frozen=True, eq=False)
class Update:
    """An Update says how columns move for one token goal."""

    goal: TokenGoal
    row: Float[Tensor, "hidden"]
    """What the logit of the token that is wanted, less that of the token that is said, reads."""
    columns: Columns
    along: dict[int, Float[Tensor, "hidden"]]
    """For each FFN the direction."""
    coefficients: Float[Tensor, "columns"]

    def effect(self, steps: TracedSteps) -> Float[Tensor, "steps"]:
        """Compute what it adds to the difference of the two logits, to first order; mean 1 at the goal's own steps."""
        return self.adds(steps, self.row.expand(len(steps), -1))

    def adds(self, steps: TracedSteps, rows: Float[Tensor, "steps hidden"]) -> Float[Tensor, "steps"]:
        """Compute what it adds, at each step, to what that step's row of `rows` reads, to first order."""
        directions, total = steps.directions(rows), torch.zeros(len(steps), dtype=torch.float32)
        parts = self.coefficients.split([len(mine) for mine in self.columns.indices.values()])
        for (i, mine), part in zip(self.columns.indices.items(), parts, strict=True):
            reach = directions.at(self.columns.anatomy.ffns[i].path) @ self.along[i] / self.along[i].pow(2).sum()
            total += (steps.activations[i][:, mine].float() @ part) * reach
        return total


def features(
    steps: TracedSteps, row: Float[Tensor, "hidden"], columns: Columns, along: dict[int, Tensor]
) -> Float[Tensor, "steps columns"]:
    """Compute what one unit of change of each column adds to what `row` reads at each step, to first order."""
    directions = steps.directions(row.expand(len(steps), -1))
    found = []
    for i, mine in columns.indices.items():
        reach = directions.at(columns.anatomy.ffns[i].path) @ along[i] / along[i].pow(2).sum()
        found.append(steps.activations[i][:, mine].float() * reach[:, None])
    return torch.cat(found, dim=1)


def logit_margin(steps: TracedSteps, rows: Float[Tensor, "steps hidden"]) -> Float[Tensor, "steps"]:
    """Compute how far the token said at each step leads over the one whose unembedding row is given, in logits."""
    said = steps.anatomy.unembed[steps.token_ids.to(steps.anatomy.unembed.device)].float().cpu()
    return (steps.directions(said - rows).at(None) * steps.residual).sum(1)


def solve(
    vlm: VLM, columns: Columns, goals: Sequence[TokenGoal], kept: Sequence[TracedSteps], ridge: float | None
) -> list[Update]:
    """Solve for the update of each goal: the effect at its steps is 1 in the mean, and small elsewhere.

    Args:
        vlm: The model.
        columns: The columns that move.
        goals: The steps, the token that is said there and the token to be said instead.
        kept: Steps that are to stay as they are, beside those of the other goals.
        ridge: See `selective`; None: the smallest change along what `row` reads, whatever it does elsewhere.

    Raises:
        SettingError: no column is active at a goal's steps.
    """
    updates, alike, lengths = [], None if ridge is None else _alike(vlm), column_lengths(columns)
    for goal in goals:
        # 1. A direction for each FFN, and what each column does along it at the goal's own steps.
        row = goal.row(vlm.anatomy.unembed)
        along = spared_directions(goal.steps, row, columns, alike)
        wanted = features(goal.steps, row, columns, along).mean(0)
        # A coefficient moves its column by 1 / |along|: in that unit the column is this long.
        own = lengths * torch.cat([along[i].norm().expand(len(mine)) for i, mine in columns.indices.items()])
        if not bool((wanted * own).any()):
            raise SettingError("None of these columns is active where SOURCE is said.", fix="Choose other neurons.")
        # 2. Coefficients: as little as will do, or as little as will do elsewhere.
        others = [*kept, *(other.steps for other in goals if other is not goal)]
        if ridge is None or not any(len(steps) for steps in others):  # or there is nothing else to spare
            coefficients = smallest(wanted)
        else:
            shared = torch.cat([features(steps, row, columns, along) for steps in others])
            weights = torch.cat([_flip_weights(vlm, steps, goal) for steps in others])
            coefficients = selective(wanted, shared, weights, ridge, own)
        updates.append(Update(goal, row, columns, along, coefficients))
    return updates


def column_lengths(columns: Columns) -> Float[Tensor, "columns"]:
    """Compute the length of each column as it is now, float32, on the CPU."""
    places = [(i, int(index)) for i, mine in columns.indices.items() for index in mine]
    return columns_of(columns.anatomy, places, torch.device("cpu")).norm(dim=1)


def spared_directions(
    steps: TracedSteps, row: Float[Tensor, "hidden"], columns: Columns, alike: Float[Tensor, "hidden hidden"] | None
) -> dict[int, Tensor]:
    """Compute for each FFN the direction that adds to what `row` reads and changes the logits of all tokens least.

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
    # How any logit reads a write is linear once the norms' scales are frozen: one row of `every` for each of hidden.
    residual, *norms = (part[len(steps) // 2].expand(hidden, -1) for part in (steps.residual, *steps.norms))
    every = Directions(anatomy, frozen_rows(anatomy, torch.eye(hidden, dtype=torch.float32), residual), norms)
    for i, mean in found.items():
        reads = every.at(anatomy.ffns[i].path)
        # The least that the logits of all tokens move, by their second moment, for one unit along `mean`.
        moment = (reads.T @ alike @ reads).double()
        r = SPARE * moment.diagonal().mean()
        found[i] = torch.linalg.solve(moment + r * torch.eye(hidden, dtype=torch.float32), mean.double()).float()
    return found


def _alike(vlm: VLM) -> Float[Tensor, "hidden hidden"]:
    # Second moment of all unembedding rows, some at a time: a vocabulary in float32 may not fit.
    tokens = vlm.anatomy.unembed[: vlm.n_tokens]
    total = torch.zeros(vlm.anatomy.hidden, vlm.anatomy.hidden, device=tokens.device, dtype=torch.float32)
    for part in tokens.split(8192):
        total += part.float().T @ part.float()
    return total.cpu() / len(tokens)


def _flip_weights(vlm: VLM, steps: TracedSteps, goal: TokenGoal) -> Float[Tensor, "steps"]:
    """Weigh each step by 1 / (the lead of the token said there over the token wanted)², in logits."""
    # Of a removal, whichever of the runners-up is nearest.
    wanted = set(goal.runners_up) if goal.wanted is None else {goal.wanted}
    rows = vlm.anatomy.unembed[sorted(wanted)].float().cpu()
    leads = torch.stack([logit_margin(steps, each.expand(len(steps), -1)) for each in rows]).amin(0)
    return leads.clamp_min(NEAR).pow(-2)


def unit_patch(vlm: VLM, columns: Columns, updates: Sequence[Update]) -> Patch:
    """Make one patch of strength 1 of all updates."""
    # Updates that share a direction share its row.
    directions: list[Tensor] = []
    terms: list[tuple[int, int, Tensor]] = []
    for update in updates:
        parts = update.coefficients.split([len(mine) for mine in columns.indices.values()])
        for i, part in zip(columns.indices, parts, strict=True):
            scaled = update.along[i] / update.along[i].pow(2).sum()
            number = next((j for j, known in enumerate(directions) if torch.equal(known, scaled)), len(directions))
            if number == len(directions):
                directions.append(scaled)
            terms.append((i, number, part))
    size = len(directions)
    rows = {i: torch.zeros(len(mine), size, dtype=torch.float32) for i, mine in columns.indices.items()}
    for i, number, part in terms:
        rows[i][:, number] += part
    return patch_of(vlm, Deltas(columns, rows, torch.stack(directions)))


def needed_strength(vlm: VLM, update: Update) -> float:
    """Estimate, to first order, the strength that turns each of an update's steps, but those that it hardly reaches."""
    # What is said is compared with what is wanted; of a removal, with the likeliest other token.
    logits = vlm.anatomy.logits(update.goal.steps.residual).float().cpu().clone()
    said = logits[:, update.goal.said].clone()
    logits[:, update.goal.said] = -torch.inf
    ahead = said - (logits.max(-1).values if update.goal.wanted is None else logits[:, update.goal.wanted])
    effect = update.effect(update.goal.steps)
    reached = effect > 0.1
    return float((ahead[reached] / effect[reached]).max().clamp_min(0.1)) if bool(reached.any()) else 1.0


def flip_risk(vlm: VLM, reference: Reference, updates: Sequence[Update]) -> Float[Tensor, "steps"]:
    """Estimate the flip risk of each reference step: 1 / the strength at which another token is said, to first order.

    That token may be the one wanted, SOURCE, or the second likeliest. The risk is minus infinity where SOURCE is said.
    """
    steps, unembed = reference.steps, vlm.anatomy.unembed
    tokens = {update.goal.said for update in updates} | {
        update.goal.wanted for update in updates if update.goal.wanted is not None
    }
    risk = torch.full((len(steps),), -torch.inf, dtype=torch.float32)
    said = unembed[steps.token_ids.to(unembed.device)].float().cpu()
    # Another token is said where what the updates add outweighs its margin: 1 / strength = added / margin.
    for others in (reference.seconds, *(torch.full_like(reference.seconds, token) for token in sorted(tokens))):
        rows = unembed[others.to(unembed.device)].float().cpu()
        adds = torch.stack([update.adds(steps, rows - said) for update in updates]).sum(0)
        risk = risk.maximum(adds / logit_margin(steps, rows).clamp_min(1e-3))
    # Steps that say SOURCE are to change.
    for update in updates:
        risk[steps.token_ids == update.goal.said] = -torch.inf
    return risk
