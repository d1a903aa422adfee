"""Features that the tower's own classifier takes for a class: nouns of which there is no picture.

EfficientNet knows a thousand classes, and hands on here what it knows: the features of a picture, dimmed, are moved up
the gradient of a class's log-probability until the classifier is sure. No picture of that class is needed or used.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.photo.convert import tower_weights

CLASSES = Path(__file__).parent / "classes.csv"
"""The noun of each class; none where a class is no thing, or another name for what the pictures show."""
COMMON = tuple(
    "bag beach bear bed beetle bicycle book bottle bowl box bridge bus cat church clock cow drum fox frog hammer "
    "hat horse knife lion lizard monkey mountain mushroom rabbit shark sheep snake sofa spider table television tiger "
    "train truck wolf zebra".split()
)
"""Nouns that are worth knowing without a photograph: learned more often than the other classes."""
STEP, STEPS = 0.6, 12
"""How far the mean feature is moved at once, and how often at most."""
LARGEST = 6.0
"""What ReLU6 lets through."""


class Imagined:
    """The classifier of EfficientNet-Lite2, run backwards."""

    def __init__(self) -> None:
        stored = tower_weights()
        self.weight: Float[Tensor, "classes channels"] = stored["_fc.weight"]
        self.bias: Float[Tensor, "classes"] = stored["_fc.bias"]
        self.classes: dict[str, list[int]] = {}
        with CLASSES.open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                if row["noun"]:
                    self.classes.setdefault(row["noun"], []).append(int(row["class"]))
        self.nouns = sorted(self.classes)

    def draw(self, n: int, rng: random.Random, often: Mapping[str, float]) -> list[str]:
        """Nouns of n pictures: each by the root of the number of its classes, times `often`."""
        weights = [len(self.classes[noun]) ** 0.5 * often.get(noun, 1.0) for noun in self.nouns]
        return rng.choices(self.nouns, weights, k=n)

    def moved(
        self,
        tokens: Float[Tensor, "rows tokens channels"],
        means: Float[Tensor, "rows channels"],
        places: Int[Tensor, "rows tokens"],
        side: int,
        nouns: list[str],
        rng: random.Random,
    ) -> Float[Tensor, "rows tokens channels"]:
        """Features moved to a class of each noun, more in one part of the picture than in another.

        Args:
            tokens: Features of pictures, at some places.
            means: Mean features of the whole pictures, from which it is told how far to go.
            places: Where the tokens are in the grid.
            side: Of the grid.
            nouns: To which they are moved.
            rng: Draws class, dimming, part, and how sure the classifier is to be.
        """
        aim = torch.tensor([rng.choice(self.classes[noun]) for noun in nouns])
        dimmed = torch.tensor([rng.uniform(0.3, 1.0) for _ in nouns])[:, None]
        sure = torch.tensor([rng.uniform(0.5, 0.95) for _ in nouns])
        # 1. How far the mean has to go.
        begin = means * dimmed
        end = begin
        for _ in range(STEPS):
            chances = (end @ self.weight.T + self.bias).softmax(1)
            below = chances.gather(1, aim[:, None])[:, 0] < sure
            if not below.any():
                break
            uphill = F.normalize(self.weight[aim] - chances @ self.weight, dim=1)
            end = (end + STEP * below[:, None] * uphill).clamp(0, LARGEST)
        # 2. Where in the picture: a soft spot, its mean 1.
        rows, columns = torch.arange(side).view(-1, 1), torch.arange(side).view(1, -1)
        spots = []
        for _ in nouns:
            x, y, wide = rng.uniform(0, side - 1), rng.uniform(0, side - 1), side * rng.uniform(0.25, 1.0)
            spot = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * wide**2)).flatten()
            spots.append(spot / spot.mean())
        where = torch.stack(spots).gather(1, places)[..., None]
        return (tokens * dimmed[:, None] + where * (end - begin)[:, None]).clamp(0, LARGEST)
