"""Grounded or not: how much of a noun the model's own image tokens say.

The residual stream at each image token is read by the final norm and the unembedding after every block; the largest
probability that a noun's token has anywhere is its *internal confidence*.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons import pocket
from mmneurons.finding.calibration import Calibration, shipped
from mmneurons.finding.grounded import Grounded
from mmneurons.finding.maps import all_positions
from mmneurons.finding.rereading import keep_positions
from mmneurons.finding.scoring import Target
from mmneurons.vlm.context import hooked
from mmneurons.vlm.grid import Grids
from mmneurons.vlm.vlm import VLM, Inputs

AT_ONCE = 2**25
"""Logits that are held at a time."""


def ground(
    vlm: VLM,
    inputs: Inputs,
    grids: Grids,
    targets: Sequence[Target],
    probabilities: Sequence[float],
    calibration: Calibration | None,
) -> list[Grounded]:
    """Tell of each word whether the image tokens say it, and where; one more pass over the prompts.

    Args:
        vlm: The model.
        inputs: Of the prompts.
        grids: Where their pictures lie.
        targets: The words.
        probabilities: The model's next-token probability of each.
        calibration: What confidence means in this model; None: it is told as it is.

    Source: Jiang et al., Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations, ICLR
        2025 (arXiv 2410.02762): their internal confidence.
    """
    if not targets:
        return []
    seen = _block_outputs(vlm, inputs, all_positions(grids))
    confidences, layers, places = _largest(vlm, seen, grids, targets)
    return [
        _grounded(grids[target.row], target, confidence, layer, place, probability, calibration)
        for target, confidence, layer, place, probability in zip(
            targets, confidences, layers, places, probabilities, strict=True
        )
    ]


def calibration_for(vlm: VLM, given: Calibration | None) -> Calibration | None:
    """The calibration given, checked, or the one that is shipped with the pocket model.

    Raises:
        SettingError: the one given was made with another model.
    """
    if given is not None:
        given.check_model(str(vlm.facts["weights_hash"]))
        return given
    own = shipped(pocket.folder()) if vlm.is_pocket else None
    return own if own is not None and own.weights_hash == vlm.facts["weights_hash"] else None


def _block_outputs(
    vlm: VLM, inputs: Inputs, positions: Int[Tensor, "rows patches"]
) -> list[Float[Tensor, "rows patches hidden"]]:
    """The residual stream behind every block, at the image tokens of each row."""
    keep, seen = keep_positions(positions), list[Tensor]()

    def left(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(keep(output if isinstance(output, Tensor) else output[0]).clone())

    with vlm.alone(), hooked(partial(b.module.register_forward_hook, left) for b in vlm.anatomy.blocks):
        vlm.read(inputs)
    return seen


def _largest(
    vlm: VLM, seen: Sequence[Float[Tensor, "rows patches hidden"]], grids: Grids, targets: Sequence[Target]
) -> tuple[list[float], list[int], list[int]]:
    """Of each target the largest probability of its token at any patch behind any block: how much, block, patch."""
    best = torch.zeros(len(targets), dtype=torch.float32)
    layers, places = [0] * len(targets), [0] * len(targets)
    step = max(1, AT_ONCE // vlm.anatomy.vocab)
    for row in {target.row for target in targets}:
        mine = [i for i, target in enumerate(targets) if target.row == row]
        tokens = [targets[i].token_id for i in mine]
        n_patches = sum(len(grid.positions) for grid in grids[row])
        for layer, stream in enumerate(seen):
            for start in range(0, n_patches, step):
                logits = vlm.anatomy.logits(stream[row, start : min(start + step, n_patches)])
                said = (logits[:, tokens] - logits.logsumexp(-1, keepdim=True)).exp().cpu()
                for i, value, place in zip(mine, *said.max(0), strict=True):
                    if value > best[i]:
                        best[i], layers[i], places[i] = value, layer, start + int(place)
    return best.tolist(), layers, places


def _grounded(
    grids: Sequence[Any],
    target: Target,
    confidence: float,
    layer: int,
    place: int,
    probability: float,
    calibration: Calibration | None,
) -> Grounded:
    """Find a patch in its picture, and what the confidence means."""
    picture = 0
    while place >= len(grids[picture].positions):
        place -= len(grids[picture].positions)
        picture += 1
    likely = seen = None
    if calibration is not None and calibration.judges(target.word.lemma):
        likely = calibration.probability(target.word.lemma, confidence, probability)
        seen = calibration.seen(likely)
    columns = grids[picture].columns
    return Grounded(confidence, layer, picture, place // columns, place % columns, likely, seen)
