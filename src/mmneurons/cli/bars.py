"""Signs of progress for someone who waits: a spinner, or bars with an estimate; plain lines where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from mmneurons.progress import Progress, untold


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show a spinner, for work whose length is not known."""
    with console.status(what):
        yield


@contextmanager
def stages(console: Console, what: str) -> Iterator[Progress]:
    """Show a spinner with what is being done, of work of unknown length; lines where nobody watches."""
    with console.status(what) as status:

        def tell(stage: str, done: float, total: int) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(stage)

        yield tell


@contextmanager
def bar(console: Console, total: int) -> Iterator[Progress]:
    """Show a bar with an estimate where someone watches and there is more than one thing to do; else show nothing."""
    if total <= 1 or not console.is_terminal:
        yield untold
        return
    with bars(console, "") as tell:
        yield tell


@contextmanager
def bars(console: Console, unit: str, *, rate: bool = False) -> Iterator[Progress]:
    """Show a bar with an estimate for each stage, counted in `unit`; print plain lines where nobody watches.

    Args:
        console: Where.
        unit: What is counted.
        rate: Whether it is told how many are done in a second.

    Yields:
        The callback for the progress; a stage is begun by its first report.
    """
    from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            # Of a stage, over its last half minute: rich's own estimate.
            return Text("" if not task.speed else f"{task.speed:.1f}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.{1 if unit else 0}f}}/{{task.total}} {unit}"),
    )
    # Bars vanish when they are done, unless they count something that is worth keeping in sight.
    last = [Rate(""), TimeRemainingColumn()] if rate else [TimeRemainingColumn()]
    with Progress(*columns, *last, console=console, disable=not console.is_terminal, transient=not unit) as shown:
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
