"""Draw the pictures of docs/reference/pocket.md: curves of training, recall against drawings, captioned scenes.

    python training/pictures.py --model FOLDER

Reads `training/log.jsonl` and `training/evaluation.json`; the scenes are the first of each kind by seed, not chosen.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.pocket import Scene, scenes
from mmneurons.words import says

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "reference"
FIRST_SEED = 600_000_000
"""Neither evaluation nor training draws these scenes."""


def curves(path: Path) -> None:
    """Each loss against the hours of its stage."""
    lines = [json.loads(line) for line in (HERE / "log.jsonl").read_text().splitlines()]
    stages: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        part = stages[line["stage"]]
        while part and part[-1]["step"] >= line["step"]:  # begun again from an earlier checkpoint
            part.pop()
        part.append(line)
    figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 3), layout="constrained", squeeze=False)
    for ax, (stage, part) in zip(axes[0], stages.items(), strict=True):
        steps = [line["step"] for line in part]
        for name in ("patch", "text", "answer"):
            if name in part[0]:
                ax.plot(steps, [line[name] for line in part], label=name)
        ax.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        ax.plot(steps, [max(line["share of rate"], 1e-3) for line in part], "--", color="grey", label="share of rate")
        ax.legend()
    figure.savefig(path, dpi=110)


def recall_against_drawings(path: Path) -> None:
    """Recall of drawings kept from training against how many drawings of the noun there were to learn from."""
    results = json.loads((HERE / "evaluation.json").read_text())
    nouns = results["unseen recall by noun, [named, shown, drawings], worst first"]
    named, shown, drawings = np.array(list(nouns.values())).T
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.scatter(drawings, named / shown, s=12, alpha=0.5)
    for noun, x, y in zip(nouns, drawings, named / shown, strict=True):
        if y < 0.35 or x > 40:
            ax.annotate(noun, (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
    edges = [4, 8, 12, 16, 24, 32, 100]
    for low, high in pairwise(edges):
        inside = (drawings >= low) & (drawings < high)
        if inside.any():
            ax.hlines(named[inside].sum() / shown[inside].sum(), low, min(high, drawings.max()), color="C1", lw=2)
    ax.set(xlabel="drawings in training", ylabel="recall on drawings kept from training", ylim=(0, 1.02), xscale="log")
    ax.set_xticks(edges[:-1], [str(edge) for edge in edges[:-1]])
    ax.minorticks_off()
    figure.savefig(path, dpi=110)


def sheet(pairs: list[tuple[Scene, str]], path: Path, columns: int = 6) -> None:
    """Scenes with what the model says of them; objects that it misses in red."""
    rows = -(-len(pairs) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (scene, caption) in zip(axes.flat, pairs, strict=False):
        _picture(ax, scene, caption)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def _picture(ax: Axes, scene: Scene, caption: str) -> None:
    ax.imshow(np.asarray(scene.image))
    right = caption == scene.caption
    missed = [noun for noun in scene.objects if not says(caption, noun)]
    title = caption if right else f"{caption}\n(missed: {', '.join(missed)})" if missed else f"{caption}\n(adds)"
    ax.set_title(title.replace(" and ", "\nand "), fontsize=7, color="black" if right else "crimson")


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    arguments = parser.parse_args()
    curves(DOCS / "pocket-curves.png")
    recall_against_drawings(DOCS / "pocket-drawings.png")
    vlm = mmn.load(arguments.model, dtype="float32", device="cpu")
    for split in scenes.SPLITS:
        made = [pocket.scene(FIRST_SEED + i, split=split) for i in range(200)]
        pairs = list(zip(made, vlm.caption([s.image for s in made], batch_size=50), strict=True))
        right = [pair for pair in pairs if pair[0].caption == pair[1]]
        wrong = [pair for pair in pairs if pair[0].caption != pair[1]]
        sheet(right[:12] + wrong[:12], DOCS / f"pocket-{split}.png")


if __name__ == "__main__":
    main()
