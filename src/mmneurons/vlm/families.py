"""Facts about families of models that neither structure nor a forward pass shows; the list is to stay short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from transformers import configuration_utils

from mmneurons.errors import ModelError

NEWER = ("aria", "git", "kosmos-2", "lfm2-vl", "lfm2_vl", "llama4", "paligemma", "qwen3_vl_moe")
"""Types of model that transformers 4 computes in another way than 5, so that results there would be wrong."""


@dataclass(frozen=True)
class Family:
    """A family says what is special about one type of model (`config.model_type`)."""

    why: str = ""
    """Reason for what is set here, as a user should read it."""
    one_at_a_time: bool = False
    """Whether a batch changes what the model computes, so that each prompt runs alone."""
    counts_positions: bool = False
    """Whether the model must be told the positions of the tokens in a padded batch, as `generate` tells it."""
    whole: Literal["first", "last"] | None = None
    """Where the tokens of the whole picture stand beside those of its tiles; None if it is not known."""
    suffix: Mapping[str, int] = field(default_factory=dict)
    """Numbers for the answer's tokens in inputs with one number per token, by input; 0 unless given here.

    (The attention mask, which is 1 for them in every family, is not listed.)
    """


_FIRST = Family("Its processor puts the whole picture before its tiles.", whole="first")
_LAST = Family("Its processor puts the whole picture after its tiles.", whole="last")
FAMILIES = {
    **dict.fromkeys(("gemma3", "llava_next", "llava_onevision", "ovis2"), _FIRST),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "got_ocr2", "idefics3", "internvl", "llama4", "smolvlm"), _LAST),
    "kosmos-2": Family(
        "Kosmos-2 numbers positions of a padded batch otherwise than of a prompt alone while it decodes.",
        one_at_a_time=True,
    ),
    "git": Family(
        "GIT has absolute positions and takes those of padding for those of words.",
        counts_positions=True,
    ),
    "instructblip": Family(
        "InstructBLIP's padding stands between its queries and the words, whose positions it would shift.",
        counts_positions=True,
    ),
    "paligemma": Family(
        "PaliGemma reads its prompt in both directions and what it generates in one; token type 1 marks the latter.",
        suffix={"token_type_ids": 1},
    ),
}


def check_version(config: Any) -> None:
    """Refuse a type of model whose results are right under newer versions of transformers only.

    Raises:
        ModelError: if this version is too old for it.
    """
    is_5 = hasattr(configuration_utils, "PreTrainedConfig")  # PretrainedConfig before
    if config.model_type in NEWER and not is_5:
        raise ModelError(
            f"Models of type '{config.model_type}' are read rightly under transformers 5 alone.",
            seen=f"transformers {transformers.__version__}",
            fix="pip install 'transformers>=5'",
        )


def family_of(config: Any) -> Family:
    """Return what is special about a model, or an empty Family where nothing is."""
    return FAMILIES.get(getattr(config, "model_type", ""), Family())
