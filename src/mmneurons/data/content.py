"""Hashes of the content that results are made of, to keep results under; and checks which images can be decoded.

Results belong to pixels and masks, not to file names: a renamed file keeps its results, a replaced one loses them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.data.dataset import Item
from mmneurons.errors import ImageError, MmneuronsError


def key_of(*parts: Any) -> str:
    """Hash plain data, such as strings, numbers and tuples of them; NaN is refused."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def image_hash(image: Image.Image) -> str:
    """Hash the pixels of an opened image, with its mode and size."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def truth_hash(item: Item) -> str:
    """Hash what an image is said to show, and where.

    Raises:
        ImageError: a mask cannot be read or used.
    """
    digest = hashlib.sha256(key_of(item.objects).encode())
    for noun, mask in item.masks().items():
        digest.update(key_of(noun, mask.shape).encode())
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()


def unreadable(items: Iterable[Item]) -> dict[str, str]:
    """Open all images to their end; return for each that cannot be decoded the reason, by its name."""
    found = {}
    for item in items:
        try:
            item.image()
        except ImageError as error:
            found[item.name] = reason(error)
    return found


def reason(error: MmneuronsError) -> str:
    """Say in one line what was wrong: with an image, or with what was asked of a model."""
    return " ".join(f"{error.what} {error.seen}".split())
