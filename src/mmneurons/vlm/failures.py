"""Errors for users whose model fails while it runs."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from mmneurons.errors import MmneuronsError, ModelError

FULL = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
"""Words that torch and its back ends use where there is no memory left."""


@contextmanager
def told() -> Iterator[None]:
    """Turn what a model's code raises inside the `with` into an error of ours.

    An error that passes through the user's own code, such as a hook, stays what it is.
    """
    try:
        yield
    except MmneuronsError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if is_out_of_memory(error):
            raise ModelError(
                "There is not enough memory for this batch.",
                seen=first_line(error),
                fix='Ask about fewer images at once (batch_size=1), or load the model smaller: dtype="bfloat16"    '
                "CLI: --batch-size 1, --dtype bfloat16, --bits 4",
            ) from error
        # A traceback of the user's own code says more about the cause than our message would. Memory was asked first,
        # since it can run out anywhere.
        if any(map(_is_users, frames)):
            raise
        raise ModelError(
            "The model's own code fails on this prompt.",
            seen=f"{type(error).__name__}: {first_line(error)}",
            fix="Its config.json, its processor and this version of transformers must fit each other: take those of "
            "the model that it was made from. Ready-made inputs must be as that processor makes them.",
        ) from error


def _is_users(frame: FrameType) -> bool:
    """Whether a frame's code is the user's: neither ours, nor a package's, nor code that came with a model."""
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    if package in ("mmneurons", "transformers_modules") or package in sys.stdlib_module_names:
        return False
    return not {"site-packages", "dist-packages"} & {*Path(frame.f_code.co_filename).parts}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that there was not enough memory, a GPU's or the machine's."""
    # By its words as well: back ends other than CUDA, and allocators of the CPU, raise a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or FULL.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """Return the first line of an error that says something, with the one it announces; messages can be very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # The text of a KeyError is the key alone, which says nothing without the name of the error.
    return f"{type(error).__name__}: {said}"[:300] if isinstance(error, LookupError) else said[:300]
