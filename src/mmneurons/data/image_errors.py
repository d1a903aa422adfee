"""What is said of a file that cannot be used as an image: what it is instead, and what to do about it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmneurons import files
from mmneurons.errors import ImageError
from mmneurons.files import quoted

GIVE = "Give a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000 file."
AGAIN = "Copy, download or export the file again."
_KINDS = (  # how a file that is no image begins, what it is, what to do
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*", "the start of an image, damaged or cut off", AGAIN),
    (rb"....ftyp(hei|hev|mif1)", "a HEIC photograph", "Export it as JPEG and give that."),
    (rb"%PDF|%!PS|\s*<(\?xml|svg)", "a document or drawing, not pixels", "Export it as PNG and give that."),
    (rb"\s*<(!doctype html|html)", "a web page", "Download the image itself, not the page that shows it."),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull"),
    (rb"\x93NUMPY", "a NumPy array", "Give the array: open_image(numpy.load(PATH, allow_pickle=False))"),
    (rb"PK\x03\x04|\x1f\x8b", "an archive", "Unpack it and give the image inside."),
)


def no_file(name: str, path: Path, suffixes: Sequence[str]) -> ImageError:
    """Make the error for a path that leads to no file; the message names those that are called nearly so."""
    if not name.strip():
        return ImageError("The path of the image is empty.", fix=GIVE)
    if path.is_dir():
        found = Counter(file.suffix for file in path.iterdir() if file.suffix.lower() in suffixes).most_common()
        seen = f"Images in it: {', '.join(f'{count} {suffix}' for suffix, count in found) or 'none'}."
        fix = f"Give its files: mmneurons find {shlex.quote(str(path))}/*{found[0][0]}" if found else GIVE
        return ImageError(f"{quoted(name)} is a folder, not an image.", seen=seen, fix=fix)
    if path.exists():
        return ImageError(f"{quoted(name)} is a device, pipe or socket, not a file.", fix=GIVE)
    return files.no_file(path, ImageError)


def kind_of(head: bytes) -> tuple[str, str]:
    """Tell from its first bytes what a file is that is no image, and what to do about it."""
    for pattern, kind, fix in _KINDS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return kind, fix
    text = head.decode("utf-8", errors="replace")[:40].strip()
    is_text = all(letter.isprintable() or letter.isspace() for letter in text) and "\ufffd" not in text
    return f"text: {text!r}" if is_text else f"data that begins {head[:8].hex(' ')}", GIVE


def too_large(name: str, seen: str, most: int) -> ImageError:
    """Make the error for a picture of more than `most` pixels, or a file of too many bytes."""
    fix = f"Shrink it to at most {most:,} pixels, for example: magick IMAGE -resize 2048x2048 small.png"
    return ImageError(f"{quoted(name)} is too large.", seen=seen, fix=fix)
