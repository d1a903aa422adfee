"""Record what neurons do while the model runs, in one `with`; nothing is changed and no hook stays behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.vlm import experts
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.locking import alone, restored

if TYPE_CHECKING:  # they see a recording themselves
    from mmneurons.vlm.insides import Insides
    from mmneurons.vlm.pass_calls import PassCalls

Keep = Callable[[Shaped[Tensor, "batch positions *width"]], Shaped[Tensor, "batch kept *width"]]
"""Function that picks the positions of one forward pass to keep; it may return a view, which is then copied."""

COPYING = ("cpu",)
"""Types of device on which what is kept is always copied; see `_Recorder._keep`."""
PASSES_AT_ONCE = 8
"""Number of forward passes for which memory is made at once."""


def last_position(values: Shaped[Tensor, "batch positions *width"]) -> Shaped[Tensor, "batch 1 *width"]:
    """Keep the last position, which predicts the next token: while generating, the only new one."""
    return values if values.shape[1] == 1 else values[:, -1:]


@dataclass(eq=False)
class Recording:
    """A recording holds what was recorded, one entry per forward pass in each innermost list.

    What was not asked for stays empty. Of fused experts, a position has slots for the neurons of its own experts only.
    """

    anatomy: Anatomy
    raw: list[list[Float[Tensor, "batch kept _"]]]
    """Inputs of `w_out` per FFN, in the model's dtype, the gate of shared experts not in them; see `activations`."""
    experts: list[list[Int[Tensor, "batch kept _"]]]
    """Experts that the slots belong to, per FFN; empty where it is dense."""
    factors: list[list[Float[Tensor, "batch kept 1"]]]
    """Outputs of the projection whose sigmoid multiplies all activations, per FFN; empty where it has none."""
    gates: list[list[Float[Tensor, "batch kept _"]]]
    """Outputs of the activation function alone, per FFN; empty unless asked for."""
    sources: list[list[Float[Tensor, "batch kept hidden"]]]
    """What each source of the anatomy wrote."""
    norms: list[list[Float[Tensor, "batch kept hidden"]]]
    """What entered each norm that writes pass on their paths."""
    embedding: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """The residual stream as it enters the first block."""
    residual: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """The residual stream as it enters the final norm."""
    calls: PassCalls | None = None
    """What the blocks were called with, if a score needs to run them again."""
    insides: Insides | None = None
    """What the FFNs did inside, if a score follows them."""

    @staticmethod
    def nothing(anatomy: Anatomy) -> Recording:
        """Return a recording in which nothing is recorded."""
        return Recording(anatomy, [], [], [], [], [], [])

    @property
    def n_passes(self) -> int:
        """Number of forward passes recorded."""
        return max((len(parts) for parts in self.raw), default=0)

    def activations(self, i: int) -> Float[Tensor, "batch steps slots"]:
        """Return the activations of one FFN in all forward passes: what its columns are multiplied by."""
        fired = self.stacked(self.raw[i])
        return fired * self.stacked(self.factors[i]).sigmoid() if self.factors[i] else fired

    @staticmethod
    def stacked(parts: list[Tensor]) -> Shaped[Tensor, "batch steps width"]:
        """Join the forward passes in one tensor; narrower ones (Llama 4 has slots by need) are padded with zeros."""
        width = max(part.shape[-1] for part in parts)
        return torch.cat([_widened(part, width) for part in parts], dim=1)


