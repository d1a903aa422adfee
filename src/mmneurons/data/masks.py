"""Reading of the mask of an object: a file that is not clearly a mask is refused, never guessed at.

A mask is an image in two colours, black where the object is not. Also read are 0 and any one other number (0/1,
palettes), a cut-out (the object opaque, all else transparent), and soft edges, of which more than half white counts.
"""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Bool, Num, UInt8
from PIL import Image

from mmneurons.data.images import open_stored
from mmneurons.errors import ImageError

_FIX = "Save a mask for each object: the object in white (255), all else in black (0)."
_GREYISH = 16
"""How far the channels of a grey pixel may lie apart: a JPEG in colour does not keep them equal."""
_MARGIN = 31 / 255
"""How far from black or white a value may lie and still count as it, as a share of white."""


class _UnclearError(Exception):
    """A file is no clear mask; the message says what was seen instead."""


def read_mask(path: str | os.PathLike[str]) -> Bool[np.ndarray, "height width"]:
    """Read a mask: True where the object is.

    Raises:
        ImageError: the file is no image, or it cannot be told which part of it is the object.
    """
    image = open_stored(path)
    try:
        return _from_alpha(image) if image.has_transparency_data else _from_colours(image)
    except _UnclearError as seen:
        what = f"It cannot be told which part of the mask {os.fspath(path)!r} is the object."
        raise ImageError(what, seen=str(seen), fix=_FIX) from None


def _from_alpha(image: Image.Image) -> Bool[np.ndarray, "height width"]:
    """Read a cut-out: the object is what is opaque."""
    if image.mode == "I;16":
        raise _UnclearError("It has 16 bits and a transparent value.")
    rgba = image.convert("RGBA")
    alpha = np.asarray(rgba.getchannel("A"))
    if alpha.max() == 0:
        raise _UnclearError("All of it is transparent.")
    if alpha.min() == alpha.max():  # transparency that says nothing: the colours are the mask
        return _from_colours(rgba.convert("RGB"))
    opaque = alpha > alpha.max() / 2  # of numbers 0 and 1, too
    if np.array_equal(np.unique(np.asarray(rgba.convert("L"))[opaque]), [0, 255]):
        raise _UnclearError("It holds one mask in black and white and another in its transparency.")
    return opaque


def _from_colours(image: Image.Image) -> Bool[np.ndarray, "height width"]:
    """Read a mask from its colours, or from its greys where it has no others."""
    values = np.asarray(image.convert({"P": "RGB", "1": "L"}[image.mode]) if image.mode in ("P", "1") else image)
    if values.ndim == 2:
        return _from_greys(values)
    darkest, brightest = values.min(axis=-1), values.max(axis=-1)
    return _from_hues(values) if (brightest - darkest).max() > _GREYISH else _from_greys(brightest)


def _from_hues(values: UInt8[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    """Read a mask in black and one other colour."""
    # One number for each colour: counting numbers is much cheaper than counting rows of three.
    red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
    numbers = np.unique(red << 16 | green << 8 | blue)
    if numbers[0] > 0:
        raise _UnclearError(f"It has {len(numbers)} colours, and none of them is black.")
    if len(numbers) > 2:
        raise _UnclearError(f"It has {len(numbers)} colours: a map of classes?")
    return values.max(axis=-1) > 0


def _from_greys(values: Num[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Read a mask in greys: two values are taken as they are, more only if they are black, white and thin edges."""
    numbers = np.unique(values)
    if numbers[0] == 0 and len(numbers) <= 2:
        return np.greater(values, 0)
    unclear = _UnclearError(f"It has {len(numbers)} greys from {numbers[0]:g} to {numbers[-1]:g}: a map of classes?")
    if not (numbers[0] >= 0 and np.isfinite(numbers[-1])):
        raise unclear
    if len(numbers) == 1:  # one value that is not 0: the object fills the image
        return np.ones(values.shape, dtype=bool)
    # What is white depends on the depth; values between black and white can only be edges, so they must be few.
    bits = values.dtype.itemsize * 8
    white = 255 if bits == 8 else 1 if values.dtype.kind == "f" else 65535
    n_white = np.count_nonzero(values >= white * (1 - _MARGIN))
    n_grey = values.size - n_white - np.count_nonzero(values == numbers[0])
    if numbers[0] > white * _MARGIN or n_grey > n_white / 2:  # an edge is thin
        raise unclear
    return np.greater(values, white / 2)
