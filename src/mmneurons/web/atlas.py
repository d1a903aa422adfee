"""What the app shows of runs: the nouns of a data set, the neurons of a noun, and the nouns and images of a neuron."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmneurons.atlas.atlas import Atlas
from mmneurons.errors import SettingError
from mmneurons.report.atlas import MEAN, Section, section
from mmneurons.vlm.vlm import VLM
from mmneurons.web import views

if TYPE_CHECKING:
    import pyarrow as pa

NOUNS, NEURONS = 100, 20
"""How many rows the table of nouns has at most, and the table of a noun's neurons."""


class Runs:
    """The runs that a server was started with; one visitor asks them at a time, since the connection is one.

    Args:
        folders: The folders of the runs, all of one model.

    Raises:
        FormatError: a folder holds no run, or a damaged one.
        SettingError: runs of several models, or pyarrow is not installed.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._atlas = Atlas(list(folders))
        self._lock = threading.Lock()
        models = {str(run.facts.made_by.get("model", {}).get("weights_hash")) for run in self._atlas.runs}
        if len(models) > 1:
            raise SettingError("These runs are of several models.", fix="Start one app for each model.")
        (self._weights_hash,) = models

    def are_of(self, vlm: VLM) -> bool:
        """Whether the runs were made with the weights of a model."""
        return vlm.facts["weights_hash"] == self._weights_hash

    def word(self, word: str) -> str:
        """Make the page of a noun, its neurons, as HTML; of no word, the nouns that were said.

        Raises:
            SettingError: no image says the word.
        """
        with self._lock:
            if not word:
                return views.tables(self._noted(), [_section("Nouns that were said most", self._atlas.concepts(NOUNS))])
            found = self._atlas.word(word, NEURONS)
        return views.tables(self._noted(MEAN), [_section(f"Neurons of “{word}”", found)])

    def neuron(self, name: str) -> str:
        """Make the tables of a neuron as HTML; empty where it is among the top neurons of no noun."""
        with self._lock:
            try:
                page = self._atlas.neuron(name, NEURONS)
            except SettingError:
                return ""
        told = [_section("In the data set it gives most to", page.concepts), _section("Gave most on", page.images)]
        return views.tables(self._noted(MEAN), told)

    def _noted(self, *notes: str) -> str:
        """Join notes with what is to be told of these runs in any case."""
        return " ".join([*notes, *self._atlas.notes])


def _section(title: str, table: pa.Table) -> Section:
    """Make a table in which the name of a neuron leads to its page."""
    return section(title, table, lambda column, name: f"?neuron={name}" if column in ("neuron", "best") else None)
