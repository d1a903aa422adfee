"""Reading of images: whatever a user gives becomes an RGB picture, or an ImageError that says what to do instead.

A file is only ever read as pixels, by the decoders of plain raster formats: Pillow's EPS reader, for one, would
start Ghostscript. Pixel values are taken as stored: a colour profile is neither applied nor kept.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmneurons.data.image_errors import AGAIN, GIVE, kind_of, no_file, quoted, too_large
from mmneurons.errors import ImageError
from mmneurons.photo.samples import located

MAX_PIXELS = 60_000_000
"""The most pixels of a picture; more are refused from the header, before decoding (0.5 GB in memory, with a copy)."""
MAX_BYTES = 400_000_000
"""The most bytes of a file; a larger one is refused unread: no format needs more for so many pixels."""
SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .pfm "
    ".avif .avifs .jp2 .j2k .jpx .jpf .jpc .j2c".split()
)
"""The endings of image file names, in small letters; a folder is searched for these."""

_MAX_SCANS = 20
"""The most scans of a progressive JPEG of `MAX_PIXELS`; a smaller one may have more. Cameras write about ten."""
_MAX_PLAIN = 10_000_000
"""The most bytes of a PPM that writes its numbers as text: they are read one by one, so many in a second."""
_COSTLY = ("WEBP", "AVIF", "JPEG2000", "F", "I")
"""Formats and modes that take twice the memory for each pixel, some of them much time: they may have half as many."""
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "F")  # of which the numbers can be read as they are
_STRIP = 2**20
"""How many pixels are converted at once where a conversion needs several copies."""
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_EXIF_ORIENTATION, _TIFF_PHOTOMETRIC = 0x0112, 262
_LOCK = threading.Lock()


@dataclass(frozen=True)
class OpenedImage:
    """A picture that a model can be shown, and notes on how it was read."""

    image: Image.Image
    """The picture: mode RGB, upright, at least 1 x 1; it shares no memory with what it was made from."""
    name: str
    """The path as it was given, or '<PIL image>' or '<array>'."""
    notes: tuple[str, ...]
    """What was dropped or changed on the way, one short phrase each; empty for a plain RGB file."""


def open_image(source: str | os.PathLike[str] | Image.Image | np.ndarray) -> OpenedImage:
    """Read one image as RGB.

    EXIF rotation is applied, transparency shown on white, 16-bit grey divided by 257, and of several frames the
    first is taken. `source` stays as it was; of a PIL image, the frame it stands at is used.

    Args:
        source: A path, a name such as `photo:coffee` (`mmneurons samples` lists them), a PIL image, or an array: height
            x width, x 3 (RGB) or x 4 (RGBA), uint8 or floats in 0..1.

    Raises:
        ImageError: anything else was given, or Pillow cannot decode the picture to its last row.
    """
    notes: list[str] = []
    # What is given -> RGB, by three ways; where Pillow is at work, its errors are turned into ours.
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        with _opened(name) as image:
            picture = _of_file(image, name, notes)
    elif isinstance(source, Image.Image):
        name = "<PIL image>"
        with _pillow(name):
            picture = _rgb(source, name, notes)
    elif isinstance(source, np.ndarray):
        name = "<array>"
        with _pillow(name):
            picture = _rgb(_from_array(source, name), name, notes)
    else:
        raise ImageError(
            "This cannot be used as an image.",
            seen=f"Got an object of type {type(source).__module__}.{type(source).__qualname__}.",
            fix="Give a path, a PIL image, or a NumPy array of uint8, height x width x 3.",
        )
    return _upright(picture, name, notes)


def open_bytes(content: bytes, name: str) -> OpenedImage:
    """Read one image as RGB from the bytes of its file, as `open_image` reads the file itself.

    Raises:
        ImageError: as `open_image`; `name` is what the message calls it.
    """
    notes: list[str] = []
    with _pillow(name), _header(_Memory(content), name) as image:
        picture = _of_file(image, name, notes)
    return _upright(picture, name, notes)


def _of_file(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Decode an image file whose header was read; of several pictures in it the first."""
    if getattr(image, "is_animated", False):  # not n_frames: counting reads the whole file
        held = "several pictures in one file" if image.format in ("TIFF", "MPO") else "animated"
        notes.append(f"{held}: the first is used")
    return _rgb(image, name, notes)


