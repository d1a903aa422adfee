"""Where in the pictures the neurons look, and what is left of their scores without them: one more pass each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mmneurons.finding.result import Grid, NounFinding
from mmneurons.finding.scoring import (
    REGION_SIZES,
    Scored,
    Target,
    read_out,
    scored_activations,
    unembed_rows,
)
from mmneurons.maths.ranking import top_k
from mmneurons.settings import FindSettings
from mmneurons.vlm.grid import Grids, PatchGrid
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.traces import pick_trace
from mmneurons.vlm.vlm import VLM, Answers, Inputs


def with_maps(vlm: VLM, inputs: Inputs, grids: Grids, scored: Scored, nouns: list[NounFinding]) -> list[NounFinding]:
    """Add each top neuron's maps and the heat maps of the top k (the mean of a(position) * sign(a where scored)).

    One prefill; image tokens stand before the answer, which they cannot see, so that it is not read again.
    """
    mapped = []
    for i, (noun, values) in enumerate(zip(nouns, _maps(vlm, inputs, grids, scored, list(scored.ranked)), strict=True)):
        mine = grids[scored.targets[i].row]
        means = values.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device)[:, None]
        mapped.append(
            replace(
                noun,
                neurons=tuple(
                    replace(neuron, maps=_as_grids(value, mine))
                    for neuron, value in zip(noun.neurons, values, strict=False)
                ),
                regions={k: _as_grids(means[k - 1], mine) for k in REGION_SIZES if k <= len(values)},
            )
        )
    return mapped


def region_maps(
    vlm: VLM, inputs: Inputs, grids: Grids, scored: Scored, sets: Sequence[Sequence[Int[Tensor, "_"]]]
) -> list[list[tuple[Grid, ...]]]:
    """Mean maps of any sets of neurons, given as slots: for each target one heat map a set. One prefill."""
    asked = [torch.cat(list(mine)).unique() if mine else torch.tensor([], dtype=torch.long) for mine in sets]
    return [
        [_as_grids(values[torch.searchsorted(slots, one)].mean(0), grids[target.row]) for one in mine]
        for mine, slots, values, target in zip(
            sets, asked, _maps(vlm, inputs, grids, scored, asked), scored.targets, strict=True
        )
    ]


def _maps(
    vlm: VLM, inputs: Inputs, grids: Grids, scored: Scored, slots: Sequence[Int[Tensor, "_"]]
) -> list[Float[Tensor, "_ patches"]]:
    """For each target a(position) * sign(a where scored) of some slots at the image tokens; in the paper the gate."""
    places = [scored.places(i, mine) for i, mine in enumerate(slots)]
    wanted = [sorted({n for row in places for ffn, n in row if ffn == i}) for i in range(len(vlm.anatomy.ffns))]
    gates = scored.choices.score == "paper"
    keep = _keep_positions(_all_positions(grids))
    with record(vlm.anatomy, keep, neurons=[torch.tensor(w).long() for w in wanted], gates=gates, writes=False) as seen:
        vlm.read(inputs)
    device = scored.scores.device
    recorded = [
        (seen.stacked(seen.gates[i])[..., torch.tensor(w).long()] if gates else seen.activations(i)).to(device)
        for i, w in enumerate(wanted)
    ]
    column_of = [{neuron: j for j, neuron in enumerate(w)} for w in wanted]
    found = []
    for i, mine in enumerate(places):
        row = scored.targets[i].row
        values = [recorded[ffn][row, :, column_of[ffn][n]] for ffn, n in mine]
        maps = torch.stack(values).float() if values else torch.empty(0, 0, device=device, dtype=torch.float32)
        found.append(maps if gates else maps * scored.activations[i, slots[i].to(device)].sign()[:, None])
    return found


def with_blank(vlm: VLM, grey: Inputs, answers: Answers, scored: Scored, nouns: list[NounFinding]) -> list[NounFinding]:
    """Add the share of each top neuron's score that is lost when the same words are read with a grey image."""
    again = reread(vlm, grey, answers, scored.targets, scored.choices)
    compared = []
    for i, noun in enumerate(nouns):
        left = again.of(i, scored.places(i, scored.ranked[i][: len(noun.neurons)]))
        neurons = (
            replace(neuron, lost_without_image=1 - value / neuron.score if neuron.score else None)
            for neuron, value in zip(noun.neurons, left, strict=True)
        )
        compared.append(replace(noun, neurons=tuple(neurons)))
    return compared


