"""Pictures and maps as `data:` URIs, which a page can show without a file beside it."""

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
"""The most bytes of a lossless picture; a larger one becomes a JPEG."""
_GREY = 0.85
"""How far a picture is greyed below a heat map; the style sheet does the same to the large one."""


Maps = list[np.ndarray | None]
"""The maps of the pictures of a prompt, in their order; None for a picture that has no map."""


class Picture(NamedTuple):
    """One image of a finding, as the page shows it."""

    image: Image.Image
    """The image, RGB, at most 768 pixels wide and high."""
    as_seen: bool
    """True: this is the model's own view; False: the file, of which the model may have seen only a part."""

    @property
    def uri(self) -> str:
        """The picture as a URI: lossless where that is small, as of scenes, crops and screenshots; else as JPEG."""
        png = _encode(self.image, "PNG", compress_level=3)  # a sixth of the time of the best level, for 3 % more bytes
        return _uri("png", png) if len(png) <= _PNG_BYTES else _jpeg(self.image, quality=90)

    @property
    def thumbnail(self) -> str:
        """The middle of the picture as a URI, 112 pixels wide and high."""
        return _jpeg(ImageOps.fit(self.image, (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)), quality=80)


def pictures_of(finding: Finding) -> list[Picture | None]:
    """Take each picture of a finding as the model saw it, or from its file, or None where neither is at hand."""
    views = [*finding.views, *[None] * len(finding.images)]  # a finding that was loaded has none
    return [_picture(name, view) for name, view in zip(finding.images, views, strict=False)]


def _picture(name: str, view: Image.Image | None) -> Picture | None:
    if view is not None:
        return Picture(_fit(view.convert("RGB"), _PICTURE_SIDE), as_seen=True)
    # A file may be gone or changed since: a report is then made without it, instead of failing.
    try:
        if not Path(name).is_file():
            return None
        return Picture(_fit(open_image(name).image, _PICTURE_SIDE), as_seen=False)
    except (ImageError, OSError, ValueError):  # ValueError: a name that no file can have
        return None


def usable(grids: Sequence[Grid]) -> Maps:
    """Turn maps into arrays, one per picture; the list is empty where no picture has a map that can be drawn."""
    # A picture without a map keeps its place as None: maps are matched with pictures by their order.
    maps = [_usable(grid) for grid in grids]
    return maps if any(patches is not None for patches in maps) else []


def _usable(grid: Grid) -> np.ndarray | None:
    """Turn one map into an array; None where there is nothing to draw: no patches, uneven rows, not finite."""
    if not grid or not grid[0] or any(len(row) != len(grid[0]) for row in grid):
        return None
    patches = np.asarray(grid, dtype="<f4")  # little-endian, as every browser reads it
    return patches if np.isfinite(patches).all() else None


def packed(maps: Maps) -> str:
    """Pack maps for the page's script, ";" between them: rows, columns, and the float32 numbers in base64."""
    return ";".join("" if patches is None else _packed(patches) for patches in maps)


def _packed(patches: np.ndarray) -> str:
    rows, columns = patches.shape
    return f"{rows} {columns} {base64.b64encode(patches.tobytes()).decode('ascii')}"


def heat_over(pictures: Sequence[Picture | None], maps: Maps) -> list[str | None]:
    """Lay each map over its greyed picture, at most 224 pixels wide and high; one scale of colours for all."""
    # First all maps at the size of their pictures, then the common scale, then the drawing: the scale needs them all.
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
    """Draw each map with one pixel per patch on a clear ground, for the browser to enlarge; one scale for all."""
    bound = _bound([patches for patches in maps if patches is not None])
    return [None if patches is None else _small_map(patches, bound) for patches in maps]


def _small_map(patches: np.ndarray, bound: float) -> str:
    overlay = np.ascontiguousarray(regions.overlay(patches, bound))
    return _uri("png", _encode(Image.fromarray(overlay), "PNG", optimize=True))


def _bound(maps: Sequence[np.ndarray]) -> float:
    """Find the largest absolute value of all maps, which gets the strongest colour."""
    return max((float(np.abs(values).max(initial=0)) for values in maps), default=0.0)


def small(image: Image.Image) -> str:
    """Make a picture to stand beside a line of text, its longer side 112 pixels."""
    return _uri("webp", _encode(_fit(image, _THUMBNAIL_SIDE), "WEBP", quality=80))


def colour_scale() -> str:
    """Draw all colours from the strongest negative to the strongest positive, one pixel high."""
    return _uri("png", _encode(Image.fromarray(regions.colours()[None].copy()), "PNG", optimize=True))


def colour_table() -> str:
    """Pack the colours for the page's script: red, green, blue, alpha of each step in base64."""
    return base64.b64encode(regions.colours().tobytes()).decode("ascii")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Copy the pixels of an image, reduced where it is larger than `side`."""
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
