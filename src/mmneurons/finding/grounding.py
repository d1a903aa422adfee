"""Grounded or not: how much of a noun the model's own image tokens say.

The residual stream at each image token is read by the final norm and the unembedding behind every block; the largest
probability that a noun has anywhere is its *internal confidence*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mmneurons import pocket
from mmneurons.errors import SettingError, WordError
from mmneurons.finding.calibration import Calibration, shipped
from mmneurons.finding.grounded import Grounded
from mmneurons.finding.maps import all_positions
from mmneurons.finding.rereading import keep_positions
from mmneurons.finding.scoring import Target
from mmneurons.vlm.context import hooked
from mmneurons.vlm.grid import Grids, PatchGrid
from mmneurons.vlm.tokens import token_of
from mmneurons.vlm.vlm import VLM, Inputs

AT_ONCE = 2**25
"""Logits that are held at a time."""


def ground(
    vlm: VLM,
    inputs: Inputs,
    grids: Grids,
    targets: Sequence[Target],
    captions: Sequence[str],
    calibration: Calibration | None,
) -> list[Grounded]:
    """Tell of each word whether the image tokens say it, and where; one more pass over the prompts.

    Args:
        vlm: The model.
        inputs: Of the prompts.
        grids: Where their pictures lie.
        targets: The words.
        captions: The answer to each prompt.
        calibration: What confidence means in this model; None: it is told as it is.

    Source: Jiang et al., Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations, ICLR
        2025 (arXiv 2410.02762): their internal confidence. They look for the name of a class, we for a word of a
        caption: as it stands there, or in the singular, whichever is said more.
    """
    if not targets:
        return []
    best = [_Best(target.row, _forms(vlm, target)) for target in targets]
    keep = keep_positions(all_positions(grids))

    # Read block by block as they run: all of their outputs together would not fit.
    def left(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        stream = keep(output if isinstance(output, Tensor) else output[0])
        for row in {one.row for one in best}:
            n_patches = sum(len(grid.positions) for grid in grids[row])
            _read(vlm, stream[row, :n_patches], layer, [one for one in best if one.row == row])

    blocks = enumerate(vlm.anatomy.blocks)
    with vlm.alone(), hooked(partial(b.module.register_forward_hook, partial(left, layer)) for layer, b in blocks):
        vlm.read(inputs)
    found = []
    for one, target in zip(best, targets, strict=True):
        judged_by = None
        if calibration is not None and calibration.judges(target.word.lemma):
            judged_by = None if calibration.has_longer(target.word, captions[target.row]) else calibration
        found.append(_grounded(grids[one.row], one, judged_by))
    return found


def calibration_for(vlm: VLM, given: object) -> Calibration | None:
    """The calibration given, checked, or, of None, the one that is shipped with the pocket model.

    Raises:
        SettingError: the one given was made with another model, or is none, such as the name of its file.
    """
    facts = vlm.facts
    if given is not None:
        if not isinstance(given, Calibration):
            raise SettingError(
                "A calibration is a mmneurons.Calibration.",
                seen=f"calibration={given!r}"[:200],
                fix='calibration=mmneurons.Calibration.load("calibration.json")',
            )
        given.check_model(facts)
        return given
    own = shipped(pocket.folder()) if vlm.is_pocket else None
    return own if own is not None and own.fits(facts) else None


@dataclass(eq=False)
class _Best:
    """One word, and where the image tokens say it most, as far as they are read."""

    row: int
    token_ids: list[int]
    confidence: float = 0.0
    layer: int = 0
    place: int = 0
    """The patch, counted through all pictures of the prompt."""


def _forms(vlm: VLM, target: Target) -> list[int]:
    """The tokens that a word is looked for by: image tokens know neither its plural nor a capital letter."""
    try:
        return list({target.token_id, token_of(vlm.tokenizer, target.word.lemma)})
    except WordError:  # no word, or one that is written in parts of characters
        return [target.token_id]


def _read(vlm: VLM, stream: Float[Tensor, "patches hidden"], layer: int, best: Sequence[_Best]) -> None:
    """Read the stream behind one block, and note of each word where it is said more than anywhere before."""
    step = max(1, AT_ONCE // vlm.anatomy.vocab)
    for start in range(0, len(stream), step):
        logits = vlm.anatomy.logits(stream[start : start + step])
        totals = logits.logsumexp(-1)
        for one in best:
            said = (logits[:, one.token_ids].amax(-1) - totals).exp()
            place = int(said.argmax())
            if (confidence := float(said[place])) > one.confidence:
                one.confidence, one.layer, one.place = min(confidence, 1.0), layer, start + place


def _grounded(grids: Sequence[PatchGrid], best: _Best, judged_by: Calibration | None) -> Grounded:
    """Find a patch in its picture, and what the confidence means."""
    picture, place = 0, best.place
    while place >= len(grids[picture].positions):
        place -= len(grids[picture].positions)
        picture += 1
    likely = seen = None
    if judged_by is not None:
        likely = judged_by.probability(best.confidence)
        seen = judged_by.seen(likely)
    row, column = divmod(place, grids[picture].columns)
    return Grounded(best.confidence, best.layer, picture, row, column, likely, seen)
