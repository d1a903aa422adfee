"""Compute the activations of fused experts from what goes into them, since they cannot be hooked inside.

An expert's neuron fires for the positions that the router sends there; the weight that the router gives belongs to
the activation, so that activation times column is what is written. All other neurons are at zero there and are left
out: a position has as many *slots* as its own experts have neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.vlm.weights.stored import is_transposed


class Routed(NamedTuple):
    """The inputs of a block's experts at some positions, with what the router chose."""

    hidden: Float[Tensor, "*positions hidden"]
    experts: Int[Tensor, "*positions k"]
    """The k experts that the router chose for each position."""
    weights: Float[Tensor, "*positions k"] | None
    """Factors of the router on the experts' outputs; None where it has multiplied their inputs instead (Llama 4)."""
    inputs: Float[Tensor, "*positions k hidden"] | None = None
    """Inputs of each expert, scaled by the router (Llama 4); None where all experts of a position read `hidden`."""


def routed(module: nn.Module, args: tuple[Tensor, ...], batch: int) -> Routed:
    """Read the arguments of an experts module as (batch, positions, ...).

    Raises:
        ModelError: if the arguments are not of a form known here.
    """
    n_experts = module.get_parameter("down_proj").shape[0]
    if len(args) == 3:
        hidden, experts, weights = (value.reshape(batch, -1, value.shape[-1]) for value in args)
        if experts.is_floating_point():  # transformers 4 gives the weights first, one for every expert
            experts, weights = weights, experts.gather(-1, weights)
        return Routed(hidden, experts, weights)
    if len(args) == 1 and args[0].shape[0] % n_experts == 0:  # Llama 4: every token for every expert, most are zeros
        inputs = args[0].view(n_experts, batch, -1, args[0].shape[-1]).permute(1, 2, 0, 3)
        # Which experts a position has shows only in which of its inputs are not zero. All positions get as many experts
        # as the one with the most; those too many have zeros for input, and so activations of zero.
        active = inputs.abs().amax(-1)  # batch, positions, experts
        k = max(int((active > 0).sum(-1).max()), 1)
        experts = active.topk(k, dim=-1).indices
        picked = inputs.gather(2, experts[..., None].expand(*experts.shape, inputs.shape[-1]))
        return Routed(picked[:, :, 0], experts, None, picked)
    raise ModelError(
        f"Cannot read the routing of experts of type {type(module).__name__}.",
        seen=f"Its forward took {len(args)} tensors of shapes {[tuple(a.shape) for a in args]}.",
        fix="Supported: experts called with (hidden, top_k_index, top_k_weights), as in transformers' own models.",
    )


def activations(module: nn.Module, places: Routed) -> Float[Tensor, "*positions slots"]:
    """Return the activations of each position's experts, one expert's after the other, times the router's factors.

    One expert at a time, so that no expert's matrix is copied for each position.
    """
    experts = places.experts.reshape(-1, places.experts.shape[-1])
    k = experts.shape[1]
    # (positions, k, hidden): every expert of a position reads the same vector, unless the router has scaled it.
    if places.inputs is None:
        inputs = places.hidden.reshape(len(experts), 1, -1).expand(-1, k, -1)
    else:
        inputs = places.inputs.reshape(len(experts), k, -1)
    found: Tensor | None = None
    # The router's answer is turned around: for each expert, the positions that it was chosen for.
    for expert in torch.unique(experts).tolist():
        rows, slots = torch.nonzero(experts == expert, as_tuple=True)
        fired = _one_expert(module, inputs[rows, slots], expert)
        if found is None:
            found = fired.new_zeros(*experts.shape, fired.shape[-1])
        found[rows, slots] = fired
    assert found is not None
    if places.weights is not None:
        found = found * places.weights.reshape(*experts.shape, 1).to(found.dtype)
    return found.reshape(*places.experts.shape[:-1], -1)


def of_neurons(
    fired: Float[Tensor, "batch kept slots"], of: Int[Tensor, "batch kept k"], chosen: Int[Tensor, "n"], width: int
) -> Float[Tensor, "batch kept n"]:
    """Pick the activations of some neurons, zero where the position was not routed to their expert."""
    slots = fired.view(*of.shape, width)
    # `chosen` counts neurons through all experts: // gives the expert, % the neuron in it. At most one of the k slots
    # of a position is the expert's, so the sum over k is a choice.
    asked = of[..., None] == chosen // width  # batch, kept, k, n
    return (slots[..., chosen % width] * asked).sum(2)


def _one_expert(module: nn.Module, hidden: Float[Tensor, "n hidden"], expert: int) -> Float[Tensor, "n neurons"]:
    """Return the activations of one expert for rows of its input, as the module's own forward computes them."""
    gated = "gate_up_proj" in module._parameters
    name = "gate_up_proj" if gated else "up_proj"
    weight = module.get_parameter(name)[expert]
    turned = is_transposed(module, hidden.shape[-1])
    before = hidden @ (weight if turned else weight.T)
    bias = module._parameters.get(f"{name}_bias")
    if bias is not None:
        before = before + bias[expert]
    act_fn = module.act_fn
    if not gated:
        return act_fn(before)  # pyright: ignore[reportCallIssue]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(before)  # pyright: ignore[reportCallIssue]
    gate, up = before.chunk(2, dim=-1)
    return act_fn(gate) * up  # pyright: ignore[reportCallIssue]
