"""Record what made a result: the model, its weights, the versions of packages."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmneurons.vlm import weights

PACKAGES = ("mmneurons", "torch", "transformers", "tokenizers", "numpy", "pillow", "HanTa")
"""Packages whose version can change a result."""


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def weights_hash(model: PreTrainedModel) -> str:
    """Return one hash over every parameter and buffer that is saved: dtype, shape, and two checksums of all its bits.

    They are taken in the order in which the model defines them, without their names: versions of transformers name the
    same weights differently. A checksum is a sum over 32-bit words (modulo 2^64), plain and weighted by position: any
    one changed number changes it, and it is as fast as reading the weights, on any device. It tells models apart; it is
    no protection against someone who wants two models to look alike.
    """
    digest = hashlib.sha256()
    for tensor in _saved(model):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} {_checksums(tensor)}".encode())
    return digest.hexdigest()


def _saved(model: PreTrainedModel) -> Iterator[Tensor]:
    """Iterate over every parameter and buffer that is saved, fetched where it is off-loaded, one at a time.

    `state_dict()` is not used: where bitsandbytes has repacked 4-bit weights for a CPU, it unpacks them, and not always
    to what they were.
    """
    for module in model.modules():
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        yield from (tensor for tensor in (weights.parameters(module) | buffers).values() if tensor is not None)


def _checksums(tensor: Tensor, chunk: int = 1 << 20) -> tuple[int, int]:
    """Return the sum of a tensor's 32-bit words, and their sum weighted by position from 1, modulo 2^64."""
    # As bytes first: a tensor of any dtype can be seen as bytes, and four of them as a word.
    words = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(words) % 4:  # padding makes a copy, so only where it must be
        words = torch.nn.functional.pad(words, (0, -len(words) % 4))
    words = words.view(torch.int32)
    ranks = torch.arange(1, min(chunk, len(words)) + 1, device=words.device)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)  # int64 wraps around: a sum modulo 2^64
    # A chunk at a time, since its words take twice their memory as int64. `ranks` are the positions in a chunk; what
    # the chunk's start adds to them is start * total.
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk].long()
        total = part.sum()
        sums[0] += total
        sums[1] += (part * ranks[: len(part)]).sum() + start * total
    plain, weighted = sums.tolist()
    return plain % 2**64, weighted % 2**64


def model_facts(
    model: PreTrainedModel, model_id: str, revision: str | None, known_hash: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Describe the model that made a result as plain data; its weights are read if their hash is not known yet.

    `dtype` is that of the language model: the model's first parameter can be a query token that stays in float32.
    """
    return {
        "id": model_id,
        "revision": revision,
        "class": type(model).__name__,
        "weights_hash": known_hash or weights_hash(model),
        "dtype": str(dtype).removeprefix("torch."),
        "device": next(model.parameters()).device.type,
    }
