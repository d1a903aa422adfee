"""Read `w_out` without caring how it is stored: always (hidden, neurons), float32, a slice at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmneurons.errors import ModelError

CHUNK = 4096
"""Neurons converted to float32 at a time."""


def dense(module: nn.Module) -> Float[Tensor, "hidden neurons"]:
    """The matrix of an output projection as stored, transposed to (hidden, neurons), no copy.

    Raises:
        ModelError: if the module does not hold one plain matrix.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta:
        if type(module) is nn.Linear:
            return weight.detach()
        if type(module) is Conv1D:
            return weight.detach().T
    raise ModelError(
        f"Cannot read the FFN output projection of type {type(module).__name__}.",
        seen=f"weight: {getattr(weight, 'dtype', None)}, {getattr(weight, 'device', None)}",
        fix="Load the model with plain weights on one device: no quantisation, no off-loading, LoRA merged.",
    )


def chunks(module: nn.Module) -> Iterator[tuple[slice, Float[Tensor, "hidden chunk"]]]:
    """Slices of neurons and their columns in float32; one slice where the matrix is float32 already."""
    weight = dense(module)
    step = weight.shape[1] if weight.dtype == torch.float32 else CHUNK
    for start in range(0, weight.shape[1], step):
        part = slice(start, min(start + step, weight.shape[1]))
        yield part, weight[:, part].float()


def project(directions: Float[Tensor, "nouns hidden"], module: nn.Module) -> Float[Tensor, "nouns neurons"]:
    """Dot products direction . w_out[:, i] for every neuron, the matrix read once for all directions."""
    return torch.cat([directions.to(part.device) @ part for _, part in chunks(module)], dim=1)


def columns(module: nn.Module, indices: Int[Tensor, "n"]) -> Float[Tensor, "n hidden"]:
    """Some columns of `w_out` in float32."""
    weight = dense(module)
    return weight[:, indices.to(weight.device)].T.float()
