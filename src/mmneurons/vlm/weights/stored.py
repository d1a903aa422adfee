"""Locate the numbers of an FFN output projection, in each form that a module can have.

A module is recognised by what it holds and by which forward it runs, not by a list of models. In this order: a PEFT
adapter around another module; fused experts (one 3-D `down_proj`); bitsandbytes and FP8 weights; tensor subclasses
that can dequantise themselves (torchao, quanto); plain `Linear` and `Conv1D`; anything else that is linear, which is
measured (`measured.py`). Weights that accelerate has off-loaded are taken from its map, the module is not run.

Locating a matrix reads nothing; only `Located.read` does. (A `Linear` with a forward of its own is run once, on one
random vector, to see whether it uses its weight.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmneurons.vlm.weights import measured, quantised
from mmneurons.vlm.weights.measured import PLAIN
from mmneurons.vlm.weights.offload import fetch, offloaded, unreadable, weights_maps


@dataclass(frozen=True)
class Located:
    """A matrix (hidden, neurons) that was located: `read()`, plus `up @ down` for every low-rank term."""

    read: Callable[[], Tensor]
    """Function that returns the matrix, or the part of it that is stored in full; a view where it is stored plainly."""
    trial: Callable[[], object] | None = None
    """Function that raises if `read` would not work; None where looking was enough to know."""
    low_rank: tuple[tuple[Tensor, Tensor], ...] = ()
    """Pairs of factors, (hidden, rank) and (rank, neurons), float32: LoRA that has not been merged."""


def locate(module: nn.Module, expert: int | None = None) -> Located:
    """Locate the matrix of a module, or of one of its fused experts.

    Raises:
        ModelError: if it is stored in a form that cannot be read.
        ValueError: if fused experts are read without saying which, or another module with an expert.
    """
    if is_adapter(module):
        return _adapted(module, expert)
    if (expert is not None) != holds_experts(module):
        raise ValueError(f"expert={expert} does not go with a module of type {type(module).__name__}")
    return _dense(module) if expert is None else _expert(module, expert)


def locate_bias(module: nn.Module, expert: int | None = None) -> Tensor | None:
    """Return the bias, (hidden,), float32, or None if there is none; the same forms and errors as `locate`."""
    if is_adapter(module):
        return _adapted_bias(module, expert)
    # A module with a forward of its own may add something else than its `bias`.
    if expert is None and needs_measuring(module):
        return measured.bias(module, in_features(module))
    bias = fetch(module, "bias" if expert is None else "down_proj_bias")
    if bias is None:
        return None
    return (bias if expert is None else bias[expert]).float()


def is_packed(module: nn.Module) -> bool:
    """Whether the weights of a module are anything but plain floats, adapters aside."""
    while is_adapter(module):
        module = cast(Any, module).base_layer
    held = getattr(module, "down_proj" if holds_experts(module) else "weight", None)
    return not isinstance(held, Tensor) or _is_subclass(held) or held.dtype not in PLAIN


def in_features(module: nn.Module) -> int:
    """Return the number of inputs of a linear module, which are its neurons; never from the shape of packed storage."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0]
    size = getattr(module, "in_features", None)
    if not isinstance(size, int) and is_adapter(module):
        size = in_features(cast(Any, module).base_layer)
    if not isinstance(size, int):
        raise unreadable(module, "It does not say how many inputs it has (in_features).")
    return size


# One matrix


