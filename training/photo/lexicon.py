"""What an image token should be for each noun, learned without pictures through the frozen language model.

    python training/photo/lexicon.py --pictures pictures.csv

The word's own embedding is not enough: of it the model tells stories, and of nouns of several tokens it says something
else. An image token is `base + sum over nouns of strength * column + how surely there are two * joint`. The last is
needed: of tokens of two nouns alone the frozen model says the first and ends, as it does of one. A grid of tokens is
drawn as pictures will make it: some places show nothing, others are weak or show another noun a little, and every
second grid shows two nouns, each place as much of both as its window would. Stopped, it continues from its last
checkpoint; what a step sees is a function of its number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import CUTS, UPRIGHT, jointly, shares
from features import WORK
from imagined import COMMON, Imagined
from jaxtyping import Float, Int
from language import Reader
from pictures import read_pictures
from plan import Plan
from rates import share_of_rate
from torch import Tensor, nn

TURN_RATE, OWN_RATE = 5e-4, 3e-3
"""Learning rates: of what all nouns share, and of each noun's own."""
ROWS, TOKENS = 16, 6
"""Of a batch: grids, and image tokens that are read of each; fewer than there are, since each costs as a word does."""
TWO = 0.5
"""Share of the grids that show two nouns. Both kinds stand in every batch: whether an answer goes on is learned from
their difference, and batches of one kind would only move all answers there and back."""
EVERY = 20
"""Steps between checkpoints."""


class Lexicon(nn.Module):
    """For each noun a column: its word's embedding, turned into what the language model reads, and its own part.

    Args:
        words: The embedding of each noun, a mean over its tokens.
        joint: The embedding of "and", which begins as what says that there are two.
    """

    def __init__(self, words: Float[Tensor, "nouns hidden"], joint: Float[Tensor, "hidden"]) -> None:
        super().__init__()
        self.words = nn.Buffer(words - words.mean(0))
        self.turn = nn.Linear(words.shape[1], words.shape[1], bias=False)
        self.own = nn.Parameter(torch.zeros_like(words))
        self.base = nn.Parameter(words.mean(0))
        self.joint = nn.Parameter(2 * (joint - words.mean(0)))
        nn.init.eye_(self.turn.weight)

    def columns(self) -> Float[Tensor, "nouns hidden"]:
        """What each noun adds to an image token."""
        return self.turn(self.words) + self.own


@dataclass(frozen=True)
class Drawn:
    """Grids as pictures will make them."""

    shown: Int[Tensor, "rows tokens 3"]
    """Nouns at each place: the first, the second, and one that is seen by accident."""
    strengths: Float[Tensor, "rows tokens 3"]
    """Of these."""
    joint: Float[Tensor, "rows tokens"]
    """How much each place says that two things are there."""
    pairs: Int[Tensor, "rows 2"]
    """What is to be said; the second is -1 where there is one."""
    places: Int[Tensor, "rows tokens"]
    side: int


