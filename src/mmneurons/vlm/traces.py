"""Traces: a model's state at the positions that are scored, and what neurons write there, read off along directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.anatomy.paths import Directions, bias_total
from mmneurons.vlm.hooks.recording import Recording


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace holds the model's state at n positions, float32, on one device.

    Neurons are counted in *slots*, FFN after FFN: all neurons of a dense FFN, and of fused experts those of the experts
    that the router chose at that position, so that one slot can be one neuron here and another there.
    """

    anatomy: Anatomy
    activations: list[Float[Tensor, "n _"]]
    """Activations per FFN, one column for each slot."""
    experts: list[Int[Tensor, "n _"] | None]
    """Experts that the slots belong to, per FFN; None where it is dense."""
    gates: list[Float[Tensor, "n _"]]
    """Outputs of the activation function alone, per FFN; empty unless recorded."""
    sources: list[Float[Tensor, "n hidden"]]
    """What each source of the anatomy wrote."""
    norms: list[Float[Tensor, "n hidden"]]
    """What entered each norm that writes pass on their paths."""
    residual: Float[Tensor, "n hidden"]
    """The residual stream as it entered the final norm."""
    embedding: Float[Tensor, "n hidden"]
    """The residual stream as it entered the first block."""
    directions: list[Float[Tensor, "n hidden"]] | None = None
    """Per FFN the read-out directions of a score that needs the pass itself (`followed`, `gradient`); else None."""

    def neurons(self, i: int) -> Int[Tensor, "n slots"]:
        """Return the neuron of one FFN, counted through all its experts, that each slot stands for."""
        shape, width = self.activations[i].shape, self.anatomy.ffns[i].n_neurons
        slots = torch.arange(shape[1], device=self.activations[i].device).expand(shape)
        experts = self.experts[i]
        return slots if experts is None else experts.gather(1, slots // width) * width + slots % width

    def of_all_experts(self) -> Trace:
        """The same with a slot for every neuron of every expert; those that the router did not ask are at zero.

        To be compared with another state, in which other experts were asked.
        """
        activations, experts = list[Tensor](), list[Tensor | None]()
        for i, (ffn, fired, asked) in enumerate(zip(self.anatomy.ffns, self.activations, self.experts, strict=True)):
            if asked is not None:
                every = torch.zeros(len(fired), ffn.size, device=fired.device, dtype=fired.dtype)
                fired = every.scatter(1, self.neurons(i), fired)
                asked = torch.arange(ffn.size // ffn.n_neurons, device=asked.device).expand(len(fired), -1)
            activations.append(fired)
            experts.append(asked)
        return replace(self, activations=activations, experts=experts)

    def projected(self, i: int, directions: Float[Tensor, "n hidden"]) -> Float[Tensor, "n slots"]:
        """Multiply each slot's column by the direction of its position; each matrix is read once."""
        return self.projected_all(i, directions[None])[0]

    def projected_all(self, i: int, directions: Float[Tensor, "m n hidden"]) -> Float[Tensor, "m n slots"]:
        """Multiply each slot's column by the directions of its position, of m sets of directions in one read."""
        ffn, experts = self.anatomy.ffns[i], self.experts[i]
        if experts is None:
            found = weights.project(directions.flatten(0, 1), ffn.module)
            return found.view(*directions.shape[:2], -1).to(directions.device)
        found = torch.zeros(
            len(directions), *experts.shape, ffn.n_neurons, device=directions.device, dtype=torch.float32
        )
        # The positions of each expert together, so that its matrix is read once for all of them.
        for expert in torch.unique(experts).tolist():
            rows, places = torch.nonzero(experts == expert, as_tuple=True)
            read = weights.project(directions[:, rows].flatten(0, 1), ffn.module, expert=expert)
            found[:, rows, places] = read.view(len(directions), len(rows), -1).to(directions.device)
        return found.flatten(2)


def pick_trace(recording: Recording, places: Int[Tensor, "n 2"]) -> Trace:
    """Pick what was recorded at the (row, step) of each place, float32, on the device of the final norm."""
    device = recording.residual[-1].device  # the blocks may lie on several devices

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
    """The parts of one token's logit at each of n positions, with norm scales held fixed, before any softcap."""

    ffn: Float[Tensor, "n"]
    attention: Float[Tensor, "n"]
    other: Float[Tensor, "n"]
    embedding: Float[Tensor, "n"]
    bias: Float[Tensor, "n"]

    @property
    def total(self) -> Float[Tensor, "n"]:
        """Sum of all parts, which is the logit if nothing was missed."""
        return self.ffn + self.attention + self.other + self.embedding + self.bias


def written(
    trace: Trace,
    rows: Float[Tensor, "n hidden"],
    directions: Directions,
    ffn: Float[Tensor, "n"],
    head_bias: Float[Tensor, "n"] | None,
) -> Written:
    """Read off each recorded write in logits; none of them is what the others leave over.

    Args:
        trace: What was recorded.
        rows: Rows of the unembedding, those of the tokens.
        directions: Read-out directions of these rows.
        ffn: What all neurons wrote along those directions, summed.
        head_bias: Entries of the head's bias, those of the tokens.

    Returns:
        The parts in logits, float32, any sign.
    """
    anatomy, device = trace.anatomy, rows.device
    rule = anatomy.logit_rule
    by_kind = {kind: torch.zeros(len(rows), device=device, dtype=torch.float32) for kind in ("attention", "other")}
    for source, wrote in zip(anatomy.sources, trace.sources, strict=True):
        by_kind[source.kind] += (directions.at(source.path) * wrote.to(device)).sum(-1)
    # The final norm's bias is multiplied by `before` and `scale`, as the rest of its output; the head's own bias comes
    # behind `before`, and is multiplied by `scale` alone.
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
