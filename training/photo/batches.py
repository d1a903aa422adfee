"""What each step sees: pictures, parts of them, collages, imagined ones, and two cut and joined."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import features
import numpy as np
import torch
from imagined import COMMON, Imagined
from jaxtyping import Float, Int
from pictures import Picture
from plan import Plan
from torch import Tensor

from mmneurons.photo.tower import pooled

FAVOUR = 3.0
"""How much more often common nouns are imagined than others, and those of photographs."""


@dataclass(frozen=True)
class Batch:
    """Some image features of some pictures."""

    tokens: Float[Tensor, "rows tokens channels"]
    places: Int[Tensor, "rows tokens"]
    """Where in the grid each is, row by row."""
    nouns: list[list[str]]
    """What a caption of each names, in order: one or two."""
    second: Float[Tensor, "rows tokens"]
    """How much of each feature is of the second noun, 0 to 1."""


class Batches:
    """Draws batches from the cache of features.

    Args:
        work: Where the cache is.
        pictures: What it was made of.
        plan: Grid, window, and how much of a batch is what.
    """

    def __init__(self, work: Path, pictures: list[Picture], plan: Plan) -> None:
        self.side, self.plan, self.pictures = plan.side, plan, pictures
        self.features, self.means, self.views = features.load(work, plan.side, plan.window)
        learned = [i for i, v in enumerate(self.views) if pictures[v.pictures[0]].split == "train"]
        self.collages = [i for i in learned if self.views[i].kind == "collage"]
        self.single: dict[str, list[int]] = {}
        for i in learned:
            if self.views[i].kind != "collage":
                self.single.setdefault(self.nouns_of(i)[0], []).append(i)
        self.nouns = sorted(self.single)
        """Of which there are pictures."""
        self.imagined = Imagined()
        self.known = sorted({*self.nouns, *self.imagined.nouns})
        """All that is to be named."""
        self.hard = dict.fromkeys(self.known, 1.0)
        """How often each comes beside its usual share."""
        self.favour = dict.fromkeys((*self.nouns, *COMMON), FAVOUR)
        right = torch.tensor([0.0] * 4 + [0.5] + [1.0] * 4).expand(9, 9)
        self.behind = [
            pooled(half[None, None].contiguous(), plan.side, plan.window).flatten() for half in (right, right.T)
        ]
        """Of collages side by side and upright: how much of each feature is of the second picture."""

    def nouns_of(self, view: int) -> list[str]:
        """What a caption of a view names, in order."""
        return [self.pictures[i].noun for i in self.views[view].pictures]

    def read(self, rows: np.ndarray, places: np.ndarray) -> Float[Tensor, "*shape channels"]:
        """Features of some views at some places."""
        return torch.from_numpy(np.asarray(self.features[rows, places], np.float32))

    def sample(self) -> Float[Tensor, "tokens channels"]:
        """Features to take means and deviations from."""
        return self.draw(random.Random(f"{self.plan.seed} scale"), 256, 9).tokens.flatten(0, 1)

    def draw(self, rng: random.Random, n: int, kept: int) -> Batch:
        """One batch.

        Args:
            rng: Draws.
            n: How many.
            kept: Image tokens of each, drawn anew.
        """
        side, plan = self.side, self.plan
        # 1. Which views, and what they show: rare nouns and hard ones more often than by number.
        often = [len(self.single[noun]) ** 0.5 * self.hard[noun] for noun in self.nouns]
        rows = [rng.choice(self.single[noun]) for noun in rng.choices(self.nouns, often, k=n)]
        rows = [rng.choice(self.collages) if self.collages and rng.random() < plan.collages else row for row in rows]
        named = [self.nouns_of(row) for row in rows]
        single = [i for i in range(n) if len(named[i]) == 1]
        new = [i for i in single if rng.random() < plan.imagined]
        partner = [rng.choice(single) if i in single and rng.random() < plan.joined else i for i in range(n)]
        # 2. Which tokens, and where they are taken from: mirrored, left is right; joined, half is another's.
        places = np.array([sorted(rng.sample(range(side**2), min(kept, side**2))) for _ in rows])
        owner = np.repeat(np.arange(n)[:, None], places.shape[1], 1)
        for i, j in enumerate(partner):
            if i != j:
                cut, axis = rng.choice((side // 2, side - side // 2)), rng.random() < 0.6
                owner[i, (places[i] % side if axis else places[i] // side) >= cut] = j
        mirrored = np.array([rng.random() < 0.5 for _ in rows])[owner]
        source = np.where(mirrored, places // side * side + side - 1 - places % side, places)
        tokens = self.read(np.array(rows)[owner], source)
        # 3. Some are moved to nouns of which there is no picture.
        often_imagined = {noun: self.hard[noun] * self.favour.get(noun, 1.0) for noun in self.imagined.nouns}
        for i, noun in zip(new, self.imagined.draw(len(new), rng, often_imagined), strict=True):
            named[i], mine = [noun], torch.from_numpy(owner == i)
            where = torch.from_numpy(places)[mine][None]
            if where.numel():
                moved = self.imagined.moved(tokens[mine][None], self.means[rows[i]][None], where, side, [noun], rng)
                tokens[mine] = moved[0]
        # 4. What is said of each, and where in it the second is.
        second = torch.from_numpy(owner != np.arange(n)[:, None]).float()
        for i, row in enumerate(rows):
            if len(named[i]) == 2:
                upright = self.views[row].upright
                named[i] = named[i][::-1] if mirrored[i, 0] and not upright else named[i]
                second[i] = self.behind[upright][torch.from_numpy(places[i])]
        joined = [named[i] if i == j else [*named[i], *named[j]] for i, j in enumerate(partner)]
        for i, j in enumerate(partner):
            if i != j and second[i].mean() in (0, 1):  # of few tokens, all may be on one side
                joined[i] = named[i] if second[i, 0] == 0 else named[j]
                second[i] = 0
        return Batch(tokens, torch.from_numpy(places), joined, second)
