"""The images that an experiment runs over, with the objects that are truly in them where those are known.

They come from a folder of images, a manifest (docs/reference/format.md), COCO instances, or an evaluation set of
the pocket world such as `pocket:find-500`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmneurons import pocket
from mmneurons.data.coco import Instances, Outline, outlines
from mmneurons.data.images import SUFFIXES, OpenedImage, check_image, open_bytes, open_image
from mmneurons.data.masks import read_mask
from mmneurons.errors import ImageError, SettingError
from mmneurons.files import no_file, read_text

POCKET = "pocket:"
"""How the name of an evaluation set of the pocket world begins."""
LARGEST = 2**30
"""The most bytes of a manifest or of COCO's instances, whose training set has half of that."""
MaskSource = Path | Outline | Bool[np.ndarray, "height width"]
Tell = Callable[[str], None]
_SHOWN = 3
"""How many of the files that are left out are named."""


@runtime_checkable
class Packed(Protocol):
    """What holds the bytes of an image file that lies in no folder, such as a member of an archive."""

    @property
    def stamp(self) -> str:
        """Changes whenever the bytes may have changed."""
        ...

    def read(self) -> bytes:
        """Read the bytes of the file.

        Raises:
            ImageError: they cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class Item:
    """An Item is one image of an experiment; it is opened when it is asked for, so that thousands need no memory."""

    name: str
    """A path as given, or the place in an evaluation set: `find-500/17`."""
    source: Path | Image.Image | Packed
    """The file of the image, what holds its bytes, or the image itself."""
    objects: tuple[str, ...] | None = None
    """The objects that are truly shown; None where that is not known."""
    mask_sources: tuple[MaskSource | None, ...] = field(default=(), repr=False)
    """For each object its mask, not yet read, or None if that is not known; empty where no masks are known."""
    caption: str | None = None
    """An answer that the model is given to read; None: the model answers by itself."""
    captions: tuple[str, ...] = ()
    """What people say is in the image, where that is known."""

    def image(self) -> Image.Image:
        """Open the image, in mode RGB.

        Raises:
            ImageError: the image cannot be read.
        """
        return self.opened().image

    def opened(self) -> OpenedImage:
        """Open the image, with notes on how it was read.

        Raises:
            ImageError: the image cannot be read.
        """
        source = self.source
        return open_bytes(source.read(), self.name) if isinstance(source, Packed) else open_image(source)

    def masks(self) -> dict[str, Bool[np.ndarray, "height width"]]:
        """Read the mask of each object, at the size of the image; objects without a known mask are left out.

        Raises:
            ImageError: a mask cannot be read or is of another size than its image.
        """
        if not self.mask_sources or self.objects is None:
            return {}
        width, height = self.image().size
        # Several objects of one noun share a mask. If one of them has none, the noun has none: the mask would lie.
        found: dict[str, np.ndarray] = {}
        unknown = {noun for noun, source in zip(self.objects, self.mask_sources, strict=True) if source is None}
        for noun, source in zip(self.objects, self.mask_sources, strict=True):
            if source is None or noun in unknown:
                continue
            mask = _drawn(source)
            if mask.shape != (height, width):
                raise ImageError(
                    f"The mask of '{noun}' in {self.name} is of another size than the image.",
                    seen=f"Mask {mask.shape[1]} x {mask.shape[0]}, image {width} x {height} pixels",
                    fix="Make masks at the size of their images.",
                )
            found[noun] = found[noun] | mask if noun in found else mask
        return found


def _drawn(source: MaskSource) -> Bool[np.ndarray, "height width"]:
    """Read or draw a mask from whatever it is given as."""
    if isinstance(source, Path):
        return read_mask(source)
    return source.mask() if isinstance(source, Outline) else source


def read_items(
    source: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    *,
    tell: Tell = lambda note: None,
    checked: bool = True,
) -> list[Item]:
    """Collect the images of an experiment, in order of name or as the manifest has them, and check each file's header.

    Args:
        source: A folder of images; an image; a manifest, a JSON list of objects with `image` and, where known,
            `objects`, `masks` (one file for each object) and a `caption` to read, paths counted from the manifest's
            folder; the JSON of COCO's instances; or `pocket:` and the name of an evaluation set, `pocket:edit/NOUN` or
            `pocket:held-out/NOUN`.
        masks: For a folder of images: a folder with a mask `STEM.NOUN.png` for each object of the image `STEM.*`, or
            `STEM.NOUN.1.png` ... for several of a kind. See `read_mask` for what may stand in them.
        tell: Called with what was left out: files of a folder that are no images, masks without an image.
        checked: Whether headers are read; if not, a damaged file stays in the list, and shows when it is opened.

    Raises:
        ImageError: there is no image, or a manifest names a file that is none.
        FormatError: a manifest cannot be read.
        SettingError: a file is no manifest, there is no such set, or masks are given where the source has its own.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    is_folder = _is_there(path) and path.is_dir()
    if masks is not None and not is_folder:
        raise SettingError(
            "A folder of masks goes with a folder of images.", seen=text, fix="Name the masks in the manifest."
        )
    if text.startswith(POCKET):
        return _pocket_items(text.removeprefix(POCKET))
    if is_folder:
        return _folder_items(path, None if masks is None else Path(os.path.expanduser(masks)), tell, checked=checked)
    if path.suffix.lower() == ".json":
        return _listed_items(path, tell, checked=checked)
    check_image(path)
    return [Item(text, path)]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _pocket_items(name: str) -> list[Item]:
    """Take an evaluation set of the pocket world, with the truth about its scenes."""
    kind, _, noun = name.partition("/")
    if kind in ("edit", "held-out"):
        scenes = pocket.edit_set(noun).edit if kind == "edit" else pocket.edit_set(noun).held_out
    else:
        scenes = tuple(pocket.evaluation_set(name))
    return [Item(f"{name}/{i}", scene.image, scene.objects, tuple(scene.masks)) for i, scene in enumerate(scenes)]


