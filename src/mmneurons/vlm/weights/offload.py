"""Fetch the tensors of one module, wherever accelerate keeps them, without running the module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmneurons.errors import ModelError


def fetch(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer of a module, detached; None if it has none of this name.

    An off-loaded one is taken from accelerate's map, in memory or on disk; the module keeps its empty placeholder.
    """
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    return offloaded(module, name) if value.is_meta else value.detach()


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters by name, without those of its children."""
    names = [name for name, value in module.named_parameters(recurse=False)]
    return {name: value for name in names if (value := fetch(module, name)) is not None}


def offloaded(module: nn.Module, name: str) -> Tensor:
    """Return the tensor that accelerate keeps for this module under `name`."""
    for weights_map in weights_maps(module):
        try:  # asking with `name in weights_map` first would read the file twice
            return weights_map[name]
        except KeyError:
            continue
    raise unreadable(
        module,
        f"Its {name} is on the meta device, and no hook of accelerate on this very module has it.",
        'Load the weights: from_pretrained(..., device_map="auto"), without preload_module_classes.',
    )


def weights_maps(module: nn.Module) -> list[Any]:
    """Return the maps in which accelerate's hooks keep a module's tensors by name; empty if nothing is off-loaded."""
    hook = getattr(module, "_hf_hook", None)
    # A `SequentialHook` holds several hooks; any other stands for itself.
    maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook])]
    return [weights_map for weights_map in maps if weights_map is not None]


def unreadable(module: nn.Module, why: str, fix: str = "") -> ModelError:
    """Return the error that says which module cannot be read, what it holds, and what to do."""
    held = ""
    for weight in (getattr(module, "weight", None), getattr(module, "down_proj", None)):
        if isinstance(weight, Tensor):
            kind = type(weight).__name__
            held = f"\nIts weight: {kind}, {weight.dtype}, {tuple(weight.shape)}, on {weight.device}."
    return ModelError(
        f"Cannot read the matrix of a module of type {type(module).__name__}.",
        seen=why + held,
        fix=fix or "Load the model with plain weights: from_pretrained(..., dtype=torch.bfloat16), adapters merged.",
    )
