"""Return the stored numbers of a `w_out` as a view that can be written to, in the forms that have one.

Plain `Linear` and `Conv1D`, fused experts, the base layer below LoRA, and weights that accelerate keeps in memory. What
is packed, computed when asked for, on disk or spread over processes has no such view and is refused by name.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmneurons.errors import ModelError
from mmneurons.vlm.weights import quantised, stored
from mmneurons.vlm.weights.measured import PLAIN
from mmneurons.vlm.weights.offload import weights_maps


def writable(module: nn.Module, expert: int | None = None) -> Tensor:
    """Return a view of the matrix, (hidden, neurons), in its stored dtype; the model runs with what is written to it.

    Args:
        module: An FFN output projection, or a module of fused experts.
        expert: Which expert, for the latter.

    Raises:
        ModelError: naming the module's type and what it holds, and what to do.
    """
    while stored.is_adapter(module):  # LoRA adds to its base: what is added to the base is added to the sum
        module = cast(Any, module).base_layer
    if stored.holds_experts(module):
        held = _held(module, "down_proj")[cast(int, expert)]
        return held.T if stored.is_transposed(module) else held
    if quantised.knows(module) or stored.is_packed(module):
        raise _unwritable(module, "Its weight is quantised.", "Load the model without quantisation to edit it.")
    if stored.needs_measuring(module):
        raise _unwritable(module, "Its matrix is not its weight: it is computed when the module runs.", "")
    weight = _held(module, "weight")
    return weight.T if isinstance(module, Conv1D) else weight


def _held(module: nn.Module, name: str) -> Tensor:
    """Return the storage of a module's parameter, refused if its numbers are not the weights themselves."""
    value = getattr(module, name)
    if value.is_meta:
        value = _in_memory(module, name)
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.dtype not in PLAIN:
        raise _unwritable(
            module, f"Its {name} is a {type(value).__name__} of {value.dtype}.", "Load it as plain weights to edit it."
        )
    return value.detach()


def _in_memory(module: nn.Module, name: str) -> Tensor:
    """Return the tensor that accelerate keeps in memory for a module; what is on disk is refused."""
    # accelerate's `PrefixedDataset` wraps an `OffloadedWeightsLoader`, whose `state_dict` is what lies in memory; its
    # keys are paths in the whole model.
    for weights_map in weights_maps(module):
        dataset = getattr(weights_map, "dataset", None)
        held = getattr(dataset, "state_dict", dataset)
        key = f"{getattr(weights_map, 'prefix', '')}{name}"
        if isinstance(held, dict) and isinstance(held.get(key), Tensor):
            return held[key]
    raise _unwritable(module, f"Its {name} is off-loaded to disk.", "Load it with enough memory to edit it.")


def _unwritable(module: nn.Module, why: str, fix: str) -> ModelError:
    """Return the error for a module whose weights cannot be edited."""
    return ModelError(f"A module of type {type(module).__name__} cannot be edited.", seen=why, fix=fix)
