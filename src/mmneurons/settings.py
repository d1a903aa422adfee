"""What a model is asked."""

from __future__ import annotations

from dataclasses import dataclass

from mmneurons.errors import SettingError

PROMPT = "Describe the image in few words."
"""Asked unless the user asks something else (Pan et al., section 4)."""
ANSWER_PREFIX = "An image of"
"""The words an answer to `PROMPT` is made to begin with, so that nouns come first (Pan et al., section 4)."""
MAX_NEW_TOKENS = 32


def prefix_for(prompt: str, answer_prefix: str | None) -> str:
    """The words that an answer is made to begin with: those given; else the paper's, with the paper's prompt only.

    Behind a question of one's own, "An image of" would turn the answer into something else.
    """
    if answer_prefix is not None:
        return answer_prefix
    return ANSWER_PREFIX if prompt == PROMPT else ""


@dataclass(frozen=True)
class Question:
    """What a model is asked about each picture, how long its answer may be, and how many are asked at once.

    Raises:
        SettingError: an answer or a batch of nothing.
    """

    prompt: str = PROMPT
    answer_prefix: str | None = None
    """Words that the answer is made to begin with. None: "An image of" with the default prompt, none with another."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Where an answer stops if the model does not stop by itself."""
    batch_size: int = 8
    """Prompts in one batch, for models whose batches change nothing."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not isinstance(self.answer_prefix, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(
                "A prompt and an answer prefix are one text each, for all images.",
                seen=f"prompt={self.prompt!r}, answer_prefix={self.answer_prefix!r}"[:200],
                fix="Ask about the images that have other prompts in a call of their own.",
            )
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise SettingError(
                "An answer has at least one token, a batch at least one prompt.",
                seen=f"max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size}",
            )

    @property
    def prefix(self) -> str:
        """The words that the answer is made to begin with."""
        return prefix_for(self.prompt, self.answer_prefix)
