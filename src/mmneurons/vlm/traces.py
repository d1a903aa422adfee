"""The model's state at the positions that are scored, and what every neuron writes there, read off along directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.anatomy.paths import Directions, bias_total
from mmneurons.vlm.hooks.recording import Recording


@dataclass(frozen=True, eq=False)
class Trace:
    """The model's state at n positions, float32, on one device.

    Neurons are counted in *slots*, block after block: all neurons of dense FFNs, and of experts those that the router
    asked at that position, so that one slot can be one neuron here and another there.
    """

    anatomy: Anatomy
    activations: list[Float[Tensor, "n _"]]
    """Per FFN; the sizes of FFNs differ."""
    experts: list[Int[Tensor, "n _"] | None]
    """Per FFN: the experts that the slots belong to; None where it is dense."""
    gates: list[Float[Tensor, "n _"]]
    """Per FFN, the outputs of the activation function alone; empty unless recorded."""
    sources: list[Float[Tensor, "n hidden"]]
    norms: list[Float[Tensor, "n hidden"]]
    residual: Float[Tensor, "n hidden"]
    embedding: Float[Tensor, "n hidden"]

    def neurons(self, i: int) -> Int[Tensor, "n slots"]:
        """Which neuron of one FFN, counted through all its experts, each slot is."""
        shape, width = self.activations[i].shape, self.anatomy.ffns[i].n_neurons
        slots = torch.arange(shape[1], device=self.activations[i].device).expand(shape)
        experts = self.experts[i]
        return slots if experts is None else experts.gather(1, slots // width) * width + slots % width

    def projected(self, i: int, directions: Float[Tensor, "n hidden"]) -> Float[Tensor, "n slots"]:
        """Dot product of each slot's column with the direction of its position; each matrix is read once."""
        return self.projected_all(i, directions[None])[0]

    def projected_all(self, i: int, directions: Float[Tensor, "m n hidden"]) -> Float[Tensor, "m n slots"]:
        """The same for several sets of directions, in one read."""
        ffn, experts = self.anatomy.ffns[i], self.experts[i]
        if experts is None:
            found = weights.project(directions.flatten(0, 1), ffn.module)
            return found.view(*directions.shape[:2], -1).to(directions.device)
        found = torch.zeros(
            len(directions), *experts.shape, ffn.n_neurons, device=directions.device, dtype=torch.float32
        )
        for expert in torch.unique(experts).tolist():
            rows, places = torch.nonzero(experts == expert, as_tuple=True)
            read = weights.project(directions[:, rows].flatten(0, 1), ffn.module, expert=expert)
            found[:, rows, places] = read.view(len(directions), len(rows), -1).to(directions.device)
        return found.flatten(2)


def pick_trace(recording: Recording, places: Int[Tensor, "n 2"]) -> Trace:
    """What was recorded at (row, step) of each place."""
    device = recording.residual[-1].device  # blocks may lie on several

    def pick(stacked: Tensor) -> Tensor:
        rows, steps = places.to(stacked.device).unbind(1)
        return stacked[rows, steps].to(device)

    def floats(parts: list[Tensor]) -> Tensor:
        return pick(recording.stacked(parts)).float()

    return Trace(
        anatomy=recording.anatomy,
        activations=[pick(recording.activations(i)).float() for i in range(len(recording.raw))],
        experts=[pick(recording.stacked(parts)) if parts else None for parts in recording.experts],
        gates=[floats(parts) for parts in recording.gates if parts],
        sources=[floats(parts) for parts in recording.sources],
        norms=[floats(parts) for parts in recording.norms],
        residual=floats(recording.residual),
        embedding=floats(recording.embedding),
    )


@dataclass(frozen=True, eq=False)
class Written:
    """What was written into the logit of one token at each of n positions, norm scales frozen; before any softcap."""

    ffn: Float[Tensor, "n"]
    attention: Float[Tensor, "n"]
    other: Float[Tensor, "n"]
    embedding: Float[Tensor, "n"]
    bias: Float[Tensor, "n"]

    @property
    def total(self) -> Float[Tensor, "n"]:
        """The logit, if nothing was missed."""
        return self.ffn + self.attention + self.other + self.embedding + self.bias


def written(
    trace: Trace,
    rows: Float[Tensor, "n hidden"],
    directions: Directions,
    ffn: Float[Tensor, "n"],
    head_bias: Float[Tensor, "n"] | None,
) -> Written:
    """Each recorded write read off in logits: none of them is had by subtraction.

    Args:
        trace: What was recorded.
        rows: Unembedding rows of the tokens.
        directions: The frozen directions of these rows.
        ffn: What all neurons wrote, along those directions.
        head_bias: Entries of the head's bias.
    """
    anatomy, device = trace.anatomy, rows.device
    rule = anatomy.logit_rule
    by_kind = {kind: torch.zeros(len(rows), device=device, dtype=torch.float32) for kind in ("attention", "other")}
    for source, wrote in zip(anatomy.sources, trace.sources, strict=True):
        by_kind[source.kind] += (directions.at(source.path) * wrote.to(device)).sum(-1)
    bias = bias_total(anatomy, directions) + rule.scale * rule.before * (rows @ anatomy.norm.bias.to(device))
    if head_bias is not None:
        bias = bias + rule.scale * head_bias.to(device)
    return Written(
        ffn=ffn,
        attention=by_kind["attention"],
        other=by_kind["other"],
        embedding=(directions.at(anatomy.embedding) * trace.embedding.to(device)).sum(-1),
        bias=bias,
    )
