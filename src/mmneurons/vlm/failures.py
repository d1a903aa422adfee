"""What to tell a user whose model fails while it runs."""

from __future__ import annotations

import traceback

import torch

from mmneurons.errors import MmneuronsError, ModelError

MODEL_CODE = ("torch", "transformers", "transformers_modules", "accelerate", "bitsandbytes", "peft")
"""Packages that run when a model does; the third holds code that came with one."""


def unanswered(error: Exception) -> ModelError | None:
    """What to say of an error in generating: the model does not take what its processor, or the user, made for it.

    None for an error of somebody else's code, such as a hook of the user's own, and for one of ours.
    """
    if isinstance(error, MmneuronsError):
        return None
    if is_out_of_memory(error):
        return ModelError(
            "There is not enough memory for this batch.",
            seen=first_line(error),
            fix='Ask about fewer images at once (batch_size=1), or load the model smaller: dtype="bfloat16"    '
            "CLI: --batch-size 1, --dtype bfloat16, --bits 4",
        )
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if str(frame.f_globals.get("__name__")).partition(".")[0] not in MODEL_CODE:
        return None
    return ModelError(
        "The model's own code fails on this prompt.",
        seen=f"{type(error).__name__}: {first_line(error)}",
        fix="Its config.json, its processor and this version of transformers must fit each other: take the config and "
        "the processor of the model that it was made from. Ready-made inputs must be as that processor makes them.",
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory, a GPU's or the machine's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """The first line that says something, and what it announces; transformers' messages run to hundreds of lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"[:300] if isinstance(error, LookupError) else said[:300]
