"""The errors that a user can cause, one class for each kind.

Each says what went wrong, what was seen, and the line that fixes it. The command line prints them without a
traceback and exits with code 2; in Python they are ordinary exceptions under one base class.
"""

from __future__ import annotations


class MmneuronsError(Exception):
    """The base of every error that this package raises on purpose.

    Args:
        what: One sentence that says what went wrong.
        seen: What was found instead, one line or several.
        fix: What to type or change, in Python or on the command line.
    """

    def __init__(self, what: str, *, seen: str = "", fix: str = "") -> None:
        self.what, self.seen, self.fix = what, seen, fix
        super().__init__("\n".join(part for part in (what, seen, fix) if part))


class ImageError(MmneuronsError):
    """A file or an object cannot be used as an image."""


class ModelError(MmneuronsError):
    """A model cannot be loaded, or its parts cannot be found."""


class WordError(MmneuronsError):
    """A word cannot be scored: the caption does not have it, or the tokenizer cannot write it."""


class MissingFileError(MmneuronsError):
    """A file that is named is not there."""


class FormatError(MmneuronsError):
    """A saved file cannot be read by this version."""


class HubError(MmneuronsError):
    """The Hugging Face Hub cannot be reached, or refuses."""


class SettingError(MmneuronsError):
    """A setting, or a pair of settings, has no meaning."""


INSPECT_EXTRA = 'pip install "mmneurons[inspect]"'
"""The command that installs what plots and BERTScore need."""
