"""What each step sees: pictures, parts of them, collages, imagined ones, and two cut and joined."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
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


CUTS, UPRIGHT = (3.5, 4.5, 5.5), 0.4
"""Where pictures are cut and joined, in the tower's nine columns or rows; the share that lie one above the other."""


@cache
def shares(side: int, window: int, cut: float = 4.5, upright: bool = False) -> Float[Tensor, "tokens"]:
    """How much of each feature is of the second picture, that is right of a cut, or below it."""
    right = (torch.arange(9) + 1 - cut).clamp(0, 1).expand(9, 9)
    return pooled((right.T if upright else right)[None, None].contiguous(), side, window).flatten()


def jointly(second: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """How much a feature shows that there are two, from its share of the second: 1 where both are seen alike."""
    return 4 * second * (1 - second)


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

    def nouns_of(self, view: int) -> list[str]:
        """What a caption of a view names, in order."""
        return [self.pictures[i].noun for i in self.views[view].pictures]

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
        often_imagined = {noun: self.hard[noun] * self.favour.get(noun, 1.0) for noun in self.imagined.nouns}
        for i, noun in zip(new, self.imagined.draw(len(new), rng, often_imagined), strict=True):
            named[i] = [noun]
        # 2. What is seen at some places of each, and at the same places of what it is joined with: mirrored, left is
        #    right; some are moved to what they do not show.
        places = torch.tensor([sorted(rng.sample(range(side**2), min(kept, side**2))) for _ in rows])
        mirrored = [rng.random() < 0.5 for _ in rows]
        met = [i for i, j in enumerate(partner) if i != j]
        of, where = [*range(n), *(partner[i] for i in met)], torch.cat([places, places[met]])
        flipped = torch.tensor(mirrored)[of][:, None]
        source = torch.where(flipped, where // side * side + side - 1 - where % side, where)
        tokens = torch.from_numpy(np.asarray(self.features[np.array(rows)[of][:, None], source.numpy()], np.float32))
        moved = [k for k, i in enumerate(of) if i in new]
        if moved:
            means, nouns = self.means[[rows[of[k]] for k in moved]], [named[of[k]][0] for k in moved]
            tokens[moved] = self.imagined.moved(tokens[moved], means, where[moved], side, nouns, rng)
        tokens, other = tokens[:n], dict(zip(met, tokens[n:], strict=True))
        # 3. What is said of each, and how much of each place is of the second: of collages, and of two that are joined.
        said, second = list(named), torch.zeros(places.shape)
        for i, j in enumerate(partner):
            if len(named[i]) == 2:
                upright = self.views[rows[i]].upright
                said[i] = named[i][::-1] if mirrored[i] and not upright else named[i]
                second[i] = shares(side, plan.window, upright=upright)[places[i]]
            elif i != j:
                said[i] = [*named[i], *named[j]]
                second[i] = shares(side, plan.window, rng.choice(CUTS), rng.random() < UPRIGHT)[places[i]]
                tokens[i] = torch.lerp(tokens[i], other[i], second[i][:, None])
            if len(set(said[i])) == 1:
                second[i] = 0
        return Batch(tokens, places, said, second)
