"""The atlas as a folder of pages that link to one another: one for each noun, and one for each of its neurons.

No page holds a script or loads anything. Whatever a run says is text on a page; the names of files are made here.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from mmneurons.errors import SettingError
from mmneurons.files import check_folder, write_whole
from mmneurons.neurons import Neuron
from mmneurons.progress import Progress, untold
from mmneurons.report import text
from mmneurons.report.page import asset, policy_hash, template

if TYPE_CHECKING:
    import pyarrow as pa

    from mmneurons.atlas.atlas import Atlas

UP = f"{posixpath.pardir}/"
"""From a page of a noun or a neuron to the folder of the site."""
MEAN = (
    "Mean: contribution over all images that say the noun. Frequency: in how many of them the neuron is among the top "
    "ones that were kept. Own share: of all that the neuron gives to nouns, what this one gets."
)


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    link: str | None
    is_number: bool


class Section(NamedTuple):
    """One table with its heading."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]]


class Site:
    """The pages of an atlas.

    Args:
        atlas: The atlas.
        limit: How many neurons a noun's page has, and nouns a neuron's.
    """

    def __init__(self, atlas: Atlas, limit: int) -> None:
        self._atlas, self._limit = atlas, limit
        self._concepts = atlas.concepts()
        lemmas = dict.fromkeys(self._concepts["lemma"].to_pylist())
        self.words = {lemma: f"{i}-{_slug(lemma)}.html" for i, lemma in enumerate(lemmas)}
        """The page of each noun, in the folder `words`."""
        style = asset("inspection.css")
        self._style = {"style": Markup(style), "style_hash": policy_hash(style)}
        self._template = template("atlas.html.j2")

    def index(self) -> str:
        """Make the first page: all nouns."""
        models = [run.facts.made_by.get("model", {}) for run in self._atlas.runs]
        note = f"{len(self.words)} nouns in {sum(run.n_used for run in self._atlas.runs)} images."
        title = f"Atlas of {', '.join(str(model.get('id')) for model in models)}"
        return self._page(title, note, [self._section("Nouns", self._concepts, "")], home="")

    def word(self, lemma: str) -> tuple[str, list[str]]:
        """Make the page of a noun; return it with the names of its neurons."""
        table = self._atlas.word(lemma, self._limit)
        names = list(dict.fromkeys(table["neuron"].to_pylist()))
        return self._page(lemma, MEAN, [self._section("Neurons", table, UP)]), names

    def neuron(self, name: str) -> str:
        """Make the page of a neuron."""
        page = self._atlas.neuron(name, self._limit)
        sections = [
            self._section("Says", page.says, UP),
            self._section("Gives most to", page.concepts, UP),
            self._section("Gave most on", page.images, UP),
        ]
        return self._page(name, MEAN, sections)

    def _section(self, title: str, table: pa.Table, up: str) -> Section:
        def link(column: str, value: str) -> str | None:
            if column in ("neuron", "best"):
                return f"{up}neurons/{value}.html"
            return f"{up}words/{self.words[value]}" if column == "lemma" and value in self.words else None

        return section(title, table, link)

    def _page(self, title: str, note: str, sections: list[Section], *, home: str = f"{UP}index.html") -> str:
        made_by = {name: run.facts.made_by for name, run in zip(self._atlas.names, self._atlas.runs, strict=True)}
        provenance = text.flatten(made_by if len(made_by) > 1 else next(iter(made_by.values())))
        return self._template.render(
            title=title,
            note=" ".join([note, *self._atlas.notes]),
            sections=sections,
            home=home,
            provenance=provenance,
            **self._style,
        )


def write_site(atlas: Atlas, folder: str | os.PathLike[str], *, limit: int = 20, progress: Progress = untold) -> int:
    """Write a page for each noun, and for each neuron on one of these pages.

    Args:
        atlas: The atlas.
        folder: A new or empty folder, or an older site.
        limit: How many neurons a noun's page has.
        progress: Told how many pages are written.

    Returns:
        How many pages there are.

    Raises:
        SettingError: the folder holds other things, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    if folder.is_dir() and (others := {one.name for one in folder.iterdir()} - {"index.html", "words", "neurons"}):
        raise SettingError(f"{folder} holds other files.", seen=", ".join(sorted(others)[:5]), fix="Name a new folder.")
    site = Site(atlas, limit)
    for place in (folder / "words", folder / "neurons"):
        place.mkdir(parents=True, exist_ok=True)
    neurons = dict[str, None]()
    for i, (lemma, file) in enumerate(site.words.items(), start=1):
        page, names = site.word(lemma)
        neurons |= dict.fromkeys(filter(_is_neuron, names))
        _write(folder / "words" / file, page)
        progress("nouns", i, len(site.words))
    for i, name in enumerate(neurons, start=1):
        _write(folder / "neurons" / f"{name}.html", site.neuron(name))
        progress("neurons", i, len(neurons))
    _write(folder / "index.html", site.index())
    return 1 + len(site.words) + len(neurons)


def section(title: str, table: pa.Table, link: Callable[[str, str], str | None]) -> Section:
    """Make what a page shows of a table.

    Args:
        title: Its heading.
        table: The table.
        link: Where a text leads, given its column; None: nowhere. It is asked of true names of neurons, and of nouns.
    """

    def cell(column: str, value: Any) -> Cell:
        leads = column == "lemma" or (column in ("neuron", "best") and _is_neuron(value))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return Cell(_shown(value), link(column, str(value)) if leads else None, is_number)

    return Section(title, table.column_names, [[cell(*one) for one in row.items()] for row in table.to_pylist()])


def _write(path: Path, page: str) -> None:
    write_whole(path, page.encode("utf-8", "replace"))


def _is_neuron(name: object) -> bool:
    """Whether a text is the name of a neuron, which is a safe name of a file, too."""
    try:
        return isinstance(name, str) and str(Neuron.parse(name)) == name
    except SettingError:
        return False


def _slug(lemma: str) -> str:
    """Make what can be read of a noun in the name of a file; nouns can be any text."""
    return re.sub(r"[^a-z0-9]+", "-", lemma.lower())[:40].strip("-")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " · ".join(text.printable(str(one)) for one in value)
    if isinstance(value, float):
        return text.number(value)
    return "" if value is None else str(value)
