"""What EfficientNet-Lite2 sees in every picture, computed once and kept: training reads it, not pictures.

    python training/photo/features.py --pictures pictures.csv

Of every picture the middle square, of those of the split `train` also random parts, and collages of two of them. What
is in the cache is a function of the pictures and the seed; stopped, it continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pictures import Picture, centred, collage, cut, opened, pixels, read_pictures
from PIL import Image
from torch import Tensor

from mmneurons.photo.convert import tower
from mmneurons.photo.tower import pooled

HERE = Path(__file__).parent
WORK = HERE / "work"
BATCH = 16


@dataclass(frozen=True)
class View:
    """One square that the tower is shown."""

    kind: str
    """centre, part, or collage."""
    pictures: tuple[int, ...]
    """Which pictures of the list it shows, in the order in which a caption names them."""
    seed: int = 0
    """Of its random cuts."""
    upright: bool = False
    """Of a collage: one above the other."""


def views(pictures: list[Picture], n_parts: int, n_collages: int, n_judged: int, seed: int = 0) -> list[View]:
    """All that is to be seen: middles first, then parts of the pictures of `train`, then collages.

    Args:
        pictures: All of them.
        n_parts: Random parts of each picture of `train`.
        n_collages: Collages of pictures of `train`, their nouns drawn evenly.
        n_judged: Collages of the middles of pictures of `val`, side by side.
        seed: Of all draws.
    """
    rng = random.Random(seed)
    train = [i for i, picture in enumerate(pictures) if picture.split == "train"]
    made = [View("centre", (i,)) for i in range(len(pictures))]
    made += [View("collage", pair) for pair in _pairs(pictures, "val", n_judged, random.Random(seed + 1))]
    made += [View("part", (i,), rng.randrange(2**31)) for _ in range(n_parts) for i in train]
    made += [
        View("collage", pair, rng.randrange(1, 2**31), rng.random() < 0.4)
        for pair in _pairs(pictures, "train", n_collages, rng)
    ]
    return made


def _pairs(pictures: list[Picture], split: str, n: int, rng: random.Random) -> list[tuple[int, int]]:
    """Pictures of two nouns each."""
    of: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        if picture.split == split:
            of.setdefault(picture.noun, []).append(i)
    if len(of) < 2:
        return []
    return [(rng.choice(of[a]), rng.choice(of[b])) for a, b in (rng.sample(sorted(of), 2) for _ in range(n))]


def seen(view: View, pictures: list[Picture]) -> Image.Image:
    """The square itself."""
    images = [opened(pictures[i]) for i in view.pictures]
    rng = random.Random(view.seed)
    if view.kind == "centre":
        return centred(images[0])
    if view.kind == "part":
        return cut(images[0], (260, 260), rng)
    return collage(*images, upright=view.upright, rng=rng if view.seed else None)


def main() -> None:
    """Fill the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--collages", type=int, default=4000)
    parser.add_argument("--judged", type=int, default=200)
    options = parser.parse_args()
    compute(options.work, read_pictures(options.pictures), options.parts, options.collages, options.judged)


def compute(work: Path, pictures: list[Picture], n_parts: int, n_collages: int, n_judged: int) -> None:
    """Compute what is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    todo = views(pictures, n_parts, n_collages, n_judged)
    shape = (len(todo), 81, 1280)
    table = [{"kind": v.kind, "pictures": v.pictures, "seed": v.seed, "upright": v.upright} for v in todo]
    listed = json.dumps({"views": table, "files": [picture.path.name for picture in pictures]})
    index, cache, count = work / "views.json", work / "features.f16", work / "features.done"
    # The beginning of another list may be the same: it is kept, as far as it is.
    done = int(count.read_text()) if count.exists() else 0
    if index.exists() and index.read_text() != listed:
        old = json.loads(index.read_text())
        same = old["files"] == json.loads(listed)["files"]
        agree = [a == b for a, b in zip(old["views"], json.loads(listed)["views"], strict=False)] if same else []
        done = min(done, agree.index(False) if False in agree else len(agree))
    index.write_text(listed)
    if not cache.exists():
        cache.touch()
    with cache.open("r+b") as file:
        file.truncate(int(np.prod(shape)) * 2)
    features = np.memmap(cache, np.float16, "r+", shape=shape)
    net, start = tower().to(memory_format=torch.channels_last), time.time()  # pyright: ignore[reportCallIssue]
    for begin in range(done, len(todo), BATCH):
        batch = pixels([seen(view, pictures) for view in todo[begin : begin + BATCH]])
        x = ((torch.from_numpy(batch).permute(0, 3, 1, 2).float() - 127) / 128).contiguous(
            memory_format=torch.channels_last
        )
        with torch.no_grad():
            features[begin : begin + BATCH] = net(x).last_hidden_state.half().numpy()
        if begin // BATCH % 20 == 19 or begin + BATCH >= len(todo):
            features.flush()
            count.write_text(str(min(begin + BATCH, len(todo))))
            print(f"{begin + BATCH} of {len(todo)} views, {time.time() - start:.0f} s", flush=True)


def load(work: Path, side: int = 9, window: int = 1) -> tuple[np.ndarray, Tensor, list[View]]:
    """The cache: features (views, side * side, 1280) float16, read as needed; their means; what each view is.

    Args:
        work: Where the cache is.
        side: Of the grid; one that is smaller is pooled once, and kept.
        window: Over which each feature is averaged; likewise.
    """
    content = json.loads((work / "views.json").read_text())
    known = [View(v["kind"], tuple(v["pictures"]), v["seed"], v["upright"]) for v in content["views"]]
    n = int((work / "features.done").read_text())
    whole = np.memmap(work / "features.f16", np.float16, "r", shape=(len(known), 81, 1280))[:n]
    means, small = work / f"means.{n}.npy", work / f"features.{side}.{window}.{n}.npy"
    if not means.exists():
        np.save(means, np.concatenate([whole[i : i + 256].mean(1, np.float32) for i in range(0, n, 256)]))
    is_whole = (side, window) == (9, 1)
    if not is_whole and not small.exists():
        made = np.lib.format.open_memmap(small.with_suffix(".tmp"), "w+", np.float16, (n, side**2, 1280))
        for i in range(0, n, 256):
            grids = torch.from_numpy(whole[i : i + 256].astype(np.float32)).unflatten(1, (9, 9)).permute(0, 3, 1, 2)
            made[i : i + 256] = pooled(grids, side, window).flatten(2).transpose(1, 2).half().numpy()
        made.flush()
        os.replace(small.with_suffix(".tmp"), small)
    return whole if is_whole else np.load(small, mmap_mode="r"), torch.from_numpy(np.load(means)), known[:n]


if __name__ == "__main__":
    main()
