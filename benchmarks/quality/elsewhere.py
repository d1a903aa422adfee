"""Images and texts of other kinds than an edit's reference: what leaves the package's scenes alone may change these.

`images()`: of each kind `N` scenes, one to three nouns drawn evenly unless it says otherwise, from fixed seeds.

| kind | what it holds |
| --- | --- |
| unseen drawings | drawings kept from training |
| other style | icons in a line style that training has none of |
| other layouts | four in a grid, two above each other, six small ones, one that the edge cuts: drawings from training |
| stamps | Tux Paint's drawings and photographs (Debian's tuxpaint-stamps-default), where installed |

`sentences()`: 200 English sentences, written one by one; none is among those that the package ships.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from mmneurons import pocket
from mmneurons.data.dataset import Item
from mmneurons.pocket import scenes, world

N = 100
FIRST_SEED = 760_000_000
"""Beyond those of the evaluation sets."""
STAMPS = Path(os.environ.get("TUXPAINT_STAMPS", "/usr/share/tuxpaint/stamps"))
LAYOUTS = (
    [(x, y, 42) for y in (0.3, 0.72) for x in (0.27, 0.73)],
    [(0.5, 0.27, 50), (0.5, 0.75, 50)],
    [(x, y, 24) for y in (0.3, 0.7) for x in (0.2, 0.5, 0.8)],
    [(0.02, 0.5, 90)],
)
"""Of each layout the middle of each object, in shares of the picture, and its longer side in pixels."""


def images() -> dict[str, list[Item]]:
    """The images of each kind."""
    made = {
        "unseen drawings": [pocket.scene(FIRST_SEED + i, split="unseen").image for i in range(N)],
        "other style": [pocket.scene(FIRST_SEED + i, split="style").image for i in range(N)],
        "other layouts": [laid_out(FIRST_SEED + i, LAYOUTS[i % len(LAYOUTS)]) for i in range(N)],
    }
    if STAMPS.exists():
        drawings = stamps()
        made["stamps"] = [stamped(FIRST_SEED + i, drawings) for i in range(N)]
    return {kind: [Item(f"{kind}/{i}", image) for i, image in enumerate(mine)] for kind, mine in made.items()}


def sentences() -> list[str]:
    """The sentences that an edit is judged by."""
    return Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()


def laid_out(seed: int, places: list[tuple[float, float, int]]) -> Image.Image:
    """Different nouns at these places, on a background drawn by the seed."""
    random = np.random.default_rng(seed)
    canvas = scenes.paint_background(str(random.choice(list(scenes.BACKGROUNDS))), random)
    for noun, (x, y, side) in zip(random.choice(pocket.nouns(), len(places), replace=False), places, strict=False):
        drawings = [drawing for drawing in scenes.sprites()[noun] if drawing.split == "seen"]
        drawing = scenes.pixels(drawings[random.integers(len(drawings))])
        scale = side / max(drawing.size)
        drawing = drawing.resize((max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))))
        corner = round(x * scenes.SIDE - drawing.width / 2), round(y * scenes.SIDE - drawing.height / 2)
        canvas.paste(drawing, corner, drawing)
    return canvas


def stamps() -> dict[str, list[Image.Image]]:
    """Tux Paint's stamps whose English name has exactly one noun."""
    found: dict[str, list[Image.Image]] = defaultdict(list)
    for path in sorted(STAMPS.rglob("*.png")):
        label = path.with_suffix(".txt")
        if not label.exists() or path.stem.endswith(("_mirror", "_flip")):
            continue
        name = label.read_text(encoding="utf-8").splitlines()[0].lower()
        named = {noun for noun in world.FREQUENCY if re.search(rf"\b{noun}s?\b", name)}
        image = Image.open(path).convert("RGBA")
        if len(named) == 1 and np.asarray(image)[..., 3].mean() < 250:
            image = image.crop(image.getchannel("A").getbbox())
            image.thumbnail((128, 128))
            found[named.pop()].append(image)
    return found


def stamped(seed: int, drawings: dict[str, list[Image.Image]]) -> Image.Image:
    """One to three stamps as a scene shows drawings."""
    random = np.random.default_rng(seed)
    nouns = random.choice(sorted(drawings), random.integers(1, 4), replace=False).tolist()
    place = str(random.choice(list(scenes.BACKGROUNDS)))
    return scenes.draw(random, nouns, place, lambda noun: drawings[noun][random.integers(len(drawings[noun]))]).image