def _dense(module: nn.Module) -> Located:
    """Locate the matrix of a module that holds one."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        _check_held(module, weight)
    # Known packed kinds come first: bitsandbytes' weights are tensor subclasses too, and would match a case below.
    if quantised.knows(module):
        quantised.check(module)
        return Located(partial(_of_right_shape, module, quantised.matrix))
    if needs_measuring(module):
        neurons = in_features(module)
        return Located(partial(measured.matrix, module, neurons), partial(measured.check_linear, module, neurons))
    if not isinstance(weight, Tensor):
        raise unreadable(module, "It has no weight.")
    if _is_subclass(weight):
        read = partial(_of_right_shape, module, _own_dequantise)
        return Located(read, trial=read)
    if weight.dtype not in PLAIN:
        raise unreadable(module, "Its weight is packed in a way that is not known.")
    # What is left is plain: the weight is the matrix or its transpose.
    _check_shape(module, weight.T if isinstance(module, Conv1D) else weight)
    return Located(partial(_plain, module))


def _plain(module: nn.Module) -> Tensor:
    """Return the weight of a plain `Linear` or `Conv1D` as (hidden, neurons), a view."""
    weight = cast(Tensor, fetch(module, "weight"))
    return weight.T if isinstance(module, Conv1D) else weight


def _own_dequantise(module: nn.Module) -> Tensor:
    """Return the weight of a tensor class that dequantises itself (torchao, quanto), in the dtype of the model."""
    try:
        return cast(Any, fetch(module, "weight")).dequantize()
    except Exception as error:  # whatever the library raises, the user should read which module it was
        raise unreadable(module, f"Its weight cannot be dequantised: {error}") from error


def _of_right_shape(module: nn.Module, read: Callable[[nn.Module], Tensor]) -> Tensor:
    """Read a matrix, and refuse it if it is not as large as the module says."""
    matrix = read(module)
    _check_shape(module, matrix)
    return matrix


def _check_shape(module: nn.Module, matrix: Tensor) -> None:
    """Refuse a matrix that is not as large as the module says: a shard, or something packed."""
    neurons = in_features(module)
    hidden = getattr(module, "out_features", matrix.shape[0])
    if tuple(matrix.shape) != (hidden, neurons):
        raise unreadable(module, f"Its matrix is {tuple(matrix.shape)}, but it maps {neurons} to {hidden}.")


def needs_measuring(module: nn.Module) -> bool:
    """Whether only running a module tells its matrix, since its forward is its own and does not just use its weight."""
    if quantised.knows(module) or type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or _is_subclass(weight) or weight.dtype not in PLAIN or weight.ndim != 2:
        return True
    return not measured.uses(module, partial(_plain, module), in_features(module))


def _is_subclass(weight: Tensor) -> bool:
    """Whether a weight is of a tensor class of its own, whose storage need not be its numbers."""
    return type(weight) not in (Tensor, nn.Parameter, nn.Buffer)


def _check_held(module: nn.Module, weight: Tensor) -> None:
    """Refuse a weight that is one process's shard, and a weight on the meta device that nobody holds."""
    if type(weight).__name__ == "DTensor":
        raise unreadable(
            module,
            "Its weight is a shard: tensor parallel or FSDP.",
            'Load the model in one process: from_pretrained(..., device_map="auto"), without tp_plan.',
        )
    if weight.is_meta and not weights_maps(module):
        offloaded(module, "weight")  # raises


# Fused experts


def holds_experts(module: nn.Module) -> bool:
    """Whether the module holds the output projections of several experts in one 3-D parameter."""
    if is_adapter(module):
        return holds_experts(cast(Any, module).base_layer)
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.ndim == 3


def experts_shape(module: nn.Module, hidden: int) -> tuple[int, int]:
    """Return (neurons of each expert, experts) of a module of fused experts."""
    while is_adapter(module):
        module = cast(Any, module).base_layer
    shape = cast(Tensor, module.down_proj).shape
    return shape[1 if is_transposed(module, hidden) else 2], shape[0]


def is_transposed(module: nn.Module, hidden: int | None = None) -> bool:
    """Whether `down_proj` is stored (experts, neurons, hidden) rather than (experts, hidden, neurons).

    The class's own word first; then the shape of `gate_up_proj`, whose one doubled axis tells neurons from hidden
    even where their sizes are equal; then the hidden size.
    """
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    # `gate_up_proj` is stored the same way round: (2 neurons, hidden) beside (hidden, neurons), or (hidden, 2 neurons)
    # beside (neurons, hidden).
    rows, cols = cast(Tensor, module.down_proj).shape[1:]
    entry = getattr(module, "gate_up_proj", None)
    if isinstance(entry, Tensor):
        if tuple(entry.shape[1:]) == (2 * cols, rows):
            return False
        if tuple(entry.shape[1:]) == (cols, 2 * rows):
            return True
    hidden = hidden or getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    if rows == cols or hidden not in (rows, cols):
        raise unreadable(module, f"Cannot tell neurons from hidden ({hidden}) in experts of {rows} x {cols}.")
    return hidden == cols


