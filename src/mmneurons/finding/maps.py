"""Where in the image the neurons look, and what is left of their scores without the image: one more pass each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import BatchFeature

from mmneurons.finding.result import Grid, NounFinding
from mmneurons.finding.scoring import REGION_SIZES, Scored, columns_of, pick_moments, read_out, scored_activations
from mmneurons.vlm.grid import PatchGrid
from mmneurons.vlm.recording import Recording, record
from mmneurons.vlm.vlm import VLM, Answers


def with_maps(
    vlm: VLM, inputs: BatchFeature, grid: PatchGrid, scored: Scored, nouns: list[NounFinding]
) -> list[NounFinding]:
    """Add each top neuron's map and the heat maps of the top k (the mean of a(position) * sign(a where scored)).

    One prefill; image tokens stand before the caption, which they cannot see, so that it is not read again.
    """
    needed = torch.unique(torch.cat(scored.ranked))
    keeps, start = [], 0
    for block in vlm.anatomy.blocks:
        mine = needed[(needed >= start) & (needed < start + block.n_neurons)] - start
        keeps.append(_keep_patches(grid.positions, mine))
        start += block.n_neurons
    gates = scored.choices.score == "paper"
    with record(vlm.anatomy, keeps, gates=gates, writes=False) as recording:
        vlm.read(inputs)
    recorded = recording.gates if gates else recording.activations
    values = torch.cat([Recording.stacked(parts).to(needed.device) for parts in recorded], dim=2)
    place = torch.full((scored.scores.shape[1],), -1, device=needed.device)
    place[needed] = torch.arange(len(needed), device=needed.device)
    mapped = []
    for i, noun in enumerate(nouns):
        order = scored.ranked[i]
        signs = 1.0 if gates else scored.activations[i, order].sign()  # the paper maps the raw gate
        maps = (values[scored.targets[i].row][:, place[order]].float() * signs).T
        means = maps.cumsum(0) / torch.arange(1, len(maps) + 1, device=maps.device)[:, None]
        mapped.append(
            replace(
                noun,
                neurons=tuple(replace(n, map=_as_grid(m, grid)) for n, m in zip(noun.neurons, maps, strict=False)),
                regions={k: _as_grid(means[k - 1], grid) for k in REGION_SIZES if k <= len(maps)},
            )
        )
    return mapped


def with_blank(
    vlm: VLM, grey: BatchFeature, answers: Answers, scored: Scored, nouns: list[NounFinding]
) -> list[NounFinding]:
    """Add the share of each top neuron's score that is lost when the same words are read with a grey image.

    The score is computed anew throughout: activation, norm scale and probabilities are those of the grey image.
    """
    steps: list[list[int]] = [[] for _ in range(len(answers.token_ids))]
    places = []
    for target in scored.targets:
        places.append([target.row, len(steps[target.row])])
        steps[target.row].append(answers.n_prompt + target.step - 1)
    width = max(map(len, steps))
    positions = torch.tensor([row + [0] * (width - len(row)) for row in steps])
    with record(vlm.anatomy, _keep_patches(positions, None), gates=scored.choices.score == "paper") as recording:
        vlm.read(grey, answers)
    moments = pick_moments(recording, torch.tensor(places))
    token_ids = [target.token_id for target in scored.targets]
    directions = read_out(vlm, moments, vlm.anatomy.logits(moments.residual), token_ids, scored.choices)
    activations = scored_activations(moments, scored.choices)
    compared = []
    for i, noun in enumerate(nouns):
        listed = scored.ranked[i][: len(noun.neurons)]
        blank = activations[i, listed] * (columns_of(vlm.anatomy, listed) @ directions[i])
        lost = 1 - blank / scored.scores[i, listed]
        neurons = [
            replace(n, lost_without_image=float(share) if torch.isfinite(share) else None)
            for n, share in zip(noun.neurons, lost, strict=True)
        ]
        compared.append(replace(noun, neurons=tuple(neurons)))
    return compared


def _keep_patches(positions: Int[Tensor, "batch kept"], neurons: Int[Tensor, "n"] | None) -> Callable[[Tensor], Tensor]:
    def keep(values: Float[Tensor, "batch positions width"]) -> Float[Tensor, "batch kept n"]:
        rows = torch.arange(len(values), device=values.device)[:, None]
        kept = values[rows, positions.to(values.device)]
        return kept if neurons is None else kept[..., neurons.to(values.device)]

    return keep


def _as_grid(values: Float[Tensor, "patches"], grid: PatchGrid) -> Grid:
    return tuple(tuple(row) for row in values.view(grid.rows, grid.columns).tolist())
