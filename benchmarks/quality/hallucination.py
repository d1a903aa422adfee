"""Hallucinations of the pocket model lowered: every figure of docs/measurements/results.md, Hallucination.

    python -m benchmarks.quality.hallucination DIR 8000 half

Made with the first so many scenes of `hallucination-8000` and judged on `hallucination-500`; or made with half of the
latter and judged on the other half. Patches are kept in DIR; one that was stopped goes on.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.data.dataset import Item, read_items
from mmneurons.editing.answers import likeliest_tokens
from mmneurons.editing.dehallucinate import DehallucinateSettings, chair_change, dehallucinate
from mmneurons.editing.reference import Reference
from mmneurons.metrics.chair import Chair, Pope, Vocabulary, chair, pope
from mmneurons.patches.patch import Patch
from mmneurons.pocket.sets import Negatives
from mmneurons.vlm.vlm import VLM

FIGURES = ("chair_i", "chair_s", "recall", "named")
BATCH = 50
JUDGED_ON = "hallucination-500"
SCALES = (1.0, 0.85)
"""Of each patch: what is given up, and what stays."""
TAUGHT_STYLE = "other style"
"""The group whose icons the training scenes show too: figures are given without it as well."""


def sets_of(name: str) -> tuple[list[Item], list[Item]]:
    """What a patch is made with, and what it is judged on."""
    judged_on = read_items(f"pocket:{JUDGED_ON}")
    if name != "half":
        return read_items("pocket:hallucination-8000")[: int(name)], judged_on
    order = np.random.default_rng(0).permutation(len(judged_on)).tolist()
    halves = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    return [judged_on[i] for i in halves[0]], [judged_on[i] for i in halves[1]]


def reference_for(vlm: VLM) -> Reference:
    """What `mmneurons dehallucinate` takes for the pocket model."""
    images = [item.image() for item in read_items("pocket:reference-400")]
    return mmn.make_reference(vlm, images, pocket.facts()[::4], batch_size=BATCH)


def made(vlm: VLM, name: str, folder: Path, shown: list[Item], vocabulary: Vocabulary) -> Patch:
    """A patch, made once and kept."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        start = time.perf_counter()

        def tell(what: str, done: float, total: int) -> None:
            if what == "learning" and done == int(done):
                print(f"{name}: {done:.0f} of {total}, {time.perf_counter() - start:.0f} s", flush=True)

        patch = dehallucinate(
            vlm,
            [item.image() for item in shown],
            [item.objects or () for item in shown],
            vocabulary=vocabulary,
            reference=reference_for(vlm),
            settings=DehallucinateSettings(say="image", batch_size=BATCH),
            checkpoint=folder / f"{name}.part",
            progress=tell,
        )
        patch.save(path)
        (folder / f"{name}.part").unlink(missing_ok=True)
    return Patch.load(path)


def line(name: str, found: Chair, usual: Chair) -> str:
    """One row: figures, and by how much CHAIR-i and recall fell."""
    cells = [str(getattr(found, figure)) for figure in FIGURES]
    falls = []
    for figure in ("chair_i", "recall"):
        before = getattr(usual, figure).mean
        falls.append(f"{1 - getattr(found, figure).mean / before:.3f}" if before else "")
    return f"| {name} | {' | '.join([*cells, *falls])} |"


def asked(vlm: VLM, negatives: Negatives) -> Pope:
    """POPE on `pope-500`; what is neither yes nor no is counted apart."""
    polled = pocket.pope(negatives)
    images = [question.scene.image for question in polled]
    return pope(vlm, images, [q.text for q in polled], [q.answer for q in polled], batch_size=BATCH)


@dataclass(frozen=True)
class Unedited:
    """What is to stay: answers about `locality-500`, the likeliest tokens of texts, POPE."""

    images: list[Image.Image]
    texts: tuple[str, ...]
    answers: list[str]
    read: torch.Tensor

    @staticmethod
    def of(vlm: VLM) -> Unedited:
        """As the model is now."""
        images, texts = [item.image() for item in read_items("pocket:locality-500")], tuple(pocket.facts()[1::4])
        return Unedited(
            images, texts, vlm.caption([*images], batch_size=BATCH), torch.cat(likeliest_tokens(vlm, texts))
        )

    def line(self, vlm: VLM) -> str:
        """How much of it stays now."""
        now = vlm.caption([*self.images], batch_size=BATCH)
        kept = statistics.mean(a == b for a, b in zip(self.answers, now, strict=True))
        read = (self.read == torch.cat(likeliest_tokens(vlm, self.texts))).double().mean()
        polled = [(negatives, asked(vlm, negatives)) for negatives in get_args(Negatives)]
        f1 = ", ".join(f"{negatives} {found.f1:.3f}" for negatives, found in polled)
        neither = ", ".join(f"{found.neither:.3f}" for _, found in polled)
        return f"locality-500 {kept:.3f}; T-locality@1 {read:.3f}; POPE F1: {f1}; neither yes nor no: {neither}"


def report(vlm: VLM, name: str, patch: Patch, others: list[Item], vocabulary: Vocabulary, usual: Unedited) -> None:
    """Judge one patch: without the style it was taught, over all, by group; and what else it changes."""
    objects = [item.objects or () for item in others]
    groups = {f"{JUDGED_ON}/{i}": group for i, group in enumerate(pocket.evaluation_set(JUDGED_ON).groups)}
    new = [item for item in others if groups[item.name] != TAUGHT_STYLE]
    without = chair_change(vlm, patch, [item.image() for item in new], [item.objects or () for item in new], vocabulary)
    judged = chair_change(vlm, patch, [item.image() for item in others], objects, vocabulary)
    for title, found in ((f"{name} without {TAUGHT_STYLE}", without), (name, judged)):
        for state in ("before", "after", "rival"):
            print(line(f"{title}: {state}", getattr(found, state), found.before), flush=True)
    for group in dict.fromkeys(groups.values()):
        mine = [i for i, item in enumerate(others) if groups[item.name] == group]
        there = [objects[i] for i in mine]
        first, second = (chair([judged.texts[i][k] for i in mine], there, vocabulary) for k in (0, 1))
        print(line(f"{name}: {group}, before", first, first))
        print(line(f"{name}: {group}, after", second, first), flush=True)
    with patch.applied(vlm):
        print(f"{name}: {usual.line(vlm)}", flush=True)


def main(folder: Path, names: list[str]) -> None:
    """Make and judge patches, whole and scaled."""
    vlm, vocabulary = mmn.load(), Vocabulary([pocket.nouns()])
    folder.mkdir(parents=True, exist_ok=True)
    usual = Unedited.of(vlm)
    print(f"before: {usual.line(vlm)}", flush=True)
    for name in names:
        shown, others = sets_of(name)
        patch = made(vlm, name, folder, shown, vocabulary)
        kilobytes = (folder / f"{name}.safetensors").stat().st_size / 1000
        print(f"{name}: {len(shown)} images, {len(patch.neurons)} columns, {kilobytes:.0f} kB", end="; ")
        print({part.layer: len(part.indices) for part in patch.parts}, flush=True)
        for scale in SCALES:
            report(vlm, f"{name} x {scale}", scale * patch, others, vocabulary, usual)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]), sys.argv[2:])
