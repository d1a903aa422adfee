"""How long work reports its progress: one shape of callback for the whole package."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, int], None]
"""A callback, given the name of a stage, how much of it is done (in fractions, too), and the total; 0: not known."""


def untold(stage: str, done: float, total: int) -> None:
    """Report nothing: the default callback, for callers who do not ask for progress."""