def drawn(n_nouns: int, often: Tensor, rng: random.Random, generator: torch.Generator) -> Drawn:
    """Some grids.

    Args:
        n_nouns: How many there are.
        often: How often each comes.
        rng: Draws shapes and places.
        generator: Draws all else.
    """
    side = rng.choice((3, 5))
    picked = torch.multinomial(often, 2 * ROWS, generator=generator).view(ROWS, 2)
    places = torch.stack([torch.tensor(sorted(rng.sample(range(side**2), TOKENS))) for _ in range(ROWS)])
    # 1. How much of each place shows the second noun.
    two = [rng.random() < TWO for _ in range(ROWS)]
    cuts = [shares(side, Plan.window, rng.choice(CUTS), rng.random() < UPRIGHT) for _ in range(ROWS)]
    second = torch.stack(cuts).gather(1, places) * torch.tensor(two)[:, None]
    # 2. How strongly: some places show nothing, but more than half do.
    share = torch.rand(ROWS, 1, generator=generator) * 0.45
    here = torch.rand(ROWS, TOKENS, generator=generator) > share
    strength = torch.rand(ROWS, TOKENS, generator=generator)
    strength = torch.where(here, 0.5 + 0.7 * strength, 0.3 * strength)
    # 3. What is seen by accident: at each place something else, or in all places the same.
    other = torch.randint(n_nouns, (ROWS, TOKENS), generator=generator)
    same = torch.rand(ROWS, 1, generator=generator) < 0.4
    other = torch.where(same, other[:, :1], other)
    accident = 0.4 * torch.rand(ROWS, TOKENS, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    # 4. That there are two is seen where both are near, not surely, and now and then where there is one.
    seen = 0.3 + 0.9 * torch.rand(ROWS, TOKENS, generator=generator)
    wrongly = 0.3 * torch.rand(ROWS, TOKENS, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    return Drawn(
        torch.stack([*picked[:, :, None].expand(-1, -1, TOKENS).unbind(1), other], 2),
        torch.stack([(1 - second) * strength, second * strength, accident], 2),
        seen * jointly(second) + wrongly,
        torch.stack([picked[:, 0], torch.where(torch.tensor(two), picked[:, 1], -1)], 1),
        places,
        side,
    )


def learn(reader: Reader, nouns: list[str], favoured: set[str], steps: int, path: Path) -> Lexicon:
    """Learn the lexicon, or go on.

    Args:
        reader: The language model.
        nouns: All that are to be named.
        favoured: Those that come three times as often.
        steps: In all.
        path: Checkpoint.
    """
    lexicon = Lexicon(reader.words(nouns), reader.words(["and"])[0])
    optimizer = torch.optim.Adam(
        [
            {"params": [*lexicon.turn.parameters()], "rate": TURN_RATE},
            {"params": [lexicon.own, lexicon.base, lexicon.joint], "rate": OWN_RATE},
        ],
        betas=(0.9, 0.99),
    )
    hard, begun = torch.full((len(nouns),), 2.0), 0
    if path.exists():
        content = torch.load(path, weights_only=True)
        lexicon.load_state_dict(content["lexicon"])
        optimizer.load_state_dict(content["optimizer"])
        hard, begun = content["hard"], content["step"]
    usual, start, running = torch.tensor([3.0 if noun in favoured else 1.0 for noun in nouns]), time.time(), []
    for step in range(begun, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(step, steps)
        rng, generator = random.Random(f"lexicon {step}"), torch.Generator().manual_seed(step)
        grids = drawn(len(nouns), usual * hard.clamp(0.3, 4), rng, generator)
        columns = lexicon.columns()
        image = lexicon.base + (grids.strengths[..., None] * columns[grids.shown]).sum(2)
        image = image + grids.joint[..., None] * lexicon.joint
        noise = torch.randn(image.shape, generator=generator) * columns.detach().std() * 0.3
        named = [[nouns[i] for i in pair if i >= 0] for pair in grids.pairs.tolist()]
        losses = reader.losses(image + noise, grids.places, grids.side, named, rng)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        note(hard, grids.pairs, losses.detach())
        running.append(losses.mean().item())
        if (step + 1) % EVERY == 0 or step == steps - 1:
            told = {"lexicon": step + 1, "loss": round(sum(running[-EVERY:]) / len(running[-EVERY:]), 3)}
            print(told | {"s": round(time.time() - start, 1)}, flush=True)
            content = {"lexicon": lexicon.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content | {"hard": hard, "step": step + 1}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    return lexicon.requires_grad_(False)


def note(hard: Float[Tensor, "nouns"], pairs: Int[Tensor, "rows 2"], losses: Float[Tensor, "rows"]) -> None:
    """Note which nouns are hard, in place: the running loss of the pictures that show each alone."""
    for (first, second), loss in zip(pairs.tolist(), losses.tolist(), strict=True):
        if second < 0:
            hard[first] = 0.7 * hard[first] + 0.3 * min(loss, 6.0)


def main() -> None:
    """Learn it and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="whose nouns are learned")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    photographed = {picture.noun for picture in read_pictures(options.pictures) if picture.split == "train"}
    nouns = sorted(photographed.union(Imagined().nouns))
    favoured = photographed.union(COMMON)
    options.work.mkdir(parents=True, exist_ok=True)
    learn(Reader(options.work), nouns, favoured, options.steps, options.work / "lexicon.pt")
    (options.work / "lexicon.json").write_text(json.dumps(nouns))


if __name__ == "__main__":
    main()
