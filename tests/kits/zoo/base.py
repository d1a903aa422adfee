"""What a tiny model of one family of vision-language models is for the tests: how to build it, how to feed it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kits.library import lacking


class Row(NamedTuple):
    """One row of a batch: the seed of its picture and words, and how many tokens of text follow the picture."""

    seed: int
    n_text: int


Inputs = dict[str, Any]
Perturb = Callable[[PreTrainedModel, Inputs, int, int], Inputs]


@dataclass(frozen=True)
class Family:
    """One row of docs/reference/models.md."""

    name: str
    """As transformers calls the type of model; variants in brackets: "blip-2 (opt)"."""
    build: Callable[[], PreTrainedModel]
    """A fresh tiny model with the library's initial weights, in eval mode; the tests randomise it."""
    inputs: Callable[[PreTrainedModel, Sequence[Row]], Inputs]
    """Model inputs of a batch, padded as the family's own processor pads. A row alone has no padding, and its picture
    and words are the same as in a batch."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches that the image tokens of one picture stand for; None if there are none."""
    perturb: Perturb | None = None
    """Inputs with the pixels of one patch (row, column of `grid`) of the first picture changed."""
    facts: Mapping[str, str] | None = None
    """What a reader of the family's code sees, where the structure must find the same: see tests/test_families.py."""


def runnable(build: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """The same, for a family that some version of transformers cannot run: the test is skipped there."""

    def checked() -> PreTrainedModel:
        model = build()
        name = type(model).__name__
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            lacking(f"{name} names its pixels otherwise")
        try:
            with torch.no_grad():
                model(input_ids=torch.ones(1, 1, dtype=torch.long))
        except (AttributeError, ValueError) as error:
            lacking(f"{name} does not run on a word: {error}")
        return model

    return checked


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Move every norm weight, bias, gate, scale and other vector away from its initial value, in place.

    Ones and zeros hide errors: a norm weight of one reads the same as w and as 1 + w, a bias of zero can be forgotten.
    Matrices are drawn anew too, larger than transformers' initial 0.02, so that no part of the model is negligible.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim < 2:
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 / parameter.shape[-1]) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # a buffer in Gemma 4, part of the checkpoint
                buffer.copy_(buffer * 0.8)
    return model


def quiet_vision(model: PreTrainedModel, tower: nn.Module) -> None:
    """Switch off attention in a vision tower, so that each patch is computed from its own pixels alone."""
    with torch.no_grad():
        for module in tower.modules():
            if "attention" in type(module).__name__.lower():
                for name, child in module.named_modules():
                    if name.rsplit(".", 1)[-1] in ("out_proj", "o_proj", "proj", "dense", "projection_layer"):
                        for parameter in child.parameters():
                            parameter.zero_()


def words(row: Row, low: int, high: int) -> Tensor:
    """The text of a row: (n_text,) token ids from low to high - 1."""
    generator = torch.Generator().manual_seed(1000 + row.seed)
    return torch.randint(low, high, (row.n_text,), generator=generator)


def pixels(row: Row, *shape: int) -> Tensor:
    """The picture of a row: standard normal, of the shape given."""
    generator = torch.Generator().manual_seed(row.seed)
    return torch.randn(shape, generator=generator)


def left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of rows of different length, padded on the left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(width - len(row)), torch.ones(len(row))]) for row in rows])
    return ids, mask.long()
