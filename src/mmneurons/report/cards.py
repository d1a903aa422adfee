"""The card of a neuron, and the table of the neurons of a word, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmneurons.report.terminal import words
from mmneurons.report.text import READINGS, printable

if TYPE_CHECKING:
    from mmneurons.finding.lookup import NeuronCard, WordNeurons


def show_neuron(card: NeuronCard, console: Console) -> None:
    """Print what a neuron says, how long its column is, and which neurons are like it."""
    # What a neuron says depends on the sign of its activation, which without an image is not known: both are shown.
    console.print(Text(str(card.neuron), style="bold green"))
    longer = f"longer than {card.norm_rank:.0%} of its FFN's columns"
    console.print(f"  column length {card.norm:.4g}, {longer}", soft_wrap=True)
    table = Table(box=None, padding=(0, 1), show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("firing above zero says", Text(words(card.tokens)))
    table.add_row("firing below zero says", Text(words(card.suppressed)))
    console.print(table)
    console.print(f"  words: {card.says}, {READINGS[card.says]}", style="dim", soft_wrap=True)
    if card.neighbours:
        console.print("  nearest columns, by cosine:")
        near = "  ".join(f"{n.neuron} {n.cosine:+.2f}" for n in card.neighbours)
        console.print(Padding(Text(near), (0, 0, 0, 4)))


def show_word(found: WordNeurons, console: Console) -> None:
    """Print the neurons whose columns point to a word, as a table."""
    first = "" if found.token.strip().lower() == found.word.strip().lower() else ", the first of several"
    console.print(Text(printable(found.word), style="bold green").append(f"  token {printable(found.token)!r}{first}"))
    console.print(f"  words and ranks: {found.says}, {READINGS[found.says]}", style="dim", soft_wrap=True)
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("neuron", no_wrap=True)
    table.add_column("fires", no_wrap=True)
    table.add_column("cosine", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("says then")  # the one that gives way where the screen is narrow
    for n in found.neurons:
        sign = "above 0" if n.cosine >= 0 else "below 0"
        table.add_row(
            str(n.neuron),
            sign,
            f"{n.cosine:+.3f}",
            str(n.rank),
            Text(words(n.tokens), no_wrap=True, overflow="ellipsis"),
        )
    console.print(table)
