"""The command `atlas`, with a command of its own for each question."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from mmneurons.cli.bars import stages
from mmneurons.cli.options import Json, app, check_json, err, out, write_json
from mmneurons.errors import SettingError

if TYPE_CHECKING:
    import pyarrow as pa

    from mmneurons.atlas.atlas import Atlas

QUESTIONS = ("word", "neuron", "image", "concepts", "similar", "sql", "site")


@app.command()
def atlas(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... QUESTION [WHAT]",
            help="One run or several, from mmneurons sweep, then the question: word NOUN, neuron L23.u6012, "
            "image NAME, concepts, similar L23.u6012, sql 'SELECT ...', or site DIR.",
        ),
    ],
    limit: Annotated[int, typer.Option(min=1, help="How many neurons, nouns or rows are shown.")] = 20,
    json_path: Json = None,
) -> None:
    """Ask a run which neurons say a noun, what a neuron says and on which images.

    word: the neurons that gave most to a noun; similar: those that give to the same nouns as a neuron. neuron, image:
    what is known of one. concepts: the nouns that were said. sql: a query of DuckDB over the views rows, images, nouns,
    top, neurons, pairs and words; it cannot read or write files. site: a folder of pages of all nouns and their
    neurons. Several runs stand side by side, told apart by a column. No model is loaded.
    """
    folders, question, what = _asked(runs)
    check_json(json_path)
    from mmneurons.atlas.atlas import Atlas

    with stages(err, "reading the run") as progress:
        opened = Atlas(folders, progress=progress)
    with opened:
        for note in opened.notes:
            err.print(note, style="yellow", soft_wrap=True)
        if question == "site":
            _site(opened, Path(what), limit)
            return
        tables = _answer(opened, question, what, limit)
    document = {name: table.to_pylist() for name, table in tables.items()}
    if write_json(_plain(document), json_path):
        for name, table in tables.items():
            _show(name, table)


def _asked(words: list[str]) -> tuple[list[str], str, str]:
    """Split the words of a command into runs, question, and what it asks about."""
    # From the end: a run may be called like a question, but nothing follows `concepts`, and one word the others.
    if len(words) > 1 and words[-1] == "concepts":
        return words[:-1], "concepts", ""
    if len(words) > 2 and words[-2] in QUESTIONS and words[-2] != "concepts":
        return words[:-2], words[-2], words[-1]
    raise SettingError(
        "There is no question to a run.",
        seen=" ".join(words),
        fix="mmneurons atlas RUN word dog    or one of: " + ", ".join(QUESTIONS),
    )


def _answer(atlas: Atlas, question: str, what: str, limit: int) -> dict[str, pa.Table]:
    """Ask, and return the tables of the answer by their headings; the heading of a single one is empty."""
    if question == "neuron":
        page = atlas.neuron(what, limit)
        return {"says": page.says, "gives most to": page.concepts, "most on": page.images}
    if question == "image":
        found = atlas.image(what, limit)
        return {"image": found.image, "neurons": found.nouns}
    if question == "concepts":
        return {"": atlas.concepts(limit)}
    if question == "sql":
        return {"": atlas.sql(what)}
    return {"": atlas.word(what, limit) if question == "word" else atlas.similar(what, limit)}


def _show(name: str, table: pa.Table) -> None:
    """Print a table; texts give way where the screen is narrow, and numbers do not."""
    from rich.table import Table
    from rich.text import Text

    if name:
        out.print(Text(name, style="bold"))
    shown, rows = Table(box=None, padding=(0, 1), show_edge=False), table.to_pylist()
    for column in table.column_names:
        is_text = any(isinstance(row[column], list) or len(str(row[column])) > 24 for row in rows)
        longest = max((len(_cell(column, row[column])) for row in rows), default=0)
        width = None if is_text else max(longest, len(column))
        shown.add_column(column, no_wrap=True, overflow="ellipsis", min_width=width)
    for row in rows:
        shown.add_row(*(out.render_str(_cell(column, value)) for column, value in row.items()))
    out.print(shown)


def _cell(column: str, value: object) -> str:
    """Write one value of an answer."""
    from mmneurons.report.terminal import words

    if isinstance(value, list):
        return words(tuple(map(str, value)))
    if column in ("image", "name"):  # what tells images apart stands at the end
        return PurePath(str(value)).name
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(document: object) -> object:
    """Make what JSON can hold of an answer: a user's query can give dates, bytes and NaN."""
    if isinstance(document, dict):
        return {str(key): _plain(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_plain(value) for value in document]
    if isinstance(document, float):
        return document if document - document == 0 else None
    return document if document is None or isinstance(document, str | int | bool) else str(document)


def _site(atlas: Atlas, folder: Path, limit: int) -> None:
    from mmneurons.cli.bars import bars
    from mmneurons.report.atlas import write_site

    with bars(err, "pages") as progress:
        n_pages = write_site(atlas, folder, limit=limit, progress=progress)
    err.print(f"wrote {n_pages} pages: {folder / 'index.html'}", soft_wrap=True)
