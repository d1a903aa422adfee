"""The images of a whole data set, listed without opening them: what a sweep goes through.

Beside the sources of `read_items`: a glob, COCO's captions, SBU's JSON, a table in CSV or Parquet, WebDataset archives
and Hugging Face data sets.
"""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from mmneurons.data.dataset import LARGEST, Item, Tell, coco_roots, first_file, read_items
from mmneurons.data.images import SUFFIXES
from mmneurons.data.packed import hub_items, tar_items
from mmneurons.errors import ImageError, SettingError
from mmneurons.files import read_text

HUB = "hub:"
"""How the name of a Hugging Face data set begins."""
_NAMES = ("image", "path", "file_name", "file")
"""The columns of a table that may name the files, the first of them that is there."""
_CHECKED = 100
"""How many files of a list are looked for before it is believed that none is there."""


def list_items(
    source: str | os.PathLike[str],
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    tell: Tell = lambda note: None,
) -> Sequence[Item]:
    """List the images of a data set, in its order; a file that is damaged stays in the list.

    Args:
        source: What `read_items` takes; a pattern such as `photos/**/*.jpg`; COCO's captions or SBU's captions, JSON,
            with the images beside them; a table, CSV or Parquet, with a column `image` of paths and, where known,
            `caption` and `objects`; a WebDataset archive, `.tar`, or a pattern of them; or `hub:NAME`, a data set of
            Hugging Face.
        limit: At most so many images.
        shuffle_seed: Take them in an order drawn with this seed, so that a limit takes a sample; None: as they come.
        tell: Called with what was left out.

    Raises:
        ImageError: there is no image.
        SettingError: the source is none of these.
        FormatError: it cannot be read.
    """
    items = _listed(os.fspath(source), tell)
    if shuffle_seed is not None:
        items = [items[i] for i in np.random.default_rng(shuffle_seed).permutation(len(items)).tolist()]
    return items[:limit]


def _listed(source: str, tell: Tell) -> list[Item]:
    """List the images of one source, by its kind."""
    if source.startswith(HUB):
        return hub_items(source.removeprefix(HUB))
    path = Path(os.path.expanduser(source))
    if glob.has_magic(source) and not path.exists():
        return _matching(source)
    kinds = {".tar": tar_items, ".csv": _table_items, ".parquet": _table_items}
    if (kind := kinds.get(path.suffix.lower())) and path.is_file():
        return kind(path)
    if path.suffix.lower() == ".json" and path.is_file() and (items := _captioned(path)) is not None:
        return items
    return read_items(source, tell=tell, checked=False)


def _matching(pattern: str) -> list[Item]:
    """List the images, and the images in archives, whose names match a pattern, in order of name."""
    files = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH207 - pathlib needs a root apart
    items = [Item(file, Path(file)) for file in files if file.lower().endswith(SUFFIXES)]
    for file in files:
        if file.lower().endswith(".tar"):
            items += tar_items(Path(file))
    if not items:
        raise ImageError(f"No image matches {pattern}.", fix="Quote a pattern, and write ** for folders in folders.")
    return items


class _CocoCaption(msgspec.Struct):
    image_id: int | str
    caption: str


class _CocoImage(msgspec.Struct):
    id: int | str
    file_name: str


class _CocoCaptions(msgspec.Struct):
    """COCO's captions: several of each image, in any order."""

    images: list[_CocoImage]
    annotations: list[_CocoCaption]


class _Sbu(msgspec.Struct):
    """The SBU captioned photographs: addresses and captions, as many of each."""

    image_urls: list[str]
    captions: list[str]


def _captioned(path: Path) -> list[Item] | None:
    """List the images of COCO's or SBU's captions; None if the file is another kind of JSON."""
    content = read_text(path, limit=LARGEST)
    for kind, items_of in ((_Sbu, _sbu_items), (_CocoCaptions, _coco_caption_items)):
        try:
            return items_of(path, msgspec.json.decode(content, type=kind))
        except (msgspec.MsgspecError, RecursionError):
            continue
    return None


def _coco_caption_items(path: Path, listed: Any) -> list[Item]:
    said = defaultdict(list)
    for one in listed.annotations:
        said[one.image_id].append(one.caption.strip())
    named = [(picture.file_name, tuple(said[picture.id])) for picture in listed.images]
    return _beside(path, named)


def _sbu_items(path: Path, listed: Any) -> list[Item]:
    if len(listed.image_urls) != len(listed.captions):
        raise SettingError(
            f"{path} has another number of captions than of images.",
            seen=f"{len(listed.image_urls)} images, {len(listed.captions)} captions",
        )
    # Nothing is fetched: the photographs must be there, under the last part of their address.
    names = [PurePosixPath(urlsplit(url).path).name for url in listed.image_urls]
    return _beside(path, [(name, (said.strip(),)) for name, said in zip(names, listed.captions, strict=True)])


def _beside(path: Path, named: list[tuple[str, tuple[str, ...]]]) -> list[Item]:
    """List files that lie beside a list of them; those that are missing stay in it, to be told as failures."""
    roots = coco_roots(path)
    if not any(first_file(roots, name) for name, _ in named[:_CHECKED]):
        raise ImageError(
            f"The images of {path} are not there.",
            seen=f"Looked for {named[0][0] if named else 'none'} in {', '.join(map(str, roots))}.",
            fix=f"Put them beside it: {path.parent / 'images'}",
        )
    return [
        Item(str(file), file, caption=said[0] if said and said[0] else None, captions=said)
        for name, said in named
        if (file := first_file(roots, name) or roots[0] / name)
    ]


def _table_items(path: Path) -> list[Item]:
    """List the images that a table names, in its order."""
    import duckdb  # slow to import

    if path.suffix.lower() == ".csv":
        table = duckdb.read_csv(str(path), all_varchar=True, header=True)
    else:
        table = duckdb.read_parquet(str(path))
    try:
        column = next(name for name in _NAMES if name in table.columns)
        wanted = [name for name in (column, "caption", "objects") if name in table.columns]
        rows = table.select(*wanted).fetchall()
    except StopIteration:
        raise SettingError(
            f"{path} has no column of images.", seen=f"It has: {', '.join(table.columns)}.", fix="Call it image."
        ) from None
    if not rows:
        raise ImageError(f"{path} names no image.")
    return [_table_item(path, dict(zip(["image", *wanted[1:]], row, strict=True))) for row in rows]


def _table_item(path: Path, row: dict[str, Any]) -> Item:
    name, objects = str(row["image"]), row.get("objects")
    if isinstance(objects, str):  # of a CSV file
        objects = [word.strip() for word in objects.split(",") if word.strip()]
    caption = (row.get("caption") or "").strip() or None
    return Item(
        name,
        path.parent / os.path.expanduser(name),
        None if objects is None else tuple(map(str, objects)),
        caption=caption,
        captions=(caption,) if caption else (),
    )
