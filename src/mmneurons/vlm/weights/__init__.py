"""Read `w_out`, the output projection of an FFN, however it is stored: (hidden, neurons), column i is neuron i.

Plain, transposed, LoRA-wrapped, 8-bit, 4-bit, FP8, torchao, off-loaded, one expert of many: `stored.py` has the
forms. `expert` is None for a dense module and a number for a module that holds fused experts. Nothing here changes
the model, and what is read for one call is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.vlm.weights import offload, stored
from mmneurons.vlm.weights.stored import Located, locate
from mmneurons.vlm.weights.stored import holds_experts as holds_experts
from mmneurons.vlm.weights.writable import writable as writable

CHUNK = 4096
"""Number of neurons that `chunks` converts to float32 at a time."""
SLICE = {"cpu": 2**20, "other": 2**26}
"""Count of numbers that `project` converts to float32 at a time: what fits a CPU's cache; what keeps a GPU busy."""


def shape(module: nn.Module, hidden: int) -> tuple[int, int | None]:
    """Return the number of neurons of a module (of each expert, if it has fused experts) and of its experts, or None.

    Args:
        module: An FFN output projection, or a module of fused experts.
        hidden: The width of the residual stream, which tells the axes of fused experts apart.

    Raises:
        ModelError: if the module does not say how many inputs it has.
    """
    if holds_experts(module):
        return stored.experts_shape(module, hidden)
    return stored.in_features(module), None


def check(module: nn.Module) -> None:
    """Refuse a `w_out` that cannot be read, before anything depends on it.

    Looks only, where looking is enough. A tensor class with its own way to dequantise is dequantised once, and a
    module of an unknown kind is run on a few vectors (see `measured.py`).

    Raises:
        ModelError: naming the module's type, its weight's class, dtype, shape and device, and what to do.
    """
    located = locate(module, 0 if holds_experts(module) else None)
    if located.trial is not None:
        located.trial()


def is_quantised(module: nn.Module) -> bool:
    """Whether the weights of a module are packed, so that its kernel may round more than its dtype says."""
    return stored.is_packed(module)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters by name, in the form in which they are stored, off-loaded or not."""
    return offload.parameters(module)


@torch.no_grad()
def dense(module: nn.Module, expert: int | None = None) -> Float[Tensor, "hidden neurons"]:
    """Return the matrix that the module multiplies by in evaluation mode, adapters included.

    Returns:
        (hidden, neurons). A view in the stored dtype where weights are plain; otherwise a copy, in float32 or, of
        tensor classes that dequantise themselves (torchao), in the dtype that these give.

    Raises:
        ModelError: if it cannot be read.
    """
    located = locate(module, expert)
    matrix = located.read()
    # Adapters are added in float32: in a 16-bit dtype, small ones would be lost in the rounding of the base.
    for up, down in located.low_rank:
        matrix = matrix.float() + (up @ down).to(matrix.device)
    return matrix


def bias(module: nn.Module, expert: int | None = None) -> Float[Tensor, "hidden"] | None:
    """Return the bias that the module adds whatever the activations are, float32; None if it adds none."""
    return stored.locate_bias(module, expert)


def chunks(module: nn.Module, expert: int | None = None) -> Iterator[tuple[slice, Float[Tensor, "hidden chunk"]]]:
    """Iterate over slices of neurons with their columns in float32; one slice where the matrix is float32 already."""
    matrix = dense(module, expert)
    # A float32 copy of a whole 16-bit matrix would take twice the memory of the matrix itself.
    step = matrix.shape[1] if matrix.dtype == torch.float32 else CHUNK
    for start in range(0, matrix.shape[1], step):
        part = slice(start, min(start + step, matrix.shape[1]))
        yield part, matrix[:, part].float()


@torch.no_grad()
def project(
    directions: Float[Tensor, "nouns hidden"], module: nn.Module, expert: int | None = None
) -> Float[Tensor, "nouns neurons"]:
    """Multiply directions by the column of every neuron: direction . w_out[:, i], the matrix read once for all of them.

    Returns:
        Dot products, float32, on the device where the weights are.
    """
    located = locate(module, expert)
    matrix = located.read()
    directions = directions.to(device=matrix.device, dtype=torch.float32)
    result = _product(directions, matrix)
    # An adapter that is not merged is added as (direction . up) . down: its full matrix is never made.
    for up, down in located.low_rank:
        result += (directions.to(up.device) @ up @ down).to(result.device)
    return result


def columns(module: nn.Module, indices: Int[Tensor, "n"], expert: int | None = None) -> Float[Tensor, "n hidden"]:
    """Return the columns of some neurons as rows, float32; of plain weights only these are read."""
    located = locate(module, expert)
    with torch.no_grad():
        return _columns(located, indices)


def _columns(located: Located, indices: Tensor) -> Tensor:
    """Return columns of a located matrix as rows, (n, hidden), low-rank terms included."""
    matrix = located.read()
    # Picked before they are converted: of plain weights, the rest of the matrix is not read.
    result = matrix[:, indices.to(matrix.device)].T.float()
    for up, down in located.low_rank:
        result = result + (up @ down[:, indices.to(down.device)]).T.to(result.device)
    return result


def _product(directions: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (n, hidden) by (hidden, neurons), the products of 16-bit weights summed in float32.

    Such a matrix is converted slice by slice along the axis in which it is stored, so that each slice is read in one
    go and its float32 copy is still in the cache when it is multiplied.
    """
    if matrix.dtype == torch.float32:
        return directions @ matrix
    hidden, neurons = matrix.shape
    budget = SLICE["cpu" if matrix.device.type == "cpu" else "other"]
    result = directions.new_zeros(len(directions), neurons)
    # Stored row by row (`Linear`): slices of rows, each a part of the sum for every neuron. Stored column by column
    # (`Conv1D`, transposed experts): slices of neurons, each with its whole sum.
    if matrix.stride(0) >= matrix.stride(1):
        step = max(budget // neurons, 1)
        for start in range(0, hidden, step):
            result.addmm_(directions[:, start : start + step], matrix[start : start + step].float())
    else:
        step = max(budget // hidden, 1)
        for start in range(0, neurons, step):
            result[:, start : start + step] = directions @ matrix[:, start : start + step].float()
    return result