def _upright(picture: Image.Image, name: str, notes: list[str]) -> OpenedImage:
    ImageOps.exif_transpose(picture, in_place=True)  # `_rgb` has left the orientation in the EXIF data, alone
    return OpenedImage(picture, name, tuple(notes))


def check_image(path: str | os.PathLike[str]) -> None:
    """Check the header of an image file alone, so that thousands can be checked before a model is loaded.

    Raises:
        ImageError: there is no such file, it is no image, or it is too large. Damaged pixels are not noticed.
    """
    with _opened(os.fsdecode(path)):
        pass


def open_stored(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image upright but otherwise as stored, for files such as masks, whose numbers have a meaning.

    Modes for print and television (CMYK, YCbCr, LAB) become RGB.

    Raises:
        ImageError: as `open_image`, or the file holds several pictures.
    """
    name = os.fsdecode(path)
    with _opened(name) as image:
        if getattr(image, "is_animated", False):
            raise ImageError(f"{quoted(name)} holds several pictures.", fix="Save the one that is meant by itself.")
        _load(image, name)
        stored = image if image.mode in _PLAIN_MODES or image.mode.startswith("I;16") else image.convert("RGB")
        return ImageOps.exif_transpose(stored)


def check_scaled(sizes: Iterable[tuple[int, int]], image_processor: object) -> None:
    """Refuse a picture that a processor would scale up without bound: one that is far longer than it is wide.

    Args:
        sizes: Width and height of each picture.
        image_processor: The processor; one that fixes the shorter side's length and not the longer's has no bound.

    Raises:
        ImageError: a picture is too long and thin; the message has the size that it would be scaled to.
    """
    size = getattr(image_processor, "size", None)
    of = size.get if isinstance(size, Mapping) else partial(getattr, size)  # a dict or an object, by version
    short, long = (of(name, None) for name in ("shortest_edge", "longest_edge"))
    if not isinstance(short, int) or long is not None or not getattr(image_processor, "do_resize", True):
        return
    for width, height in sizes:
        scaled = [round(side * short / min(width, height)) for side in (width, height)]
        if scaled[0] * scaled[1] > MAX_PIXELS:
            raise ImageError(
                f"A picture of {width} x {height} pixels is too long and thin for this model.",
                seen=f"Its processor would make it {scaled[0]} x {scaled[1]} pixels, at most {MAX_PIXELS:,} in all.",
                fix="Crop it: magick IMAGE -gravity center -extent 1:1 square.png",
            )


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an ImageError, silence its warnings, refuse truncated files.

    Warning filters and Pillow's truncation switch belong to the process. The lock keeps two of our own threads from
    restoring each other's state, so threads decode one at a time; other code that sets them meanwhile is not guarded.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pads_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise too_large(name, str(error), MAX_PIXELS) from error
        except Exception as error:  # a hostile file raises almost anything: struct.error, SyntaxError, MemoryError
            what = f"{quoted(name)} cannot be decoded: it is damaged, incomplete or closed."
            seen = f"The decoder says: {str(error) or type(error).__name__}"
            raise ImageError(what, seen=seen, fix=AGAIN) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = pads_truncated


@contextmanager
def _opened(name: str) -> Iterator[Image.Image]:
    """Open an image file, read its header and check it, for the time of a `with`; the file is closed in any case."""
    if re.match(r"[a-z][a-z0-9+.-]+:/|data:", name, re.IGNORECASE):
        fix = "Download it, then give the path of the file: curl -L -o image.jpg URL"
        raise ImageError(f"{quoted(name)} is an address, not a file.", seen="Nothing is fetched here.", fix=fix)
    path = located(name)
    try:
        if not path.is_file():
            raise no_file(name, path, SUFFIXES)
        with _File(path.open("rb", 0)) as file, _pillow(name), _header(file, name) as image:
            try:
                yield image
            finally:
                image.close()  # its pixels, too: the copy that is turned upright is the third otherwise
    except PermissionError as error:
        what = f"{quoted(name)} may not be read by this user."
        raise ImageError(what, seen=str(error), fix=f"chmod u+r {shlex.quote(str(path))}") from error
    except (OSError, ValueError) as error:  # a name too long, a null byte in it, a failing disk
        raise ImageError(f"{quoted(name)} cannot be opened.", seen=quoted(str(error)), fix=GIVE) from error


class _File(io.BufferedReader):
    """A file that makes room for what it has left, not for what a decoder asks: a chunk may claim to have gigabytes."""

    @property
    def n_bytes(self) -> int:
        return os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.n_bytes - self.tell()
        return super().read(size if size is None or size < left else max(left, 0))


class _Memory(io.BytesIO):
    """The bytes of a file that was read already."""

    @property
    def n_bytes(self) -> int:
        return self.getbuffer().nbytes


def _header(file: _File | _Memory, name: str) -> Image.Image:
    """Read the header of an image; refuse what is empty, too large, or of a format that is not taken."""
    n_bytes = file.n_bytes
    head = file.read(512)
    if not head:
        raise ImageError(f"{quoted(name)} is empty.", seen="It has 0 bytes.", fix=AGAIN)
    if n_bytes > (_MAX_PLAIN if re.match(rb"P[123]\s", head) else MAX_BYTES):
        raise too_large(name, f"It has {n_bytes:,} bytes.", MAX_PIXELS)
    Image.init()
    try:
        image = Image.open(file, formats=[known for known in _FORMATS if known in Image.OPEN])
    except UnidentifiedImageError as error:
        seen, fix = kind_of(head)
        what = f"{quoted(name)} cannot be read as an image."
        raise ImageError(what, seen=f"It looks like {seen}.", fix=fix) from error
    _check_size(name, *image.size, MAX_PIXELS // (2 if {image.format, image.mode} & {*_COSTLY} else 1))
    return image


def _load(image: Image.Image, name: str) -> None:
    """Decode the pixels, of which Pillow has read the header alone so far."""
    _check_size(name, *image.size)  # again: a PIL image that a user gives has not passed `_header`
    file = getattr(image, "fp", None)
    if image.format in ("JPEG", "MPO") and file is not None:
        place = file.tell()
        n_scans = _count(file, b"\xff\xda")  # the marker "start of scan"
        file.seek(place)
        if n_scans * image.width * image.height > _MAX_SCANS * MAX_PIXELS:
            seen = f"A JPEG of {image.width} x {image.height} pixels in {n_scans} scans; each costs as much as all."
            raise ImageError(f"{quoted(name)} would take too long to decode.", seen=seen, fix="Save it again as PNG.")
    image.load()


def _count(file: IO[bytes], marker: bytes) -> int:
    """Count how often two bytes stand in a file. In a JPEG, coded pixels never hold those of a marker."""
    file.seek(0)
    count, before = 0, b""
    while part := file.read(2**20):
        count += (before + part).count(marker)
        before = part[-1:]  # a marker may be cut in two by the end of a part
    return count


def _rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Make a copy in RGB, not yet upright: the one EXIF tag that is left in it says how it is to be turned."""
    _load(image, name)  # before getexif(): a TIFF turns itself upright here
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - EXIF data can be as hostile, but the picture is still good
        orientation = 1
        notes.append("EXIF data unreadable: not rotated")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bit(image, name, notes)
    elif image.mode == "F":
        image = Image.fromarray(_bytes_from_floats(np.asarray(image), name))
    elif image.mode == "CMYK":
        notes.append("CMYK: converted without its colour profile")
    picture = _on_white(image, notes) if image.has_transparency_data else image.convert("RGB")  # either is a copy
    picture.info.clear()  # old EXIF data would turn it again the next time it is opened
    picture.getexif()[_EXIF_ORIENTATION] = orientation  # that one tag alone: others may be damaged
    return picture


def _strips(height: int, width: int) -> Iterator[slice]:
    """Yield the rows of a picture a few at a time, so that conversions need little memory."""
    step = max(1, _STRIP // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    picture = Image.new("RGB", image.size)
    is_opaque = True
    for rows in _strips(image.height, image.width):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        # Pillow knows no direct way from La, premultiplied grey, to RGBA.
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        is_opaque &= strip.getchannel("A").getextrema() == (255, 255)
        white = Image.new("RGBA", strip.size, "white")
        picture.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, rows.start))
    if not is_opaque:
        notes.append("transparent: shown on white")
    return picture


