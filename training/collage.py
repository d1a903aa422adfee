"""Dense pictures for the tower: up to six augmented drawings on a background, and what each patch shows.

The tower learns shapes from these before it sees a scene: more objects a picture than scenes have, more kinds of
drawings, and every drawing altered in shape and colour, partly hidden and of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from model import GRID, PATCH
from restyle import restyled

from mmneurons.pocket import scenes

T = TypeVar("T")
EXTRA = Path(__file__).parent / "work" / "extra.npz"
BACKGROUNDS_EACH = 150
"""Pictures of each background, painted once and used again, mirrored and shaded."""
EXTRA_SHARE = 0.25
"""How often an object of a scene is a drawing for training only."""
SHARES = {"world": 0.55, "extra": 0.17, "things": 0.28}
"""How often an object is a drawing of the world, a further drawing of its nouns, a drawing of something else."""
SLOTS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (3, 2), 6: (3, 2)}
"""Columns and rows that objects are spread over."""
LENGTHS = {1: (44, 104), 2: (36, 66), 3: (28, 50), 4: (30, 58), 5: (28, 48), 6: (28, 48)}
"""Longer side of an object in pixels, by the number of objects."""
HOW_MANY = {1: 0.1, 2: 0.15, 3: 0.25, 4: 0.2, 5: 0.15, 6: 0.15}


@dataclass(frozen=True)
class Cut:
    """One drawing, ready to be pasted."""

    label: int
    pixels: np.ndarray
    """(height, width, 4) uint8."""
    two_tone: bool


class Collages:
    """Makes pictures; labels count the nouns first, then the backgrounds, then other things."""

    def __init__(self) -> None:
        nouns = scenes.nouns()
        self.names = {name: i for i, name in enumerate((*nouns, *scenes.BACKGROUNDS, *_things()))}
        kinds: dict[str, dict[int, list[Cut]]] = {kind: {} for kind in SHARES}
        for noun, drawings in scenes.sprites().items():
            for drawing in drawings:
                if drawing.split == "seen":
                    cut = Cut(self.names[noun], np.asarray(scenes.pixels(drawing)), False)
                    kinds["world"].setdefault(cut.label, []).append(cut)
        with np.load(EXTRA) as extra:
            columns = (extra["labels"], extra["pixels"], extra["sizes"], extra["two_tone"])
        for label, pixels, (width, height), two_tone in zip(*columns, strict=True):
            cut = Cut(self.names[str(label)], pixels[:height, :width].copy(), bool(two_tone))
            kinds["extra" if label in nouns else "things"].setdefault(cut.label, []).append(cut)
        self.cuts = kinds
        self.labels_of = {kind: tuple(by_label) for kind, by_label in kinds.items()}
        random = np.random.default_rng(0)
        places = tuple(scenes.BACKGROUNDS)
        self.backgrounds = {
            place: [np.asarray(scenes.paint_background(place, random)) for _ in range(BACKGROUNDS_EACH)]
            for place in places
        }

    @staticmethod
    def n_labels() -> int:
        """How many things a patch can show."""
        return len(scenes.nouns()) + len(scenes.BACKGROUNDS) + len(_things())

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A picture (SIDE, SIDE, 3) uint8 of anything anywhere and the label of each patch (GRID, GRID)."""
        n = draw_from(HOW_MANY, random)
        cuts = []
        for _ in range(n):
            kind = draw_from(SHARES, random)
            labels = self.labels_of[kind]
            cuts.append(self._cut(kind, labels[random.integers(len(labels))], random))
        places = tuple(scenes.BACKGROUNDS)
        return self._paint(random, cuts, places[random.integers(len(places))], LENGTHS[n], SLOTS[n])

    def scene(
        self, random: np.random.Generator, objects: Sequence[str], background: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for objects from left to right on a background, sized and spread as in a scene."""
        cuts = []
        for noun in objects:
            label = self.names[noun]
            kind = "extra" if label in self.cuts["extra"] and random.random() < EXTRA_SHARE else "world"
            cuts.append(self._cut(kind, label, random))
        n = len(cuts)
        return self._paint(random, cuts, background, scenes.LENGTHS[n], (n, 1))

    def labels(self, scene: scenes.Scene) -> np.ndarray:
        """The label of each patch of a scene (GRID, GRID)."""
        owner = np.full((scenes.SIDE, scenes.SIDE), len(scene.objects), dtype=np.intp)
        for i, mask in enumerate(scene.masks):
            owner[mask] = i
        return patch_labels(owner, [self.names[noun] for noun in scene.objects], self.names[scene.background])

    def _cut(self, kind: str, label: int, random: np.random.Generator) -> Cut:
        cuts = self.cuts[kind][label]
        return cuts[random.integers(len(cuts))]

    def _paint(
        self,
        random: np.random.Generator,
        cuts: Sequence[Cut],
        background: str,
        lengths: tuple[int, int],
        slots: tuple[int, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        painted = self.backgrounds[background][random.integers(BACKGROUNDS_EACH)]
        canvas = painted[:, ::-1] if random.random() < 0.5 else painted
        canvas = canvas * np.float32(random.uniform(0.85, 1.12)) + random.normal(0, 6, 3).astype(np.float32)
        columns, rows = slots
        width, height = scenes.SIDE / columns, scenes.SIDE / rows
        owner = np.full((scenes.SIDE, scenes.SIDE), len(cuts), dtype=np.intp)
        for i in random.permutation(len(cuts)):
            x = (i % columns + 0.5 + random.uniform(-0.25, 0.25)) * width
            y = (i // columns + 0.5 + random.uniform(-0.25, 0.25)) * height
            if rows == 1:
                y = random.uniform(0.33, 0.7) * scenes.SIDE
            layers, left, top = altered(cuts[i], random, random.uniform(*lengths), x, y)
            area = np.s_[top : top + layers.shape[0], left : left + layers.shape[1]]
            alpha = layers[..., 3:]
            canvas[area] += layers[..., :3] - canvas[area] * alpha
            owner[area][alpha[..., 0] > 0.5] = i
        if random.random() < 0.15:
            canvas = cv2.GaussianBlur(canvas, (3, 3), 0)
        labels = patch_labels(owner, [cut.label for cut in cuts], self.names[background])
        return canvas.clip(0, 255).astype(np.uint8), labels


def patch_labels(owner: np.ndarray, objects: Sequence[int], background: int) -> np.ndarray:
    """What each patch shows: the object that covers most of it, if more than a quarter, else the background.

    Args:
        owner: Which object each pixel shows, the number of objects where none, (SIDE, SIDE).
        objects: Their labels.
        background: Its label.
    """
    n = len(objects) + 1
    patch = np.arange(GRID * GRID).reshape(GRID, GRID).repeat(PATCH, 0).repeat(PATCH, 1)
    counts = np.bincount((patch * n + owner).ravel(), minlength=GRID * GRID * n).reshape(GRID, GRID, n)[..., :-1]
    return np.where(counts.max(-1) > PATCH * PATCH / 4, np.array(objects)[counts.argmax(-1)], background)


@cache
def _things() -> tuple[str, ...]:
    """The other things that there are drawings of, as emoji."""
    with np.load(EXTRA) as extra:
        return tuple(sorted(set(extra["labels"].tolist()) - set(scenes.nouns())))


def draw_from(shares: Mapping[T, float], random: np.random.Generator) -> T:
    """One key, each as often as its share says."""
    keys = list(shares)
    return keys[int(np.searchsorted(np.cumsum(list(shares.values())), random.random() * sum(shares.values())))]


def altered(cut: Cut, random: np.random.Generator, length: float, x: float, y: float) -> tuple[np.ndarray, int, int]:
    """A drawing altered in shape and colour, about `length` long and centred near (x, y), cut at the picture's edge.

    Returns:
        Its colours times its opacity, and its opacity in 0 to 1, (height, width, 4) float32; its left; its top.
    """
    layers = cut.pixels.astype(np.float32)
    rgb, opacity = layers[..., :3], layers[..., 3:] / 255
    if cut.two_tone:
        line, paper = random.uniform(0, 255, (2, 3)).astype(np.float32)
        rgb = line + (paper - line) * rgb / 255
    rgb, opacity = restyled(rgb, opacity[..., 0], random)
    opacity = opacity[..., None]
    if random.random() < 0.85:
        rgb = cv2.transform(rgb.astype(np.float32), colour_matrix(random)).clip(0, 255)
    # Turned and sized with premultiplied opacity, so that invisible pixels lend no colour to the edge.
    layers = np.concatenate([rgb * opacity, opacity], axis=-1)
    height, width = opacity.shape[:2]
    angle = random.normal(0, 0.21)
    stretch = np.exp(random.normal(0, 0.12))
    mirror = -1 if random.random() < 0.5 else 1
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = np.array([[mirror * stretch, random.normal(0, 0.1)], [0, 1 / stretch]])
    matrix = turn @ shape * length / max(width, height)
    half = np.abs(matrix) @ (width / 2, height / 2)
    # At most a fifth of it lies outside of the picture.
    x, y = (
        np.clip(c, min(h, side) * 0.8, 2 * side - min(h, side) * 0.8)
        for c, h, side in zip((x, y), half, (scenes.SIDE / 2,) * 2, strict=True)
    )
    left, top = (max(0, int(c - h)) for c, h in zip((x, y), half, strict=True))
    right, bottom = (min(scenes.SIDE, int(c + h) + 1) for c, h in zip((x, y), half, strict=True))
    offset = np.array((x - left, y - top)) - matrix @ (width / 2, height / 2)
    return cv2.warpAffine(layers, np.column_stack([matrix, offset]), (right - left, bottom - top)), left, top


def colour_matrix(random: np.random.Generator) -> np.ndarray:
    """A 3 x 4 colour transform: hue turned (now and then anywhere), saturation, gain and offset at random."""
    turn = random.uniform(-np.pi, np.pi) if random.random() < 0.12 else random.normal(0, 0.2)
    saturation = 0.0 if random.random() < 0.06 else random.uniform(0.5, 1.4)
    grey = np.full((3, 3), 1 / 3)
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.cos(turn) * np.eye(3) + (1 - np.cos(turn)) * grey + np.sin(turn) * axis
    mixed = grey + saturation * (hue - grey)
    return np.column_stack([mixed * random.uniform(0.7, 1.2), random.normal(0, 14, 3)]).astype(np.float32)