@restored
def record(
    anatomy: Anatomy,
    keep: Keep = last_position,
    *,
    neurons: Sequence[Int[Tensor, "n"]] | None = None,
    gates: bool = False,
    writes: bool = True,
):
    """Record activations in every forward pass inside the `with`; other threads wait for its end.

    Args:
        anatomy: The anatomy of the model that runs.
        keep: Which positions to keep of each pass.
        neurons: For each FFN the neurons to keep, counted through all its experts; None keeps all.
        gates: Also record the output of the activation function alone.
        writes: Also record the residual stream, and what everything but the neurons writes into it.

    Yields:
        A Recording, filled as the model runs.

    Raises:
        ModelError: if `gates` is asked for and an FFN has no module of its own for its activation function; after
            the `with`, if a part was not reached in a forward pass that went through its block: silence must not be
            taken for zero. (A block that is left out as a whole, as Mllama leaves out cross-attention without an image,
            writes nothing.)
    """
    # Where the code calls a function, or a fused kernel holds it, there is nothing to hook.
    if gates and (nameless := [ffn.name for ffn in anatomy.ffns if ffn.activation is None]):
        raise ModelError(
            "Not every block has a module of its own for its activation function.",
            seen=f"None beside {', '.join(nameless)}",
            fix='Choose score="logit" or score="logprob", which need the whole activation only.',
        )
    recorder = _Recorder(anatomy, keep, neurons, writes=writes, gates=gates)
    with alone(anatomy.owner):
        try:
            recorder.start()
            yield recorder.recording
        finally:
            recorder.stop()
    # After the `with`, and not in its `finally`: an error of the user's own inside it is not covered by this one.
    if recorder.missed:
        raise ModelError(
            "Not every block's FFN or activation function was reached in every forward pass.",
            seen=f"Missed: {', '.join(sorted(recorder.missed))}",
            fix="Switch off layer skipping, early exit, compiled generation and replaced forward functions.",
        )