def _from_16_bit(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    # convert("RGB") would clip every value above 255 to white.
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        seen = f"32-bit values from {low} to {high}; up to 65535 they are read as 16-bit grey."
        raise ImageError(f"{quoted(name)} has no known white.", seen=seen, fix="Save it as 8 or 16 bits per channel.")
    notes.append(f"16-bit grey, values {low} to {high}: divided by 257")
    opaque = values != image.info.get("transparency", -1)  # one grey can stand for "transparent"
    grey = np.empty(values.shape, np.uint8)
    for rows in _strips(*values.shape):
        strip = values[rows].astype(np.int32)
        if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0:
            strip = 65535 - strip  # white is zero; Pillow turns it round at 8 bits, not at 16
        grey[rows] = (strip + 128) // 257
    made = Image.fromarray(grey)
    if not opaque.all():
        made.putalpha(Image.fromarray(np.where(opaque, np.uint8(255), np.uint8(0))))
    return made


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Make an image of an array; what is not clearly height x width of known white is refused, never guessed at."""
    seen = f"Its shape is {array.shape}, its dtype {array.dtype}."
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        fix = "Give height x width, x 3 (RGB) or x 4 (RGBA); from channels first: array.transpose(1, 2, 0)"
        raise ImageError("An array of this shape is not one image.", seen=seen, fix=fix)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        known = {"bool": "array.astype('uint8') * 255", "uint16": "(array // 257).astype('uint8')"}
        fix = "Give uint8 from 0 to 255: " + known.get(array.dtype.name, "array.astype('uint8')")
        raise ImageError(f"{array.dtype} pixels have no known white.", seen=seen, fix=fix)
    _check_size(name, array.shape[1], array.shape[0])
    return Image.fromarray(array if array.dtype == np.uint8 else _bytes_from_floats(array, name))


def _bytes_from_floats(values: np.ndarray, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # so that NaN is refused too
        in_bytes = low >= 0 and high <= 255
        fix = "Scale them first: array / 255" if in_bytes else "Undo the normalisation, then array.clip(0, 1)"
        seen = f"Values from {low:.4g} to {high:.4g}."
        raise ImageError(f"{quoted(name)} holds floats outside 0..1.", seen=seen, fix=fix)
    made = np.empty(values.shape, np.uint8)
    for rows in _strips(*values.shape[:2]):
        made[rows] = np.round(values[rows] * 255)
    return made


def _check_size(name: str, width: int, height: int, most: int | None = None) -> None:
    if width * height == 0:
        raise ImageError(f"{quoted(name)} has no pixels.", seen=f"It is {width} x {height} pixels.", fix=AGAIN)
    if width * height > (most or MAX_PIXELS):
        raise too_large(name, f"It is {width} x {height} pixels.", most or MAX_PIXELS)
