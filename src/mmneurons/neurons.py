"""The name of a neuron: `L23.u6012`, or `L23.e5.u6012` inside a mixture of experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering

from mmneurons.errors import SettingError

_NAME = re.compile(r"L([0-9]{1,9})(?:\.e([0-9]{1,9}))?\.u([0-9]{1,9})")


@total_ordering
@dataclass(frozen=True)
class Neuron:
    """One column of the FFN output projection `w_out` of one block of the language model.

    Neurons are ordered by (layer, index), the order in which equal scores are listed.
    """

    layer: int
    """The block of the language model, counted from 0 at the embedding."""
    index: int
    """The column of that block's `w_out`, counted from 0."""
    expert: int | None = None
    """The expert that the column belongs to; None in a dense FFN."""

    def __lt__(self, other: Neuron) -> bool:
        return self._place < other._place

    def __str__(self) -> str:
        expert = "" if self.expert is None else f".e{self.expert}"
        return f"L{self.layer}{expert}.u{self.index}"

    @property
    def _place(self) -> tuple[int, int, int]:
        # None does not compare with numbers; a dense neuron sorts before those of experts.
        return self.layer, self.index, -1 if self.expert is None else self.expert

    @classmethod
    def parse(cls, name: str) -> Neuron:
        """Read a neuron from the name that `str()` gives it.

        Raises:
            SettingError: if `name` is not of that form.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise SettingError(
                f"'{name}' is not the name of a neuron.",
                fix="Write block and column, counted from 0: L23.u6012, or L23.e5.u6012 for expert 5.",
            )
        layer, expert, index = match.groups()
        return cls(int(layer), int(index), None if expert is None else int(expert))
