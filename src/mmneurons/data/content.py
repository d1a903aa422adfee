"""What results are kept under: hashes of what they were made of, whatever its name is; and what cannot be read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.data.dataset import Item
from mmneurons.errors import ImageError


def key_of(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def image_hash(image: Image.Image) -> str:
    """A hash of the pixels of an opened image."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def truth_hash(item: Item) -> str:
    """A hash of what an image is said to show, and where.

    Raises:
        ImageError: a mask cannot be read or used.
    """
    digest = hashlib.sha256(key_of(item.objects).encode())
    for noun, mask in item.masks().items():
        digest.update(key_of(noun, mask.shape).encode())
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()


def unreadable(items: Iterable[Item]) -> dict[str, str]:
    """By name why an image cannot be decoded; all of them are opened."""
    found = {}
    for item in items:
        try:
            item.image()
        except ImageError as error:
            found[item.name] = reason(error)
    return found


def reason(error: ImageError) -> str:
    """What was wrong with an image, in one line."""
    return " ".join(f"{error.what} {error.seen}".split())
