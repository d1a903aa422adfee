"""What long work tells of how far it is: one shape for all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, int], None]
"""Called with what is being done, how much of it is done, shares counted, and how much there is; 0: not known."""


def untold(stage: str, done: float, total: int) -> None:
    """For whoever waits without looking."""
