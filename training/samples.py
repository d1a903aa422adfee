"""Make the sample images that the package ships, and fix the digests that evaluation sets are checked by.

    python training/samples.py

Samples are scenes of drawings kept from training, with their truth. Their seeds were fixed before any model saw the
scenes: samples are not picked by how well they are captioned. Only which comes first, and so is shown by `make demo`,
was chosen later: one that the pocket model names rightly.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmneurons.pocket import sets, world
from mmneurons.pocket.scenes import scene

DATA = Path(__file__).parent.parent / "src" / "mmneurons" / "pocket" / "data"
FOLDER = DATA / "samples"
FIRST = 111
SEEDS = (FIRST, *(seed for seed in range(100, 130) if seed != FIRST))


def main() -> None:
    """Write one picture and one indexed mask (0 = background, i + 1 = object i) per seed, and samples.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    entries = []
    for seed in SEEDS:
        made = scene(seed, split="unseen")
        name = "-".join(made.objects)
        made.image.save(FOLDER / f"{name}.png", optimize=True)
        indexed = np.zeros(made.masks.shape[1:], dtype=np.uint8)
        for i, mask in enumerate(made.masks):
            indexed[mask] = i + 1
        Image.fromarray(indexed).save(FOLDER / f"{name}.mask.png", optimize=True)
        entry = {"name": name, "seed": seed, "caption": made.caption}
        entries.append(entry | {"objects": made.objects, "background": made.background})
    (FOLDER / "samples.json").write_text(json.dumps(entries, indent=1) + "\n")
    print(f"wrote {len(entries)} samples to {FOLDER}")
    made = {name: [s for _, s in make()] for name, make in sets.MAKERS.items()}
    made |= {f"edit/{noun}": sets.make_edit_scenes(noun) for noun in world.FREQUENCY}
    digests = {name: sets.digest(scenes) for name, scenes in made.items()}
    (DATA / "sets.json").write_text(json.dumps(digests, indent=1) + "\n")
    print(f"fixed {len(digests)} evaluation sets")


if __name__ == "__main__":
    main()
