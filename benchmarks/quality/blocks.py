"""Dependence on the image and maps on objects, block by block: the reasons in docs/measurements/results.md.

python -m benchmarks.quality.blocks
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.attribution.finders import finder_scores
from mmneurons.data.dataset import Item, read_items
from mmneurons.inspection.sensitivity import HALF
from mmneurons.metrics.regions import match
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.grid import find_grids
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM

TOP = 10


def dependence(vlm: VLM, n_images: int) -> dict[str, list[bool]]:
    """Whether each top neuron loses half of its score with a blank image: by its block, and by what the noun is."""
    scenes = list(pocket.evaluation_set("find-500"))[:n_images]
    found: dict[str, list[bool]] = defaultdict(list)
    for finding, scene in zip(mmn.find(vlm, [s.image for s in scenes], blank=True), scenes, strict=True):
        for noun in finding.nouns:
            kind = "objects shown" if noun.lemma in scene.objects else "other nouns (places)"
            for neuron in noun.neurons:
                if neuron.lost_without_image is not None:
                    lost = neuron.lost_without_image >= HALF
                    found[f"block {neuron.neuron.layer}"].append(lost)
                    found[kind].append(lost)
    return found


def maps(vlm: VLM, item: Item, found: dict[str, list[float]]) -> None:
    """For each object said, the signed map of each block's own top 10: AUROC, and how strong it is on and off it."""
    image, masks = item.image(), item.masks()
    inputs = vlm.encode([[image]], PROMPT, ANSWER_PREFIX)
    grids = find_grids(vlm.model, inputs, 1)
    if isinstance(grids, str):
        raise SystemExit(grids)
    grid = grids[0][0]
    with record(vlm.anatomy, lambda values: values, writes=False) as seen:
        vlm.read(inputs)
    for judged in finder_scores(vlm, image, ["logit"]):
        mask = masks.get(judged.word.lemma)
        if mask is None or not mask.any() or mask.all():
            continue
        for i, fired in enumerate(judged.replay.activations):
            start = int(judged.replay.slot_starts[i])
            top = judged.scores["logit"][start : start + len(fired)].topk(TOP).indices
            there = seen.raw[i][0][0, grid.positions][:, top]
            patches = (there * fired[top].sign()).mean(1).view(grid.rows, grid.columns).numpy()
            if (auroc := match(patches, mask).auroc) is not None:
                found[f"block {i}: AUROC"].append(auroc)
            size = float(fired[top].abs().mean())
            share = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(mask).float()[None], (grid.rows, grid.columns))
            on = share.flatten() >= 0.5
            off = share.flatten() == 0
            for where, which in (("on the object", on), ("beside it", off)):
                if which.any():
                    strength = float(there[which].abs().mean())
                    found[f"block {i}: activation {where} / at the word"].append(strength / size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="for dependence")
    parser.add_argument("--maps", type=int, default=60, help="images for maps")
    asked = parser.parse_args()
    vlm = mmn.load(dtype="float32", device="cpu")
    print("| neurons | share that loses half with a blank image | n |\n| --- | --- | --- |")
    for name, lost in sorted(dependence(vlm, asked.images).items()):
        print(f"| {name} | {np.mean(lost):.2f} | {len(lost)} |")
    found: dict[str, list[float]] = defaultdict(list)
    for item in read_items("pocket:find-500")[: asked.maps]:
        maps(vlm, item, found)
    print("\n| maps of a block's own top 10 | mean | n |\n| --- | --- | --- |")
    for name, values in sorted(found.items()):
        print(f"| {name} | {np.mean(values):.2f} | {len(values)} |")


if __name__ == "__main__":
    main()
