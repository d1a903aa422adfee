"""How much a visitor may ask of the server: sizes, numbers, and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from mmneurons.data.images import OpenedImage, open_image
from mmneurons.errors import ImageError, SettingError
from mmneurons.vlm.context import hooked
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True)
class Limits:
    """Limits say what one visitor may ask of the server."""

    seconds: float = 120
    """How long the model may work on one request; waiting for other visitors does not count."""
    n_bytes: int = 20_000_000
    """The largest file that may be uploaded."""
    pixels: int = 25_000_000
    """The most pixels of a picture."""
    pictures: int = 6
    """How many pictures a session remembers."""
    patches: int = 8
    """How many patches a session may hold."""
    characters: int = 500
    """The longest text of a field."""


class StoppedError(SettingError):
    """A visitor has stopped their own request."""


def open_upload(path: str, limits: Limits) -> OpenedImage:
    """Open a picture that a visitor sent.

    Raises:
        ImageError: it is no image, or too large; the message names the file without its folder.
    """
    name = Path(path).name
    try:
        # From the header alone: the pixels of a picture that is too large are never decoded.
        with Image.open(path) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large.", seen=str(error)) from error
    except (OSError, SyntaxError, ValueError):
        width, height = 0, 0  # `open_image` says what is wrong with it
    if width * height > limits.pixels:
        raise ImageError(
            f"{name} is too large.",
            seen=f"It has {width} x {height} pixels; at most {limits.pixels:,} are taken.",
            fix="Make it smaller, and give it again.",
        )
    try:
        opened = open_image(path)
    except ImageError as error:
        told = [part.replace(path, name) for part in (error.what, error.seen)]
        raise ImageError(told[0], seen=told[1], fix="Give a PNG, JPEG, WebP, GIF, BMP or TIFF file.") from error
    return OpenedImage(opened.image, name, opened.notes)


def check_text(text: str | None, limits: Limits) -> str:
    """Return a text that a visitor typed, without spaces around it; refuse one that is too long.

    Raises:
        SettingError: the text is too long.
    """
    text = (text or "").strip()
    if len(text) > limits.characters:
        raise SettingError("This text is too long.", seen=f"{len(text):,} characters; at most {limits.characters}.")
    return text


@contextmanager
def within(vlm: VLM, limits: Limits, stop: threading.Event) -> Iterator[None]:
    """Give this thread the model inside the `with`, and end what runs there when it takes too long or is stopped.

    Raises:
        SettingError: the time is over.
        StoppedError: `stop` was set.
    """
    with vlm.alone():
        end = time.monotonic() + limits.seconds

        def look(module: nn.Module, args: Any) -> None:
            if stop.is_set():
                raise StoppedError("Stopped. Nothing was changed.")
            if time.monotonic() > end:
                raise SettingError(f"This took longer than {limits.seconds:g} seconds.", fix="Ask for less at once.")

        # Looked at before each forward pass: nothing that runs a model goes on for long without one.
        watched: AbstractContextManager[None] = hooked(
            [partial(vlm.anatomy.owner.register_forward_pre_hook, look), *_of_blocks(vlm, look)]
        )
        with watched:
            yield


def _of_blocks(vlm: VLM, look: Any) -> Iterator[Any]:
    """The same look before the first block, which fits and readers run without the owner."""
    yield partial(vlm.anatomy.blocks[0].module.register_forward_pre_hook, look)
