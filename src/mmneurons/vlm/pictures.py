"""What users give as pictures: one, several, several in one prompt; opened, and put into batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.vlm.images import OpenedImage, open_image

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""What `open_image` takes."""
Pictures = list[Any] | tuple[Any, ...]
"""Several of them, one prompt each; a list in the list is several pictures in one prompt. `Any`, because a list of
paths is no list of `Picture` to a type checker."""


def as_list(images: Picture | Pictures | None) -> list[Any]:
    """One prompt or several, as a list."""
    return list(images) if isinstance(images, list | tuple) else [images]


def open_row(row: Picture | Pictures | None) -> list[OpenedImage]:
    """The pictures of one prompt, opened: one, several, or none."""
    if row is None:
        return []
    return [open_image(picture) for picture in (row if isinstance(row, list | tuple) else [row])]


def batches(rows: Sequence[list[OpenedImage]], size: int) -> list[list[list[OpenedImage]]]:
    """Rows in batches of at most `size`, in order; the rows of one batch hold equally many pictures."""
    made: list[list[list[OpenedImage]]] = []
    for row in rows:
        if made and len(made[-1]) < size and len(made[-1][0]) == len(row):
            made[-1].append(row)
        else:
            made.append([row])
    return made
