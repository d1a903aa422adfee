"""The description of a patch, what it changes and what made it: as plain text, and as a table for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from mmneurons.report.text import READINGS, percent, printable

if TYPE_CHECKING:
    from mmneurons.patches.describe import ColumnChange, PatchDescription
    from mmneurons.patches.patch import Patch

LISTED = 10
"""How many columns are listed unless asked otherwise."""
WIDTH = 38
"""The most characters that the tokens of one column take."""


def patch_text(description: PatchDescription, listed: int | None = LISTED) -> str:
    """Describe a patch as text: totals, what made it, and its columns, the largest change first.

    Args:
        description: The description, from `describe_patch`.
        listed: How many columns are listed; None: all.

    Returns:
        Lines without colour and without hidden characters; the last one ends without a line break.
    """
    n, blocks = len(description.changes), ", ".join(map(str, description.blocks))
    lines = [
        f"{_count(n, 'column')} of {_count(len(description.blocks), 'block')}{f' ({blocks})' if blocks else ''}, "
        f"rank {description.rank}, {description.n_bytes:,} bytes",
        *_aligned([("hash", description.hash[:16]), *description.facts]),
    ]
    shown = description.changes[:listed]
    if shown:
        lines += ["", *_table(shown)]
    if shown and description.says == "raw":
        lines.append(f"read {description.says}: {READINGS[description.says]}")
    if len(shown) < n:
        lines.append(f"... and {n - len(shown)} more, that change less (mmneurons patch show --all)")
    return "\n".join(lines)


def patch_html(patch: Patch) -> str:
    """Make an HTML table of what made a patch and how far it moves the columns of each block, without a style."""
    from mmneurons.patches.describe import facts_of, sizes_of

    # By block: a notebook has no room for hundreds of columns, and `mmneurons patch show` lists them.
    rows = [("hash", patch.hash[:16]), *facts_of(patch.provenance)]
    sizes: dict[int, list[float]] = {}
    for change in sizes_of(patch):
        sizes.setdefault(change.neuron.layer, []).append(change.size)
    for layer, moved in sorted(sizes.items()):
        rows.append((f"block {layer}", f"{_count(len(moved), 'column')}, |change| up to {max(moved):.3g}"))
    cells = (f"<tr><th>{escape(printable(name))}</th><td>{escape(printable(text))}</td></tr>" for name, text in rows)
    return f"<table>{''.join(cells)}</table>"


def _table(changes: Sequence[ColumnChange]) -> list[str]:
    """Lay out one line for each column; without a model there are no shares and no tokens to show."""
    compared = any(change.before or change.share is not None for change in changes)
    rows = [["neuron", "|change|", *(["of column", "said before", "says after"] if compared else [])]]
    for change in changes:
        row = [str(change.neuron), f"{change.size:.3g}"]
        if compared:
            row += ["-" if change.share is None else percent(change.share), *map(_words, (change.before, change.after))]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_right = (1, 2)  # the columns of numbers
    return [
        "  ".join(
            cell.rjust(width) if i in to_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _aligned(facts: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"{printable(name).ljust(width)}  {printable(text)}" for name, text in facts]


def _words(tokens: Sequence[str]) -> str:
    """Join as many tokens as fit, each without the space before it."""
    text = " ".join(printable(token.removeprefix(" ")) for token in tokens)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1].rstrip()}…"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
