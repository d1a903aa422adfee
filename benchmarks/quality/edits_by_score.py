"""Edits of the columns that each score ranks first for SOURCE, judged: a table of docs/measurements/results.md.

    python -m benchmarks.quality.edits_by_score DIR          # goes on where it was stopped
    python -m benchmarks.quality.edits table DIR             # what DIR holds, as Markdown

Everything but the choice of columns is as `mmneurons.edit` has it: strength, ridge, reference, images.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.finders import Finder, finder_scores
from mmneurons.data.dataset import read_items
from mmneurons.editing.edit import edit
from mmneurons.editing.evaluate_edits import Case, evaluate_edits
from mmneurons.maths.ranking import top_k
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.vlm.vlm import VLM

from .edits import RIVAL_PAIRS, images_of, made, reference_for

PAIRS = RIVAL_PAIRS[::2]
"""Two near, two far."""
SCORES: tuple[Finder, ...] = ("logit", "logprob", "paper", "activation", "gradient", "random")
CASES = (("last", 50), ("last", 400), ("all", 400), ("all", 50))
"""Of the last block, or of all; so many columns."""
UNRELATED_EVERY = 5
"""Locality is judged on every fifth image of `locality-500`."""


def ranked(vlm: VLM, source: str, score: Finder, scope: str, top: int, seed: int) -> list[Neuron]:
    """The neurons that a score ranks first: its mean over the steps of the edit images' answers that say SOURCE."""
    steps = steps_of(vlm, source, seed)
    mean = torch.stack([scores[score] for scores, _ in steps]).mean(0)
    replay = steps[0][1]
    first = 0 if scope == "all" else int(replay.slot_starts[-1])  # dense blocks: slots are neurons
    return [replay.neuron(first + int(slot)) for slot in top_k(mean[first:], top)]


@cache
def steps_of(vlm: VLM, source: str, seed: int) -> list[tuple[dict[Finder, Float[Tensor, "slots"]], Replay]]:
    """Every score of every neuron, at each step that says SOURCE; random numbers differ between images."""
    return [
        (one.scores, one.replay)
        for i, image in enumerate(images_of(source))
        for one in finder_scores(vlm, image, SCORES, words=[source], seed=seed + i)
    ]


def main() -> None:
    """Make, judge, keep."""
    folder, vlm = Path(sys.argv[1]), mmn.load()

    @cache
    def reference() -> mmn.Reference:
        return reference_for(vlm)

    def patch(name: str, pair: pocket.EditPair, neurons: tuple[Finder, str, int], seed: int) -> Patch:
        def make() -> Patch:
            mine = ranked(vlm, pair.source, *neurons, seed)
            images = images_of(pair.source)
            return edit(vlm, images, source=pair.source, target=pair.target, reference=reference(), neurons=mine)

        return made(folder, name, make)

    asked = {}
    for (scope, top), (number, pair), score in product(CASES, enumerate(PAIRS), SCORES):
        if (scope, score) == ("last", "gradient"):  # the same columns as logprob
            continue
        name = f"{score},{scope},{top}"
        make = partial(patch, f"{name}-{pair.source}", pair, (score, scope, top), 100 * number)
        asked[f"{name} {pair.source}"] = Case(make, pair.source, pair.target)
    evaluate_edits(
        vlm,
        asked,
        folder,
        edit=lambda source: read_items(f"pocket:edit/{source}"),
        held_out=lambda source: read_items(f"pocket:held-out/{source}"),
        unrelated=read_items("pocket:locality-500")[::UNRELATED_EVERY],
        texts=pocket.facts()[1::4],
        batch_size=50,
        progress=lambda name, done, total: print(f"{done:.1f} of {total}", flush=True),
    )


if __name__ == "__main__":
    main()
