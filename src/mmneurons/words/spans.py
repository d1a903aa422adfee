"""The characters of a text that each generated token wrote, and the words made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmneurons.errors import WordError

Span = tuple[int, int]
Place = tuple[int, int, str]
"""A word in a text: its first character, one past its last, and what it stands for, its lemma or an object's name."""
Decode = Callable[[Sequence[int]], str]
"""A function from token ids to text, which skips special tokens."""


@dataclass(frozen=True)
class Word:
    """One occurrence of a word, or of a phrase, in a caption."""

    text: str
    """The word as it is written, capital letter, plural and all."""
    lemma: str
    """The word in the singular, lower case."""
    start: int
    """The word's first character in the caption, counted from 0."""
    stop: int
    """One past the word's last character."""
    steps: tuple[int, ...]
    """The steps of the generated tokens that wrote it, in order, 0 for the first token generated; never empty."""


def words_at(places: Iterable[Place], caption: str, token_ids: Sequence[int], decode: Decode) -> list[Word]:
    """Make words of places in the caption, in order, less those outside it and those that no token wrote.

    Args:
        places: The places, as `Phrases.places` gives them; the lemma of each word is what its place stands for.
        caption: The generated text, `decode(token_ids).strip()`.
        token_ids: Every generated token, end-of-text and padding included, those of the prompt left out.
        decode: A function from token ids to text that skips special tokens.

    Raises:
        WordError: `caption` is not what the tokens decode to.
    """
    # Spans are counted in the text as decoded, places in the stripped caption: `lead` is what lies between the two.
    text, spans = _decoded_spans(token_ids, decode)
    if text.strip() != caption:
        raise WordError(
            "The caption is not what its tokens decode to.",
            seen=f"The caption is {caption!r},\nthe tokens say {text.strip()!r}.",
            fix="Pass caption=decode(token_ids).strip(), and only the tokens generated, not those of the prompt.",
        )
    lead = len(text) - len(text.lstrip())
    words = []
    for start, stop, lemma in sorted(places):
        steps = tuple(i for i, (a, b) in enumerate(spans) if max(a - lead, start) < min(b - lead, stop))
        if start >= 0 and stop <= len(caption) and steps:
            words.append(Word(caption[start:stop], lemma, start, stop, steps))
    return words


def token_spans(token_ids: Sequence[int], decode: Decode) -> list[Span]:
    """Find the characters of the decoded text that each token wrote, or wrote bytes of.

    Every prefix of the tokens is decoded once. It settles the characters that it shares with the whole text; if it ends
    in anything else (part of a character, a space that clean-up takes back), its last token began the next character.

    Args:
        token_ids: The tokens, in the order in which they were generated.
        decode: A function from token ids to text that skips special tokens.

    Returns:
        One (start, stop) per token, in characters of `decode(token_ids)`. Neither decreases; together they cover the
        text; two overlap only in a character that both wrote bytes of. A token that wrote nothing has start == stop.
    """
    return _decoded_spans(token_ids, decode)[1]


def _decoded_spans(token_ids: Sequence[int], decode: Decode) -> tuple[str, list[Span]]:
    """Return the whole text, and what `token_spans` says of it."""
    prefixes = [decode(token_ids[: i + 1]) for i in range(len(token_ids))]
    text = prefixes[-1] if prefixes else ""
    spans, settled = [], 0
    for prefix in prefixes:
        # Never back: one more byte can turn a whole run of characters into U+FFFD until the next one is complete.
        start, settled = settled, max(settled, _shared(prefix, text))
        began = len(prefix) > settled and settled < len(text)
        spans.append((start, settled + began))
    return text, spans


def _shared(one: str, other: str) -> int:
    """Count the characters that two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
