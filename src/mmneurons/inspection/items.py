"""The images that an experiment runs over, with what is truly in them where that is known.

From a folder of images, a manifest (docs/format.md), or an evaluation set of the pocket world: `pocket:find-500`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmneurons import pocket
from mmneurons.errors import ImageError, SettingError
from mmneurons.vlm.images import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
POCKET = "pocket:"


@dataclass(frozen=True, eq=False)
class Item:
    """One image; opened when it is asked for, so that thousands need no memory."""

    name: str
    """A path as given, or the place in an evaluation set: `find-500/17`."""
    source: Path | Image.Image
    objects: tuple[str, ...] | None = None
    """What is truly shown; None where nobody said."""
    mask_sources: tuple[Path | Bool[np.ndarray, "height width"], ...] = field(default=(), repr=False)
    """Where each object is; empty where nobody said."""

    def image(self) -> Image.Image:
        """RGB.

        Raises:
            ImageError: if it cannot be read.
        """
        return open_image(self.source).image

    def masks(self) -> dict[str, Bool[np.ndarray, "height width"]]:
        """Where each object is visible, at the size of the image; none where nobody said.

        Raises:
            ImageError: if a mask cannot be read or is of another size than its image.
        """
        if not self.mask_sources or self.objects is None:
            return {}
        width, height = self.image().size
        found: dict[str, np.ndarray] = {}
        for noun, source in zip(self.objects, self.mask_sources, strict=True):
            mask = source if isinstance(source, np.ndarray) else np.asarray(open_image(source).image.convert("L")) > 127
            if mask.shape != (height, width):
                raise ImageError(
                    f"The mask of '{noun}' in {self.name} is of another size than the image.",
                    seen=f"Mask {mask.shape[1]} x {mask.shape[0]}, image {width} x {height} pixels",
                    fix="Make masks at the size of their images.",
                )
            found[noun] = found[noun] | mask if noun in found else mask
        return found


def read_items(source: str | os.PathLike[str], masks: str | os.PathLike[str] | None = None) -> list[Item]:
    """The images of an experiment, in order of name or as the manifest has them.

    Args:
        source: A folder of images; a manifest, a JSON list of objects with `image` and, where known, `objects` and
            `masks` (one file for each object, white where it is), paths counted from the manifest's folder; or
            `pocket:` and the name of an evaluation set, `pocket:edit/NOUN` or `pocket:held-out/NOUN`.
        masks: For a folder of images: a folder with a mask `STEM.NOUN.png` for each object of the image `STEM.*`.

    Raises:
        ImageError: no image there.
        SettingError: a manifest that is none, a set that there is not, or masks where the source has its own.
    """
    text = os.fspath(source)
    if masks is not None and not Path(text).is_dir():
        raise SettingError(
            "A folder of masks goes with a folder of images.", seen=text, fix="Name the masks in the manifest."
        )
    if text.startswith(POCKET):
        return _pocket_items(text.removeprefix(POCKET))
    path = Path(text)
    if path.is_dir():
        return _folder_items(path, None if masks is None else Path(masks))
    if path.suffix.lower() in SUFFIXES:
        open_image(path)  # one that was named is told at once if it is none
        return [Item(text, path)]
    return _manifest_items(path)


def _pocket_items(name: str) -> list[Item]:
    kind, _, noun = name.partition("/")
    if kind in ("edit", "held-out"):
        scenes = pocket.edit_set(noun).edit if kind == "edit" else pocket.edit_set(noun).held_out
    else:
        scenes = tuple(pocket.evaluation_set(name))
    return [Item(f"{name}/{i}", scene.image, scene.objects, tuple(scene.masks)) for i, scene in enumerate(scenes)]


def _folder_items(folder: Path, masks: Path | None) -> list[Item]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not _is_mask(path))
    if not images:
        raise ImageError(f"There is no image in {folder}.", fix=f"Files that end in {', '.join(SUFFIXES)} are taken.")
    if masks is None:
        return [Item(str(path), path) for path in images]
    if not masks.is_dir():
        raise ImageError(f"There is no folder {masks}.", fix="--masks DIR with files STEM.NOUN.png")
    items = []
    for path in images:
        found = sorted(masks.glob(f"{path.stem}.*.png"))
        names = tuple(mask.name[len(path.stem) + 1 : -len(".png")] for mask in found)
        items.append(Item(str(path), path, names or None, tuple(found)))
    if not any(item.objects for item in items):
        raise ImageError(
            f"No mask in {masks} belongs to an image in {folder}.",
            fix=f"Name them after image and noun: {images[0].stem}.dog.png",
        )
    return items


def _is_mask(path: Path) -> bool:
    return path.stem.endswith(".mask")


def _manifest_items(path: Path) -> list[Item]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImageError(f"There is no file or folder {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no manifest.", seen=str(error), fix=_EXAMPLE) from error
    if not isinstance(entries, list) or not entries:
        raise SettingError(f"{path} is no manifest.", seen="It is no list of images.", fix=_EXAMPLE)
    return [_manifest_item(path, i, entry) for i, entry in enumerate(entries)]


_EXAMPLE = '[{"image": "park.png", "objects": ["dog"], "masks": ["park.dog.png"]}]'


def _manifest_item(path: Path, i: int, entry: Any) -> Item:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), str):
        raise SettingError(f"Entry {i} of {path} names no image.", seen=str(entry)[:200], fix=_EXAMPLE)
    objects, masks = entry.get("objects"), entry.get("masks", [])
    if objects is not None and not _are_texts(objects):
        raise SettingError(f"The objects of entry {i} of {path} are no list of words.", seen=str(objects)[:200])
    if masks and (objects is None or not _are_texts(masks) or len(masks) != len(objects)):
        raise SettingError(
            f"Entry {i} of {path} needs one mask for each object.", seen=f"{objects} and {masks}", fix=_EXAMPLE
        )
    return Item(
        entry["image"],
        path.parent / entry["image"],
        None if objects is None else tuple(objects),
        tuple(path.parent / mask for mask in masks),
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value)
