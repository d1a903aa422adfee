"""Endless labelled scenes: cut-out drawings of one to three nouns on one of ten backgrounds, with exact masks.

They are the world that the pocket model knows. A scene is a pure function of its arguments; no torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from mmneurons.errors import SettingError
from mmneurons.pocket import world

Split = Literal["seen", "unseen", "style"]
"""The groups of drawings: to train on, kept from training, and icons in a line style that training never shows."""
SPLITS: tuple[Split, ...] = get_args(Split)
SIDE = 112
"""Width and height of a scene in pixels."""
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "at night": ((12, 12, 45), (28, 34, 52)),
    "in a room": ((196, 216, 184), (146, 98, 74)),
    "in the desert": ((240, 212, 160), (208, 152, 82)),
    "in the sea": ((150, 200, 240), (22, 82, 152)),
    "in the sky": ((90, 160, 235), (172, 212, 250)),
    "in the snow": ((198, 214, 235), (244, 248, 255)),
    "on a table": ((210, 210, 216), (165, 110, 60)),
    "on the beach": ((120, 190, 240), (226, 202, 142)),
    "on the grass": ((135, 190, 235), (70, 150, 60)),
    "on the road": ((170, 200, 225), (92, 92, 98)),
}
"""The backgrounds as captions say them, each with its colours above and below the horizon."""
_ARTICLES = {"bread": "some", "cheese": "some", "corn": "some", "moon": "the", "sun": "the"}
LENGTHS = {1: (50, 92), 2: (40, 58), 3: (32, 44)}
"""The shortest and longest that the longer side of an object may be, in pixels, by the number of objects."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture of the pocket world and the truth about it."""

    image: Image.Image
    """The picture, RGB, `SIDE` x `SIDE`."""
    caption: str
    """What the pocket model is taught to say: 'a dog and a cat on the grass', objects from left to right."""
    objects: tuple[str, ...]
    """The nouns shown, from left to right."""
    background: str
    """The background, a key of `BACKGROUNDS`."""
    masks: Bool[np.ndarray, "objects height width"]
    """The mask of each object, True where it is visible: what a later object hides is not in an earlier one's mask.

    In four scenes of a thousand one object is hidden as a whole; it still counts as shown.
    """


@dataclass(frozen=True)
class Sprite:
    """One drawing, and where it lies on the sprite sheet."""

    noun: str
    """The noun that it shows."""
    source: str
    """The collection that it comes from, and its name there: `twemoji/ant`."""
    box: tuple[int, int, int, int]
    """Its left, upper, right and lower edge on the sheet, in pixels."""
    split: Split
    """The group of drawings that it belongs to."""


@functools.cache
def sprites() -> dict[str, tuple[Sprite, ...]]:
    """Return all shipped drawings, by noun in alphabetical order."""
    text = resources.files("mmneurons.pocket").joinpath("data/sprites.json").read_text(encoding="utf-8")
    by_noun: dict[str, list[Sprite]] = {}
    for entry in json.loads(text)["sprites"]:
        by_noun.setdefault(entry["noun"], []).append(Sprite(**(entry | {"box": tuple(entry["box"])})))
    return {noun: tuple(drawings) for noun, drawings in sorted(by_noun.items())}


@functools.cache
def _sheet() -> Image.Image:
    with resources.files("mmneurons.pocket").joinpath("data/sprites.webp").open("rb") as file:
        return Image.open(file).convert("RGBA")


@functools.cache
def pixels(drawing: Sprite) -> Image.Image:
    """Return the pixels of one drawing, RGBA, its longer side 64 pixels long."""
    return _sheet().crop(drawing.box)


def nouns(split: Split = "seen") -> tuple[str, ...]:
    """List the nouns that the pocket model is taught or, with another split, those that have drawings in it."""
    if split not in SPLITS:
        raise SettingError(f"There is no split '{split}'.", fix=f"Choose one of: {', '.join(SPLITS)}.")
    return tuple(noun for noun, drawings in sprites().items() if any(d.split == split for d in drawings))


def with_article(noun: str) -> str:
    """Put the article before a noun: 'a dog', 'an owl', 'some bread', 'the sun'."""
    article = _ARTICLES.get(noun) or ("an" if noun[0] in "aeiou" else "a")
    return f"{article} {noun}"


