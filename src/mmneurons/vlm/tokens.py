"""Write tokens as text, with a tokenizer or without."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmneurons.errors import WordError


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
