"""What an experiment found so far, one line an image: written as it goes, read again when it is started anew."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from mmneurons.errors import SettingError

T = TypeVar("T")


class Shelf(Generic[T]):
    """Results of one experiment in one file of JSON lines; the first line says what makes them.

    A run that was stopped, even while it wrote, goes on after the last whole line.

    Args:
        path: The file; made, with its folder, if it is not there.
        made_by: Model, images, settings. A file that was made by anything else is refused.
        kind: The type of one image's result, a dataclass or a list of them.

    Raises:
        SettingError: the file was made by something else, or is none of this kind.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], kind: type[T]) -> None:
        self.path = path
        self.found: dict[str, T] = {}
        """By name of image, in the order in which they were done."""
        header = json.dumps({"made_by": made_by}, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._whole_lines()
        if not whole:
            path.write_text(header + "\n", encoding="utf-8")
            return
        if whole[0] != header:
            raise SettingError(
                f"{path} holds results of another experiment.",
                seen=_differences(whole[0], header),
                fix="Choose another folder with --out, or delete this one.",
            )
        line = msgspec.json.Decoder(tuple[str, kind])
        try:
            self.found = dict(line.decode(text) for text in whole[1:])
        except msgspec.MsgspecError as error:
            raise SettingError(f"{path} is damaged.", seen=str(error), fix="Delete it and run again.") from error
        # What was cut off in the middle goes, so that the next line begins where a line begins.
        size = sum(len(text.encode()) + 1 for text in whole)
        if path.stat().st_size != size:
            os.truncate(path, size)

    def add(self, name: str, result: T) -> None:
        """Keep what one image gave."""
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode((name, result)) + b"\n")
        self.found[name] = result

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        return text[: text.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]


def _differences(one: str, other: str) -> str:
    """Which entries of two headers differ."""
    try:
        before, now = (json.loads(header)["made_by"] for header in (one, other))
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "Its first line is not that of an experiment."
    return "\n".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in names)
