"""What the photo model learns from: photographs with the noun of each, from folders or from a table."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

SIDE = 260
"""What EfficientNet-Lite2 is given."""
KINDS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Picture:
    """One photograph."""

    path: Path
    noun: str
    """The plain word that a caption should have: "dog" of a dalmatian."""
    label: str
    """The finer word, if there is one; else the noun."""
    split: str
    """train, val, or any other name of a set to judge by."""


def read_pictures(source: Path) -> list[Picture]:
    """Read a table (columns file, noun and, if it has them, label and split), or folders NOUN/*.jpg.

    Args:
        source: A CSV file; its files are named relative to its own folder or to `pictures` in that. Or a folder of
            folders, one a noun; every seventh picture of each, in the order of names, is kept for `val`.

    Raises:
        SystemExit: if there is no picture, or one that is named is not there.
    """
    if source.is_dir():
        found = [
            Picture(path, folder.name, folder.name, "val" if i % 7 == 3 else "train")
            for folder in sorted(path for path in source.iterdir() if path.is_dir())
            for i, path in enumerate(sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS))
        ]
    else:
        base = source.parent / "pictures" if (source.parent / "pictures").is_dir() else source.parent
        with source.open(encoding="utf-8", newline="") as table:
            found = [
                Picture(base / row["file"], row["noun"], row.get("label") or row["noun"], row.get("split") or "train")
                for row in csv.DictReader(table)
            ]
    missing = [picture.path for picture in found if not picture.path.is_file()]
    if missing or not found:
        raise SystemExit(f"{source}: {len(found)} pictures, {len(missing)} of them not there, such as {missing[:1]}")
    return found


def opened(picture: Picture) -> Image.Image:
    """The photograph, upright, in colour."""
    with Image.open(picture.path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def centred(image: Image.Image) -> Image.Image:
    """The middle square, as the model's own processor cuts it."""
    scale = SIDE / min(image.size)
    wide, high = (max(SIDE, int(side * scale)) for side in image.size)
    left, top = (wide - SIDE) // 2, (high - SIDE) // 2
    return image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))


def cut(image: Image.Image, size: tuple[int, int], rng: random.Random, smallest: float = 0.4) -> Image.Image:
    """A random part of a picture, of about the shape of `size` (width, height) and scaled to it; half are mirrored.

    Args:
        image: The picture.
        size: In pixels.
        rng: Draws.
        smallest: The least share of the largest such part that is kept, as an area.
    """
    shape = size[0] / size[1] * 2 ** rng.uniform(-0.4, 0.4)
    largest = min(image.width, image.height * shape)  # its width
    wide = largest * rng.uniform(smallest, 1) ** 0.5
    high = wide / shape
    left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
    part = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    return ImageOps.mirror(part) if rng.random() < 0.5 else part


def collage(first: Image.Image, second: Image.Image, *, upright: bool, rng: random.Random | None) -> Image.Image:
    """Two pictures in one: side by side, or one above the other.

    Args:
        first: Left, or above.
        second: Right, or below.
        upright: Whether one stands above the other.
        rng: Draws the part of each that is seen; None for the middle.
    """
    size = (SIDE, SIDE // 2) if upright else (SIDE // 2, SIDE)
    whole = Image.new("RGB", (SIDE, SIDE))
    for i, image in enumerate((first, second)):
        part = ImageOps.fit(image, size, Image.Resampling.BICUBIC) if rng is None else cut(image, size, rng, 0.7)
        whole.paste(part, (0, i * size[1]) if upright else (i * size[0], 0))
    return whole


def pixels(images: list[Image.Image]) -> UInt8[np.ndarray, "pictures high wide 3"]:
    """Squares side by side in one array."""
    return np.stack([np.asarray(image) for image in images])