def _folder_items(folder: Path, masks: Path | None, tell: Tell, *, checked: bool) -> list[Item]:
    """Take the images of a folder, with their masks where a folder of masks is given."""
    # 1. Masks that lie among the images. Where it is not said that they do, a file counts as one only if it is named
    # after an image and reads as a mask: `park.dog.png` beside `park.png` could be a photograph, too.
    left_out: Counter[str] = Counter()
    files = _image_files(folder, left_out)
    if masks is not None and not (_is_there(masks) and masks.is_dir()):
        raise ImageError(f"There is no folder {masks}.", fix="--masks DIR with files STEM.NOUN.png")
    named_like_masks = _by_stem(files, {file.stem for file in files})
    is_one_folder = masks is not None and folder.samefile(masks)
    own_masks = {
        file for ones in named_like_masks.values() for noun, file in ones if is_one_folder or _is_mask(noun, file)
    }
    left_out["mask"] = 0 if is_one_folder else len(own_masks)
    # 2. All other files must be images. Damaged ones are told and left out, unless nothing is left without them.
    images, first = [], None
    for file in files:
        if file not in own_masks:
            try:
                if checked:
                    check_image(file)
                images.append(file)
            except ImageError as error:
                first = first or error
                left_out["damaged"] += 1
                if left_out["damaged"] <= _SHOWN:
                    tell(f"left out: {error.what} {error.seen}".rstrip())
    if said := ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count):
        tell(f"{folder}: left out {said}")
    if not images:
        raise first or ImageError(
            f"There is no image in {folder}.", fix=f"Files that end in {', '.join(SUFFIXES)} are taken."
        )
    # 3. The masks, each with the image that it is named after.
    if masks is None:
        return [Item(str(file), file) for file in images]
    return _with_masks(images, sorted(own_masks) if is_one_folder else _image_files(masks, Counter()), masks, tell)


def _image_files(folder: Path, left_out: Counter[str]) -> list[Path]:
    """List the files of a folder that are images by their name, in order; all others are counted in `left_out`."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"The folder {folder} cannot be read.", seen=str(error)) from error
    found = []
    for file in files:
        if file.name.startswith("."):  # '._park.jpg' holds what a Mac knows about park.jpg, no picture
            left_out["hidden"] += 1
        elif not file.is_file():
            left_out["folder" if file.is_dir() else "device or broken link"] += 1
        elif file.suffix.lower() in SUFFIXES:
            found.append(file)
        else:
            left_out[file.suffix.lower() or "without suffix"] += 1
    return found


def _by_stem(files: Iterable[Path], stems: set[str]) -> dict[str, list[tuple[str, Path]]]:
    """Collect for each stem of an image the nouns and files named after it: STEM.NOUN.png, or STEM.NOUN.1.png."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for file in files:
        parts = file.stem.split(".")
        for n in range(len(parts) - 1, 0, -1):  # the longest stem first: a.2.cat.png goes with a.2.png
            stem, (noun, *number) = ".".join(parts[:n]), parts[n:]
            # `park.2.png` is a second photograph, not the mask of an object called 2.
            is_number = len(number) <= 1 and all(one.isdecimal() for one in number)
            if stem in stems and noun.strip() and not noun.isdecimal() and is_number:
                found[stem].append((noun, file))
                break
    return found


def _is_mask(noun: str, file: Path) -> bool:
    """Tell whether a file named after another image of its folder is a mask of it, and not another photograph."""
    if noun == "mask":  # those of the pocket world's samples, one for all objects
        return True
    try:
        read_mask(file)
    except ImageError:
        return False
    return True


