"""Render a user's turn by a model's chat template, up to the place where the answer begins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from jinja2 import TemplateError

from mmneurons.errors import SettingError

REFUSALS = (ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, NotImplementedError)
"""Errors that processors raise at a text or a layout of pictures that is not theirs."""
_THOUGHTS = re.compile(r"(?:<(think|thinking|thought)>|\[(THINK)\])\s*$")
_DAY = re.compile(r"strftime_now\(\s*(['\"])(?P<form>.*?)\1\s*\)")
_UNTOLD_DAY = re.compile(r"strftime_now\s*\(")
LEFT_OUT = (
    "The model's chat template cannot write this prompt: the model was asked in plain words, without the marks that it "
    "was trained with. rendered_prompt shows what it read."
)
DATED = (
    "Today's date stands in the prompt, so that results change from day to day. A date of one's own: "
    'load(..., date="2025-01-31")    CLI: --date 2025-01-31'
)


def template_of(processor: Any) -> str | None:
    """Return the chat template of a processor, or of its tokenizer; of several by name, the default one."""
    for owner in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if template:
            return str(template)
    return None


def rendered_turn(
    processor: Any, prompt: str, n_images: int, *, image_token: str = "", day: date | None = None
) -> str | None:
    """Render one turn of a user, open for the answer.

    Args:
        processor: The model's processor.
        prompt: What is asked.
        n_images: Number of pictures in front of the prompt.
        image_token: Text that stands for a picture, where the template would not write it.
        day: The day that the template takes for today; None for the real one.

    Returns:
        The text, with a place for thoughts closed again; None if there is no template, or it cannot write the turn.

    Raises:
        SettingError: `day` is given, and the template asks for the date in a form that is not known here.
    """
    template = template_of(processor)
    if template is None:
        return None
    if day is not None:
        template = _dated(template, day)
    # A template that can take pictures gets a list of parts. One for words alone drops the prompt, prints the list, or
    # fails: it then gets the words, with the tokens of the pictures in them.
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    text = _rendered(processor, template, content)
    if text is None or prompt.strip() not in text or "{'type':" in text or text.count(image_token) < n_images:
        text = _rendered(processor, template, f"{image_token}\n" * n_images + prompt if image_token else prompt)
    return None if text is None else _without_thoughts(text)


def joined(processor: Any, text: str, answer_prefix: str) -> str:
    """Put the words that an answer begins with behind a prompt, with a space between where the model would write one.

    Behind a token of its own that ends the user's turn, a byte-level tokenizer's answer begins without a space. One
    of SentencePiece's writes a space at the beginning of every text.
    """
    answer_prefix = answer_prefix.strip(" ")
    if not text or text[-1].isspace() or not answer_prefix:
        return f"{text}{answer_prefix}"
    tokenizer = processor.tokenizer
    special = tuple(str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    if special and text.endswith(special):
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids[:1])[0]
        if not first.startswith("\u2581"):
            return f"{text}{answer_prefix}"
    return f"{text} {answer_prefix}"


def prompt_notes(processor: Any, prompt: str, n_images: int, day: date | None = None) -> list[str]:
    """Return notes for a reader of answers to this prompt: its template was left out, or has today's date in it."""
    template = template_of(processor)
    if template is None:
        return []
    text = rendered_turn(processor, prompt, n_images, day=day)
    if text is None:
        return [LEFT_OUT]
    if day is None and _UNTOLD_DAY.search(template):
        others = [_rendered_on(processor, prompt, n_images, date(year, 1, 31)) for year in (1999, 2001)]
        if None in others or others[0] != others[1]:
            return [DATED]
    return []


def _rendered_on(processor: Any, prompt: str, n_images: int, day: date) -> str | None:
    """Render a turn as of some day; None where the day cannot be told to the template."""
    try:
        return rendered_turn(processor, prompt, n_images, day=day)
    except SettingError:
        return None


def _rendered(processor: Any, template: str, content: Any) -> str | None:
    """Render one turn of a user; None if the template cannot write it."""
    # By the tokenizer, whose method is a function of the template and the special tokens alone: a processor's own may
    # ask for settings of videos, which are left out here.
    owner = processor.tokenizer if hasattr(processor.tokenizer, "apply_chat_template") else processor
    # A model that thinks first would write its thoughts where the answer is expected.
    options = {"enable_thinking": False} if "enable_thinking" in template else {}
    try:
        return owner.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            **options,
        )
    except (*REFUSALS, RuntimeError, TemplateError):  # the last two come from the template engine
        return None


def _without_thoughts(text: str) -> str:
    """Close the place for thoughts that a prompt ends with, as models that can skip thinking are told to skip it."""
    opened = _THOUGHTS.search(text)
    if opened is None:
        return text
    close = f"</{opened[1]}>" if opened[1] else f"[/{opened[2]}]"
    return f"{text.rstrip()}\n\n{close}\n\n"


def _dated(template: str, day: date) -> str:
    """Write a day into a template in the place of today.

    It is written into the text of the template: transformers hands no function of ours to it.

    Raises:
        SettingError: the template asks for the date in a form that is not known here.
    """
    template = _DAY.sub(lambda asked: repr(day.strftime(asked["form"])), template)
    if _UNTOLD_DAY.search(template):
        raise SettingError(
            "The date that this model's chat template writes cannot be chosen.",
            seen=_UNTOLD_DAY.split(template)[1][:80],
            fix="Leave the date out (date=None, no --date).",
        )
    return template