@dataclass(frozen=True, eq=False)
class Reread:
    """The scores of all neurons for the same words after another prompt: another image, or one changed on its way."""

    neurons: list[Int[Tensor, "targets _"]]
    """Per FFN: which neuron, counted through all its experts, each slot is."""
    scores: list[Float[Tensor, "targets _"]]
    """Per FFN."""

    def of(self, target: int, places: Sequence[tuple[int, int]]) -> list[float]:
        """Scores of neurons given as (FFN, neuron); 0 where a neuron's expert was not asked."""
        return [float(self.scores[ffn][target][self.neurons[ffn][target] == neuron].sum()) for ffn, neuron in places]

    def top(self, target: int, k: int) -> list[tuple[int, int]]:
        """The k neurons that score highest, as (FFN, neuron)."""
        whole = torch.cat([scores[target] for scores in self.scores])
        ends = torch.tensor([scores.shape[1] for scores in self.scores]).cumsum(0)
        found = []
        for slot in top_k(whole, k).tolist():
            ffn = int(torch.bucketize(torch.tensor(slot), ends, right=True))
            inside = slot - int(ends[ffn]) + self.scores[ffn].shape[1]
            found.append((ffn, int(self.neurons[ffn][target, inside])))
        return found


def reread(vlm: VLM, inputs: Inputs, answers: Answers, targets: Sequence[Target], choices: FindSettings) -> Reread:
    """Score all neurons anew where the same words are read after `inputs`, in one pass over prompt and answer.

    Everything is that of the new pass: activations, norm scales and probabilities.
    """
    steps: list[list[int]] = [[] for _ in range(len(answers.token_ids))]
    spots = []
    end = answers.sequences.shape[1]  # counted from the end: some models put the picture before the first position
    for target in targets:
        spots.append([target.row, len(steps[target.row])])
        steps[target.row].append(answers.n_prompt + target.step - 1 - end)
    width = max(map(len, steps))
    positions = torch.tensor([row + [-1] * (width - len(row)) for row in steps])
    paper = choices.score == "paper"
    with record(vlm.anatomy, _keep_positions(positions), gates=paper) as recording:
        vlm.read(inputs, answers)
    trace = pick_trace(recording, torch.tensor(spots))
    token_ids = [target.token_id for target in targets]
    rows = unembed_rows(vlm.anatomy, token_ids, trace.residual)
    directions = read_out(vlm, trace, token_ids, rows, choices)
    activations = scored_activations(trace, choices)
    paths = [None if paper else ffn.path for ffn in vlm.anatomy.ffns]
    return Reread(
        [trace.neurons(i) for i in range(len(activations))],
        [
            fired * trace.projected(i, directions.at(path))
            for i, (fired, path) in enumerate(zip(activations, paths, strict=True))
        ],
    )


def _all_positions(grids: Grids) -> Int[Tensor, "batch patches"]:
    """The positions of all pictures of each row, one after the other; shorter rows filled up."""
    rows = [torch.cat([grid.positions for grid in row]) for row in grids]
    width = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def _keep_positions(positions: Int[Tensor, "batch kept"]) -> Callable[[Tensor], Tensor]:
    def keep(values: Shaped[Tensor, "batch positions *width"]) -> Shaped[Tensor, "batch kept *width"]:
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, positions.to(values.device)]

    return keep


def _as_grids(values: Float[Tensor, "patches"], grids: tuple[PatchGrid, ...]) -> tuple[Grid, ...]:
    parts = values.split([len(grid.positions) for grid in grids] + [len(values) - sum(len(g.positions) for g in grids)])
    return tuple(
        tuple(tuple(row) for row in part.view(grid.rows, grid.columns).tolist())
        for part, grid in zip(parts, grids, strict=False)
    )
