"""Pictures and maps as `data:` URIs: what the page shows without a file beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mmneurons.data.images import open_image
from mmneurons.errors import ImageError
from mmneurons.finding.result import Finding, Grid
from mmneurons.maths import regions

_PICTURE_SIDE, _HEAT_SIDE, _THUMBNAIL_SIDE = 768, 224, 112
_PNG_BYTES = 60_000
_GREY = 0.85
"""How far a picture is greyed below a heat map; the style sheet does the same to the large one."""


Maps = list[np.ndarray | None]
"""What belongs to the pictures of a prompt, in their order; None for one that has no map."""


class Picture(NamedTuple):
    """One image of a finding."""

    image: Image.Image
    """RGB, at most 768 pixels wide and high."""
    as_seen: bool
    """The model's own view; else the file, of which the model may have seen a part only."""

    @property
    def uri(self) -> str:
        """Lossless where that is small: scenes, crops and screenshots; else JPEG."""
        png = _encode(self.image, "PNG", optimize=True)
        return _uri("png", png) if len(png) <= _PNG_BYTES else _jpeg(self.image, quality=90)

    @property
    def thumbnail(self) -> str:
        """The middle of it, 112 pixels wide and high."""
        return _jpeg(ImageOps.fit(self.image, (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)), quality=80)


def pictures_of(finding: Finding) -> list[Picture | None]:
    """Each picture as the model saw it, or the file it came from, or None where neither is at hand."""
    views = [*finding.views, *[None] * len(finding.images)]  # a finding that was loaded has none
    return [_picture(name, view) for name, view in zip(finding.images, views, strict=False)]


def _picture(name: str, view: Image.Image | None) -> Picture | None:
    if view is not None:
        return Picture(_fit(view.convert("RGB"), _PICTURE_SIDE), as_seen=True)
    try:
        if not Path(name).is_file():
            return None
        return Picture(_fit(open_image(name).image, _PICTURE_SIDE), as_seen=False)
    except (ImageError, OSError, ValueError):  # ValueError: a name that no file can have
        return None


def usable(grids: Sequence[Grid]) -> Maps:
    """Maps as arrays, one per picture; none at all where no picture has one that can be drawn."""
    maps = [_usable(grid) for grid in grids]
    return maps if any(patches is not None for patches in maps) else []


def _usable(grid: Grid) -> np.ndarray | None:
    """None where there is nothing to draw: no patches, uneven rows, not finite."""
    if not grid or not grid[0] or any(len(row) != len(grid[0]) for row in grid):
        return None
    patches = np.asarray(grid, dtype="<f4")  # little-endian, as every browser reads it
    return patches if np.isfinite(patches).all() else None


def packed(maps: Maps) -> str:
    """Maps for the page's script, ";" between them: rows, columns and the float32 numbers themselves in base64."""
    return ";".join("" if patches is None else _packed(patches) for patches in maps)


def _packed(patches: np.ndarray) -> str:
    rows, columns = patches.shape
    return f"{rows} {columns} {base64.b64encode(patches.tobytes()).decode('ascii')}"


def heat_over(pictures: Sequence[Picture | None], maps: Maps) -> list[str | None]:
    """Each map laid over its greyed picture, at most 224 pixels wide and high; one scale of colours for all."""
    drawn: list[tuple[Image.Image, np.ndarray] | None] = []
    for picture, patches in zip(pictures, maps, strict=False):
        if picture is None or patches is None:
            drawn.append(None)
            continue
        below = _fit(picture.image, _HEAT_SIDE)
        below = Image.blend(below, below.convert("L").convert("RGB"), _GREY).convert("RGBA")
        drawn.append((below, regions.upsample(patches, (below.height, below.width))))
    bound = _bound([both[1] for both in drawn if both])
    return [both and _laid_over(*both, bound) for both in drawn]


def _laid_over(below: Image.Image, heat: np.ndarray, bound: float) -> str:
    below.alpha_composite(Image.fromarray(np.ascontiguousarray(regions.overlay(heat, bound))))
    return _jpeg(below.convert("RGB"), quality=88)


def small_maps(maps: Maps) -> list[str | None]:
    """One pixel per patch on a clear ground; the browser enlarges it. One scale of colours for all."""
    bound = _bound([patches for patches in maps if patches is not None])
    return [None if patches is None else _small_map(patches, bound) for patches in maps]


def _small_map(patches: np.ndarray, bound: float) -> str:
    overlay = np.ascontiguousarray(regions.overlay(patches, bound))
    return _uri("png", _encode(Image.fromarray(overlay), "PNG", optimize=True))


def _bound(maps: Sequence[np.ndarray]) -> float:
    """The size of value that gets the strongest colour."""
    return max((float(np.abs(values).max(initial=0)) for values in maps), default=0.0)


def small(image: Image.Image) -> str:
    """A picture beside a line of text, its longer side 112 pixels."""
    return _uri("webp", _encode(_fit(image, _THUMBNAIL_SIDE), "WEBP", quality=80))


def colour_scale() -> str:
    """All colours from the strongest negative to the strongest positive, one pixel high."""
    return _uri("png", _encode(Image.fromarray(regions.colours()[None].copy()), "PNG", optimize=True))


def colour_table() -> str:
    """The colours for the page's script: red, green, blue, alpha of each step in base64."""
    return base64.b64encode(regions.colours().tobytes()).decode("ascii")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """A copy of `image`, reduced where it is larger than `side`; nothing but its pixels."""
    scale = min(1, side / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _jpeg(image: Image.Image, quality: int) -> str:
    return _uri("jpeg", _encode(image, "JPEG", quality=quality, optimize=True))


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    plain = Image.frombytes(image.mode, image.size, image.tobytes())  # without comments, profiles and EXIF
    file = io.BytesIO()
    plain.save(file, kind, **options)
    return file.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
