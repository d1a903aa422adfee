"""Numbers and words as reports write them: nothing invisible, nothing that moves the text around it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmneurons.finding.result import Finding

READINGS = {
    "raw": "the tokens that its column pushes most",
    "standardised": "the tokens that it pushes hardest next to all neurons, in deviations over them",
}
"""What a neuron says, in one line for each way to read it."""
BASELINES = {
    "zero": "activations as they are",
    "blank": "what activations have over those of the same answer with a blank image",
    "reference": "what activations have over their mean where other pictures' answers say other nouns",
}
"""What is scored, in one line for each baseline."""
_MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (also right-to-left overrides), surrogate, separators
_JOINERS = "\u200c\u200d"  # inside emoji and Indic words they belong to the spelling
_MINUS = "\N{MINUS SIGN}"
_EDGE_SPACE = re.compile(r"^ +| +$")


class Piece(NamedTuple):
    """A stretch of text that is shown as it is, or a mark that stands for what cannot be seen."""

    text: str
    """The characters to show."""
    is_mark: bool
    """Whether they stand for something that cannot be seen."""


def pieces(text: str, *, spaces: bool = True) -> list[Piece]:
    """Cut a text into pieces, with a mark for every hidden character and for each space at its beginning and end.

    Args:
        text: Any string, lone surrogates included.
        spaces: Mark leading and trailing spaces too, which belong to a token but not to a caption.
    """
    if not text:
        return [Piece("(empty)", True)]
    edges: set[int] = set()
    if spaces:
        edges = {i for match in _EDGE_SPACE.finditer(text) for i in range(*match.span())}
    found: list[Piece] = []
    for i, character in enumerate(text):
        # A joiner shapes its neighbours; alone it has none, and nothing would be seen.
        hidden = i in edges or _is_hidden(character) or (character in _JOINERS and len(text) == 1)
        shown = _mark(character) if hidden else character
        if found and found[-1].is_mark == hidden:
            found[-1] = Piece(found[-1].text + shown, hidden)
        else:
            found.append(Piece(shown, hidden))
    return found


def without_pictures(finding: Finding) -> str:
    """Name a finding that has no picture: a prompt of words alone, or tensors made elsewhere."""
    return "words alone" if finding.prompt else "ready-made inputs"


def is_warning(note: str) -> bool:
    """Tell whether a note says that the numbers themselves may be off, which must not be overlooked."""
    return "approximate" in note.lower()


def placed(caption: str, words: Sequence[tuple[str, int]]) -> tuple[list[tuple[str, int | None]], list[int]]:
    """Cut a caption at its words.

    Args:
        caption: Any text.
        words: Each word with the offset at which it says it stands.

    Returns:
        Stretches of the caption, each with the number of the word that it is, or None; and the numbers of the words
        that do not stand where they say, or overlap.
    """
    # Nothing is taken on trust: a finding may come from a file that somebody changed.
    cut: list[tuple[str, int | None]] = []
    unplaced: list[int] = []
    end = 0
    # In the order of the caption, whatever the order of the words: what is cut once is not looked at again.
    for i, (word, start) in sorted(enumerate(words), key=lambda entry: entry[1][1]):
        if not word or start < end or not caption.startswith(word, start):
            unplaced.append(i)
            continue
        if start > end:
            cut.append((caption[end:start], None))
        end = start + len(word)
        cut.append((word, i))
    if end < len(caption):
        cut.append((caption[end:], None))
    return cut, unplaced


def printable(text: str) -> str:
    """Replace hidden characters by marks: the result can stand in a page, an attribute or a file name, in UTF-8."""
    if text.isprintable():  # nearly every text: nothing in it is hidden
        return text
    return "".join(_mark(character) if _is_hidden(character) else character for character in text)


def number(value: float, *, signed: bool = False) -> str:
    """Write a number with about four digits and a typographic minus: '+1.234', '12.35', 123456 as '1.2e+05'."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    size = abs(value)
    if value and not 1e-3 <= size < 1e5:
        digits = f"{value:.1e}"
    else:
        digits = f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return ("+" if signed and value > 0 else "") + digits.replace("-", _MINUS)


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal: '92.1 %'."""
    digits = f"{share * 100:.1f}".replace("-", _MINUS) if math.isfinite(share) else number(share)
    return f"{digits}\N{NO-BREAK SPACE}%"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings into rows: {'versions': {'torch': '2'}} -> ('versions.torch', '2')."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{name}.")
        else:
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    """Write a value of JSON in words."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(entry) for entry in value) or "none"
    return str(value)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def _mark(character: str) -> str:
    """Choose the mark for a hidden character: Unicode's picture of it where there is one, else its number."""
    if character in _MARKS:
        return _MARKS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    return f"[U+{code:04X}]"
