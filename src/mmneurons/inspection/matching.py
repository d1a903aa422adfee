"""Random neurons to compare with: of the same blocks and as loud as those that they stand for."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.replay import Replay

NEAREST = 20
"""A stand-in is drawn from this many neurons of the block that are nearest in loudness."""


def column_norms(anatomy: Anatomy) -> list[Float[Tensor, "neurons"]]:
    """Length of each column of each FFN, those of experts one after the other; float32, on the CPU."""
    norms = []
    for ffn in anatomy.ffns:
        experts = [None] if ffn.n_experts is None else range(ffn.n_experts)
        parts = [chunk.float().norm(dim=0).cpu() for e in experts for _, chunk in weights.chunks(ffn.module, e)]
        norms.append(torch.cat(parts))
    return norms


def loudness(replay: Replay, norms: list[Float[Tensor, "neurons"]]) -> Float[Tensor, "slots"]:
    """|activation| * |column| of each slot: how much it writes."""
    found = []
    for ffn, fired, of, norm in zip(replay.anatomy.ffns, replay.activations, replay.experts, norms, strict=True):
        if of is not None:
            norm = norm.view(-1, ffn.n_neurons)[of].flatten()
        found.append(fired.abs() * norm)
    return torch.cat(found)


def matched(
    replay: Replay, loud: Float[Tensor, "slots"], chosen: Int[Tensor, "k"], draws: int, seed: int
) -> list[Int[Tensor, "k"]]:
    """Sets of random neurons like `chosen`: for each one of the same FFN, among the nearest in loudness.

    None of them is one of `chosen`; within a set all differ, unless an FFN has no more neurons; where all of an FFN
    was chosen, nothing stands in and the sets are that much smaller.

    Args:
        replay: The step.
        loud: From `loudness`.
        chosen: Slots.
        draws: How many sets.
        seed: The same seed gives the same sets.
    """
    random = torch.Generator().manual_seed(seed)
    ends = torch.cat([replay.slot_starts[1:], torch.tensor([replay.n_slots])])
    ffns = torch.bucketize(chosen, replay.slot_starts, right=True) - 1
    sets: list[list[int]] = [[] for _ in range(draws)]
    for i in ffns.unique().tolist():
        free = torch.arange(int(replay.slot_starts[i]), int(ends[i]))
        free = free[~torch.isin(free, chosen)]
        if not len(free):  # all of the FFN was chosen: nothing is like it
            continue
        ordered = free[loud[free].argsort()]
        for drawn in sets:
            left = ordered
            for slot in chosen[ffns == i].tolist():
                place = int(torch.searchsorted(loud[left].contiguous(), loud[slot]))
                low = max(0, min(place - NEAREST // 2, len(left) - NEAREST))
                near = left[low : low + NEAREST]
                pick = int(near[torch.randint(len(near), (1,), generator=random)])
                drawn.append(pick)
                left = left[left != pick] if len(left) > 1 else ordered
    return [torch.tensor(drawn) for drawn in sets]
