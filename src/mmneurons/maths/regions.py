"""Maps of patches brought to the size of their image: bilinear upsampling, the 95th-percentile mask, colours.

Plain numpy: a report or a plot needs no torch. The report's script repeats `upsample` and `mask` in the browser.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

PERCENTILE = 95.0
"""The percentile of a map above which its mask lies."""
LEVELS = 127
"""How many steps of colour there are on each side of zero."""
_WARM = ((255, 214, 102), (247, 122, 32), (196, 22, 40))
_COLD = ((150, 214, 255), (56, 132, 240), (28, 50, 178))
_OPAQUE = 195
"""Alpha of the strongest colour, so that the picture below stays visible."""


def upsample(
    grid: Float[np.ndarray, "rows columns"] | Sequence[Sequence[float]], size: tuple[int, int]
) -> Float[np.ndarray, "height width"]:
    """Bring a grid of patches to the size of its image by bilinear interpolation.

    Patch i has its centre at (i + 0.5) * height / rows, pixel y at y + 0.5 (`align_corners=False` in torch); beyond
    the outermost centres the outermost patch is continued.

    Args:
        grid: One number per patch, rows from top to bottom.
        size: Height and width in pixels; sides that are no multiple of the grid's, or smaller, are fine.

    Returns:
        float32, in the unit of `grid`, nowhere outside its range; a constant grid gives exactly its constant.
    """
    patches = np.asarray(grid, dtype=np.float64)
    # Rows first, then columns: bilinear interpolation is separable. low + share * (high - low) keeps a constant exact.
    (rows, columns), (height, width) = patches.shape, size
    low, high, share = _neighbours(rows, height)
    lines = patches[low] + share[:, None] * (patches[high] - patches[low])
    low, high, share = _neighbours(columns, width)
    return (lines[:, low] + share * (lines[:, high] - lines[:, low])).astype(np.float32)


def mask(heat: Float[np.ndarray, "height width"], percentile: float = PERCENTILE) -> Bool[np.ndarray, "height width"]:
    """Mark the strongest pixels of a map: about 100 - `percentile` percent of them.

    A pixel is set where it lies strictly above the percentile, which is itself a value of the map (of two neighbours
    the lower), so that about that share is set. Fewer are set where values tie. Where so many pixels tie at the maximum
    that none lies above, those at the maximum are set. A constant map has no strongest pixels: its mask is empty.

    Args:
        heat: The map, of any sign, finite; a negative value is weak however large.
        percentile: From 0 to 100.
    """
    place = int(percentile / 100 * (heat.size - 1))
    cut = np.partition(heat, place, axis=None)[place]
    highest = heat.max()
    if cut < highest:
        return heat > cut
    return (heat == highest) & (heat.min() < highest)


@functools.cache
def colours() -> UInt8[np.ndarray, "steps rgba"]:
    """Make the colours of a signed map, as red, green, blue, alpha: cold below zero, clear at zero, warm above.

    Entry `LEVELS` is zero, the first and last are the strongest; alpha and darkness grow with strength, so that
    strength can be told without telling red from blue.
    """
    strength = np.linspace(0, 1, LEVELS + 1)
    sides = []
    for stops in (_COLD, _WARM):
        channels = [np.interp(strength, (0, 0.5, 1), channel) for channel in zip(*stops, strict=True)]
        sides.append(np.stack([*channels, _OPAQUE * strength], axis=1))
    # The cold side is turned round and loses its zero, which the warm side has already.
    table = np.concatenate([sides[0][:0:-1], sides[1]]).round().astype(np.uint8)
    table.flags.writeable = False  # cached: every caller gets this one array
    return table


def overlay(
    heat: Float[np.ndarray, "height width"], bound: float | None = None
) -> UInt8[np.ndarray, "height width rgba"]:
    """Draw a map as a half-transparent picture to lay over the image.

    Args:
        heat: The map, of any sign, finite.
        bound: The absolute value that gets the strongest colour; None: the map's own largest.
    """
    if bound is None:
        bound = float(np.abs(heat).max(initial=0))
    if bound == 0:
        return np.broadcast_to(colours()[LEVELS], (*heat.shape, 4))
    steps = np.floor(heat.astype(np.float64) / bound * LEVELS + 0.5)  # not rint: the script rounds halves up too
    return colours()[np.clip(steps, -LEVELS, LEVELS).astype(int) + LEVELS]


def _neighbours(patches: int, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find for each pixel of one side the patch at or before its centre, the one after, and the share of the latter."""
    centres = np.clip((np.arange(pixels) + 0.5) * patches / pixels - 0.5, 0, patches - 1)
    low = centres.astype(int)
    return low, np.minimum(low + 1, patches - 1), centres - low