def _with_masks(images: Sequence[Path], files: Sequence[Path], masks: Path, tell: Tell) -> list[Item]:
    """Give each image the masks that are named after it; masks of no image are told."""
    by_stem = _by_stem(files, {image.stem for image in images})
    # `park.png` and `park.jpg` have one stem: nothing says which of them `park.dog.png` is a mask of.
    twice = [stem for stem, count in Counter(image.stem for image in images).items() if count > 1 and stem in by_stem]
    if twice:
        seen = ", ".join(image.name for image in images if image.stem == twice[0])
        fix = f"Name the masks of each image in a manifest: {_EXAMPLE}"
        raise SettingError(f"Which image is {by_stem[twice[0]][0][1].name} a mask of?", seen=seen, fix=fix)
    if not by_stem:
        raise ImageError(f"No mask in {masks} belongs to an image.", fix=f"Name them {images[0].stem}.dog.png ...")
    belonging = {file for ones in by_stem.values() for _, file in ones}
    if lost := [file.name for file in files if file not in belonging]:
        more = " ..." if len(lost) > _SHOWN else ""
        tell(f"{masks}: {len(lost)} mask{'s' * (len(lost) > 1)} without an image: {', '.join(lost[:_SHOWN])}{more}")
    items = []
    for image in images:
        mine = by_stem.get(image.stem, [])
        for _, file in mine:
            check_image(file)
        nouns = tuple(noun for noun, _ in mine)
        items.append(Item(str(image), image, nouns or None, tuple(file for _, file in mine)))
    return items


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One image of a manifest; a misspelt field is refused."""

    image: str
    objects: list[str] | None = None
    masks: list[str] | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        if self.caption is not None and not self.caption.strip():
            raise ValueError("a caption without a word")
        if self.masks and len(self.masks) != len(self.objects or []):
            raise ValueError(f"{len(self.objects or [])} objects, {len(self.masks)} masks: each needs one")


_EXAMPLE = '[{"image": "park.png", "objects": ["dog"], "masks": ["park.dog.png"]}]'


def _listed_items(path: Path, tell: Tell, *, checked: bool) -> list[Item]:
    """Take the images of a JSON file: a list is a manifest, an object must be COCO's instances."""
    if not _is_there(path):
        raise no_file(path, ImageError)
    try:
        listed = msgspec.json.decode(read_text(path, limit=LARGEST), type=list[_Entry] | Instances)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise SettingError(f"{path} is no manifest, and none of COCO's.", seen=str(error), fix=_EXAMPLE) from error
    if isinstance(listed, Instances):
        return _coco_items(path, listed, tell, checked=checked)
    if not listed:
        raise SettingError(f"{path} names no image.", fix=_EXAMPLE)
    return [
        _manifest_item(path, f"entry {i} of {len(listed)} in {path}", one, checked=checked)
        for i, one in enumerate(listed, 1)
    ]


def _manifest_item(path: Path, place: str, entry: _Entry, *, checked: bool) -> Item:
    """Take one image of a manifest; `place` is what error messages call its entry."""
    image, *drawn = (path.parent / os.path.expanduser(one) for one in (entry.image, *(entry.masks or [])))
    for file in (image, *drawn) if checked else ():
        try:
            check_image(file)
        except ImageError as error:
            raise ImageError(f"{error.what} It is named by {place}.", seen=error.seen, fix=error.fix) from error
    objects = None if entry.objects is None else tuple(entry.objects)
    return Item(entry.image, image, objects, tuple(drawn), entry.caption)


def coco_roots(path: Path) -> list[Path]:
    """List where the images of a COCO file may lie: beside it, or as COCO packs them, `annotations/` and `X/`."""
    split = path.stem.removeprefix("instances_").removeprefix("captions_")
    beside = [path.parent / name for name in (".", "images", split)]
    return beside + [path.parent.parent / name for name in (split, f"images/{split}", "images", ".")]


def first_file(roots: Sequence[Path], name: str) -> Path | None:
    """Return the file of this name in the first of the folders that has it."""
    return next((root / name for root in roots if _is_there(root / name)), None)


def _coco_items(path: Path, coco: Instances, tell: Tell, *, checked: bool) -> list[Item]:
    """Take the images of COCO instances that are there: a part of the set is enough."""
    # 1. Where the images may lie.
    roots = coco_roots(path)
    # 2. Annotations by their image: the file lists them in any order.
    names = {one.id: one.name for one in coco.categories}
    shown = defaultdict(list)
    for one in coco.annotations:
        shown[one.image_id].append(one)
    items = []
    for picture in coco.images:
        file = first_file(roots, picture.file_name)
        if file is not None:
            if checked:
                check_image(file)
            there = outlines(shown[picture.id], names, picture)
            items.append(Item(str(file), file, tuple(there), tuple(there.values())))
    # 3. Of a few missing images the user is told; if all are missing, the place is wrong.
    if not items:
        raise ImageError(
            f"None of the {len(coco.images)} images of {path} is there.",
            seen=f"Looked in {', '.join(str(root) for root in roots)}.",
            fix=f"Put them beside it: {path.parent / 'images'}",
        )
    if n_missing := len(coco.images) - len(items):
        tell(f"{path}: {n_missing} of its {len(coco.images)} images are not there")
    return items
