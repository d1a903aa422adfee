"""What one visitor has done: pictures shown, patches made, which of them are switched on.

Sessions share the model, but no patch: a visitor's patches are on it while their own request runs, and are taken back
exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.report.text import printable
from mmneurons.settings import Question
from mmneurons.vlm.vlm import VLM
from mmneurons.web.limits import Limits, within


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that was shown to a model, and how it was asked about."""

    model: str
    """The name of the model among those of the server."""
    image: Image.Image
    name: str
    question: Question
    caption: str
    """What the model said of it, with the patches that were on."""


class Session:
    """A session belongs to one visitor, and to one open page.

    It is no dataclass: Gradio would copy its fields, lock and all, instead of asking it for a new one.
    """

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        """The last pictures, the newest last."""
        self.patches: list[tuple[str, Patch]] = []
        """The patches in the order in which they came, each with the name of the model that it is for."""
        self.on: set[str] = set()
        """The hashes of those that are switched on."""
        self.stand_ins: dict[tuple[Any, ...], Neuron] = {}
        """The random neuron that was drawn last beside one under the slider, by what it was drawn for."""
        self.stop = threading.Event()
        """Set to end the request that is running."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """Make a new session: Gradio copies the initial value for every page that is opened."""
        return Session()

    def active(self, model: str) -> list[Patch]:
        """Return the patches for a model that are switched on."""
        return [patch for name, patch in self.patches if name == model and patch.hash in self.on]

    def last(self, model: str) -> Shown:
        """Return the newest picture that this model was shown.

        Raises:
            SettingError: there is none.
        """
        mine = [one for one in self.shown if one.model == model]
        if not mine:
            raise SettingError("There is no picture yet.", fix="Give one under Find first.")
        return mine[-1]

    def show(self, one: Shown, limits: Limits) -> None:
        """Remember a picture, and forget the oldest where there are too many."""
        self.shown = [*self.shown, one][-limits.pictures :]

    def add(self, model: str, patch: Patch, limits: Limits) -> None:
        """Put a patch on the stack, switched on.

        Raises:
            SettingError: it is there already, or there are too many.
        """
        if any(patch.hash == other.hash for _, other in self.patches):
            raise SettingError("This patch is in the list already.")
        if len(self.patches) >= limits.patches:
            raise SettingError(f"There are {limits.patches} patches already.", fix="Undo one first.")
        self.patches.append((model, patch))
        self.on.add(patch.hash)

    def undo(self) -> Patch:
        """Take the newest patch off the stack.

        Raises:
            SettingError: there is none.
        """
        if not self.patches:
            raise SettingError("There is nothing to undo.")
        _, patch = self.patches.pop()
        self.on.discard(patch.hash)
        return patch


def title(patch: Patch) -> str:
    """Write what a patch does in one line: 'dog → cat, 400 columns, 6ba7c1'."""
    # Provenance of an uploaded file can hold anything, of any type.
    source, target = (printable(str(patch.provenance.get(name) or ""))[:40] for name in ("source", "target"))
    change = f"{source} → {target or 'anything else'}" if source else "a patch without a name"
    return f"{change}, {len(patch.neurons)} columns, {patch.hash[:6]}"


@contextmanager
def patched(vlm: VLM, patches: Sequence[Patch], limits: Limits, stop: threading.Event | None = None) -> Iterator[None]:
    """Give this thread the model with some patches on it inside the `with`; they are taken back whatever happens."""
    with vlm.alone(), ExitStack() as applied:
        for patch in patches:
            applied.enter_context(patch.applied(vlm))
        applied.enter_context(within(vlm, limits, stop or threading.Event()))
        yield