class _Recorder:
    """The hooks of one `record`, and what they know of the forward pass that is running."""

    def __init__(self, anatomy: Anatomy, keep: Keep, neurons: Any, *, writes: bool, gates: bool) -> None:
        def lists(parts: Sequence[Any]) -> list[list[Tensor]]:
            return [[] for _ in parts]

        ffns = anatomy.ffns
        self.recording = Recording(
            anatomy, lists(ffns), lists(ffns), lists(ffns), lists(ffns), lists(anatomy.sources), lists(anatomy.norms)
        )
        self.keep, self.neurons, self.writes, self.gates = keep, neurons, writes, gates
        self.missed: set[str] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._entries: dict[int, torch.utils.hooks.RemovableHandle] = {}
        # `_entered`: blocks entered in this pass. `_shape`: its batch and positions. `_rooms`: memory for what is
        # kept, and how much of it is taken.
        self._entered: set[int] = set()
        self._shape = (1, 1)
        self._rooms: dict[tuple[torch.dtype, torch.device], tuple[Tensor, int]] = {}
        # By the identity of the list that a part is recorded in: copies and originals of this pass, of which it is yet
        # to be seen whether the model changes the original; and the parts whose originals last.
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._lasting: set[int] = set()
        width = sum(ffn.n_neurons for ffn in ffns) * (2 if gates else 1)
        self._width = width + (2 + len(anatomy.sources) + len(anatomy.norms)) * anatomy.hidden * writes
        """About how many numbers are kept of one position."""

    def start(self) -> None:
        """Set the hooks of every part that is to be recorded."""
        anatomy, recording, add = self.recording.anatomy, self.recording, self._hooks.append
        # Every block, to tell one that was left out as a whole from a part that was missed in a block that ran.
        for layer, block in enumerate(anatomy.blocks):
            self._entries[layer] = block.module.register_forward_pre_hook(self._enter(layer), with_kwargs=True)
        for i, ffn in enumerate(anatomy.ffns):
            hook = self._dense(i) if ffn.n_experts is None else self._experts(i, ffn)
            add(ffn.module.register_forward_pre_hook(hook, with_kwargs=True))
            if ffn.gate is not None:
                add(ffn.gate.register_forward_hook(self._output(recording.factors[i])))
            if self.gates and ffn.activation is not None:
                add(ffn.activation.register_forward_hook(self._output(recording.gates[i])))
        if self.writes:
            for source, parts in zip(anatomy.sources, recording.sources, strict=True):
                add(source.module.register_forward_hook(self._output(parts)))
            for site, parts in zip(anatomy.norms, recording.norms, strict=True):
                add(site.module.register_forward_pre_hook(self._input(parts)))
            add(anatomy.norm_module.register_forward_pre_hook(self._input(recording.residual)))
        # The last module that a forward pass reaches closes it: the final norm, or the last block where nothing behind
        # the blocks is recorded.
        end = self._end if self.writes else self._end_without_writes
        last = anatomy.norm_module if self.writes else anatomy.blocks[-1].module
        add(last.register_forward_hook(lambda module, args, output: end()))

    def stop(self) -> None:
        """Remove all hooks."""
        for hook in (*self._hooks, *self._entries.values()):
            hook.remove()

    def _enter(self, layer: int):
        """Make the hook that notes that a block was entered; at the first block, the embedding and the shape."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._entered.add(layer)
            if layer == 0:
                stream = args[0] if args else kwargs["hidden_states"]
                self._shape = stream.shape[:2]
                if self.writes:
                    self._keep(self.recording.embedding, stream)

        return hook

    def _dense(self, i: int):
        """Make the hook that records the inputs of a dense `w_out`."""
        parts, chosen = self.recording.raw[i], None if self.neurons is None else self.neurons[i]

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._keep(parts, self._with_batch(args[0]))
            if chosen is not None:
                parts[-1] = parts[-1][..., chosen.to(parts[-1].device)]

        return hook

    def _experts(self, i: int, ffn: Ffn):
        """Make the hook that computes the activations of fused experts from their inputs, and records them."""
        recording, chosen = self.recording, None if self.neurons is None else self.neurons[i]

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            all_places = experts.routed(module, (*args, *kwargs.values()), self._shape[0])
            # Positions are picked before anything is computed: experts are computed again, and only for what is kept.
            places = experts.Routed(*(None if value is None else self._kept(value) for value in all_places))  # pyright: ignore[reportArgumentType]
            fired = experts.activations(module, places)
            if chosen is not None:
                fired = experts.of_neurons(fired, places.experts, chosen.to(fired.device), ffn.n_neurons)
            recording.raw[i].append(fired)
            recording.experts[i].append(places.experts)

        return hook

    def _output(self, parts: list[Tensor]):
        """Make a hook that records the output of a module, the first one of several."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._keep(parts, self._with_batch(output if isinstance(output, Tensor) else output[0]))

        return hook

    def _input(self, parts: list[Tensor]):
        """Make a hook that records the input of a module."""

        def hook(module: nn.Module, args: tuple) -> None:
            self._keep(parts, self._with_batch(args[0]))

        return hook

    def _keep(self, parts: list[Tensor], values: Tensor) -> None:
        """Add the positions to keep to a part's passes: the tensor that is there, where nothing changes it later.

        Whether the model goes on to change a tensor in place is seen in the second pass, for the passes behind it: of
        these, a GPU copies nothing. On a CPU small pieces that stay are costly, see `_kept`.
        """
        is_whole = values.shape[1] == 1 and values.untyped_storage().nbytes() == values.nbytes
        if self.keep is not last_position or not is_whole or values.device.type in COPYING:
            parts.append(self._kept(values))
        elif id(parts) in self._lasting:
            parts.append(values)
        else:
            kept = self._kept(values)
            parts.append(kept)
            self._seen[id(parts)] = kept, values

    def _see_what_lasts(self) -> None:
        """At the end of a pass: which of the tensors that were seen in it are still what they were."""
        if not self._seen:
            return
        still = [(kept == values).all() for kept, values in self._seen.values()]
        flags = torch.stack([flag.to(still[0].device) for flag in still]).tolist()
        self._lasting |= {key for key, flag in zip(self._seen, flags, strict=True) if flag}
        self._seen.clear()

    def _kept(self, values: Tensor) -> Tensor:
        """Return the positions to keep, in memory of their own: a model may change an output in place later.

        On a CPU all that is kept is copied into pieces of memory made for several passes: small pieces that stay,
        between the large ones that the model makes and frees, would keep the C library from using that space again,
        which costs more than what is recorded.
        """
        kept = self.keep(values)
        # What `keep` returned can be a view of the model's tensor; only then is a copy needed.
        if self.keep is not last_position:
            return kept.clone() if kept.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() else kept
        # Pieces are taken from the room one behind the other; a new room is made when it is used up. A tensor that was
        # taken keeps its room's memory alive.
        kind, n = (kept.dtype, kept.device), kept.numel()
        room, taken = self._rooms.get(kind, (None, 0))
        if room is None or room.numel() - taken < n:
            room, taken = kept.new_empty(max(n, PASSES_AT_ONCE * self._width * len(kept))), 0
        self._rooms[kind] = room, taken + n
        return room.narrow(0, taken, n).view(kept.shape).copy_(kept)

    def _with_batch(self, values: Tensor) -> Tensor:
        """Return values as (batch, positions, width): some FFNs (OPT, experts) see batch and positions as one axis."""
        return values if values.ndim == 3 else values.reshape(*self._shape, values.shape[-1])

    def _end(self) -> None:
        """Close one forward pass: a part that recorded nothing gets zeros, and counts as missed if its block ran."""
        recording, anatomy, like = self.recording, self.recording.anatomy, self.recording.residual[-1]
        n = len(recording.residual)
        # A block counts as entered if any part of it was reached, too: see below.
        recorded = [
            *zip(anatomy.sources, recording.sources, strict=True),
            *zip(anatomy.ffns, recording.raw, strict=True),
        ]
        self._entered |= {part.layer for part, parts in recorded if len(parts) == n}
        for source, parts in zip(anatomy.sources, recording.sources, strict=True):
            if len(parts) < n:
                self._fill(source.layer, source.name, parts, like)
        # A norm counts as missed even if its block was left out: zeros would not be an input that its scale is held at.
        for site, parts in zip(anatomy.norms, recording.norms, strict=True):
            if len(parts) < n:
                self.missed.add(site.name)
        for i, ffn in enumerate(anatomy.ffns):
            if len(recording.raw[i]) < n:
                self._fill(ffn.layer, ffn.name, recording.raw[i], self._blank(i))
                if ffn.n_experts is not None:
                    recording.experts[i].append(like.new_zeros(*like.shape[:2], 1).long())
            if self.gates and len(recording.gates[i]) < n:
                self._fill(ffn.layer, f"activation of {ffn.name}", recording.gates[i], self._blank(i))
        # Blocks that ran whole once need no hook of their own any more, to be called at each step: where one of their
        # parts is missed later, the others tell that the block ran.
        if n == 1:
            for layer in self._entered - {0}:
                self._entries.pop(layer).remove()
        self._see_what_lasts()
        self._entered.clear()

    def _blank(self, i: int) -> Float[Tensor, "batch kept _"]:
        """Zeros as one FFN's activations of one pass."""
        like = self.recording.residual[-1]
        return like.new_zeros(*like.shape[:2], self._n_recorded(i))

    def _end_without_writes(self) -> None:
        """Close one forward pass of which only activations are recorded."""
        recording = self.recording
        n = recording.n_passes
        shape = next((parts[-1].shape[:2] for parts in recording.raw if parts), (1, 1))
        for i, ffn in enumerate(recording.anatomy.ffns):
            if len(recording.raw[i]) < n:
                blank = torch.zeros(*shape, self._n_recorded(i), dtype=torch.float32)
                self._fill(ffn.layer, ffn.name, recording.raw[i], blank)
        self._see_what_lasts()
        self._entered.clear()

    def _n_recorded(self, i: int) -> int:
        """Return how many neurons of an FFN are recorded."""
        return self.recording.anatomy.ffns[i].n_neurons if self.neurons is None else len(self.neurons[i])

    def _fill(self, layer: int, name: str, parts: list[Tensor], like: Tensor) -> None:
        """Add zeros for a part that recorded nothing, and note it as missed if its block was entered."""
        if layer in self._entered:
            self.missed.add(name)
        parts.append(torch.zeros_like(like))


def _widened(part: Tensor, width: int) -> Tensor:
    """Pad the last axis with zeros up to a width."""
    return part if part.shape[-1] == width else torch.nn.functional.pad(part, (0, width - part.shape[-1]))
