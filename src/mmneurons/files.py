"""Files read with suspicion, and written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmneurons.errors import FormatError

T = TypeVar("T")

DEEPEST = 200
"""Levels of free-form JSON."""
LARGEST = 2**28
"""Bytes of a file of text: a hundred times what any command here writes."""


def read_file(path: str | os.PathLike[str], *, limit: int = LARGEST) -> bytes:
    """The bytes of a regular file of a sane size.

    Args:
        path: The file; a link to one is followed.
        limit: Bytes: a larger file is refused before it is read.

    Raises:
        FormatError: no such file, one that may not be read, a folder, device or pipe, or a file that is too large.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise FormatError(f"Cannot read {path}.", seen="It is no file, but a device or a pipe.")
            content = file.read(limit + 1) if facts.st_size <= limit else b""
    except OSError as error:
        raise FormatError(f"Cannot read {path}.", seen=error.strerror or str(error)) from error
    except ValueError as error:  # a name with a null character
        raise FormatError("Cannot read a file of this name.", seen=f"{error}: {os.fspath(path)!r}") from error
    if max(facts.st_size, len(content)) > limit:
        raise FormatError(
            f"{path} is too large.", seen=f"It has {facts.st_size:,} bytes; at most {limit:,} are expected."
        )
    return content


def read_text(path: str | os.PathLike[str], *, limit: int = LARGEST) -> str:
    """The text of a file in UTF-8, without the mark that some editors put before it.

    Raises:
        FormatError: as `read_file`, or the file is not UTF-8.
    """
    content = read_file(path, limit=limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text in UTF-8.", seen=str(error)) from error


def decode_json(content: bytes | str, kind: type[T], name: str) -> T:
    """JSON as typed data; nothing of another type, no NaN, no text that cannot be written.

    Args:
        content: The JSON.
        kind: What it must be: a msgspec struct or a dataclass, or a type of these.
        name: What it is, for the message: a path.

    Raises:
        FormatError: it is not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FormatError(f"{name} is damaged, or of another kind.", seen=str(error)) from error


def check_facts(facts: Any, name: str) -> None:
    """Refuse free-form JSON that cannot be shown: nested very deeply, or with numbers of hundreds of digits.

    Raises:
        FormatError: it is such.
    """
    level = [facts]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and abs(value) >= 2**64 for value in level):
            raise FormatError(f"{name} is damaged.", seen="It holds a number beyond 64 bits.")
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise FormatError(f"{name} is damaged.", seen=f"It is nested more than {DEEPEST} levels deep.")


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a stop or a full disk leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
