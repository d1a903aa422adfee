"""The pictures that users give, one, several, or several in one prompt: put into batches, checked and opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.data.images import OpenedImage, check_image, open_image

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""Anything that `open_image` takes as one picture."""
Pictures = list[Any] | tuple[Any, ...]
"""Several pictures, one prompt each; a list in the list is several pictures in one prompt. `Any`, because a list of
paths is no list of `Picture` to a type checker."""


def as_list(images: Picture | Pictures | None) -> list[Any]:
    """Return a list of prompts, whether one or several were given."""
    return list(images) if isinstance(images, list | tuple) else [images]


def row_of(prompt: Picture | Pictures | None) -> list[Picture]:
    """List the pictures of one prompt, not yet opened: one, several, or none."""
    if prompt is None:
        return []
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]


def open_row(prompt: Picture | Pictures | None) -> list[OpenedImage]:
    """Open the pictures of one prompt."""
    return [open_image(picture) for picture in row_of(prompt)]


def opened_batches(images: Sequence[Any], size: int) -> Iterator[list[list[OpenedImage]]]:
    """Yield prompts in batches of at most `size`, in order, and open each batch only when its turn comes.

    The prompts of one batch have the same number of pictures. Headers of files are read at the start, so that a file
    that is no image is refused before any work; damaged pixels show when their batch is opened.

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
    """Group rows of pictures into batches of at most `size`, in order; rows of one batch are equally long."""
    # Only neighbours share a batch, so that answers come in the order of the prompts.
    made: list[list[list[Picture]]] = []
    for row in rows:
        if made and len(made[-1]) < size and len(made[-1][0]) == len(row):
            made[-1].append(row)
        else:
            made.append([row])
    return made
