"""A finding as it is printed in the terminal: answer, nouns, top neurons and maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmneurons.finding.result import Finding, Grid, Grounded, NounFinding
from mmneurons.report.text import BASELINES, is_warning, placed, printable, without_pictures

if TYPE_CHECKING:  # it needs torch
    from mmneurons.finding.checking import Checked

SHADES = " ░▒▓█"
"""The block characters of a map, from nothing to the largest value."""
_WORDS_WIDTH = 24
"""How many columns of the screen the tokens of a neuron must have for maps to be put beside the table."""
_MAP_WIDTH = 48
"""The most columns of the screen that a map takes: 24 patches side by side."""
_GAP = 2
_TITLE = "map of the top 10"


def show(finding: Finding, console: Console) -> None:
    """Print one finding: the answer with its nouns marked, then per noun its probability, parts and top neurons."""
    console.print()
    for line in _pictures(finding):
        console.print(Text(line, style="bold"), soft_wrap=True)
    console.print(_answer(finding))
    _show_notes(finding.notes, console)
    for noun in finding.nouns:
        console.print()
        console.print(_heading(noun, finding))
        _show_neurons(noun, finding, console)


def _show_notes(notes: Sequence[str], console: Console) -> None:
    """Print what a reader should be told, each on a line of its own."""
    for note in notes:
        warns = is_warning(note)
        label = ("warning:", "bold white on red") if warns else ("note:", "yellow")
        console.print(Text.assemble(label, (f" {printable(note)}", "bold red" if warns else "yellow")))


def show_checked(checked: Checked, console: Console) -> None:
    """Print one caption that was checked: its nouns, those that the picture does not support in red."""
    console.print()
    console.print(Text(" + ".join(printable(name) for name in checked.images), style="bold"), soft_wrap=True)
    cut, _ = placed(checked.caption, [(noun.word, noun.start) for noun in checked.nouns])
    text = Text(f"{printable(checked.answer_prefix)} " if checked.answer_prefix else "", style="dim")
    for part, i in cut:
        unseen = i is not None and checked.nouns[i].grounded.seen is False
        text.append(printable(part), style="bold red" if unseen else "" if i is None else "bold green")
    console.print(text)
    _show_notes(checked.notes, console)
    for noun in checked.nouns:
        told, style = seen_text(noun.grounded)
        patch = f"block {noun.grounded.layer}, patch row {noun.grounded.row} column {noun.grounded.column}"
        console.print(Text.assemble((f"  {printable(noun.word)}", "bold"), (f"  {told} ({patch})", style)))


def _show_neurons(noun: NounFinding, finding: Finding, console: Console) -> None:
    """The table of its neurons, and beside it the map of the top 10; below it where the screen is narrow."""
    table = _table(noun, finding)
    grids = [grid for grid in noun.regions.get(10, ()) if any(grid)]
    if not grids:
        console.print(table)
        return
    maps = _maps(grids, min(_MAP_WIDTH, console.width))
    # Beside the table only if that leaves the tokens their width; else below, in as many rows as it takes.
    columns = sum((column.min_width or _WORDS_WIDTH) + 2 for column in table.columns)
    width = max(sum(map(_width, maps)) + _GAP * (len(maps) - 1), len(_TITLE))
    if columns + _GAP + width <= console.width:
        console.print(_beside([table, _labelled(maps)]))
        return
    console.print(table)
    for row in _rows(maps, console.width):
        console.print(_labelled(row))


def _pictures(finding: Finding) -> list[str]:
    """Make the lines of the heading: the file, the numbered files, or what was asked without one."""
    if not finding.images:
        asked = f": {printable(finding.prompt)}" if finding.prompt else ""
        return [f"{without_pictures(finding)}{asked}"]
    if len(finding.images) == 1:
        return [printable(finding.images[0])]
    return [f"{i}  {printable(name)}" for i, name in enumerate(finding.images, start=1)]


def _answer(finding: Finding) -> Text:
    """Make the line of the answer: the prefix dim, the nouns marked."""
    text = Text()
    if finding.answer_prefix:
        text.append(f"{printable(finding.answer_prefix)} ", style="dim")
    cut, _ = placed(finding.caption, [(noun.word, noun.start) for noun in finding.nouns])
    for part, noun in cut:
        text.append(printable(part), style="" if noun is None else "bold green")
    return text if finding.caption else text.append("(the model said nothing)", style="dim")


def _heading(noun: NounFinding, finding: Finding) -> Text:
    """Make the heading of a noun: how it was scored, its probability, its logit and the parts of that."""
    parts = noun.parts
    heading = Text().append(printable(noun.word), style="bold green")
    if noun.n_tokens > 1:
        heading.append(f"  scored at its first of {noun.n_tokens} tokens, {printable(noun.token)!r}", style="dim")
    if noun.grounded is not None:
        told, style = seen_text(noun.grounded)
        heading.append(f"  {told}", style=style)
    if finding.against is not None:
        heading.append(f"  scores: why not {printable(finding.against)!r}", style="dim")
    if finding.baseline != "zero":
        heading.append(f"  baseline {finding.baseline}: {BASELINES[finding.baseline]}", style="dim")
    heading.append(f"\n  p {noun.probability:.3f}; logit {noun.logit:.2f}: ")
    # Parts are of the logit that the model gave: no baseline is taken off them, whatever the scores below are.
    plain = "" if finding.baseline == "zero" else " without baseline"
    heading.append(f"FFN {parts.ffn:+.2f} (top {len(noun.neurons)}{plain} {parts.top:+.2f}), ")
    heading.append(f"attention {parts.attention:+.2f}, ")
    if parts.other:
        heading.append(f"side paths {parts.other:+.2f}, ")
    heading.append(f"rest {parts.embedding + parts.bias:+.2f}")
    return heading


def seen_text(grounded: Grounded) -> tuple[str, str]:
    """What is said of a noun's ground, and its style."""
    if grounded.seen is None:
        return f"image tokens say it with {grounded.confidence:.3f}", "dim"
    sure = f"image tokens say it with {grounded.confidence:.3f}, in the picture with {grounded.probability:.2f}"
    return (f"seen: {sure}", "dim") if grounded.seen else (f"not seen in the picture: {sure}", "bold red")


