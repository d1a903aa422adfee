"""What someone who waits sees: a spinner, or bars with an estimate. Nothing where nobody watches but what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mmneurons.progress import Progress, untold


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """A spinner."""
    with console.status(what):
        yield


@contextmanager
def bar(console: Console, total: int) -> Iterator[Progress]:
    """A bar with an estimate where someone sees it and there is something to wait for; else nothing."""
    if total <= 1 or not console.is_terminal:
        yield untold
        return
    with bars(console, "") as tell:
        yield tell


@contextmanager
def bars(console: Console, unit: str) -> Iterator[Progress]:
    """A bar for each stage, with an estimate; plain lines where nobody watches. Counted are `unit`s."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.{1 if unit else 0}f}}/{{task.total}} {unit}"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=not unit
    ) as shown:
        tasks: dict[str, Any] = {}
        told: dict[str, int] = {}

        def tell(stage: str, done: float, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done)
            # A line for each unit, or for each twentieth where there are more of them.
            if not console.is_terminal and int(done) >= told.get(stage, 1):
                told[stage] = int(done) + max(1, total // 20)
                console.print(f"{stage}: {int(done)} of {total} {unit}")

        yield tell
