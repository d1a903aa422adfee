"""A store of an experiment's results, one line each: written as they come, read again when the run is started anew."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from filelock import FileLock, Timeout

from mmneurons.errors import FormatError, ModelError, SettingError
from mmneurons.files import read_file

T = TypeVar("T")

LARGEST = 2**30
"""The most bytes that a store may have."""
LOCK = ".lock"
"""The name of the lock file in a folder of results, in which one run at a time writes."""


def lock_of(file: Path) -> Path:
    """Name the lock file beside a file that only one run at a time may write."""
    return file.with_name(f".{file.name}.lock")


@contextmanager
def one_writer(place: Path, lock: Path) -> Iterator[None]:
    """Keep every other run from writing in a place, for the time of a `with`.

    The system frees the lock when its process ends, even if it is killed.

    Args:
        place: What is written, for the message.
        lock: A file for the lock; it is left there. Its folder is made if it is not there.

    Raises:
        SettingError: another run or another thread writes there, or the lock file cannot be made.
    """
    # timeout=0: a second run is told at once, instead of waiting for hours without a word.
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout:
        raise SettingError(
            f"Another run writes in {place}.", fix="Wait until it has ended, or name another place with --out."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise _cannot_write(place, error) from error
    try:
        yield
    finally:
        held.release()


class Store(Generic[T]):
    """The results of one experiment in one file of JSON lines, whose first line says what made them all.

    Each result stands under a key, a hash of everything else that it was made of: with other pictures, other results.
    A run that was stopped, even while it wrote, goes on after the last whole line. To be used under `one_writer`.

    Args:
        path: The file; made if it is not there.
        made_by: Model and settings. A file that was made by anything else is refused.
        kind: The type of one result, a dataclass or a list of them.

    Raises:
        SettingError: the file was made by something else, or cannot be written.
        FormatError: the file is damaged, or holds no results.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], kind: type[T]) -> None:
        self.path = path
        self.found: dict[str, T] = {}
        """The results so far, by key."""
        # 1. The header: a new file gets it, one that was stopped in the middle of it gets the rest.
        header = _with_checksum(json.dumps({"made_by": made_by}, sort_keys=True).encode("ascii"))
        content = read_file(path, limit=LARGEST) if os.path.lexists(path) else b""
        *lines, rest = content.split(b"\n")
        if not lines and not (header + b"\n").startswith(rest):
            raise self._foreign()
        if not lines:
            self._write(header[len(rest) :])
            return
        # 2. An old file must have the very same header, byte for byte.
        if lines[0] != header:
            raise self._another(lines[0], header)
        # 3. Its whole lines are the results; each carries a checksum, so that a damaged file is never taken for good.
        line_of = msgspec.json.Decoder(tuple[str, str, kind])
        for number, line in enumerate(lines[1:], start=2):
            try:
                key, _, self.found[key] = line_of.decode(_checked(line))
            except (ValueError, RecursionError) as error:
                raise self.damaged(f"Line {number}: {error}") from error
        if rest:  # cut off in the middle: the next line is to begin where a line begins
            os.truncate(path, len(content) - len(rest))

    def add(self, key: str, name: str, result: T) -> None:
        """Keep a result, in memory and as a line of the file.

        Args:
            key: The hash of what the result was made of.
            name: What the result is called, for people who look into the file.
            result: The result.

        Raises:
            ModelError: the result holds NaN or infinity.
            SettingError: the file cannot be written.
        """
        if not _is_finite(msgspec.to_builtins(result)):  # it would be written as null
            raise no_number(name)
        readable = name.encode("utf-8", "replace").decode("utf-8")
        self._write(_with_checksum(msgspec.json.encode((key, readable, result))))
        self.found[key] = result

    def damaged(self, seen: str) -> FormatError:
        """Make the error to raise where the file, or what belongs to it, is not as it was written."""
        return FormatError(f"{self.path} is damaged.", seen=seen, fix="Delete it and run again.")

    def _write(self, line: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(line + b"\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _foreign(self) -> FormatError:
        return FormatError(
            f"{self.path} holds no results of an experiment, or is damaged.",
            seen="Its first line does not say what made it.",
            fix="Choose another folder with --out, or delete this file.",
        )

    def _another(self, there: bytes, asked: bytes) -> SettingError | FormatError:
        """Make the error for a file with another header, which names the settings that differ."""
        try:
            before, now = (msgspec.json.decode(_checked(header))["made_by"] for header in (there, asked))
            names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return self._foreign()
        return SettingError(
            f"{self.path} holds results of another experiment.",
            seen="\n".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in names),
            fix="Choose another folder with --out, or delete this one.",
        )


def no_number(name: str) -> ModelError:
    """Make the error to raise where NaN or infinity would be kept."""
    return ModelError(
        f"What was measured of {name} is no number (NaN or infinite).",
        fix="Load the model in another dtype: --dtype bfloat16, or float32.",
    )


def _with_checksum(data: bytes) -> bytes:
    """Wrap JSON in an array, with its checksum in front."""
    return b"[%d,%s]" % (zlib.crc32(data), data)


def _checked(line: bytes) -> msgspec.Raw:
    """Unwrap the JSON of a line; refuse it if it is not what its checksum says."""
    checksum, data = msgspec.json.decode(line, type=tuple[int, msgspec.Raw])
    if zlib.crc32(data) != checksum:
        raise ValueError("not as it was written")
    return data


def _cannot_write(path: Path, error: Exception) -> SettingError:
    return SettingError(f"Cannot write {path}.", seen=str(error), fix="Name another place with --out.")


def _is_finite(plain: Any) -> bool:
    """Tell whether plain data holds neither NaN nor infinity."""
    if isinstance(plain, dict):
        return all(map(_is_finite, plain.values()))
    if isinstance(plain, list | tuple):
        return all(map(_is_finite, plain))
    return not isinstance(plain, float) or math.isfinite(plain)
