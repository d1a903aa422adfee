"""The pictures of the server that edits are made and judged with, and what the unedited model says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from mmneurons.progress import Progress, untold
from mmneurons.report.edit import Shown as Picture
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

EDIT, STRIP, REFERENCE = 7, 12, 60
"""The most pictures that an edit is made with beside the visitor's, that a strip shows, and that are to stay."""


class Split(NamedTuple):
    """The pictures of a pool, for an edit of one word; no picture is in two of these lists."""

    edit: list[Image.Image]
    """Of these the model says the word; the edit is made with them."""
    held_out: list[Image.Image]
    """Of these too; it is judged on them."""
    reference: list[Image.Image]
    """Of these it does not; the edit is made to leave them as they are."""
    unrelated: list[Image.Image]
    """Nor of these; it is judged on them."""


def _none(word: str) -> Sequence[Picture]:
    return ()


@dataclass(eq=False)
class Pool:
    """A pool holds pictures that the server was started with."""

    vlm: VLM
    items: Sequence[Picture]
    more: Callable[[str], Sequence[Picture]] = _none
    """Gives further pictures that show a word, where the server can make them."""
    said: list[str] | None = None
    """What the unedited model says of the items, once it was asked."""

    def split(self, word: str, progress: Progress = untold) -> Split:
        """Split the pictures for an edit of a word: every other one to make it with, the rest to judge it on.

        The model must be unedited: which picture is which is decided by what it then says.
        """
        if self.said is None:
            self.said = self._ask(self.items, progress)
        more = self.more(word)
        items, said = [*more, *self.items], [*self._ask(more, progress), *self.said]
        shows = [i for i, text in enumerate(said) if says(text, word)]
        others = [i for i in range(len(items)) if i not in set(shows)]
        parts = (shows[::2][:EDIT], shows[1::2][:STRIP], others[::2][:REFERENCE], others[1::2][:STRIP])
        return Split(*([items[i].image() for i in part] for part in parts))

    def _ask(self, items: Sequence[Picture], progress: Progress) -> list[str]:
        """Let the model, as it is now, say what is in each picture."""
        said: list[str] = []
        for batch in ask(self.vlm, [item.image() for item in items], Question()) if items else ():
            said += batch.answers.texts
            progress("looking at the server's pictures", len(said), len(items))
        return said
