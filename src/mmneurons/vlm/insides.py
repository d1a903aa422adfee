"""The inside of FFNs, found by structure and checked by what they do, and its derivative without autograd.

An FFN is followed where `act(gate) * up` or `act(first)`, worked out anew from what its projections gave, is what
entered its `w_out`, and where one norm of its block gave what entered those projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.maths.readout import Norm, jacobian_direction
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.norms import measure_norm
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn, hops
from mmneurons.vlm.context import hooked
from mmneurons.vlm.hooks.recording import Keep, Recording
from mmneurons.vlm.locking import restored
from mmneurons.vlm.traces import Trace

STEP = 1e-4
"""For the slope of the activation function, by a symmetric difference in float64."""
INSTEAD = 'score="gradient", or score="logprob"    CLI: --score gradient'


@dataclass(frozen=True, eq=False)
class Inside:
    """The modules that one FFN is made of, besides its `w_out`."""

    ffn: Ffn
    projections: tuple[nn.Module, ...]
    """From hidden to neurons: one, or gate and up in any order, or one that gives both end to end."""
    norms: tuple[nn.Module, ...]
    """The norms of its block; one of them stands before the projections."""


@dataclass(eq=False)
class Insides:
    """What the projections and the norms of all FFNs did in every forward pass."""

    parts: list[Inside]
    seen: dict[tuple[int, str], list[Float[Tensor, "batch kept _"]]] = field(default_factory=dict)

    def at(self, i: int, name: str, places: Int[Tensor, "n 2"]) -> Float[Tensor, "n _"]:
        """What was seen of a part of FFN number `i` at (row, step) of each place, in float32."""
        whole = Recording.stacked(self.seen[i, name])
        rows, steps = places.to(whole.device).unbind(1)
        return whole[rows, steps].float()


def insides_of(model: nn.Module, anatomy: Anatomy) -> list[Inside]:
    """Find the inside of every FFN.

    Raises:
        ModelError: for experts, blocks with two FFNs, a stream that norms or factors stand in, and projections that
            are not found.
    """
    if len({ffn.layer for ffn in anatomy.ffns}) < len(anatomy.ffns) or any(
        ffn.n_experts is not None or ffn.gate is not None for ffn in anatomy.ffns
    ):
        raise _refused("It has experts, whose router answers as well.")
    if any(step.norm is not None or step.scale != 1 for step in hops(anatomy.embedding)):
        raise _refused("Norms or factors stand in its residual stream itself.")
    return [_inside(model, anatomy, ffn) for ffn in anatomy.ffns]


def _inside(model: nn.Module, anatomy: Anatomy, ffn: Ffn) -> Inside:
    """Find the inside of one FFN: projections beside `w_out`, norms anywhere in the block."""
    parent, block = model.get_submodule(ffn.name.rpartition(".")[0]), anatomy.blocks[ffn.layer].module
    widths = {ffn.n_neurons: 1, 2 * ffn.n_neurons: 2}
    found = [
        (child, widths[width])
        for child in parent.children()
        if child is not ffn.module and (width := getattr(child, "out_features", getattr(child, "nf", None))) in widths
    ]
    n_inputs = sum(times for _, times in found)
    if n_inputs not in (1, 2) or ffn.activation is None:
        raise _refused(f"The projections or the activation function before {ffn.name} were not found.")
    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower() and not [*m.children()]]
    return Inside(ffn, tuple(child for child, _ in found), tuple(norms))


def _refused(why: str) -> ModelError:
    return ModelError("Later FFNs cannot be followed in this model.", seen=why, fix=INSTEAD)


@restored
def watching_insides(model: nn.Module, anatomy: Anatomy, keep: Keep):
    """See what FFNs do inside, at the positions that `keep` picks of each pass, inside the `with`."""
    insides = Insides(insides_of(model, anatomy))
    shape = [1, 1]

    def entered(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def see(i: int, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        # Some FFNs see rows and positions as one axis; norms of heads (Qwen 3) are of another width.
        for kind, values in (("in", args[0]), ("out", output)):
            if values.numel() == shape[0] * shape[1] * values.shape[-1]:
                kept = keep(values.reshape(*shape, values.shape[-1])).clone()
                insides.seen.setdefault((i, f"{name} {kind}"), []).append(kept)

    setters: list[Callable[[], Any]] = [
        partial(anatomy.blocks[0].module.register_forward_pre_hook, entered, with_kwargs=True)
    ]
    for i, part in enumerate(insides.parts):
        for kind, modules in (("projection", part.projections), ("norm", part.norms)):
            setters += [partial(m.register_forward_hook, partial(see, i, f"{kind} {j}")) for j, m in enumerate(modules)]
    with hooked(setters):
        yield insides


def followed_directions(
    insides: Insides, trace: Trace, places: Int[Tensor, "n 2"], final: Float[Tensor, "n hidden"], limit: float
) -> list[Float[Tensor, "n hidden"]]:
    """Carry directions down from the final norm's input, through every later FFN and the norms around it.

    Attention and all else that is no FFN is held as it was.

    Args:
        insides: From `watching_insides`, over the pass that was recorded.
        trace: What was recorded at the places.
        places: Row and step of each.
        final: The directions at the input of the final norm.
        limit: How far, of the largest, activations worked out anew may be from those recorded.

    Returns:
        Per FFN the directions at the output of its `w_out`.

    Raises:
        ModelError: an FFN is not what it looks like.
    """
    anatomy, stream = trace.anatomy, final
    entered = {id(site): values for site, values in zip(anatomy.norms, trace.norms, strict=True)}
    found: list[Tensor] = []
    for i in reversed(range(len(anatomy.ffns))):
        ffn, direction = anatomy.ffns[i], stream
        # 1. Back from the stream to what `w_out` writes.
        for step in reversed([*hops(ffn.path)]):
            if step.norm is not None:
                x = entered[id(step.norm)].float().to(direction.device)
                direction = jacobian_direction(direction, x, step.norm.norm.to(direction.device))
            direction = step.scale * direction
        found.append(direction)
        # 2. On through the FFN to the stream that it reads: what is written below it is answered by it as well.
        if i:
            read = weights.project(direction, ffn.module).to(direction.device)
            back = _through(insides, i, trace.activations[i], read, places, limit)
            norm, x = _norm_before(insides, i, places, anatomy.hidden)
            stream = stream + jacobian_direction(back, x.to(back.device), norm.to(back.device))
    return found[::-1]


def _through(
    insides: Insides,
    i: int,
    fired: Float[Tensor, "n neurons"],
    read: Float[Tensor, "n neurons"],
    places: Int[Tensor, "n 2"],
    limit: float,
) -> Float[Tensor, "n hidden"]:
    """Multiply what is read off each neuron by the derivative of its activation by the FFN's input."""
    part, act = insides.parts[i], insides.parts[i].ffn.activation
    assert act is not None
    given = [insides.at(i, f"projection {j} out", places) for j in range(len(part.projections))]
    halves = [half for values in given for half in values.split(fired.shape[1], dim=1)]
    for gate, up in ((0, -1), (-1, 0)):
        x = halves[gate].double()
        other = halves[up] if len(halves) == 2 else torch.ones_like(halves[0])
        if bool(((act(x).float() * other).to(fired.device) - fired).abs().max() <= limit * fired.abs().max()):
            break
    else:
        what = "is not its activation function times a projection, or an intervention changes it"
        raise _refused(f"What enters {part.ffn.name} {what}.")
    slope = ((act(x + STEP) - act(x - STEP)) / (2 * STEP)).float()
    read = read.to(slope.device)
    backs = [read * slope * other] if len(halves) == 1 else [read * slope * other, read * act(x).float()]
    if len(halves) == 2 and gate == -1:
        backs.reverse()
    if len(part.projections) == 1:  # one matrix for both
        backs = [torch.cat(backs, dim=1)]
    return torch.stack(
        [weights.project(back, module).to(slope.device) for back, module in zip(backs, part.projections, strict=True)]
    ).sum(0)


def _norm_before(
    insides: Insides, i: int, places: Int[Tensor, "n 2"], hidden: int
) -> tuple[Norm, Float[Tensor, "n hidden"]]:
    """The norm that gave what the projections read, and what entered it."""
    read = insides.at(i, "projection 0 in", places)
    for j, module in enumerate(insides.parts[i].norms):
        if (i, f"norm {j} out") in insides.seen:
            gave = insides.at(i, f"norm {j} out", places)
            if gave.shape == read.shape and torch.equal(gave, read):
                return measure_norm(module, hidden), insides.at(i, f"norm {j} in", places)
    raise _refused(f"No norm stands before {insides.parts[i].ffn.name}.")
