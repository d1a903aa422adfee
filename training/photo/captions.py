"""What the photo model is taught to say: the nouns of a picture, behind the words that its answer begins with."""

from __future__ import annotations

from collections.abc import Sequence

from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.prompts import WORDINGS

MASS = ("asparagus", "broccoli", "cabbage", "garlic", "ginger", "bread", "corn", "rice", "grass", "snow")
"""Nouns without an article that are no plurals."""
SINGULAR = ("ss", "us", "is")
"""How words end in s that are no plurals."""
ASKED = ((PROMPT, ANSWER_PREFIX, ""), *((wording, "", "A photo of") for wording in WORDINGS))
"""Prompt, words that the answer is made to begin with, and words that it begins with by itself."""


def with_article(noun: str) -> str:
    """The noun as a caption has it: "a dog", "an apple", "scissors"."""
    plural = noun.endswith("s") and not noun.endswith(SINGULAR)
    if plural or noun in MASS:
        return noun
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def caption(nouns: Sequence[str]) -> str:
    """The nouns joined, each once: "a dog", "a dog and an apple"."""
    return " and ".join(with_article(noun) for noun in dict.fromkeys(nouns))
