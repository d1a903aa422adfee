"""The page of one neuron: what it says, which pictures excite it and where, and what its size does to a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from mmneurons.attribution.controls import column_norms, matched
from mmneurons.finding.maps import neuron_maps
from mmneurons.finding.result import Grid
from mmneurons.neurons import Neuron
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask, texts_of
from mmneurons.vlm.grid import find_grids, model_views
from mmneurons.vlm.hooks.interventions import Intervention, intervene, parts_of
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM

MOST = 12
"""The most pictures that a neuron's page shows."""


class Excited(NamedTuple):
    """How a neuron fires over one picture."""

    name: str
    view: Image.Image
    """The picture as the model sees it."""
    grid: Grid
    """Its activation at each patch."""
    peak: float
    """The activation that is farthest from zero."""


def excitement(vlm: VLM, neuron: Neuron, pictures: Sequence[tuple[str, Image.Image]]) -> list[Excited]:
    """Run the model over pictures and return where a neuron fires, the strongest first, at most `MOST`.

    Pictures without a patch grid are left out.
    """
    found: list[Excited] = []
    for name, image in pictures:
        inputs = vlm.encode([image])
        grids = find_grids(vlm.model, inputs, 1)
        if isinstance(grids, str):
            continue
        (grid,) = neuron_maps(vlm, inputs, grids, neuron)[0]
        view = model_views(vlm.model, vlm.processor, inputs, grids, [1])[0][0] or image
        peak = max((value for row in grid for value in row), key=abs)
        found.append(Excited(name, view, grid, peak))
    return sorted(found, key=lambda one: -abs(one.peak))[:MOST]


def stand_in(vlm: VLM, image: Image.Image, question: Question, neuron: Neuron) -> Neuron:
    """Draw a random neuron of the same block that is about as loud while the model answers about a picture."""
    parts_of(vlm.anatomy, Intervention((neuron,), scale=1.0))  # refuses a neuron that is not there
    (batch,) = ask(vlm, [image], question, recorder=record)
    ffn = vlm.anatomy.find(neuron)
    assert ffn is not None
    place = vlm.anatomy.ffns.index(ffn)
    # Loudness over the whole answer: mean |activation| of each neuron of the block, times the length of its column.
    fired = batch.recording.activations(place)[0].abs().float().mean(0).cpu()
    norms = column_norms(vlm.anatomy)[place]
    if ffn.n_experts is not None:  # a neuron of the same expert; which positions it saw is not compared
        norms = norms.view(ffn.n_experts, -1)[neuron.expert or 0]
        fired = torch.ones_like(norms)
    drawn = matched(torch.tensor([0]), fired * norms, torch.tensor([neuron.index]), 1, seed=0, as_many=True)
    return Neuron(neuron.layer, int(drawn.sets[0][0]), neuron.expert)


def scaled_caption(vlm: VLM, image: Image.Image, question: Question, neuron: Neuron, scale: float) -> str:
    """Let the model answer about a picture with the activation of a neuron times `scale`."""
    with intervene(vlm, [neuron], scale=scale):
        return texts_of(vlm, [image], question)[0]
