"""The numbers of the top neurons of a whole batch, as arrays: what a sweep keeps of millions, without objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmneurons.finding.scoring import Scored


@dataclass(frozen=True, eq=False)
class TopNumbers:
    """Top neurons of several words with their numbers; every array is of shape (words, ranks)."""

    layer: np.ndarray
    expert: np.ndarray
    """The expert of each, -1 in a dense FFN."""
    index: np.ndarray
    score: np.ndarray
    """Float32, as it was worked out; so are the next two."""
    activation: np.ndarray
    baseline: np.ndarray | None
    """What each activation is compared with; None: zero."""


def top_numbers(scored: Scored) -> TopNumbers:
    """Return the numbers that `describe` puts into its NeuronFindings, for the same neurons in the same order."""
    anatomy, listed = scored.trace.anatomy, scored.ranked[:, : scored.choices.top].contiguous()
    # Slots -> places within an FFN, counted through all of its experts.
    ffns = scored.ffns_of(listed)
    starts = torch.nn.functional.pad(scored.slot_ends, (1, 0))[ffns]
    places = listed.cpu() - starts
    for i, experts in enumerate(scored.trace.experts):
        if experts is not None:
            mine, width = ffns == i, anatomy.ffns[i].n_neurons
            words = torch.nonzero(mine)[:, 0]
            places[mine] = experts.cpu()[words, places[mine] // width] * width + places[mine] % width
    widths = torch.tensor([ffn.n_neurons for ffn in anatomy.ffns])[ffns]
    fused = torch.tensor([ffn.n_experts is not None for ffn in anatomy.ffns])[ffns]
    return TopNumbers(
        layer=torch.tensor([ffn.layer for ffn in anatomy.ffns])[ffns].numpy(),
        expert=torch.where(fused, places // widths, -1).numpy(),
        index=(places % widths).numpy(),
        score=scored.scores.gather(1, listed).cpu().numpy(),
        activation=scored.activations.gather(1, listed).cpu().numpy(),
        baseline=None if scored.baseline is None else scored.baseline.gather(1, listed).cpu().numpy(),
    )
