"""Images are read, hashed and decoded by threads, some batches ahead of the model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mmneurons.data.content import image_hash, reason
from mmneurons.data.dataset import Item
from mmneurons.data.images import MAX_BYTES, OpenedImage, check_scaled, open_bytes, open_image
from mmneurons.errors import FormatError, ImageError, MissingFileError
from mmneurons.files import read_file, stamp_of

AHEAD = 1
"""How many portions are read before the model asks for them; with the one it is asked about, all that is held."""


class Items(Protocol):
    """Images by their place in the list of a data set: all of them, or those of some shards."""

    def __getitem__(self, position: int, /) -> Item:
        """Return the image at a place."""
        ...


@dataclass(frozen=True, eq=False)
class ReadImage:
    """One image of a data set, read; or why it could not be."""

    position: int
    """Its place in the list of images, from 0."""
    item: Item
    stamp: str
    """Changes whenever its file may have changed; "" for an image that has no file."""
    content: str = ""
    """SHA-256 of the bytes of its file, or of its pixels where there is no file."""
    opened: OpenedImage | None = None
    """None: it could not be used."""
    failure: str = ""


@dataclass(frozen=True)
class Portion:
    """Images that are read together, and divided into batches: a fixed part of a shard, whatever ran before."""

    shard: int
    positions: range
    is_last: bool
    """Whether the shard ends with it."""


def portions(slices: Iterable[tuple[int, range]], size: int) -> Iterator[Portion]:
    """Cut shards into portions of at most so many images."""
    for shard, mine in slices:
        for start in range(mine.start, mine.stop, size):
            stop = min(start + size, mine.stop)
            yield Portion(shard, range(start, stop), stop == mine.stop)


def read_ahead(
    items: Items, plan: Iterable[Portion], image_processor: Any, workers: int
) -> Generator[tuple[Portion, list[ReadImage]]]:
    """Read the images of each portion, in order, while whoever asks works on those before.

    Args:
        items: The data set.
        plan: What is read.
        image_processor: The model's; what it would scale up without bound cannot be used.
        workers: How many threads read.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mmneurons-read")
    waiting: deque[tuple[Portion, list[Any]]] = deque()
    try:
        for portion in plan:
            asked = [pool.submit(read_image, i, items[i], image_processor) for i in portion.positions]
            waiting.append((portion, asked))
            if len(waiting) > AHEAD:
                first, found = waiting.popleft()
                yield first, [one.result() for one in found]
        while waiting:
            first, found = waiting.popleft()
            yield first, [one.result() for one in found]
    finally:  # stopped in between: nobody waits for what is not needed any more
        pool.shutdown(wait=True, cancel_futures=True)


def read_image(position: int, item: Item, image_processor: Any) -> ReadImage:
    """Read one image; whatever is wrong with it is told in the result."""
    read = ReadImage(position, item, stamp_of_item(item))
    try:
        if isinstance(item.source, Image.Image):
            opened = open_image(item.source)
            read = replace(read, content=image_hash(opened.image))
        else:  # the file is read once, for its hash and its pixels
            content = _bytes(item)
            read = replace(read, content=hashlib.sha256(content).hexdigest())
            opened = open_bytes(content, item.name)
        check_scaled([opened.image.size], image_processor)
        return replace(read, opened=replace(opened, name=item.name))
    except ImageError as error:
        return replace(read, failure=reason(error))


def stamp_of_item(item: Item) -> str:
    """Return what changes whenever an image's file may have changed; "" for an image that has no file."""
    if isinstance(item.source, Image.Image):
        return ""
    return stamp_of(item.source) if isinstance(item.source, Path) else item.source.stamp


def content_hash(item: Item) -> str:
    """Hash an image as `read_image` does; "" where it cannot be read."""
    try:
        if isinstance(item.source, Image.Image):
            return image_hash(open_image(item.source).image)
        return hashlib.sha256(_bytes(item)).hexdigest()
    except ImageError:
        return ""


def _bytes(item: Item) -> bytes:
    """Read the bytes of an image that is not in memory."""
    source = item.source
    assert not isinstance(source, Image.Image)
    if not isinstance(source, Path):
        return source.read()
    try:
        return read_file(source, limit=MAX_BYTES)
    except (FormatError, MissingFileError) as error:
        open_image(source)  # which says better what is wrong with it
        raise ImageError(error.what, seen=error.seen) from error
