"""What someone who waits sees: a spinner, or bars with an estimate. Nothing where nobody watches but what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """A spinner."""
    with console.status(what):
        yield


@contextmanager
def bar(console: Console, total: int, what: str) -> Iterator[Any]:
    """A bar with an estimate on stderr where someone sees it and there is something to wait for."""
    if total == 1 or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


@contextmanager
def bars(console: Console, unit: str) -> Iterator[Any]:
    """A bar for each experiment, with an estimate; plain lines where nobody watches. Counted are `unit`s."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.1f}}/{{task.total}} {unit}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as shown:
        tasks: dict[str, Any] = {}
        told: dict[str, int] = {}

        def tell(name: str, done: float, total: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=total)
            shown.update(tasks[name], completed=done)
            # A line for each unit, or for each twentieth where there are more of them.
            if not console.is_terminal and int(done) >= told.get(name, 1):
                told[name] = int(done) + max(1, total // 20)
                console.print(f"{name}: {int(done)} of {total} {unit}")

        yield tell
