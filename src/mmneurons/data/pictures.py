"""What users give as pictures: one, several, several in one prompt; put into batches, and opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.data.images import OpenedImage, check_image, open_image

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""What `open_image` takes."""
Pictures = list[Any] | tuple[Any, ...]
"""Several of them, one prompt each; a list in the list is several pictures in one prompt. `Any`, because a list of
paths is no list of `Picture` to a type checker."""


def as_list(images: Picture | Pictures | None) -> list[Any]:
    """One prompt or several, as a list."""
    return list(images) if isinstance(images, list | tuple) else [images]


def row_of(prompt: Picture | Pictures | None) -> list[Picture]:
    """The pictures of one prompt, as they were given: one, several, or none."""
    if prompt is None:
        return []
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]


def open_row(prompt: Picture | Pictures | None) -> list[OpenedImage]:
    """The pictures of one prompt, opened."""
    return [open_image(picture) for picture in row_of(prompt)]


def opened_batches(images: Sequence[Any], size: int) -> Iterator[list[list[OpenedImage]]]:
    """Prompts in batches of at most `size`, in order; each batch is opened when its turn comes.

    The prompts of one batch hold equally many pictures. Of files the headers are read at once: what is no image is
    told before anything is worked out, pixels that cannot be read when their turn comes.

    Raises:
        ImageError: something is not an image.
    """
    rows = [row_of(prompt) for prompt in images]
    for row in rows:
        for picture in row:
            if isinstance(picture, str | os.PathLike):
                check_image(picture)
            elif not isinstance(picture, Image.Image | np.ndarray):
                open_image(picture)  # which says what it takes
    for batch in batches(rows, size):
        yield [open_row(row) for row in batch]


def batches(rows: Sequence[list[Picture]], size: int) -> list[list[list[Picture]]]:
    """Rows in batches of at most `size`, in order; the rows of one batch hold equally many pictures."""
    made: list[list[list[Picture]]] = []
    for row in rows:
        if made and len(made[-1]) < size and len(made[-1][0]) == len(row):
            made[-1].append(row)
        else:
            made.append([row])
    return made