def _table(noun: NounFinding, finding: Finding) -> Table:
    """Make the table of a noun's top neurons."""
    over = any(found.baseline is not None for found in noun.neurons)
    lost = any(finding.lost_without_image is not None for finding in noun.neurons)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    says = "says" if finding.says == "standardised" else f"says, {finding.says}"
    # Of a word that is certain anyway, shares of log p are small: fixed decimals would print zeros.
    largest = max((abs(found.score) for found in noun.neurons), default=0.0)
    digits = ".3f" if largest >= 0.01 or not largest else ".1e"
    rows = [
        [
            str(found.neuron),
            f"{found.score:+{digits}}",
            f"{found.activation:+.2f}",
            *(["-" if found.baseline is None else f"{found.baseline:+.2f}"] if over else []),
            *(["-" if found.lost_without_image is None else f"{found.lost_without_image:.0%}"] if lost else []),
        ]
        for found in noun.neurons
    ]
    # Numbers are never cut: their columns are as wide as their widest entry, and the tokens get what is left.
    least = {"neuron": 8, finding.score: 7, "act.": 6, **({"base": 6} if over else {}), **({"lost": 5} if lost else {})}
    for i, (name, width) in enumerate(least.items()):
        width = max([width, *(len(row[i]) for row in rows)])
        table.add_column(name, min_width=width, justify="right" if i else "left", no_wrap=True)
    table.add_column(says)  # alone without no_wrap: the one that gives way where the screen is narrow
    for row, found in zip(rows, noun.neurons, strict=True):
        table.add_row(*row, Text(words(found.tokens), no_wrap=True, overflow="ellipsis"))
    return table


def words(tokens: Sequence[str]) -> str:
    """Join tokens in one line, control characters made visible, the space before a word left out."""
    return " ".join(printable(token.removeprefix(" ")) for token in tokens)


def _maps(grids: Sequence[Grid], width: int) -> list[list[str]]:
    """Draw the maps of one noun in block characters, on one scale of shades, numbered where there are several."""
    fitting = [_reduced(grid, width // 2) for grid in grids]
    # One largest value for all pictures, so that the same shade means the same everywhere.
    top = max((value for grid in fitting for row in grid for value in row), default=0.0)
    numbers = range(1, len(grids) + 1) if len(grids) > 1 else [""]
    return [[str(number), *shaded(grid, top)] for number, grid in zip(numbers, fitting, strict=True)]


def _width(lines: Sequence[str]) -> int:
    return max(map(len, lines))


def _rows(maps: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Arrange maps in rows, as many in each as fit next to each other."""
    rows: list[list[list[str]]] = [[]]
    for one in maps:
        if rows[-1] and sum(map(_width, rows[-1])) + _GAP * len(rows[-1]) + _width(one) > width:
            rows.append([])
        rows[-1].append(one)
    return rows


def _labelled(maps: Sequence[list[str]]) -> Table:
    """Lay out maps next to each other, the first row of them under a title."""
    labelled = Table.grid()
    labelled.add_column(no_wrap=True)
    if maps[0][0] in ("", "1"):
        labelled.add_row(Text(_TITLE))
    shown = [one if one[0] else one[1:] for one in maps]
    labelled.add_row(_beside([Text("\n".join(one), no_wrap=True) for one in shown]))
    return labelled


def _beside(parts: Sequence[Table | Text]) -> Table:
    """Put tables or texts next to each other."""
    # A grid, as rich has no other way to put blocks of several lines next to each other.
    both = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for _ in parts:
        both.add_column()
    both.add_row(*parts)
    return both


def _reduced(grid: Grid, columns: int) -> Grid:
    """Reduce a map to at most so many columns: each patch becomes the mean of a square of patches."""
    side = -(-len(grid[0]) // max(columns, 1))
    if side == 1:
        return grid

    def mean(y: int, x: int) -> float:
        square = [value for row in grid[y : y + side] for value in row[x : x + side]]
        return sum(square) / len(square)

    return tuple(tuple(mean(y, x) for x in range(0, len(grid[0]), side)) for y in range(0, len(grid), side))


def shaded(grid: Grid, top: float) -> list[str]:
    """Draw a map in block characters, two for each patch, the darkest for `top`; negative values are blank."""
    steps = len(SHADES) - 1
    return [
        "".join(SHADES[round(max(value, 0.0) / top * steps) if top > 0 else 0] * 2 for value in row) for row in grid
    ]
