"""Hallucinations of the pocket model lowered: every figure of docs/results.md, Hallucination.

python benchmarks/hallucination.py
"""

from __future__ import annotations

import statistics
from typing import get_args

import numpy as np
import torch

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing.hallucination import DehallucinateSettings, Judged, dehallucinate, judge
from mmneurons.editing.patch import Patch
from mmneurons.inspection.hallucination import Chair, Pope, Vocabulary, pope
from mmneurons.inspection.items import read_items
from mmneurons.pocket.sets import Negatives
from mmneurons.vlm.vlm import VLM

SPLITS = 5
FIGURES = ("chair_i", "chair_s", "recall", "named")


def halves(n: int, seed: int) -> tuple[list[int], list[int]]:
    """To make a patch with, and to judge it on."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


def line(name: str, found: Chair, usual: Chair) -> str:
    """One row: figures, and by how much CHAIR-i and recall fell."""
    cells = [str(getattr(found, figure)) for figure in FIGURES]
    return (
        f"| {name} | {' | '.join(cells)} | {fall(found, usual, 'chair_i'):.3f} | {fall(found, usual, 'recall'):.3f} |"
    )


def fall(found: Chair, usual: Chair, figure: str) -> float:
    """Share by which a figure fell."""
    return 1 - getattr(found, figure).mean / getattr(usual, figure).mean


def asked(vlm: VLM, negatives: Negatives) -> Pope:
    """POPE on `pope-500`."""
    questions = pocket.pope(negatives)
    images = [question.scene.image for question in questions]
    return pope(vlm, images, [q.text for q in questions], [q.answer for q in questions], batch_size=50)


def main() -> None:
    """Make and judge patches on halves of the set; POPE and locality of the first."""
    vlm = mmn.load()
    items = read_items("pocket:hallucination-500")
    images, objects = [item.image() for item in items], [item.objects or () for item in items]
    vocabulary = Vocabulary(objects)
    kept = [item.image() for item in read_items("pocket:reference-400")]
    reference = mmn.make_reference(vlm, kept, pocket.facts()[::4], batch_size=50)
    settings = DehallucinateSettings(say="image", batch_size=50)
    judged: list[Judged] = []
    patches: list[Patch] = []
    for seed in range(SPLITS):
        made_with, others = halves(len(items), seed)
        patch = dehallucinate(
            vlm, [images[i] for i in made_with], [objects[i] for i in made_with], reference=reference, settings=settings
        )
        one = judge(vlm, patch, [images[i] for i in others], [objects[i] for i in others], vocabulary)
        judged.append(one)
        patches.append(patch)
        print(line(f"{seed}: before", one.before, one.before))
        print(line(f"{seed}: with the patch", one.after, one.before))
        print(line(f"{seed}: rival", one.rival, one.before), flush=True)
    for name in ("after", "rival"):
        falls = [[fall(getattr(one, name), one.before, f) for one in judged] for f in ("chair_i", "recall")]
        print(f"| mean of {SPLITS}, {name} | {statistics.mean(falls[0]):.3f} | {statistics.mean(falls[1]):.3f} |")
    unrelated = [item.image() for item in read_items("pocket:locality-500")]
    usual, polled = vlm.caption(unrelated, batch_size=50), {n: asked(vlm, n) for n in get_args(Negatives)}
    with patches[0].applied(vlm):
        now, again = vlm.caption(unrelated, batch_size=50), {n: asked(vlm, n) for n in get_args(Negatives)}
    print(f"locality-500 unchanged: {statistics.mean(a == b for a, b in zip(usual, now, strict=True)):.3f}")
    for negatives, before in polled.items():
        print(negatives, before, again[negatives], sep="\n  ")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
