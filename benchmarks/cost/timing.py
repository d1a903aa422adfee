"""Time things side by side, and where the time goes; what a GPU still has to do is waited for."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Round by round, one over the other."""
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def now() -> float:
    """Seconds, once a GPU in use has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = now()
    run()
    return now() - start


def rounds(arms: Mapping[str, Callable[[], object]], n: int) -> dict[str, list[float]]:
    """Seconds of each arm in each of n rounds: one after the other, every other round in reverse order.

    What is slow only the first time is for the caller to have done before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(n):
        for name in list(arms)[:: -1 if i % 2 else 1]:
            seconds[name].append(seconds_of(arms[name]))
            say(f"  round {i} {name}: {seconds[name][-1]:.4f} s")
    return seconds


@contextmanager
def stopwatch(places: Mapping[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Seconds spent inside functions, each named by (module or class, attribute), while the `with` lasts."""
    spent = dict.fromkeys(places, 0.0)

    def timed(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += now() - start

        return run

    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spent


def device_peak(run: Callable[[], object]) -> float:
    """The most memory of the GPU that is held at once during a call, MiB, weights included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)
