"""COCO's JSON of instances: which objects each image shows and where, as polygons or run lengths.

Source: cocodataset.org, "Data format"; the text form of run lengths is that of its API, maskApi.c, `rleFrString`. A
pixel belongs to a polygon if its centre does; the API's own rasteriser may differ by the pixels on the edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from jaxtyping import Bool

from mmneurons.data.images import MAX_PIXELS
from mmneurons.errors import ImageError

_Id = int | str
_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_PIXELS)]
Polygon = list[float]
"""The corners of a polygon: x, y, x, y ... in pixels from the upper left corner of the image."""


class RunLengths(msgspec.Struct):
    """A mask as lengths of runs, column by column: pixels outside the object and pixels of it, in turn."""

    size: tuple[_Side, _Side]
    """Height and width in pixels."""
    counts: str | list[int]
    """The lengths, as numbers or in COCO's text form."""


Shape = list[Polygon] | RunLengths


class Category(msgspec.Struct):
    """A kind of object."""

    id: _Id
    name: str


class Annotation(msgspec.Struct):
    """One object in one image."""

    image_id: _Id
    category_id: _Id
    segmentation: Shape | None = None
    """The place of the object; None where the file does not say."""


class Picture(msgspec.Struct):
    """One image as the file lists it."""

    id: _Id
    file_name: str
    width: _Side
    height: _Side


class Instances(msgspec.Struct):
    """A whole file of instances."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]


@dataclass(frozen=True)
class Outline:
    """The place of all objects of one category in one image, not yet drawn as a mask."""

    shapes: tuple[Shape, ...]
    width: int
    height: int

    def mask(self) -> Bool[np.ndarray, "height width"]:
        """Draw the mask, True where any of the objects is, at the size of the image.

        Raises:
            ImageError: the numbers of the file draw no mask, or the image is too large.
        """
        if self.width * self.height > MAX_PIXELS:
            raise ImageError("A segmentation is too large.", seen=f"It is {self.width} x {self.height} pixels.")
        drawn = np.zeros((self.height, self.width), dtype=bool)
        for shape in self.shapes:
            if isinstance(shape, RunLengths):
                drawn |= _from_runs(shape, self.height, self.width)
            else:
                for polygon in shape:
                    drawn |= _from_polygon(polygon, self.height, self.width)
        return drawn


def outlines(annotations: list[Annotation], names: dict[_Id, str], picture: Picture) -> dict[str, Outline | None]:
    """Collect what an image shows, by the name of the category; None where an object of it has no segmentation.

    Args:
        annotations: The annotations of this image.
        names: The name of each category, by its id.
        picture: The image.

    Raises:
        ImageError: an annotation is of a category that the file does not list.
    """
    # One object without a segmentation spoils its whole category: a mask of the others would call it background.
    found: dict[str, list[Shape]] = {}
    unknown_place = set()
    for one in annotations:
        if one.category_id not in names:
            raise ImageError(
                f"There is no category {one.category_id!r}.", seen=f"Image {picture.file_name!r} shows it."
            )
        name = names[one.category_id]
        found.setdefault(name, [])
        if one.segmentation:
            found[name].append(one.segmentation)
        else:
            unknown_place.add(name)
    return {
        name: None if name in unknown_place else Outline(tuple(shapes), picture.width, picture.height)
        for name, shapes in found.items()
    }


def _from_runs(runs: RunLengths, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Draw a mask from run lengths, which must fill the image exactly."""
    counts = _numbers(runs.counts) if isinstance(runs.counts, str) else runs.counts
    sound = runs.size == (height, width) and len(counts) <= 2 * height * width + 1
    if not (sound and all(0 <= count <= height * width for count in counts) and sum(counts) == height * width):
        seen = f"Size {list(runs.size)}, {len(counts)} runs; the image has {height} x {width} pixels."
        raise ImageError("The run lengths of a segmentation do not fill its image.", seen=seen)
    # The sum is checked above, before `repeat`: else a few digits in a file could ask for gigabytes.
    is_object = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_object, counts).reshape(width, height).T


def _numbers(text: str) -> list[int]:
    """Decode run lengths from COCO's text form.

    A letter, counted from '0' on, has six bits: five of the number, low ones first, and one that says whether more
    follow. From the fourth number on, the difference to the number two before is written instead of the number.
    """
    counts: list[int] = []
    value = place = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or place > 60:
            raise ImageError("The run lengths of a segmentation are not those of COCO.", seen=repr(text[:40]))
        value |= (bits & 31) << place
        place += 5
        if not bits & 32:
            if bits & 16:  # the highest bit written is the sign, in two's complement
                value -= 1 << place
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = place = 0
    return counts


def _from_polygon(polygon: Polygon, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Draw a mask from a polygon: a pixel belongs to it if its centre lies inside, by the even-odd rule."""
    points = np.asarray(polygon, dtype=float)
    far = 2 * max(height, width)
    if len(points) < 6 or len(points) % 2 or not np.abs(points).max() <= far:
        raise ImageError("A polygon of a segmentation is none.", seen=f"{len(points)} numbers: {polygon[:6]} ...")
    xs, ys = points[::2], points[1::2]
    edge = np.zeros((height, width + 1), dtype=bool)  # where, in a row, one gets in or out
    # In each row whose centre line an edge crosses, it toggles the first pixel whose centre lies right of the crossing;
    # the running exclusive or along the row is then True behind an odd number of crossings.
    for x, y, to_x, to_y in zip(xs, ys, np.roll(xs, -1), np.roll(ys, -1), strict=True):
        top, bottom = (int(np.clip(np.ceil(end - 0.5), 0, height)) for end in sorted((y, to_y)))
        if top < bottom:
            rows = np.arange(top, bottom)
            crossing = x + (rows + 0.5 - y) * (to_x - x) / (to_y - y)
            edge[rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(edge, axis=1)[:, :width]
