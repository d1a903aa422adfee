"""Record what the neurons do while the model runs, in one `with`; nothing is changed and no hook stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.vlm.anatomy import Anatomy, Block

Keep = Callable[[Float[Tensor, "batch positions width"]], Float[Tensor, "batch kept width"]]
"""Which positions of one forward pass are kept; must return memory of its own."""


def last_position(values: Float[Tensor, "batch positions width"]) -> Float[Tensor, "batch 1 width"]:
    """Keep the position that predicts the next token: while generating, the only new one."""
    return values[:, -1:].clone()


@dataclass(eq=False)
class Recording:
    """What was recorded: one entry per forward pass in each list; join with `stacked`.

    What was not asked for stays empty.
    """

    activations: list[list[Float[Tensor, "batch kept neurons"]]]
    """Per block: the inputs of `w_out`, in the model's dtype."""
    gates: list[list[Float[Tensor, "batch kept neurons"]]]
    """Per block: the outputs of the activation function alone; empty unless asked for."""
    embedding: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """The residual stream as it enters the first block."""
    attention: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """What the mixers of all blocks wrote, summed in float32."""
    ffn: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """What the FFNs of all blocks wrote, biases included, summed in float32."""
    residual: list[Float[Tensor, "batch kept hidden"]] = field(default_factory=list)
    """The residual stream as it enters the final norm."""

    @staticmethod
    def stacked(parts: list[Tensor]) -> Float[Tensor, "batch steps width"]:
        """One tensor of all forward passes."""
        return torch.cat(parts, dim=1)


@contextmanager
def record(
    anatomy: Anatomy, keep: Keep | Sequence[Keep] = last_position, *, gates: bool = False, writes: bool = True
) -> Iterator[Recording]:
    """Record activations in every forward pass inside the `with`.

    Args:
        anatomy: Where to look.
        keep: Which positions to keep; one function per block, where the blocks are to differ (then without `writes`).
        gates: Also record the output of the activation function alone.
        writes: Also record the residual stream and what attention and FFNs write into it.

    Raises:
        ModelError: if `gates` is asked for and a block has no module of its own for its activation function; after
            the `with`, if a block was not reached in a forward pass: silence must not be taken for zero.
    """
    blocks = anatomy.blocks
    if gates and (nameless := [block.name for block in blocks if block.activation is None]):
        raise ModelError(
            "Not every block has a module of its own for its activation function.",
            seen=f"None in {', '.join(nameless)}",
            fix='Choose score="logit" or score="logprob", which need the whole activation only.',
        )
    keeps = [keep] * len(blocks) if callable(keep) else list(keep)
    recording = Recording(activations=[[] for _ in blocks], gates=[[] for _ in blocks])
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for layer, block in enumerate(blocks):
            hooks += _block_hooks(recording, layer, block, keeps[layer], gates=gates, writes=writes)
        if writes:
            for module, parts in ((blocks[0].module, recording.embedding), (anatomy.norm_module, recording.residual)):
                hooks.append(module.register_forward_pre_hook(_keep_input(parts, keeps[0]), with_kwargs=True))
        yield recording
    finally:
        for hook in hooks:
            hook.remove()
    for recorded, what in ((recording.activations, "FFN"), (recording.gates if gates else [], "activation function")):
        passes = [len(layer) for layer in recorded]
        if missed := [block.name for block, n in zip(blocks, passes, strict=False) if n < max(passes, default=1)]:
            raise ModelError(
                f"Not every block's {what} was reached in every forward pass.",
                seen=f"{max(passes)} passes; fewer in {', '.join(missed)}",
                fix="Switch off layer skipping, early exit, compiled generation and replaced forward functions.",
            )


def _block_hooks(
    recording: Recording, layer: int, block: Block, keep: Keep, *, gates: bool, writes: bool
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def neurons(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        recording.activations[layer].append(keep(_with_batch(args[0])))
        if writes:
            _add(recording.ffn, layer, keep(_with_batch(output)))

    def mixer(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        _add(recording.attention, layer, keep(output if isinstance(output, Tensor) else output[0]))

    def gate(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        recording.gates[layer].append(keep(_with_batch(output)))

    yield block.w_out.register_forward_hook(neurons)
    if writes:
        yield block.mixer.register_forward_hook(mixer)
    if gates and block.activation is not None:
        yield block.activation.register_forward_hook(gate)


def _add(sums: list[Tensor], layer: int, written: Tensor) -> None:
    """Add to the sum over blocks of this forward pass; block 0 opens a new one."""
    if layer == 0:
        sums.append(written.float())
    else:
        sums[-1] = sums[-1] + written.to(device=sums[-1].device, dtype=torch.float32)


def _keep_input(parts: list[Tensor], keep: Keep) -> Callable[[nn.Module, tuple, dict], None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        parts.append(keep(args[0] if args else kwargs["hidden_states"]))

    return hook


def _with_batch(values: Tensor) -> Tensor:
    """The tensor, if it is (batch, positions, width): some FFNs see batch and positions as one axis."""
    if values.ndim != 3:
        raise ModelError("This model's FFN sees batch and positions as one axis.", seen=f"shape {tuple(values.shape)}")
    return values
