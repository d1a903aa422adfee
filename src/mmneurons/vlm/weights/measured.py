"""Measure the matrix of a module that says nothing about how it is stored, as module(identity) - module(0).

One run of the module per slice of neurons, so slow; it is the last resort. Running it is made invisible: in eval
mode, without gradients, and with the forward hooks on it and on what it holds set aside, so that no recording sees
these runs and no intervention changes them. (`no_grad`, not inference mode: what a module caches while running
must stay usable in training.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.vlm.locking import restored
from mmneurons.vlm.weights.offload import unreadable

SLICE = 512
"""Number of neurons measured in one run."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes in which the stored numbers are the weights themselves."""

_uses_its_weight: WeakSet[nn.Module] = WeakSet()
"""Modules that were seen to multiply by their `weight`, so that their matrix is read without running them again."""


def matrix(module: nn.Module, neurons: int) -> Tensor:
    """Measure the matrix of a module, (hidden, neurons), float32, to the precision of what the module returns.

    Raises:
        ModelError: if the module cannot be run, or one random vector shows that it is not linear.
    """
    device, dtype = _place(module)
    with _undisturbed(module):
        offset = _run(module, torch.zeros(1, neurons, device=device, dtype=dtype))
        measured = torch.empty(offset.shape[1], neurons, device=offset.device, dtype=torch.float32)
        # Row i of the input is 1 for neuron i alone, so that row i of the output is its column and the bias; a slice at
        # a time, since the whole identity is as large as neurons squared.
        for start in range(0, neurons, SLICE):
            rows = torch.arange(start, min(start + SLICE, neurons), device=device)
            inputs = torch.zeros(len(rows), neurons, device=device, dtype=dtype)
            inputs[rows - start, rows] = 1
            measured[:, start : start + SLICE] = (_run(module, inputs) - offset).T
        # One activation at a time cannot show that a module is not linear; a random vector does.
        vector = _random(1, neurons, device, dtype)
        seen, expected = _run(module, vector) - offset, vector.float().to(offset.device) @ measured.T
    if not _close(seen, expected, dtype):
        raise _curved(module)
    return measured


def bias(module: nn.Module, neurons: int) -> Tensor | None:
    """Measure the bias of a module, (hidden,), float32, as its output for zeros; None if that is zero."""
    device, dtype = _place(module)
    with _undisturbed(module):
        offset = _run(module, torch.zeros(1, neurons, device=device, dtype=dtype))[0]
    return offset if bool(offset.any()) else None


def check_linear(module: nn.Module, neurons: int) -> None:
    """Refuse a module that cannot be run, or for which f(2a + b) - f(0) is not 2 (f(a) - f(0)) + (f(b) - f(0))."""
    device, dtype = _place(module)
    a, b = _random(2, neurons, device, dtype).split(1)
    with _undisturbed(module):
        outputs = _run(module, torch.cat([2 * a + b, a, b, torch.zeros_like(a)]))
    seen, first, second = outputs[:3] - outputs[3]
    if not _close(seen, 2 * first + second, dtype):
        raise _curved(module)


def uses(module: nn.Module, weight: Callable[[], Tensor], neurons: int) -> bool:
    """Whether a module with a forward of its own only multiplies by its weight; a yes is remembered."""
    if module in _uses_its_weight:
        return True
    device, dtype = _place(module)
    held, vector = weight(), _random(1, neurons, device, dtype)
    # Storage of another shape (packed, a shard) is not the matrix.
    if held.shape[1] != neurons:
        return False
    with _undisturbed(module):
        seen = _run(module, vector) - _run(module, torch.zeros_like(vector))
    expected = vector.to(held.device).float() @ held.float().T
    if seen.shape != expected.shape or not _close(seen, expected.to(seen.device), dtype):
        return False
    _uses_its_weight.add(module)
    return True


@restored
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module and all it holds into evaluation mode, without gradients and forward hooks, inside the `with`."""
    kept = [(each, each.training, each._forward_hooks, each._forward_pre_hooks) for each in module.modules()]
    try:
        # New dictionaries take the place of the module's own: the user's hooks are set aside whole, in their order.
        for each, *_ in kept:
            each.training, each._forward_hooks, each._forward_pre_hooks = False, OrderedDict(), OrderedDict()
        with torch.no_grad():
            yield
    finally:
        for each, training, hooks, pre_hooks in kept:
            each.training, each._forward_hooks, each._forward_pre_hooks = training, hooks, pre_hooks


def _run(module: nn.Module, inputs: Tensor) -> Tensor:
    """Run a module on rows of activations, (n, neurons), and return its outputs, (n, hidden), float32."""
    try:
        outputs = module(inputs)
    except Exception as error:  # whatever its kernel raises, the user should read which module it was
        raise unreadable(
            module, f"It holds no plain weight, and running it on {inputs.dtype} fails: {error}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        raise unreadable(module, "It does not turn one row of activations into one row of the residual stream.")
    return outputs.float()


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to run a module in: those of its first loaded tensor of ordinary floats."""
    tensors = [each for each in chain(module.parameters(), module.buffers()) if not each.is_meta]
    for each in tensors:
        if each.dtype in PLAIN:
            return each.device, each.dtype
    # No ordinary floats are loaded: an off-loaded tensor still tells the dtype, and a packed one the device.
    held = next(chain(module.parameters(), module.buffers()), None)
    dtype = held.dtype if held is not None and held.dtype in PLAIN else torch.float32
    return (tensors[0].device if tensors else torch.device("cpu")), dtype


def _random(n: int, neurons: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random rows, always the same ones, made without touching the user's random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, neurons, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)


def _close(seen: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal up to what rounding in the module's dtype explains."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    return bool((seen - expected).norm() <= tolerance * expected.norm())


def _curved(module: nn.Module) -> ModelError:
    """Return the error for a module that is not linear."""
    return unreadable(module, "It is not linear: a sum of activations does not give the sum of what each gives.")
