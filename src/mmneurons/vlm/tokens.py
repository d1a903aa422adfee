"""Write words as tokens and tokens as text, with a tokenizer or without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmneurons.errors import WordError
from mmneurons.words.search import is_unspaced

_SPACES = ("\u2581", "\u0120", " ")
"""How a token begins that writes a space before its word: SentencePiece's mark, the byte-level one, the space."""
_BEFORE = ("a", "the", "of", ",")
"""Words behind which another stands with a space."""
_BEFORE_UNSPACED = ("", "\n", '"', "(", "-")
"""What stands before a word without a space: nothing, at the beginning of a text, or one of these signs."""


class TokenIds:
    """A stand-in for a tokenizer where there is none: token 17 is written `<17>`."""

    eos_token_id = None
    pad_token_id = None

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        """Write token ids as text, one after the other."""
        return " ".join(f"<{i}>" for i in token_ids)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """Write one token id as text."""
        return f"<{token_id}>"

    def token_of(self, word: str) -> int:
        """Return the token id that a word such as `<17>` stands for.

        Raises:
            WordError: if the word is of another form.
        """
        number = re.fullmatch(r"<(\d+)>", word.strip())
        if number is None:
            raise WordError(
                f"'{word}' is no token of a model without a tokenizer.", fix="Write it by number: <17> is token 17."
            )
        return int(number[1])

    def __len__(self) -> int:
        """Return a number beyond any vocabulary: every row of the unembedding has a name."""
        return 1 << 62


def pieces(tokenizer: object) -> int:
    """Return the number of tokens that a tokenizer knows; rows of the unembedding beyond them are padding."""
    return min(len(tokenizer), 1 << 62) if hasattr(tokenizer, "__len__") else 1 << 62  # pyright: ignore[reportArgumentType]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without any that mark its beginning or end."""
    return tokenizer(text, add_special_tokens=False).input_ids


def text_of(tokenizer: Any, token_id: int) -> str:
    """Return one token as text, leading space kept; part of a character is given as the vocabulary writes it."""
    text = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if not text or "\ufffd" in text:
        return piece or f"<{token_id}>"
    # SentencePiece's decoders leave out the space that a text begins with: it is the token's own all the same.
    if isinstance(piece, str) and piece.startswith(_SPACES[0]) and not text.startswith(" "):
        return f" {text}"
    return text


def continued(tokenizer: Any, written: Sequence[int], text: str) -> list[int]:
    """Return the tokens of a text behind others, as a model would go on: after a space, unless it begins a line.

    Args:
        tokenizer: The model's tokenizer.
        written: The last tokens before the text.
        text: What follows; spaces around it do not matter.
    """
    # Tokens depend on what stands before them: the text is tokenised together with the end of what is written, from the
    # last special token on, and the tokens behind that end are its own.
    special = {*tokenizer.all_special_ids}
    begin = next((i for i in range(len(written), 0, -1) if written[i - 1] in special), 0)
    before = tokenizer.decode(list(written[begin:]))  # only what was written as text
    text = _as_text(text)
    joint = "" if not before or before[-1].isspace() else " "
    alone, both = ids_of(tokenizer, before), ids_of(tokenizer, f"{before}{joint}{text}")
    if both[: len(alone)] == alone:
        return both[len(alone) :]
    return ids_of(tokenizer, f"{joint}{text}")  # its first letters share a token with what stands before


def token_of(tokenizer: Any, word: str, *, like: int | None = None) -> int:
    """Return the first token of a word inside a sentence, with which a model would begin to write it.

    A token that is no more than the space before the word does not count.

    Args:
        tokenizer: The model's tokenizer.
        word: The word.
        like: As in `tokens_of`.

    Raises:
        WordError: see `tokens_of`; or if that token is only a part of a character, with which other words begin, too.
    """
    ids = tokens_of(tokenizer, word, like=like)
    first = next(i for i in ids if tokenizer.decode([i]).strip())
    if "\ufffd" in tokenizer.decode([first]):
        raise _untold(tokenizer, word, ids)
    return first


def tokens_of(tokenizer: Any, word: str, *, like: int | None = None) -> list[int]:
    """Return the tokens of a word inside a sentence, as a model would write it.

    Args:
        tokenizer: The model's tokenizer.
        word: The word.
        like: A token that begins a word whose place this one takes: the word is written with a space before it if that
            token has one. None: with a space, but in scripts that put none between words.

    Raises:
        WordError: if the word is empty or unknown to the tokenizer.
    """
    if isinstance(tokenizer, TokenIds):
        return [tokenizer.token_of(word)]
    if any("\ud800" <= sign <= "\udfff" for sign in word):  # bytes that are no text, as a terminal hands them on
        raise _untold(tokenizer, _as_text(word), [])
    word = _as_text(word)
    spaced = not is_unspaced(word) if like is None else _has_space(tokenizer, like)
    rest = _behind(tokenizer, word, spaced=spaced)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in rest or not tokenizer.decode(rest).strip():
        raise _untold(tokenizer, word, rest)
    return rest


def _behind(tokenizer: Any, word: str, *, spaced: bool) -> list[int]:
    """Return the tokens of a word behind others, with a space before it or without; none if they cannot be told."""
    # A word alone and behind another often has different tokens. Some tokenizers join the two: then the next is tried.
    for before in _BEFORE if spaced else _BEFORE_UNSPACED:
        alone = ids_of(tokenizer, before) if before else []
        both = ids_of(tokenizer, f"{before}{' ' if spaced else ''}{word}")
        rest = both[len(alone) :]
        if rest and both[: len(alone)] == alone and (spaced or not _has_space(tokenizer, rest[0])):
            return rest
    return []


def _has_space(tokenizer: Any, token_id: int) -> bool:
    """Whether a token begins with a space."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return isinstance(piece, str) and piece.startswith(_SPACES)


def _as_text(word: str) -> str:
    """Return a word without spaces around it and as valid text: from a terminal come bytes that are none."""
    return word.strip().encode("utf-8", "replace").decode("utf-8")


def _untold(tokenizer: Any, word: str, ids: Sequence[int]) -> WordError:
    """Return the error for a word that has no token to be told by."""
    return WordError(
        f"'{word}' has no token of its own to begin with.",
        seen=f"The tokenizer writes it as {tokenizer.convert_ids_to_tokens(list(ids))}.",
        fix="Choose another word.",
    )
