"""Which characters of a text each generated token wrote, and the words made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmneurons.errors import WordError

Span = tuple[int, int]
Place = tuple[int, int, str]
"""First character of a word in a text, one past its last, and what it stands for: its lemma, or an object's name."""
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Word:
    """One occurrence of a word, or of a phrase, in a caption."""

    text: str
    """As written: capital letter, plural and all."""
    lemma: str
    """Lower case, singular."""
    start: int
    """First character in the caption, counted from 0."""
    stop: int
    """One past the last character."""
    steps: tuple[int, ...]
    """Generated tokens that wrote it, in order, 0 the first token generated. Never empty."""


def words_at(places: Iterable[Place], caption: str, token_ids: Sequence[int], decode: Decode) -> list[Word]:
    """The words at places of the caption, in order, less those outside it and those that no token wrote.

    Args:
        places: Such as `Phrases.places` gives; the lemma of each word is what its place stands for.
        caption: The text generated, `decode(token_ids).strip()`.
        token_ids: Every token generated, end-of-text and padding included, the prompt's left out.
        decode: Token ids to text, special tokens skipped.

    Raises:
        WordError: if `caption` is not what the tokens decode to.
    """
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
    """The characters of the decoded text that each token wrote, or wrote bytes of.

    Decodes every prefix once. A prefix settles the characters that it shares with the whole text; if it ends in
    anything else (part of a character, a space that clean-up takes back), its last token began the next character.

    Args:
        token_ids: The tokens, in the order generated.
        decode: Token ids to text, special tokens skipped.

    Returns:
        One (start, stop) per token, in characters of `decode(token_ids)`. Neither decreases; together they cover the
        text; two overlap only in a character that both wrote bytes of. A token that wrote nothing has start == stop.
    """
    return _decoded_spans(token_ids, decode)[1]


def _decoded_spans(token_ids: Sequence[int], decode: Decode) -> tuple[str, list[Span]]:
    """The whole text, and `token_spans`."""
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
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
