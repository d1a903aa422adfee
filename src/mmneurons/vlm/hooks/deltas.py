"""Changes of columns of `w_out` that act by hooks: differentiable, to be learned, and no weight is written to.

change = Deltas.zero(columns, device)
with change.added():
    loss_of(vlm).backward()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import restored


@dataclass(frozen=True, eq=False)
class Deltas:
    """What is added to columns of dense FFNs: vectors of their own, or combinations of directions that all share."""

    columns: Columns
    rows: Mapping[int, Float[Tensor, "n width"]]
    """Per FFN, float32, on its device: what is added to each column, or its coefficients of `directions`."""
    directions: Float[Tensor, "width hidden"] | None = None
    """float32."""
    units: Mapping[int, float] = field(default_factory=dict)
    """Per FFN, what `rows` are multiplied by; 1 where nothing is said."""

    @staticmethod
    def zero(columns: Columns, device: torch.device | None = None) -> Deltas:
        """The change that changes nothing."""
        hidden = columns.anatomy.hidden
        return Deltas(
            columns,
            {i: torch.zeros(len(n), hidden, device=device, dtype=torch.float32) for i, n in columns.indices.items()},
        )

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned: `rows`, then `directions`."""
        return [*self.rows.values(), *([] if self.directions is None else [self.directions])]

    def scaled(self, i: int) -> Float[Tensor, "n width"]:
        """The rows of one FFN, times its unit."""
        return self.rows[i] * self.units[i] if i in self.units else self.rows[i]

    @restored
    def added(self) -> Iterator[Deltas]:
        """Within it the model runs as if the columns were changed."""

        def hook(i: int) -> RemovableHandle:
            return self.columns.anatomy.ffns[i].module.register_forward_hook(partial(self._add, i))

        with hooked(partial(hook, i) for i in self.rows):
            yield self

    def _add(self, i: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given, mine, rows = args[0], self.columns.indices[i], self.scaled(i)
        # Only the neurons whose columns change are picked out; of all of them no copy is made.
        fired = given if len(mine) == given.shape[-1] else given[..., mine.to(given.device)]
        # Summed in float32 whatever the model's dtype, then rounded to what it is added to.
        written = fired.to(rows.dtype) @ rows.to(given.device)
        if self.directions is not None:
            written = written @ self.directions.to(given.device)
        return output + written.to(output.dtype)


def all_columns(anatomy: Anatomy, ffns: Sequence[int]) -> Columns:
    """Every column of some FFNs, by their numbers."""
    return Columns(anatomy, {i: torch.arange(anatomy.ffns[i].size) for i in ffns})