def _expert(module: nn.Module, expert: int) -> Located:
    """Locate the matrix of one of a module's fused experts."""
    down, transposed = cast(Tensor, module.down_proj), is_transposed(module)
    _check_held(module, down)
    if quantised.is_fp8(module, "down_proj"):
        read = partial(quantised.fp8, module, "down_proj", expert)
    elif _is_subclass(down) or down.dtype not in PLAIN:
        raise unreadable(module, "Its experts are quantised in a way that cannot be read.")
    else:
        read = partial(_one_expert, module, expert)
    return Located(partial(_transposed, read) if transposed else read)


def _one_expert(module: nn.Module, expert: int) -> Tensor:
    """Return the plain numbers of one expert's output projection, as stored."""
    return cast(Tensor, fetch(module, "down_proj"))[expert]


def _transposed(read: Callable[[], Tensor]) -> Tensor:
    """Read a matrix that is stored as (neurons, hidden)."""
    return read().T


# PEFT adapters


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT has wrapped a module; told by attributes that its layers share, so PEFT need not be installed."""
    return all(hasattr(module, name) for name in ("base_layer", "active_adapters", "disable_adapters", "merged"))


def _adapted(module: Any, expert: int | None) -> Located:
    """Locate the matrix that a PEFT layer multiplies by: its base alone, or the base and its active adapters."""
    terms = _terms(module)
    # An adapter of another kind (DoRA, OFT ...) is more than a low-rank term: the wrapped layer is measured as a whole.
    if terms is None:
        if expert is not None:
            raise unreadable(module, "An adapter is active on its fused experts.", "Merge it: model.merge_and_unload()")
        neurons = in_features(module)
        return Located(partial(measured.matrix, module, neurons), partial(measured.check_linear, module, neurons))
    base = locate(module.base_layer, expert)
    return replace(base, low_rank=base.low_rank + tuple(_factors(module, name, scale) for name, scale in terms))


def _adapted_bias(module: Any, expert: int | None) -> Tensor | None:
    """Return the bias of a PEFT layer, with the biases that its adapters have of their own."""
    terms = _terms(module)
    if terms is None:
        return measured.bias(module, in_features(module))
    bias = locate_bias(module.base_layer, expert)
    for name, scale in terms:
        own = fetch(module.lora_B[name], "bias")
        if own is not None:
            bias = scale * own.float() + (0 if bias is None else bias)
    return bias


def _terms(module: Any) -> list[tuple[str, float]] | None:
    """List the (adapter, scaling) of each low-rank term on the base; None if an active adapter is no plain LoRA."""
    if getattr(module, "parameter_name", "down_proj") != "down_proj":
        return []  # this layer wraps the fused experts too, but adapts another of their parameters
    sign = -1.0 if module.disable_adapters else 1.0
    # Disabled while merged: the next forward pass takes the merged adapters out first, so they are subtracted here.
    names = module.merged_adapters if module.disable_adapters else [] if module.merged else module.active_adapters
    # A layer knows only the adapters that it has: another layer's may be active too.
    names = [name for name in names if name in getattr(module, "lora_A", names)]
    if not all(_is_plain_lora(module, name) for name in names):
        if module.disable_adapters:
            raise unreadable(
                module, "Its adapter is merged and disabled at once.", "Unmerge it: model.unmerge_adapter()"
            )
        return None
    return [(name, sign * module.scaling[name]) for name in names]


def _is_plain_lora(module: Any, name: str) -> bool:
    """Whether an adapter is LoRA and nothing else, on a module: variants rescale (DoRA), or adapt one parameter."""
    return (
        name in getattr(module, "lora_A", ())
        and name not in getattr(module, "lora_variant", ())
        and not hasattr(module, "parameter_name")
    )


def _factors(module: Any, name: str, scale: float) -> tuple[Tensor, Tensor]:
    """Return the factors of one LoRA adapter, up (hidden, rank) and down (rank, neurons), float32, scaling in up."""
    up, down = (cast(Tensor, fetch(part[name], "weight")) for part in (module.lora_B, module.lora_A))
    return scale * up.float(), down.float()
