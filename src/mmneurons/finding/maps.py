"""Where in the pictures the neurons look: one more pass over the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.finding.lookup import no_such_neuron
from mmneurons.finding.rereading import keep_positions
from mmneurons.finding.result import Grid, NounFinding
from mmneurons.finding.scoring import REGION_SIZES, Scored
from mmneurons.neurons import Neuron
from mmneurons.vlm.grid import Grids, PatchGrid
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM, Inputs


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


def neuron_maps(vlm: VLM, inputs: Inputs, grids: Grids, neuron: Neuron) -> list[tuple[Grid, ...]]:
    """Return the activations of one neuron at the image tokens, as they are: for each row one map a picture.

    Raises:
        SettingError: the model has no such neuron.
    """
    ffn = vlm.anatomy.find(neuron)
    if ffn is None:
        raise no_such_neuron(vlm.anatomy, neuron)
    place = vlm.anatomy.ffns.index(ffn)
    wanted: list[Int[Tensor, "_"]] = [torch.tensor([], dtype=torch.long) for _ in vlm.anatomy.ffns]
    wanted[place] = torch.tensor([neuron.index + (neuron.expert or 0) * ffn.n_neurons])
    with record(vlm.anatomy, keep_positions(all_positions(grids)), neurons=wanted, writes=False) as seen:
        vlm.read(inputs)
    fired = seen.activations(place)[..., 0].float().cpu()
    return [_as_grids(row, mine) for row, mine in zip(fired, grids, strict=True)]


def _maps(
    vlm: VLM, inputs: Inputs, grids: Grids, scored: Scored, slots: Sequence[Int[Tensor, "_"]]
) -> list[Float[Tensor, "_ patches"]]:
    """For each target a(position) * sign(a where scored) of some slots at the image tokens; in the paper the gate."""
    places = [scored.places(i, mine.tolist()) for i, mine in enumerate(slots)]
    wanted = [sorted({n for row in places for ffn, n in row if ffn == i}) for i in range(len(vlm.anatomy.ffns))]
    gates = scored.choices.score == "paper"
    keep = keep_positions(all_positions(grids))
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
        fired = scored.activations[i, slots[i].to(device)]
        if scored.baseline is not None:  # as the words: above its baseline, or below
            fired = fired - scored.baseline[i, slots[i].to(device)]
        found.append(maps if gates else maps * fired.sign()[:, None])
    return found


def all_positions(grids: Grids) -> Int[Tensor, "batch patches"]:
    """The positions of all pictures of each row, one after the other; shorter rows filled up."""
    rows = [torch.cat([grid.positions for grid in row]) for row in grids]
    width = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def _as_grids(values: Float[Tensor, "patches"], grids: tuple[PatchGrid, ...]) -> tuple[Grid, ...]:
    parts = values.split([len(grid.positions) for grid in grids] + [len(values) - sum(len(g.positions) for g in grids)])
    return tuple(
        tuple(tuple(row) for row in part.view(grid.rows, grid.columns).tolist())
        for part, grid in zip(parts, grids, strict=False)
    )
