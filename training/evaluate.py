"""Measure what the pocket model names in scenes it has never seen.

    python training/evaluate.py --model FOLDER --out training/evaluation.json

Recall: of the objects shown, the share whose noun is in the caption (as a whole word, the model's greedy answer).
Per split and number of objects, over fresh scenes (seeds that training never uses), with a 95 % bootstrap interval
over scenes. Unseen: drawings kept from training, of nouns that have such; never a seen drawing instead.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mmneurons as mmn
from mmneurons.pocket import Scene, nouns, scene
from mmneurons.words import says

FIRST_SEED = 500_000_000
"""Training's seeds begin at 1,000,000,000; tests and samples use small ones."""


def interval(per_scene: Sequence[tuple[int, int]], draws: int = 2000) -> dict[str, Any]:
    """Share of hits with a 95 % bootstrap interval over scenes, from (hits, trials) of each scene."""
    values = np.array(per_scene)
    random = np.random.default_rng(0)
    picks = random.integers(len(values), size=(draws, len(values)))
    shares = values[picks, 0].sum(1) / values[picks, 1].sum(1).clip(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    share = values[:, 0].sum() / max(1, values[:, 1].sum())
    return {"share": round(float(share), 4), "interval": [round(float(low), 4), round(float(high), 4)]} | {
        "scenes": len(values),
        "trials": int(values[:, 1].sum()),
    }


def measure(made: list[Scene], captions: list[str]) -> dict[str, Any]:
    """Recall, background and false mentions of one set of scenes."""
    pairs = list(zip(made, captions, strict=True))
    every = nouns()

    def said_wrongly(s: Scene, caption: str) -> tuple[int, int]:
        said = [noun for noun in every if says(caption, noun)]
        return sum(noun not in s.objects for noun in said), len(said)

    counts: dict[str, Callable[[Scene, str], tuple[int, int]]] = {
        "recall": lambda s, c: (sum(says(c, noun) for noun in s.objects), len(s.objects)),
        "background": lambda s, c: (int(c.endswith(s.background)), 1),
        "whole caption right": lambda s, c: (int(c == s.caption), 1),
        "objects said that are not there": said_wrongly,
    }
    return {name: interval([count(s, c) for s, c in pairs]) for name, count in counts.items()}


def main() -> None:
    """Evaluate and print; write all numbers and the recall of each noun as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--scenes", type=int, default=500, help="per split and number of objects")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    vlm = mmn.load(arguments.model, dtype="float32", device="cpu")
    results: dict[str, Any] = {"model": vlm.facts["weights_hash"]}
    shown: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for split in ("seen", "unseen"):
        everything: list[tuple[Scene, str]] = []
        known = nouns(split)
        for n_objects in (1, 2, 3):
            seeds = range(FIRST_SEED + n_objects * 100_000, FIRST_SEED + n_objects * 100_000 + arguments.scenes)
            random = np.random.default_rng(n_objects)
            picks = [[known[i] for i in random.choice(len(known), n_objects, replace=False)] for _ in seeds]
            made = [scene(seed, pick, split) for seed, pick in zip(seeds, picks, strict=True)]
            captions = vlm.caption([s.image for s in made], batch_size=50)
            everything += zip(made, captions, strict=True)
            results[f"{split}, {n_objects} object{'s' * (n_objects > 1)}"] = measure(made, captions)
        results[f"{split}, all"] = measure([s for s, _ in everything], [c for _, c in everything])
        if split == "seen":
            shown.update(noun for s, _ in everything for noun in s.objects)
            named.update(noun for s, c in everything for noun in s.objects if says(c, noun))
    for name, numbers in results.items():
        if isinstance(numbers, dict):
            line = [
                f"{key} {v['share']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" for key, v in numbers.items()
            ]
            print(f"{name} ({numbers['recall']['scenes']} scenes): {'; '.join(line)}")
    by_noun = {noun: [named[noun], shown[noun]] for noun in sorted(shown, key=lambda n: named[n] / shown[n])}
    results["seen recall by noun, [named, shown], worst first"] = by_noun
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
