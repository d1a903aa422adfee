"""How well a heat map finds an object, against the object's true mask (METRICS, Sensitivity: region). Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mmneurons.errors import ImageError
from mmneurons.maths.regions import mask as strongest
from mmneurons.maths.regions import upsample
from mmneurons.maths.statistics import auroc


@dataclass(frozen=True)
class RegionMatch:
    """One map against one mask; each share in 0 to 1."""

    iou: float
    """Of the map's strongest 5 % of pixels with the mask: small by construction where the object is large."""
    iou_equal_area: float
    """Of as many of the strongest pixels as the mask has."""
    pointing: float
    """1 if the map's strongest pixel lies in the mask (several as strong: the share of them that do)."""
    auroc: float | None
    """How often a patch of the object is stronger than one beside it; None if no patch is either."""
    area: float
    """The mask's share of the image: what pointing would hit by chance."""


def match(
    grid: Float[np.ndarray, "rows columns"] | Sequence[Sequence[float]], mask: Bool[np.ndarray, "height width"]
) -> RegionMatch:
    """Compare a map on the patch grid with a mask of the image.

    The map is brought to the size of the mask (bilinear). For the AUROC the mask is brought to the grid: a patch is of
    the object if at least half of it is, beside it if none of it is.

    Args:
        grid: One number a patch.
        mask: True where the object is.

    Raises:
        ImageError: the mask is empty or covers everything.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any() or mask.all():
        raise ImageError("A mask shows where an object is and where not.", seen=f"{mask.mean():.0%} of it is set")
    patches = np.asarray(grid, dtype=np.float64)
    heat = upsample(patches, mask.shape)
    cover = _cover(mask, patches.shape)
    judged = (cover >= 0.5) | (cover == 0)
    return RegionMatch(
        iou=_iou(strongest(heat), mask),
        iou_equal_area=_iou(_top(heat, int(mask.sum())), mask),
        pointing=float(mask[heat == heat.max()].mean()),
        auroc=auroc(patches[judged], cover[judged] >= 0.5),
        area=float(mask.mean()),
    )


def mean_match(found: Sequence[RegionMatch]) -> RegionMatch:
    """The mean of several maps' matches with one mask."""
    ranked = [one.auroc for one in found if one.auroc is not None]
    return RegionMatch(
        iou=float(np.mean([one.iou for one in found])),
        iou_equal_area=float(np.mean([one.iou_equal_area for one in found])),
        pointing=float(np.mean([one.pointing for one in found])),
        auroc=float(np.mean(ranked)) if ranked else None,
        area=found[0].area,
    )


def _iou(a: Bool[np.ndarray, "height width"], b: Bool[np.ndarray, "height width"]) -> float:
    return float((a & b).sum() / (a | b).sum())


def _top(heat: Float[np.ndarray, "height width"], n: int) -> Bool[np.ndarray, "height width"]:
    """The n strongest pixels, equal ones in order of place."""
    chosen = np.zeros(heat.size, dtype=bool)
    chosen[np.argsort(-heat, axis=None, kind="stable")[:n]] = True
    return chosen.reshape(heat.shape)


def _cover(mask: Bool[np.ndarray, "height width"], shape: tuple[int, ...]) -> Float[np.ndarray, "rows columns"]:
    """What share of each patch is set; patches need not be whole pixels."""
    rows, columns = (_shares(length, patches) for length, patches in zip(mask.shape, shape, strict=True))
    return rows @ mask.astype(np.float64) @ columns.T


def _shares(length: int, patches: int) -> Float[np.ndarray, "patches length"]:
    """Row p: which share of patch p each pixel makes up; rows sum to one."""
    edges = np.linspace(0, length, patches + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)[None]
    return (np.minimum(high, pixels + 1) - np.maximum(low, pixels)).clip(0) * patches / length
