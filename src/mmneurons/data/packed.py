"""Images that lie in no folder: members of WebDataset's tar archives, and rows of Hugging Face data sets."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from PIL import Image

from mmneurons.data.dataset import Item
from mmneurons.data.images import MAX_BYTES, SUFFIXES
from mmneurons.errors import ImageError, SettingError
from mmneurons.files import stamp_of

_TEXT = 2**20
"""The most bytes of a caption or of JSON in an archive."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar archive that is not compressed, read in its place."""

    archive: Path
    offset: int
    size: int
    stamp: str
    """Changes whenever the archive has changed."""

    def read(self) -> bytes:
        """Read the bytes of the file.

        Raises:
            ImageError: the archive cannot be read, or the file is too large.
        """
        if self.size > MAX_BYTES:
            raise ImageError("A file in an archive is too large.", seen=f"{self.size:,} bytes in {self.archive}")
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.archive} cannot be read.", seen=str(error)) from error


def tar_items(path: Path) -> list[Item]:
    """List the images of a WebDataset archive: files of one stem are one sample, `000.jpg`, `000.txt`, `000.json`.

    `.txt` is a caption; `.json` may have `caption`, and `objects`, a list of words.

    Raises:
        SettingError: it is no tar archive, or a compressed one.
        ImageError: there is no image in it.
    """
    found, told = list[tuple[str, Member]](), dict[str, dict[str, Any]]()
    stamp = stamp_of(path)
    try:
        # "r:" reads no compressed archive: a member could not be read in its place.
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                stem, suffix = _split(member.name)
                if suffix in SUFFIXES:
                    found.append((member.name, Member(path, member.offset_data, member.size, stamp)))
                elif suffix in (".txt", ".json") and member.size <= _TEXT and (file := archive.extractfile(member)):
                    told.setdefault(stem, {}).update(_told(file.read(), suffix))
                setattr(archive, "members", [])  # noqa: B010 - tarfile would keep the header of every member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SettingError(f"{path} is no plain tar archive.", seen=str(error), fix="Unpack it: gunzip FILE") from error
    if not found:
        raise ImageError(f"There is no image in {path}.", fix=f"Files that end in {', '.join(SUFFIXES)} are taken.")
    return [_item(path, name, member, told.get(_split(name)[0], {})) for name, member in found]


def _split(name: str) -> tuple[str, str]:
    """Split a name as WebDataset does: at the first dot of its last part."""
    place = PurePosixPath(name)
    stem, dot, _ = place.name.partition(".")
    return str(place.with_name(stem)) if stem else name, f".{place.name.rpartition('.')[2].lower()}" if dot else ""


def _told(content: bytes, suffix: str) -> dict[str, Any]:
    """Read what a sample says of its image; what cannot be read says nothing."""
    text = content.decode("utf-8", "replace").strip()
    if suffix == ".txt":
        return {"caption": text}
    try:
        document = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return {}
    document = document if isinstance(document, dict) else {}
    caption, objects = document.get("caption"), document.get("objects")
    told: dict[str, Any] = {"caption": caption} if isinstance(caption, str) else {}
    if isinstance(objects, list) and all(isinstance(one, str) for one in objects):
        told["objects"] = tuple(objects)
    return told


def _item(path: Path, name: str, member: Member, told: dict[str, Any]) -> Item:
    caption = (told.get("caption") or "").strip() or None
    return Item(
        f"{path.name}/{name}", member, told.get("objects"), caption=caption, captions=(caption,) if caption else ()
    )


@dataclass(frozen=True, eq=False)
class HubRow:
    """The image of one row of a Hugging Face data set."""

    dataset: Any = field(repr=False)
    row: int
    column: str
    stamp: str

    def read(self) -> bytes:
        """Read the bytes of the file as the data set holds them; a picture without bytes is written as PNG.

        Raises:
            ImageError: they cannot be read.
        """
        held = self.dataset[self.row][self.column]
        if isinstance(held, dict) and held.get("bytes"):
            return held["bytes"]
        path = held.get("path") if isinstance(held, dict) else held
        if isinstance(path, str | os.PathLike):
            return Path(path).read_bytes()
        if isinstance(held, Image.Image):
            file = io.BytesIO()
            held.save(file, format="PNG")
            return file.getvalue()
        raise ImageError(f"Row {self.row} of the data set holds no image.", seen=type(held).__name__)


def hub_items(name: str) -> list[Item]:
    """List the rows of a Hugging Face data set: `hub:owner/name`, `hub:owner/name:split`, or `hub:FOLDER` on disk.

    The column of type `Image` is taken, or the one called `image`; `caption`, or `text`, is the caption.

    Raises:
        SettingError: the package `datasets` is not installed, or the data set cannot be loaded or has no images.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # of the user's own choice
    except ImportError as error:
        raise SettingError(
            "Hugging Face data sets need the package datasets, which is not installed.", fix="pip install datasets"
        ) from error
    place, _, split = name.partition(":")
    try:
        held = datasets.load_from_disk(place) if Path(place).is_dir() else datasets.load_dataset(place)
        if isinstance(held, dict):
            held = held[split or next(iter(held))]
        column = next(
            name for name, kind in held.features.items() if isinstance(kind, datasets.Image) or name == "image"
        )
        held = held.cast_column(column, datasets.Image(decode=False))  # our own reader decodes
    except (OSError, ValueError, KeyError, StopIteration, RuntimeError) as error:
        raise SettingError(f"The data set '{name}' cannot be used.", seen=f"{type(error).__name__}: {error}") from error
    said = next((name for name in ("caption", "text") if name in held.column_names), None)
    texts = held[said] if said else [None] * len(held)
    return list(_hub_rows(place, held, column, texts))


def _hub_rows(place: str, held: Any, column: str, texts: Any) -> Iterator[Item]:
    stamp = str(held._fingerprint)
    for row, text in enumerate(texts):
        caption = text.strip() if isinstance(text, str) and text.strip() else None
        captions = (caption,) if caption else ()
        yield Item(f"{place}/{row}", HubRow(held, row, column, stamp), None, caption=caption, captions=captions)
