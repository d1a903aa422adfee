"""What the model is asked, and how the question is written for it."""

from __future__ import annotations

from typing import Any

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
    """The first token of a word inside a sentence: what a model would write to begin it."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    return tokenizer(f"a {word}", add_special_tokens=False).input_ids[len(before)]
