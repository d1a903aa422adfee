"""What the model is asked, and how the question is written for it."""

from __future__ import annotations

from typing import Any

from mmneurons.errors import WordError

PROMPT = "Describe the image in few words."
"""Asked unless the user asks something else (Pan et al., section 4)."""
ANSWER_PREFIX = "An image of"
"""The words an answer is made to begin with, so that nouns come first (Pan et al., section 4)."""
MAX_NEW_TOKENS = 32


def chat_text(processor: Any, prompt: str, answer_prefix: str) -> str:
    """The text for one image: by the chat template if there is one, else image token, prompt, prefix."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = f"{getattr(processor, 'image_token', '')}{prompt}"
    joint = "" if not text or text[-1].isspace() or not answer_prefix else " "
    return f"{text}{joint}{answer_prefix}"


def token_of(tokenizer: Any, word: str) -> int:
    """The first token of a word inside a sentence: what a model would write to begin it.

    Raises:
        WordError: if the word is empty, or its first token is no more than the space before it.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids
    rest = tokenizer(f"a {word.strip()}", add_special_tokens=False).input_ids[len(before) :]
    if not rest or not tokenizer.decode(rest[:1]).strip():
        raise WordError(
            f"'{word}' has no token of its own to begin with.",
            seen=f"The tokenizer writes it as {tokenizer.convert_ids_to_tokens(rest)}.",
            fix="Compare with another word.",
        )
    return rest[0]
