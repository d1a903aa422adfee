"""Random neurons, as controls, that move the residual stream as far as the silence of some chosen neurons does.

Neurons that are together as loud (`controls`) need not change as much: what they write can add up or cancel, and later
blocks answer to it. Here what is equal is the change itself, all later blocks included: the length of the difference
made to the residual stream at one position, where the final norm reads it. It takes more than silence: the activations
of the random neurons are scaled, by a factor below 0 where to silence them is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.attribution.ablation import Replay

STEPS = 12
"""How often the scale is corrected by what is still missing from the change that is wanted."""


def changes(
    replay: Replay, sets: Sequence[Int[Tensor, "_"]], scales: Float[Tensor, "sets"] | None = None
) -> Float[Tensor, "sets"]:
    """Compute how far each set of neurons moves the residual stream when its activations are scaled.

    Args:
        replay: The step of an answer at which that is done.
        sets: Sets of slots; each is scaled by itself.
        scales: The factor of each set; None: 0, silence.

    Returns:
        Lengths, float32, on the CPU; 0 for an empty set.
    """
    values = None if scales is None else scales[:, None] * torch.cat(replay.activations)
    ((_, base),) = replay.streams([torch.tensor([], dtype=torch.long)])
    found = torch.empty(len(sets), dtype=torch.float32)
    for rows, streams in replay.streams(sets, values):
        found[rows] = (streams.float() - base.float()).norm(dim=-1).cpu()
    return found


def equally_changing(
    replay: Replay, chosen: Int[Tensor, "k"], sets: Sequence[Int[Tensor, "_"]]
) -> tuple[Float[Tensor, "sets"], Float[Tensor, "sets"]]:
    """Find the factor at which each set changes the residual stream as much as the silence of `chosen`.

    Args:
        replay: The step of an answer at which they are scaled.
        chosen: The slots of the neurons that are to be compared.
        sets: Sets of slots, such as those matched in loudness.

    Returns:
        The factor of each set, 0 for one as strong as `chosen` and below 0 for a weaker one; and its change over that
        of `chosen`. Both are those of the nearest that was tried: an empty set stays at 0, and changes nothing.
    """
    (wanted,) = changes(replay, [chosen])
    taken = torch.ones(len(sets), dtype=torch.float32)  # from the activations, in units of them: 1 is silence
    best, reached = taken.clone(), changes(replay, sets)
    nearest = reached
    low, high = torch.zeros_like(taken), torch.full_like(taken, torch.inf)
    for _ in range(STEPS):
        # The change is nearly linear in what is taken away; where it is not, between too little and too much.
        low = torch.where(reached < wanted, taken, low)
        high = torch.where(reached < wanted, high, taken)
        guess = torch.where(reached > 0, taken * wanted / reached, taken)
        taken = torch.where(((low < guess) & (guess < high)) | high.isinf(), guess, (low + high) / 2)
        reached = changes(replay, sets, 1 - taken)
        nearer = (reached - wanted).abs() < (nearest - wanted).abs()
        best, nearest = torch.where(nearer, taken, best), torch.where(nearer, reached, nearest)
    return 1 - best, nearest / wanted if wanted else torch.ones_like(nearest)
