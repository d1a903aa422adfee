"""Metrics of a map against the true mask of an object: how well the map finds the object. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from jaxtyping import Bool, Float

from mmneurons.errors import ImageError
from mmneurons.maths.regions import mask as strongest
from mmneurons.maths.regions import upsample
from mmneurons.maths.statistics import auroc


@dataclass(frozen=True)
class RegionMatch:
    """How well one map agrees with one mask; every figure is from 0 to 1."""

    iou: float
    """IoU of the map's strongest 5 % of pixels with the mask: small by construction where the object is large."""
    iou_equal_area: float
    """IoU with the mask of as many of the strongest pixels as the mask has."""
    pointing: float
    """The pointing game: 1 if the map's strongest pixel lies in the mask (of several as strong, the share that do)."""
    auroc: float | None
    """How often a patch of the object is stronger than one beside it; None if no patch is either."""
    area: float
    """The mask's share of the image: what pointing would hit by chance."""


def match(
    grid: Float[np.ndarray, "rows columns"] | Sequence[Sequence[float]], mask: Bool[np.ndarray, "height width"]
) -> RegionMatch:
    """Compare a map, given on the grid of patches, with a mask of the image.

    The map is brought to the size of the mask (bilinear). For the AUROC the mask is brought to the grid: a patch is of
    the object if at least half of it is, beside it if none of it is.

    Args:
        grid: The map, one number for each patch.
        mask: True where the object is.

    Raises:
        ImageError: the mask is empty or covers everything, so that there is nothing to find.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any() or mask.all():
        raise ImageError("A mask shows where an object is and where not.", seen=f"{mask.mean():.0%} of it is set")
    patches = np.asarray(grid, dtype=np.float64)
    heat = upsample(patches, mask.shape)
    cover = _cover(mask, patches.shape)
    # Patches that the object touches without filling half of them are neither of it nor beside it: they are left out.
    judged = (cover >= 0.5) | (cover == 0)
    return RegionMatch(
        iou=_iou(strongest(heat), mask),
        iou_equal_area=_iou(_top(heat, int(mask.sum())), mask),
        pointing=float(mask[heat == heat.max()].mean()),  # several maxima: the share of them that hit
        auroc=auroc(patches[judged], cover[judged] >= 0.5),
        area=float(mask.mean()),
    )


def mean_match(found: Sequence[RegionMatch]) -> RegionMatch:
    """Average the matches of several maps with one mask, or of one map with several masks."""
    ranked = [one.auroc for one in found if one.auroc is not None]
    return RegionMatch(
        iou=float(np.mean([one.iou for one in found])),
        iou_equal_area=float(np.mean([one.iou_equal_area for one in found])),
        pointing=float(np.mean([one.pointing for one in found])),
        auroc=float(np.mean(ranked)) if ranked else None,
        area=fmean(one.area for one in found),
    )


def _iou(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    return float((a & b).sum() / (a | b).sum())


def _top(heat: Float[np.ndarray, "height width"], n: int) -> Bool[np.ndarray, "height width"]:
    """Mark the n strongest pixels of a map, equal ones in order of place."""
    chosen = np.zeros(heat.size, dtype=bool)
    chosen[np.argsort(-heat, axis=None, kind="stable")[:n]] = True
    return chosen.reshape(heat.shape)


def _cover(mask: Bool[np.ndarray, "height width"], shape: tuple[int, ...]) -> Float[np.ndarray, "rows columns"]:
    """Compute what share of each patch the mask covers; patches need not be whole pixels."""
    # The area of a patch is the product of its sides: one matrix for the rows and one for the columns are enough.
    rows, columns = (_shares(length, patches) for length, patches in zip(mask.shape, shape, strict=True))
    return rows @ mask.astype(np.float64) @ columns.T


def _shares(length: int, patches: int) -> Float[np.ndarray, "patches length"]:
    """Compute which share of patch p (row p) each pixel of one side makes up; rows sum to one."""
    # The overlap of pixel [i, i + 1] with patch [low, high], over the length of a patch.
    edges = np.linspace(0, length, patches + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)[None]
    return (np.minimum(high, pixels + 1) - np.maximum(low, pixels)).clip(0) * patches / length