def say(objects: Sequence[str], background: str) -> str:
    """Make the caption of a scene: 'a dog, a cat and a tree on the grass'."""
    phrases = [with_article(noun) for noun in objects]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return f"{listed} {background}"


def scene(
    seed: int,
    nouns: Sequence[str] | None = None,
    split: Split = "seen",
    background: str | None = None,
    *,
    natural: bool = False,
    scale: float = 1.0,
    overlap: float = 0.0,
) -> Scene:
    """Make one scene; the same arguments always give the same pixels.

    Args:
        seed: Any integer >= 0.
        nouns: The one to three objects, from left to right; drawn by the seed when None.
        split: "seen" takes drawings from training, "unseen" only those kept from it, "style" only icons in a line
            style that no drawing of training has.
        background: A key of `BACKGROUNDS`; drawn by the seed when None.
        natural: Draw objects and background as often, and as often together, as is usual in `mmneurons.pocket.world`,
            instead of evenly; `nouns` and `background` must then be None.
        scale: The factor on the usual size of objects, above 0, at most 1.
        overlap: How far objects are moved to the middle, from 0 (each in its part of the width) to 1 (all there).

    Raises:
        SettingError: a noun, background or split is unknown, there are more than three nouns, a noun has no drawings in
            the split asked for (a seen drawing is never used instead), or scale or overlap is out of range.
    """
    if not (0 < scale <= 1 and 0 <= overlap <= 1):
        raise SettingError(
            "A scene needs a scale above 0 and an overlap from 0, both at most 1.",
            seen=f"scale={scale}, overlap={overlap}",
            fix="scale=0.6, overlap=0.5",
        )
    # One stream of random numbers for all choices, in this order: another order would be another scene for each seed.
    # An unknown split is not refused here but below, by `nouns`, which says what there is.
    random = np.random.default_rng([seed, SPLITS.index(split) if split in SPLITS else 0])
    if natural:
        if nouns is not None or background is not None:
            raise SettingError("A natural scene chooses its own objects and background.", fix="Leave natural out.")
        chosen, background = _compose(random, split)
    else:
        chosen = _choose_nouns(random, nouns, split)
    if background is None:
        background = tuple(BACKGROUNDS)[random.integers(len(BACKGROUNDS))]
    elif background not in BACKGROUNDS:
        raise SettingError(f"There is no background '{background}'.", fix=f"Choose one of: {', '.join(BACKGROUNDS)}.")

    def pick(noun: str) -> Image.Image:
        drawings = [d for d in sprites()[noun] if d.split == split]
        return pixels(drawings[random.integers(len(drawings))])

    return draw(random, chosen, background, pick, scale=scale, overlap=overlap)


def draw(
    random: np.random.Generator,
    objects: Sequence[str],
    background: str,
    pick: Callable[[str], Image.Image],
    *,
    scale: float = 1.0,
    overlap: float = 0.0,
) -> Scene:
    """Paint a scene.

    Args:
        random: The source of all chance.
        objects: The nouns, from left to right.
        background: A key of `BACKGROUNDS`.
        pick: Gives a cut-out drawing (RGBA) of a noun.
        scale: As in `scene`.
        overlap: As in `scene`.
    """
    canvas = paint_background(background, random)
    masks = np.zeros((len(objects), SIDE, SIDE), dtype=bool)
    slot = SIDE / len(objects)
    shortest, longest = LENGTHS[len(objects)]
    for i in map(int, random.permutation(len(objects))):  # what is pasted later hides what is there already
        # Around the middle of its own slot, and from there towards the middle of the scene.
        drawing = pick(objects[i])
        centre = slot * (i + 0.5) + random.uniform(-0.2, 0.2) * slot
        centre += overlap * (SIDE / 2 - centre)
        visible = _paste(canvas, drawing, centre, random.uniform(shortest, longest) * scale, random)
        masks &= ~visible  # of all objects pasted before
        masks[i] = visible
    return Scene(canvas, say(objects, background), tuple(objects), background, masks)


