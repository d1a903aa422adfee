"""A table holds numbers with their intervals, for a spreadsheet, a page or a program."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from mmneurons.maths.statistics import Estimate

Cell = Estimate | float | None


@dataclass(frozen=True)
class Table:
    """A table of rows of labels with one value each; None where there is nothing to measure."""

    name: str
    """Also the stem of its file."""
    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Cell], ...]
    note: str = ""

    def value(self, *labels: str) -> Cell:
        """Look up the value of the row with these labels."""
        return dict(self.rows)[labels]

    def to_csv(self) -> str:
        """Write it as CSV: labels, mean, low, high, n; empty where there is nothing."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*self.labels, "mean", "low", "high", "n"))
        for labels, value in self.rows:
            writer.writerow((*labels, *_numbers(value)))
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data, for JSON."""
        names = (*self.labels, "mean", "low", "high", "n")
        rows = [dict(zip(names, (*labels, *_numbers(value)), strict=True)) for labels, value in self.rows]
        return {"name": self.name, "title": self.title, "note": self.note, "rows": rows}

    def to_markdown(self) -> str:
        """Write it for a page of documentation: value, interval, n."""
        head = [*self.labels, "mean", "95 % interval", "n"]
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        lines += ["| " + " | ".join([*labels, *shown(value)]) + " |" for labels, value in self.rows]
        return "\n".join(lines)


def _numbers(value: Cell) -> tuple[float | int | None, ...]:
    if isinstance(value, Estimate):
        return value.mean, value.low, value.high, value.n
    return value, None, None, None


def shown(value: Cell) -> tuple[str, str, str]:
    """Write mean, interval and n as a reader sees them."""
    if value is None:
        return "not measured", "", ""
    if isinstance(value, Estimate):
        interval = "" if value.low is None else f"{value.low:.3f} to {value.high:.3f}"
        return f"{value.mean:.3f}", interval, str(value.n)
    return f"{value:.4g}", "", ""
