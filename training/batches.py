"""What each stage of training sees: batches that are functions of the step's number."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from collage import Collages
from model import GRID, build_processor
from text import caption, turns
from torch import Tensor
from torch.utils.data import IterableDataset

from mmneurons.pocket import facts, scenes, world

STAGES = ("tower", "language", "joint")
BATCH = {"tower": 96, "language": 128, "joint": 32}
TEXTS = 24
"""Sentences beside each batch of the joint stage."""
EVEN = 1 / 3
"""Share of the scenes of the joint stage that are composed evenly, not as is usual in the world."""
SEED_BASE = 1_000_000_000
"""Training's seeds begin here; everything below is free for evaluation."""
IGNORE = -100
"""Label of a token that nothing is to say."""
ROUND_TO = 16
"""Texts are padded to a multiple of this many tokens."""


class Steps(IterableDataset):
    """The batches of one stage from step `first` on, each a function of its number."""

    def __init__(self, stage: str, first: int, last: int) -> None:
        self.stage, self.first, self.last = stage, first, last

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        make = {"tower": TowerBatches, "language": LanguageBatches, "joint": JointBatches}[self.stage]()
        for step in range(self.first, self.last):
            yield make.batch(np.random.default_rng([SEED_BASE, STAGES.index(self.stage), step]))


class TowerBatches:
    """Collages and the label of each patch."""

    def __init__(self) -> None:
        self.collages = Collages()

    def batch(self, random: np.random.Generator) -> dict[str, Tensor]:
        """One batch, all of it drawn from `random`."""
        made = [self.collages.draw(random) for _ in range(BATCH["tower"])]
        pictures, patches = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        return {"pictures": pictures, "patches": patches.flatten(1)}


class LanguageBatches:
    """Captions and facts, half of each, as text alone."""

    def __init__(self) -> None:
        self.tokenizer = build_processor().tokenizer
        self.facts = facts()

    def batch(self, random: np.random.Generator) -> dict[str, Tensor]:
        """One batch, all of it drawn from `random`."""
        return pad([self.tokens(random) for _ in range(BATCH["language"])])

    def tokens(self, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """One text: its tokens, and which answer each belongs to (one only: 1)."""
        if random.random() < 0.5:
            text = self.facts[random.integers(len(self.facts))]
        else:
            text = caption(*world.compose(random, int(random.integers(1, 4))))
        ids = self.tokenizer(f"{text}</s>").input_ids
        return ids, [1] * len(ids)


class JointBatches:
    """Scenes with several prompts and answers each, and texts.

    All turns of a scene share one pass over its image: a turn's tokens see the image and their own turn only, and are
    counted on from the image, so that each is as if it stood alone.
    """

    def __init__(self) -> None:
        self.collages = Collages()
        self.texts = LanguageBatches()
        self.tokenizer = self.texts.tokenizer
        image_token = self.tokenizer.image_token
        self.opening = self.tokenizer(f"USER: {image_token * GRID**2}\n").input_ids

    def batch(self, random: np.random.Generator) -> dict[str, Tensor]:
        """One batch, all of it drawn from `random`."""
        made = [self.scene(random) for _ in range(BATCH["joint"])]
        pictures, patches, tokens = zip(*made, strict=True)
        texts = pad([self.texts.tokens(random) for _ in range(TEXTS)])
        return {
            "pictures": torch.from_numpy(np.stack(pictures)),
            "patches": torch.from_numpy(np.stack(patches)).flatten(1),
            **pad(list(tokens)),
            **{f"text_{name}": tensor for name, tensor in texts.items()},
        }

    def scene(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[list[int], list[int]]]:
        """A picture, its patch labels, and the tokens of all its turns with the number of the turn of each.

        Half are scenes as the package makes them, half have altered drawings; of both, two thirds are composed as the
        world is and one third evenly, so that rare nouns and rare pairs are learnt without losing what is usual.
        """
        if random.random() < EVEN:
            names = scenes.nouns()
            objects = tuple(names[i] for i in random.choice(len(names), int(random.integers(1, 4)), replace=False))
            background = str(random.choice(list(scenes.BACKGROUNDS)))
        else:
            objects, background = world.compose(random, int(random.integers(1, 4)))
        if random.random() < 0.5:
            made = scenes.scene(int(random.integers(SEED_BASE, 2**62)), objects, background=background)
            picture, patches = np.asarray(made.image), self.collages.labels(made)
        else:
            picture, patches = self.collages.scene(random, objects, background)
        ids, turn_of = list(self.opening), [0] * len(self.opening)
        for i, (prompt, answer) in enumerate(turns(random, objects, background), start=1):
            asked = self.tokenizer(f"{prompt} ASSISTANT:", add_special_tokens=False).input_ids
            said = self.tokenizer(f" {answer}</s>", add_special_tokens=False).input_ids
            ids += asked + said
            turn_of += [-i] * len(asked) + [i] * len(said)
        return picture, patches, (ids, turn_of)


def pad(texts: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Token ids, labels, positions and the attention mask of texts with turns.

    `turn_of` is 0 for what all turns see, -i for the prompt and i for the answer of turn i. Labels hold the answers.
    The mask (batch, 1, length, length) is true where a token may look: at itself and before, within its own turn or
    at what all turns see.
    """
    length = -(-max(len(ids) for ids, _ in texts) // ROUND_TO) * ROUND_TO
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    turn = torch.full((len(texts), length), 10**6)
    for row, (tokens, turn_of) in enumerate(texts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        turn[row, : len(tokens)] = torch.tensor(turn_of)
    labels = torch.where((turn > 0) & (turn < 10**6), ids, IGNORE)
    group = turn.abs()
    same = (group[:, :, None] == group[:, None, :]) | (group == 0)[:, None, :]
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return {"ids": ids, "labels": labels, "positions": mask.sum(-1) - 1, "mask": mask[:, None]}
