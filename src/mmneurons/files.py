"""Files read with suspicion, and written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmneurons.errors import FormatError, SettingError

T = TypeVar("T")

DEEPEST = 200
"""Levels of free-form JSON."""
LARGEST = 2**28
"""Bytes of a file of text: a hundred times what any command here writes."""
PACKAGE = Path(__file__).resolve().parent
"""Nothing is ever written here."""


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
            content = file.read(facts.st_size + 1) if facts.st_size <= limit else b""
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


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write beside the file, then rename: a stop or a full disk leaves what was there before.

    A link stays a link, a file that is replaced keeps its mode, and a device or pipe is written to as it is.

    Raises:
        SettingError: it cannot be written.
    """
    try:
        if _is_written_directly(path):
            Path(path).write_bytes(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that `write_whole` could not write, before anything is worked out; nothing is left behind.

    Raises:
        SettingError: so.
    """
    try:
        if _is_written_directly(path):
            os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
            return
        target, folder = Path(os.path.realpath(path)), Path(path).parent
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(target)  # a name that is too long raises
        if PACKAGE in target.parents:
            raise _unwritable(path, "It lies in the installed package.")
        if target.is_dir():
            raise _unwritable(path, "It is a folder.", fix=f"Name a file in it: {Path(path) / 'found.out'}")
        if target.parent.exists() and not target.parent.is_dir():
            raise _unwritable(path, f"{folder} is a file.")
        if not target.parent.is_dir():
            raise _unwritable(path, f"There is no folder {folder}.", fix=f"Make it first: mkdir -p {folder}")
        _probe(target.parent)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder in which results could not be kept, before anything is worked out; it is not made yet.

    Raises:
        SettingError: so.
    """
    folder = Path(os.path.realpath(path))
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise _unwritable(path, f"{there} is a file.", fix="Choose another folder.")
        if PACKAGE in (there, *there.parents):
            raise _unwritable(path, "It lies in the installed package.")
        _probe(there)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def check_apart(outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a file to be written that is one to be read, or that is to be written twice, by whatever name.

    Raises:
        SettingError: so.
    """
    taken = [(path, "is read") for path in inputs]
    for path in outputs:
        for other, why in taken:
            if _is_same(path, other):
                raise SettingError(f"{path} would be overwritten: it {why}.", fix="Name another file.")
        taken.append((path, "is written already"))


def json_bytes(document: Any) -> bytes:
    """A document as a file of JSON: UTF-8, and `?` for the bytes of a file name that are no text.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    return f"{text}\n".encode("utf-8", "replace")


def _is_written_directly(path: str | os.PathLike[str]) -> bool:
    """A device, a pipe, or what a process holds open: a file in its place would be another thing."""
    if Path(path).absolute().is_relative_to("/dev") or Path(path).absolute().is_relative_to("/proc"):
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(_temporary_name())
    try:
        temporary.write_bytes(content)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _probe(folder: Path) -> None:
    """Make a file and remove it."""
    temporary = folder / _temporary_name()
    try:
        temporary.touch(exist_ok=False)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name() -> str:
    """Short, whatever the file is called: its own name may be as long as the system allows."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        return Path(one).samefile(other)  # links of either kind
    except OSError:  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)


def _unwritable(path: str | os.PathLike[str], why: str, fix: str = "") -> SettingError:
    return SettingError(f"Cannot write {path}.", seen=why, fix=fix or "Choose another place, or make room there.")
