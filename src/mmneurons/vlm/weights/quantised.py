"""Turn packed weights back into numbers, without running the module and without changing it.

The result is what the packed numbers stand for. The kernels that use them add errors of their own: LLM.int8()
also rounds the inputs to 8 bits (all but outliers), 4-bit on a CPU with AVX512-BF16 computes in bfloat16, FP8 rounds
the inputs to 8 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmneurons.vlm.weights.offload import fetch, offloaded, unreadable

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def knows(module: nn.Module) -> bool:
    """Whether a module's `weight` is of a kind that is read here: bitsandbytes 8 and 4 bit, transformers' FP8."""
    return _kind(module) in ("Int8Params", "Params4bit") or is_fp8(module, "weight")


def check(module: nn.Module) -> None:
    """Refuse a weight that is only half quantised, or that is packed where it cannot be reached."""
    weight: Any = module.weight
    if _kind(module) == "Params4bit":
        if weight.is_meta:
            raise unreadable(module, "Its 4-bit weight is off-loaded.", "Load 4-bit weights without off-loading.")
        if weight.quant_state is None:
            raise unreadable(module, "It is not quantised yet.", "Move the model to its device first: model.to(device)")
    if _kind(module) == "Int8Params" and (weight.dtype != torch.int8 or getattr(weight, "has_fp16_weights", False)):
        raise unreadable(
            module,
            "It keeps 16-bit weights and quantises them at every run.",
            "Load it with BitsAndBytesConfig(load_in_8bit=True), llm_int8_has_fp16_weight left False.",
        )


def matrix(module: nn.Module) -> Tensor:
    """Return the numbers of a module's `weight`, (hidden, neurons), float32, if it is of a kind that `knows` knows."""
    if _kind(module) == "Int8Params":
        return _eight_bit(module)
    if _kind(module) == "Params4bit":
        return _four_bit(module.weight)
    return fp8(module, "weight")


def is_fp8(module: nn.Module, name: str) -> bool:
    """Whether a parameter is stored in 8-bit floats with scales beside it, as FP8Linear and FP8Experts do."""
    value = getattr(module, name, None)
    return isinstance(value, Tensor) and value.dtype in _FP8 and isinstance(_scale(module, name), Tensor)


def fp8(module: nn.Module, name: str, expert: int | None = None) -> Tensor:
    """Return 8-bit floats times the scale of their block or of the whole matrix, float32, (rows, columns) as stored."""
    values, scales = cast(Tensor, fetch(module, name)), cast(Tensor, fetch(module, f"{name}_scale_inv"))
    if expert is not None:
        values, scales = values[expert], scales[expert]
    values, scales = values.float(), scales.float()
    block = cast("Sequence[int] | None", getattr(module, "block_size", None))
    if block is not None:
        # One scale for each block of the matrix, spread over its entries; the last blocks may reach beyond the edges.
        scales = scales.repeat_interleave(block[0], 0)[: values.shape[0]]
        scales = scales.repeat_interleave(block[1], 1)[:, : values.shape[1]]
    return values * scales


def _kind(module: nn.Module) -> str:
    """Return the class name of a module's weight, so that bitsandbytes need not be installed to ask."""
    return type(getattr(module, "weight", None)).__name__


def _scale(module: nn.Module, name: str) -> object:
    """Return the scales stored beside an FP8 parameter, if there are any."""
    return getattr(module, f"{name}_scale_inv", None)


def _eight_bit(module: Any) -> Tensor:
    """Return LLM.int8() weights as float32: there is one scale per row.

    The scales are kept with the weight until the first run, and with the module's state after it.
    """
    values, scale = cast(Tensor, fetch(module, "weight")), getattr(module.weight, "SCB", None)
    # Off-loaded by accelerate, the scales lie in its map, beside the weight.
    if module.weight.is_meta:
        scale = offloaded(module, "SCB")
    elif scale is None:
        scale = module.state.SCB
    if scale is None:
        raise unreadable(module, "Its 8-bit weight has no scale (SCB).")
    # The largest number of a row is stored as 127 or -127.
    return values.as_subclass(Tensor).float() * (scale.float() / 127)[:, None]


def _four_bit(weight: Any) -> Tensor:
    """Return NF4 or FP4 weights as float32; scales that are quantised themselves are undone by bitsandbytes.

    Running the module on a CPU with AVX512-BF16 repacks the weight in place, with scales in bfloat16 and never packed.
    A copy of the state is unpacked here, since unpacking changes it.
    """
    from bitsandbytes import functional  # only installed where such weights are

    state, packed = copy.copy(weight.quant_state), weight.data.as_subclass(Tensor)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.float().reshape(-1)  # stored (blocks, rows)
        state.original_nested = False
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = scales
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed.reshape(-1, 1), state)
