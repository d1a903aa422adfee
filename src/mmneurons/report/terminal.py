"""A finding in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmneurons.finding.result import Finding, Grid, NounFinding
from mmneurons.report.text import printable

SHADES = " ░▒▓█"


def show(finding: Finding, console: Console) -> None:
    """Print one finding: the caption with its nouns marked, then per noun its probability, parts and top neurons."""
    console.print()
    console.print(Text(printable(finding.image), style="bold"), soft_wrap=True)
    text, shown = Text().append(f"{finding.answer_prefix} ", style="dim"), 0
    for noun in finding.nouns:
        text.append(printable(finding.caption[shown : noun.start]))
        shown = noun.start + len(noun.word)
        text.append(printable(finding.caption[noun.start : shown]), style="bold green")
    console.print(text.append(printable(finding.caption[shown:])))
    for note in finding.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    for noun in finding.nouns:
        console.print()
        console.print(_heading(noun))
        table = _table(noun, finding.score)
        grid = noun.regions.get(10)
        console.print(_beside(table, grid) if grid else table)


def _heading(noun: NounFinding) -> Text:
    parts = noun.parts
    heading = Text().append(printable(noun.word), style="bold green")
    if noun.n_tokens > 1:
        heading.append(f"  scored at its first of {noun.n_tokens} tokens, {printable(noun.token)!r}", style="dim")
    heading.append(f"\n  p {noun.probability:.3f}; logit {noun.logit:.2f}: ")
    heading.append(f"FFN {parts.ffn:+.2f} (top {len(noun.neurons)} {parts.top:+.2f}), ")
    heading.append(f"attention {parts.attention:+.2f}, rest {parts.embedding + parts.bias:+.2f}")
    return heading


def _table(noun: NounFinding, score: str) -> Table:
    lost = any(finding.lost_without_image is not None for finding in noun.neurons)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("neuron", min_width=8, no_wrap=True)
    table.add_column(score, min_width=7, justify="right", no_wrap=True)
    table.add_column("act.", min_width=6, justify="right", no_wrap=True)
    if lost:
        table.add_column("lost", min_width=5, justify="right", no_wrap=True)
    table.add_column("says", overflow="ellipsis", no_wrap=True)  # the one that gives way where the screen is narrow
    for found in noun.neurons:
        row = [str(found.neuron), f"{found.score:+.3f}", f"{found.activation:+.2f}"]
        if lost:
            row.append("-" if found.lost_without_image is None else f"{found.lost_without_image:.0%}")
        table.add_row(*row, Text(words(found.tokens)))
    return table


def words(tokens: Sequence[str]) -> str:
    """Tokens in one line, control characters made visible, the space before a word left out."""
    return " ".join(printable(token.removeprefix(" ")) for token in tokens)


def _beside(table: Table, grid: Grid) -> Table:
    """The table, and where in the image its neurons are active."""
    both = Table.grid(padding=(0, 2))
    both.add_column()
    both.add_column(min_width=2 * len(grid[0]), no_wrap=True)
    both.add_row(table, Text("\n".join(("where they look", *shaded(grid)))))
    return both


def shaded(grid: Grid) -> list[str]:
    """A heat map in block characters, two for each patch; negative values are blank."""
    top = max((value for row in grid for value in row), default=0.0)
    steps = len(SHADES) - 1
    return [
        "".join(SHADES[round(max(value, 0.0) / top * steps) if top > 0 else 0] * 2 for value in row) for row in grid
    ]
