"""Matched random neurons, as controls: of the same blocks as some chosen neurons, and together as loud.

What neurons do to the residual stream goes with how much they write, and top neurons are among the loudest of their
blocks: the same number of others cannot be as loud. So a matched set may hold more neurons than the set that it stands
for; where even all others together are too quiet, `Matched.loudness` says how far they fall short.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy

NEAREST = 20
"""A random neuron is drawn from this many of its block that are nearest in loudness to the one it stands for."""
TOLERANCE = 0.02
"""How far the loudness of a matched set may be from that of the chosen neurons, as a share of it."""
DRAWS = 20
"""How many matched sets are drawn for one set of neurons."""


@dataclass(frozen=True, eq=False)
class Matched:
    """The sets of random neurons that are matched to one set of chosen neurons."""

    sets: list[Int[Tensor, "_"]]
    """The slots of each set."""
    loudness: float
    """Loudness of a set over that of the chosen neurons, mean over sets: 1 within `TOLERANCE` where blocks allow it."""

    @property
    def n_neurons(self) -> float:
        """How many neurons a set holds, mean over sets."""
        return sum(map(len, self.sets)) / len(self.sets)


def column_norms(anatomy: Anatomy) -> list[Float[Tensor, "neurons"]]:
    """Compute the length of each column of each FFN, expert after expert; float32, on the CPU."""
    norms = []
    for ffn in anatomy.ffns:
        experts = [None] if ffn.n_experts is None else range(ffn.n_experts)
        parts = [chunk.float().norm(dim=0).cpu() for e in experts for _, chunk in weights.chunks(ffn.module, e)]
        norms.append(torch.cat(parts))
    return norms


def loudness(
    activations: Sequence[Float[Tensor, "_"]],
    experts: Sequence[Int[Tensor, "_"] | None],
    norms: Sequence[Float[Tensor, "neurons"]],
) -> Float[Tensor, "slots"]:
    """Compute how loud each slot is: |activation| * |column|, the length of what it writes.

    Args:
        activations: For each FFN the activations of its slots at one position.
        experts: For each FFN the experts that the slots belong to; None where it is dense.
        norms: The lengths of all columns, from `column_norms`.

    Returns:
        Not negative, the slots of all FFNs end to end.
    """
    found = []
    for fired, of, norm in zip(activations, experts, norms, strict=True):
        if of is not None:  # only the experts asked have slots: their columns alone, in the order of the slots
            norm = norm.view(-1, len(fired) // len(of))[of].flatten()
        found.append(fired.abs() * norm)
    return torch.cat(found)


def matched(
    slot_starts: Int[Tensor, "ffns"],
    loud: Float[Tensor, "slots"],
    chosen: Int[Tensor, "k"],
    draws: int,
    seed: int,
    *,
    as_many: bool = False,
) -> Matched:
    """Draw sets of random neurons to compare `chosen` with: as loud in each FFN, none of them chosen, none twice.

    For each neuron chosen, the loudest first, one of its FFN is drawn among the nearest in loudness; then more, until
    the set is as loud. None of them may exceed what is still missing.

    Args:
        slot_starts: The first slot of each FFN.
        loud: The loudness of each slot, from `loudness`.
        chosen: The slots of the neurons that are to be compared.
        draws: How many sets are drawn.
        seed: The same seed gives the same sets.
        as_many: Draw one neuron for each one chosen, however loud they are together: for figures that are means over
            neurons.
    """
    chance = random.Random(seed)
    ends = [*slot_starts[1:].tolist(), len(loud)]
    ffns = torch.bucketize(chosen, slot_starts, right=True) - 1
    sets: list[list[int]] = [[] for _ in range(draws)]
    for i in ffns.unique().tolist():
        mine = chosen[ffns == i]
        # Every set is drawn from the same list, sorted by loudness so that neighbours in it are alike.
        free = torch.arange(int(slot_starts[i]), ends[i])
        free = free[~torch.isin(free, mine)]
        free = free[loud[free].argsort(stable=True)]
        slots, louds, wanted = free.tolist(), loud[free].tolist(), loud[mine].sort(descending=True).values.tolist()
        for drawn in sets:
            drawn += _stand_ins(slots.copy(), louds.copy(), wanted, chance, as_many=as_many)
    total = float(loud[chosen].sum())
    made = [torch.tensor(drawn, dtype=torch.long) for drawn in sets]
    reached = sum(float(loud[one].sum()) for one in made) / draws
    return Matched(made, reached / total if total else 1.0)


def _stand_ins(
    free: list[int], louds: list[float], wanted: list[float], chance: random.Random, *, as_many: bool
) -> list[int]:
    """Draw some of `free`, sorted by rising loudness `louds`, as loud (or as many) as `wanted`, sorted by falling."""
    total = missing = sum(wanted)
    drawn: list[int] = []
    while len(drawn) < len(wanted) if as_many else missing > TOLERANCE * total:
        n = len(louds) if as_many else bisect_right(louds, missing + TOLERANCE * total)  # the rest would overshoot
        if not n:
            break
        aim = wanted[len(drawn)] if len(drawn) < len(wanted) else missing
        # The window of the NEAREST neurons around the loudness aimed at, moved so that it lies within the first n.
        low = max(0, min(bisect_left(louds, aim) - NEAREST // 2, n - NEAREST))
        place = low + int(chance.random() * (min(n, low + NEAREST) - low))
        drawn.append(free.pop(place))
        missing -= louds.pop(place)
    return drawn
