"""What each step sees: pictures, parts of them, collages, imagined ones, and two cut and joined."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import features
import numpy as np
import torch
from imagined import Imagined
from jaxtyping import Float, Int
from pictures import Picture
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Some image features of some pictures."""

    tokens: Float[Tensor, "rows tokens channels"]
    places: Int[Tensor, "rows tokens"]
    """Where in the grid each is, row by row."""
    nouns: list[list[str]]
    """What a caption of each names, in order."""


@dataclass(frozen=True)
class Shares:
    """How much of a batch is what."""

    imagined: float = 0.4
    """Of the pictures, those moved to a class of the tower's own classifier; 0 for what photographs show alone."""
    collages: float = 0.15
    joined: float = 0.15
    """Two grids cut and joined."""


class Batches:
    """Draws batches from the cache of features.

    Args:
        work: Where the cache is.
        pictures: What it was made of.
        side: Of the grid of image tokens; the cache is pooled to it.
        window: Over which each feature is averaged.
        shares: How much of a batch is what.
    """

    def __init__(self, work: Path, pictures: list[Picture], side: int, window: int, shares: Shares) -> None:
        self.side, self.shares, self.pictures = side, shares, pictures
        self.features, self.means, self.views = features.load(work, side, window)
        learned = [i for i, v in enumerate(self.views) if pictures[v.pictures[0]].split == "train"]
        self.collages = [i for i in learned if self.views[i].kind == "collage"]
        self.single: dict[str, list[int]] = {}
        for i in learned:
            if self.views[i].kind != "collage":
                self.single.setdefault(self.nouns_of(i)[0], []).append(i)
        self.nouns = sorted(self.single)
        """Of which there are pictures."""
        self.imagined = Imagined(self.nouns) if shares.imagined else None
        self.known = sorted({*self.nouns, *(self.imagined.nouns if self.imagined else ())})
        """All that is to be named."""
        self.hard = dict.fromkeys(self.known, 1.0)
        """How often each comes beside its usual share."""

    def nouns_of(self, view: int) -> list[str]:
        """What a caption of a view names, in order."""
        return [self.pictures[i].noun for i in self.views[view].pictures]

    def read(self, rows: np.ndarray, places: np.ndarray) -> Float[Tensor, "*shape channels"]:
        """Features of some views at some places."""
        return torch.from_numpy(np.asarray(self.features[rows, places], np.float32))

    def draw(self, rng: random.Random, n: int, kept: int, *, alone: bool = False) -> Batch:
        """One batch.

        Args:
            rng: Draws.
            n: How many.
            kept: Image tokens of each, drawn anew.
            alone: Whether each shows one noun.
        """
        side, n_all = self.side, self.side**2
        # 1. Which views, and what they show: rare nouns and hard ones more often than by number.
        often = [len(self.single[noun]) ** 0.5 * self.hard[noun] for noun in self.nouns]
        rows = [rng.choice(self.single[noun]) for noun in rng.choices(self.nouns, often, k=n)]
        if self.collages and not alone:
            rows = [rng.choice(self.collages) if rng.random() < self.shares.collages else row for row in rows]
        named = [self.nouns_of(row) for row in rows]
        new = [len(nouns) == 1 and rng.random() < self.shares.imagined for nouns in named]
        partner = list(range(n))
        if not alone:
            single = [i for i in range(n) if len(named[i]) == 1]
            partner = [rng.choice(single) if i in single and rng.random() < self.shares.joined else i for i in range(n)]
        # 2. Which tokens, and where they are taken from: mirrored, left is right; joined, half is another's.
        places = np.array([sorted(rng.sample(range(n_all), min(kept, n_all))) for _ in rows])
        owner = np.repeat(np.arange(n)[:, None], places.shape[1], 1)
        for i, j in enumerate(partner):
            if i != j:
                cut, axis = rng.choice((side // 2, side - side // 2)), rng.random() < 0.6
                owner[i, (places[i] % side if axis else places[i] // side) >= cut] = j
        mirrored = np.array([rng.random() < 0.5 for _ in rows])[owner]
        source = np.where(mirrored, places // side * side + side - 1 - places % side, places)
        tokens = self.read(np.array(rows)[owner], source)
        for i, row in enumerate(rows):
            if mirrored[i, 0] and len(named[i]) == 2 and not self.views[row].upright:
                named[i] = named[i][::-1]
        # 3. Some are moved to nouns of which there is no picture.
        if self.imagined is not None and any(new):
            for i, noun in zip(np.flatnonzero(new), self.imagined.draw(sum(new), rng, self.hard), strict=True):
                named[i] = [noun]
                mine = torch.from_numpy(owner == i)
                grid = torch.from_numpy(places)[mine][None]
                if grid.numel():
                    tokens[mine] = self.imagined.moved(
                        tokens[mine][None], self.means[rows[i]][None], grid, side, [noun], rng
                    )[0]
        joined = [named[i] if i == j else [*named[i], *named[j]] for i, j in enumerate(partner)]
        return Batch(tokens, torch.from_numpy(places), joined)
