"""Errors that a user can cause.

Each says what went wrong, what was seen, and the line that fixes it. The command line prints them without a
traceback and exits with code 2; in Python they are ordinary exceptions under one base class.
"""

from __future__ import annotations


class MmneuronsError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: One sentence that says what went wrong.
        seen: What was found instead, one line or several.
        fix: What to type or change, in Python or on the command line.
    """

    def __init__(self, what: str, *, seen: str = "", fix: str = "") -> None:
        self.what, self.seen, self.fix = what, seen, fix
        super().__init__("\n".join(part for part in (what, seen, fix) if part))


class ImageError(MmneuronsError):
    """A file or object that cannot be used as an image."""


class ModelError(MmneuronsError):
    """A model that cannot be loaded, or whose structure cannot be told."""


class WordError(MmneuronsError):
    """A word that cannot be scored: not in the caption, or not one the tokenizer can write."""


class FormatError(MmneuronsError):
    """A saved file that this version cannot read."""


class SettingError(MmneuronsError):
    """A setting, or a pair of settings, that has no meaning."""


INSPECT_EXTRA = 'pip install "mmneurons[inspect]"'
"""The line that brings plots and BERTScore."""
