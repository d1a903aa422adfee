"""The projector while it is trained: LLaVA's, behind a standardisation that is folded away when it is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from plan import Plan
from safetensors.torch import save_file
from torch import Tensor, nn

SMALLEST = 0.05
"""Deviation of a channel, at least."""


class Projector(nn.Module):
    """LLaVA's projector of one layer or two.

    Args:
        mean: Of each channel.
        deviation: Of each channel.
        hidden: Width of the language model, and number of units between the layers.
        layers: 1 or 2.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, hidden: int, layers: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(mean), nn.Buffer(deviation)
        self.first = nn.Linear(len(mean), hidden)
        self.second = nn.Linear(hidden, hidden) if layers == 2 else None

    def standard(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens channels"]:
        """Mean 0 and deviation 1 in each channel."""
        return (x - self.mean) / self.deviation

    @torch.no_grad()
    def standardised(self, sample: Float[Tensor, "tokens channels"]) -> Projector:
        """The same function, behind the means and deviations of a sample; itself, changed."""
        mean, deviation = sample.mean(0), sample.std(0).clamp_min(SMALLEST)
        weight = self.first.weight / self.deviation
        self.first.bias.add_(weight @ (mean - self.mean))
        self.first.weight.copy_(weight * deviation)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        return self

    def forward(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens hidden"]:
        """Image tokens from features."""
        x = self.first(self.standard(x))
        return x if self.second is None else self.second(F.gelu(x))

    def tensors(self) -> dict[str, Tensor]:
        """As LLaVA's projector is stored."""
        weight = self.first.weight / self.deviation
        made = {"linear_1.weight": weight, "linear_1.bias": self.first.bias - weight @ self.mean}
        if self.second is not None:
            made |= {"linear_2.weight": self.second.weight, "linear_2.bias": self.second.bias}
        return {name: tensor.detach().half().contiguous() for name, tensor in made.items()}

    def save(self, plan: Plan, path: Path) -> None:
        """Write it as LLaVA stores it, with the plan beside it."""
        save_file(self.tensors(), path, {"plan": json.dumps(asdict(plan))})


def read(tensors: Mapping[str, Tensor]) -> Projector:
    """A projector from what `tensors` gave."""
    hidden, channels = tensors["linear_1.weight"].shape
    made = Projector(torch.zeros(channels), torch.ones(channels), hidden, 2 if "linear_2.weight" in tensors else 1)
    names = {"linear_1": "first", "linear_2": "second"}
    with torch.no_grad():
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            made.get_parameter(f"{names[layer]}.{part}").copy_(tensor)
    return made.requires_grad_(False)
