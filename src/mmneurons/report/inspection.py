"""The results of an inspection as files: JSON, CSV, Markdown, PNG plots, and one page that holds all of them."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from mmneurons.data.table import Table, shown
from mmneurons.files import json_bytes, write_whole
from mmneurons.finding.result import Finding
from mmneurons.report import text
from mmneurons.report.page import asset, policy_hash, template
from mmneurons.report.plots import draw

if TYPE_CHECKING:
    from mmneurons.inspection.run import Inspection

SCHEMA = 1
"""The version of the JSON's form."""
_SECTIONS = {
    "Sensitivity": (("example-", "regions"), ("sensitivity", "regions")),
    "Specificity": (("overlap", "matrix", "layers"), ("overlap", "own-share", "layers")),
    "Causal effect": (("causal",), ("causal",)),
    "Is the ranking true?": (
        ("agreement", "deletion"),
        ("agreement", "agreement-differences", "deletion", "meaning"),
    ),
}
"""The sections of the page by their titles: how the names of their plots begin, and the names of their tables."""


class _Section(NamedTuple):
    """One section as the template reads it: its plots (name and `data:` URI) and its tables."""

    name: str
    title: str
    pictures: list[tuple[str, str]]
    tables: list[Table]


def write_inspection(
    found: Inspection,
    tables: Sequence[Table],
    folder: str | os.PathLike[str],
    examples: Sequence[Finding] = (),
    *,
    n_images: int,
) -> Path:
    """Write `inspection.json`, `tables.md`, a CSV for each table, PNG plots and `index.html`.

    Args:
        found: The inspection.
        tables: The tables made of it.
        folder: The folder to write into; it must be there.
        examples: Findings with maps, to be drawn.
        n_images: How many images the inspection was asked to use.

    Returns:
        The path of the page.

    Raises:
        SettingError: matplotlib is not installed.
    """
    # The page comes last: if it is there, everything that it shows is there, too.
    folder = Path(folder)
    plots = draw(found, tables, folder, examples)
    document = {
        "schema": SCHEMA,
        "made_by": found.made_by,
        "images": found.images,
        "left_out": found.left_out,
        "given": found.given,
        "tables": [table.to_dict() for table in tables],
    }
    # Texts hold names of files, whose bytes need be no text: "replace" writes such bytes as question marks.
    write_whole(folder / "inspection.json", json_bytes(document))
    write_whole(folder / "tables.md", ("\n\n".join(map(_as_markdown, tables)) + "\n").encode("utf-8", "replace"))
    for table in tables:
        write_whole(folder / f"{table.name}.csv", table.to_csv().encode("utf-8", "replace"))
    page = folder / "index.html"
    write_whole(page, render_inspection(found, tables, plots, n_images=n_images).encode("utf-8", "replace"))
    return page


def render_inspection(found: Inspection, tables: Sequence[Table], plots: Sequence[Path], *, n_images: int) -> str:
    """Make the page, with every table and every plot inside it; it loads nothing from elsewhere."""
    # Only sections of experiments that were run have tables; each takes the plots whose names begin as its own.
    by_name = {table.name: table for table in tables}
    sections = []
    for title, (pictures, names) in _SECTIONS.items():
        mine = [by_name[name] for name in names if name in by_name]
        if mine:
            images = [(path.stem, _uri(path)) for path in plots if path.stem.startswith(pictures)]
            sections.append(_Section(mine[0].name, title, images, mine))
    style = asset("inspection.css")
    return template("inspection.html.j2").render(
        title="Multi-modal neurons, inspected",
        n_images=n_images,
        settings=found.settings,
        sections=sections,
        shown=shown,
        left_out=found.left_out,
        n_given=len(found.given),
        provenance=text.flatten(found.made_by),
        style=Markup(style),
        style_hash=policy_hash(style),
    )


def _as_markdown(table: Table) -> str:
    note = f"\n\n{table.note}" if table.note else ""
    return f"### {table.title}\n\n{table.to_markdown()}{note}"


def _uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
