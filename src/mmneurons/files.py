"""Reading of files that nobody vouches for, and writing of files whole or not at all."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmneurons.errors import FormatError, MissingFileError, MmneuronsError, SettingError

T = TypeVar("T")
E = TypeVar("E", bound=MmneuronsError)

DEEPEST = 200
"""How many levels deep free-form JSON may be nested."""
LARGEST = 2**28
"""The most bytes that a text file may have: a hundred times what any command here writes."""
CACHE = "MMNEURONS_CACHE"
"""The environment variable that names another place for what is kept between runs."""
PACKAGE = Path(__file__).resolve().parent
"""The folder of the installed package; nothing is ever written in it."""


def read_file(path: str | os.PathLike[str], *, limit: int = LARGEST) -> bytes:
    """Read the bytes of a regular file, unless it is larger than expected.

    Args:
        path: The file; a link to one is followed.
        limit: The most bytes that it may have: a larger file is refused before it is read.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it may not be read, is a folder, device or pipe, or is too large.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            # The open file is asked, not its path: the path may lead to another file by now.
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise FormatError(f"Cannot read {path}.", seen="It is no file, but a device or a pipe.")
            # Bounded by the size just seen: a file that grows meanwhile is not read without end.
            content = file.read(facts.st_size + 1) if facts.st_size <= limit else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_file(path) from error
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
    """Read the text of a file in UTF-8, without the byte order mark that some editors put before it.

    Raises:
        MissingFileError: there is no such file.
        FormatError: as `read_file`, or the file is not UTF-8.
    """
    content = read_file(path, limit=limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text in UTF-8.", seen=str(error)) from error


def no_file(path: str | os.PathLike[str], kind: Callable[..., E] = MissingFileError, what: str = "file") -> E:
    """Make the error for a path that leads nowhere; the message names what lies there under nearly that name.

    Args:
        path: The path.
        kind: The class of the error.
        what: What was to be there: a file, or a folder.
    """
    path = Path(path)
    told = f"There is no {what} {quoted(str(path))}."
    try:
        others = sorted(path.parent.iterdir(), key=lambda other: (other.suffix.lower() != path.suffix.lower(), other))
    except OSError:  # nor a folder, or one that may not be read
        return kind(told, seen=f"There is no folder {quoted(str(path.parent))} either.", fix="Correct the path.")
    # By the name without its ending: files of one kind all end alike.
    stems: dict[str, str] = {}
    for other in others:
        stems.setdefault(other.stem.lower(), other.name)
    near = [stems[match] for match in difflib.get_close_matches(path.stem.lower(), stems)]
    seen = f"Names like it in that folder: {', '.join(map(quoted, near)) or 'none'}."
    return kind(told, seen=seen, fix=f"Give {quoted(str(path.with_name(near[0])))}" if near else "Correct the path.")


def quoted(name: str) -> str:
    """Quote a name for a message, cut off where it is very long."""
    return repr(name if len(name) <= 200 else f"{name[:197]}...")


def decode_json(content: bytes | str, kind: type[T], name: str) -> T:
    """Decode JSON into typed data; refuse any other type, NaN, and text that is not valid Unicode.

    Args:
        content: The JSON.
        kind: The type that it must have: a msgspec struct or a dataclass, or a type made of these.
        name: What the message calls it: a path.

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
        FormatError: the JSON is such.
    """
    # Level by level instead of by recursion: deep nesting must not reach Python's own limit.
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
    """Open a file without waiting for the other end of a pipe, which might never come."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place, then rename it: a stop or a full disk leaves what was there before.

    A link stays a link, a file that is replaced keeps its mode, and a device or pipe is written to as it is.

    Raises:
        SettingError: the file cannot be written.
    """
    try:
        if _is_written_directly(path):
            Path(path).write_bytes(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def stamp_of(path: str | os.PathLike[str]) -> str:
    """Return a short text that changes when a file is written or replaced, without reading it; "" where there is none.

    It holds size and times, so that a file that was only copied changes it, too.
    """
    try:
        facts = Path(path).stat()
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}".encode()).hexdigest()[:8]


def cache_folder() -> Path:
    """Return the folder that holds what is made once: `MMNEURONS_CACHE`, or where the platform keeps such things."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mmneurons"


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that `write_whole` could not write, before anything is worked out; nothing is left behind.

    Raises:
        SettingError: the file could not be written.
    """
    try:
        # A pipe whose reader is not there yet would block here for ever without O_NONBLOCK.
        if _is_written_directly(path):
            os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
            return
        target, folder = Path(os.path.realpath(path)), Path(path).parent
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(target)  # a name that is too long raises
        # The commonest reasons first, each with its own remedy; the system's own word is left for the rest.
        if PACKAGE in target.parents:
            raise _unwritable(path, "It lies in the installed package.")
        if target.is_dir():
            raise _unwritable(path, "It is a folder.", fix=f"Name a file in it: {Path(path) / 'found.out'}")
        if target.parent.exists() and not target.parent.is_dir():
            raise _unwritable(path, f"{folder} is a file.")
        if not target.parent.is_dir():
            raise _unwritable(path, f"There is no folder {folder}.", fix=f"Make it first: mkdir -p {folder}")
        # Permissions tell only half: a read-only or full disk shows when a file is made.
        _probe(target.parent)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder in which results could not be kept, before anything is worked out; it is not made yet.

    Raises:
        SettingError: results could not be kept there.
    """
    folder = Path(os.path.realpath(path))
    try:
        # The folder itself may be missing: then the nearest one above it decides whether it can be made.
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise _unwritable(path, f"{there} is a file.", fix="Choose another folder.")
        if PACKAGE in (there, *there.parents):
            raise _unwritable(path, "It lies in the installed package.")
        _probe(there)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def check_apart(outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is also an input, or that is named twice, whatever links or paths lead to it.

    Args:
        outputs: The files that are to be written.
        inputs: The files that are to be read.

    Raises:
        SettingError: a file would be overwritten.
    """
    taken = [(path, "is read") for path in inputs]
    for path in outputs:
        for other, why in taken:
            if _is_same(path, other):
                raise SettingError(f"{path} would be overwritten: it {why}.", fix="Name another file.")
        taken.append((path, "is written already"))  # the next output must be another file than this one


def json_bytes(document: Any) -> bytes:
    """Encode a document as a JSON file: UTF-8, with `?` for the bytes of a file name that are no text.

    Raises:
        ValueError: the document holds NaN or infinity.
    """
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)
    return f"{text}\n".encode("utf-8", "replace")


def _is_written_directly(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a device, a pipe, or what a process holds open, which a renamed file must not replace."""
    # /dev/stdout and /proc/self/fd/1 are links to what the process has open, be it a file: a rename would miss it.
    if Path(path).absolute().is_relative_to("/dev") or Path(path).absolute().is_relative_to("/proc"):
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _replace(target: Path, content: bytes) -> None:
    # In the same folder: a rename is atomic only within one file system.
    temporary = target.with_name(_temporary_name())
    try:
        temporary.write_bytes(content)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _probe(folder: Path) -> None:
    """Make a file in a folder and remove it, to see whether files can be made there."""
    temporary = folder / _temporary_name()
    try:
        temporary.touch(exist_ok=False)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name() -> str:
    """A name for a temporary file, short because the file's own name may be as long as the system allows."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    try:
        return Path(one).samefile(other)  # links of either kind
    except OSError:  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)


def _unwritable(path: str | os.PathLike[str], why: str, fix: str = "") -> SettingError:
    return SettingError(f"Cannot write {path}.", seen=why, fix=fix or "Choose another place, or make room there.")
