"""Random neurons to compare with: of the same blocks, and together as loud as those that they stand for.

What neurons do to the stream goes with how much they write, and top neurons are among the loudest of their blocks: as
many others cannot be as loud. So a stand-in set may hold more neurons than the set that it stands for; where even all
others are too quiet, `Matched.loudness` says how far they fall short.
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
"""A stand-in is drawn from this many neurons of the block that are nearest in loudness."""
TOLERANCE = 0.02
"""How far the loudness of a stand-in set may be from that of what it stands for, as a share of it."""
DRAWS = 20
"""Stand-in sets of one set of neurons."""


@dataclass(frozen=True, eq=False)
class Matched:
    """Sets of random neurons that stand for one set."""

    sets: list[Int[Tensor, "_"]]
    """Slots."""
    loudness: float
    """Of a set over that of what it stands for, mean over sets: 1 within `TOLERANCE` where the blocks allow it."""

    @property
    def n_neurons(self) -> float:
        """In a set, mean."""
        return sum(map(len, self.sets)) / len(self.sets)


def column_norms(anatomy: Anatomy) -> list[Float[Tensor, "neurons"]]:
    """Length of each column of each FFN, those of experts one after the other; float32, on the CPU."""
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
    """|activation| * |column| of each slot: how much it writes.

    Args:
        activations: Of each FFN's slots at one position.
        experts: Per FFN: the experts that the slots belong to.
        norms: From `column_norms`.
    """
    found = []
    for fired, of, norm in zip(activations, experts, norms, strict=True):
        if of is not None:
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
    """Sets of random neurons like `chosen`: of each FFN as much loudness, none of them in `chosen`, none twice.

    For each neuron chosen, the loudest first, one of its FFN is drawn among the nearest in loudness; then more, until
    the set is as loud. None of them may exceed what is still missing.

    Args:
        slot_starts: Where the slots of each FFN begin.
        loud: Of each slot, from `loudness`.
        chosen: Slots.
        draws: How many sets.
        seed: The same seed gives the same sets.
        as_many: One for each neuron chosen, however loud they are together: for what is a mean over neurons.
    """
    chance = random.Random(seed)
    ends = [*slot_starts[1:].tolist(), len(loud)]
    ffns = torch.bucketize(chosen, slot_starts, right=True) - 1
    sets: list[list[int]] = [[] for _ in range(draws)]
    for i in ffns.unique().tolist():
        mine = chosen[ffns == i]
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
    """Some of `free`, which is sorted by its loudness `louds`, as loud (or as many) as `wanted`, which falls."""
    total = missing = sum(wanted)
    drawn: list[int] = []
    while len(drawn) < len(wanted) if as_many else missing > TOLERANCE * total:
        n = len(louds) if as_many else bisect_right(louds, missing + TOLERANCE * total)  # the rest would overshoot
        if not n:
            break
        aim = wanted[len(drawn)] if len(drawn) < len(wanted) else missing
        low = max(0, min(bisect_left(louds, aim) - NEAREST // 2, n - NEAREST))
        place = low + int(chance.random() * (min(n, low + NEAREST) - low))
        drawn.append(free.pop(place))
        missing -= louds.pop(place)
    return drawn
