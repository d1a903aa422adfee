"""Classes of transformers by name, whatever this version calls them; one that it lacks skips the test that needs it."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest
import transformers


def lacking(what: str) -> NoReturn:
    """Skip the test for what this version of transformers lacks; a failure where CI says that it lacks nothing."""
    told = f"transformers {transformers.__version__}: {what}"
    if os.environ.get("MMNEURONS_REQUIRE_FAMILIES"):
        pytest.fail(told)
    pytest.skip(told)


class Absent:
    """A class that this version of transformers lacks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        lacking(f"no {self.name}")


class Library:
    """The package transformers: `hf.LlavaConfig`."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Pil") and not hasattr(transformers, name):
            name = name.removesuffix("Pil")  # before there were two by name, the plain one read pictures by Pillow
        return getattr(transformers, name, None) or Absent(name)

    def of(self, module: str, name: str) -> Any:
        """A class that may not be exported: `hf.of("models.aria.modeling_aria", "AriaExperts")`."""
        try:
            return getattr(importlib.import_module(f"transformers.{module}"), name)
        except (ImportError, AttributeError):
            return Absent(name)


hf = Library()
