"""Slopes of losses, measured in float64: a difference of two float32 losses is mostly rounding, another on each CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mmneurons as mmn

FAR = 1e6
"""How many roundings a difference of losses must be worth."""


class _Float64(TorchFunctionMode):
    """Whoever asks for float32 gets float64: norms and softmax compute in float32 whatever the model's dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        swapped = {name: _swapped(value) for name, value in (kwargs or {}).items()}
        return func(*map(_swapped, args), **swapped)


def _swapped(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_float64(vlm: mmn.VLM) -> Iterator[mmn.VLM]:
    """A copy of a model in float64; inside the `with`, everything computes in float64."""
    double = mmn.load(copy.deepcopy(vlm.model).double(), processor=vlm.processor)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield double
    finally:
        torch.set_default_dtype(default)


def slope(loss: Callable[[], float], parameter: Tensor, along: Tensor, step: float) -> float:
    """How steeply a loss rises along a direction, from its difference; the parameter is left as it was.

    Args:
        loss: Of the parameter as it is.
        parameter: float64.
        along: A direction of length 1.
        step: Taken forward and backward.
    """
    kept, found = parameter.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(kept + sign * step * along)
        found.append(loss())
    with torch.no_grad():
        parameter.copy_(kept)
    difference, rounding = found[0] - found[1], torch.finfo(parameter.dtype).eps * max(map(abs, found))
    assert abs(difference) > FAR * rounding, f"{difference} is rounding: losses {found} in {parameter.dtype}"
    return difference / (2 * step)