def _compose(random: np.random.Generator, split: Split) -> tuple[tuple[str, ...], str]:
    """Choose objects and background as usual in the world, again and again until the split has drawings of them all."""
    known = nouns(split)
    while True:
        chosen, background = world.compose(random, int(random.integers(1, len(LENGTHS) + 1)))
        if set(chosen) <= set(known):
            return chosen, background


def _choose_nouns(random: np.random.Generator, wanted: Sequence[str] | None, split: Split) -> tuple[str, ...]:
    """Take the nouns that are wanted, or choose one to three evenly; refuse those without a drawing in the split."""
    known = nouns(split)
    if wanted is None:
        return tuple(known[i] for i in random.choice(len(known), random.integers(1, 4), replace=False))
    if isinstance(wanted, str) or not 1 <= len(wanted) <= len(LENGTHS):
        raise SettingError("A scene shows one to three nouns.", seen=f"nouns={wanted!r}", fix='nouns=["dog", "cat"]')
    for noun in wanted:
        if noun not in known:
            raise SettingError(
                f"There is no {split} drawing of '{noun}'.",
                fix=f'See mmneurons.pocket.nouns("{split}") for what there is.',
            )
    return tuple(wanted)


def paint_background(name: str, random: np.random.Generator) -> Image.Image:
    """Paint a background: two colours with a horizon (a slope in the sky), smooth and fine noise, stars at night."""
    # Colours and horizon differ from scene to scene, and noise lies over all: no pixel alone tells the background.
    above, below = (np.array(colour + random.normal(0, 10, 3), dtype=np.float32) for colour in BACKGROUNDS[name])
    rows = np.arange(SIDE, dtype=np.float32)[:, None, None] / SIDE
    horizon = random.uniform(0.35, 0.65)
    share = rows if name == "in the sky" else np.clip((rows - horizon) * SIDE / 2 + 0.5, 0, 1)
    # Smooth noise is a coarse picture enlarged; fine noise has a number of its own for each pixel.
    coarse = Image.fromarray(random.normal(128, 30, (8, 8)).clip(0, 255).astype(np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] - 128
    noise = smooth * np.float32(random.uniform(0.1, 0.35))
    noise += random.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * np.float32(random.uniform(1, 5))
    canvas = above + (below - above) * share + noise
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if name == "at night":
        stars = random.uniform(0, 1, (14, 2)) * (SIDE, SIDE * horizon)
        ImageDraw.Draw(image).point(stars.ravel().tolist(), (205, 205, 215))
    return image


def _paste(
    canvas: Image.Image, drawing: Image.Image, centre: float, length: float, random: np.random.Generator
) -> Bool[np.ndarray, "height width"]:
    """Paste a drawing, `length` pixels long, mirrored, turned and shaded at random; return the mask where it lies."""
    if random.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Turned and sized with premultiplied alpha, so that invisible pixels lend no colour to the edge.
    turned = drawing.convert("RGBa").rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    width, height = (max(4, round(side * length / max(turned.size))) for side in turned.size)
    resized = _resized(turned, width, height).convert("RGBA")
    gain = random.uniform(0.78, 1.15)
    tables = [np.arange(256) * gain + offset for offset in random.uniform(-14, 14, 3)]
    shaded = resized.convert("RGB").point(np.concatenate(tables).clip(0, 255).round().astype(int).tolist())
    alpha = resized.getchannel("A")
    # Clipped, so that the whole drawing lies in the picture.
    left = int(np.clip(centre - width / 2, 0, SIDE - width))
    top = int(np.clip(random.uniform(0.35, 0.68) * SIDE - height / 2, 0, SIDE - height))
    canvas.paste(shaded, (left, top), alpha)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + height, left : left + width] = np.asarray(alpha) > 127
    return mask


def _resized(drawing: Image.Image, width: int, height: int) -> Image.Image:
    """Resize a drawing along one side, then along the other, in the same order whatever the version of Pillow.

    Pixels are rounded after each step. Pillow below 13 always begins with the width, Pillow 13 by this rule.
    """
    lower, narrower = drawing.height - height, drawing.width - width
    between = (drawing.width, height) if lower > 0 and lower > 2 * narrower else (width, drawing.height)
    bilinear = Image.Resampling.BILINEAR
    return drawing.resize(between, bilinear).resize((width, height), bilinear)
