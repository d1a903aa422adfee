"""A quick judge of a projector while it is trained: captions of cached features, the same few pictures every time.

    python training/photo/judge.py --pictures pictures.csv --projector projector.safetensors

Started alone, it prints what train.py prints at its ends, of any projector of the same grid; of a projector whose
weights are drawn, with `--random`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Batches
from captions import ASKED
from features import WORK
from language import Reader
from pictures import read_pictures
from plan import Plan
from projector import Projector, read
from safetensors import safe_open
from safetensors.torch import load_file
from synonyms import names

from mmneurons.photo.convert import CHAT

SHOWN, BATCH, NEW_TOKENS = 60, 20, 9
"""Pictures of each set, at once, and tokens of an answer."""


def captions(reader: Reader, projector: Projector, features: np.ndarray) -> list[str]:
    """Greedy answers to the usual question.

    Args:
        reader: The language model.
        projector: In front of it.
        features: (pictures, tokens, channels) of the tower.
    """
    before, after = CHAT.split("{image}")
    ends = [reader.embedding[reader.ids(part)] for part in (before, after.format(prompt=ASKED[0][0]) + ASKED[0][1])]
    said: list[str] = []
    for begin in range(0, len(features), BATCH):
        with torch.no_grad():
            image = projector(torch.from_numpy(features[begin : begin + BATCH].astype(np.float32)))
            embedded = torch.cat([ends[0].expand(len(image), -1, -1), image, ends[1].expand(len(image), -1, -1)], 1)
            ids = reader.model.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=reader.tokenizer.eos_token_id,
            )
        said += reader.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in said]


def judged(reader: Reader, projector: Projector, batches: Batches, shown: int = SHOWN) -> dict[str, Any]:
    """The share of captions that name what is there, of evenly spaced pictures of each set.

    Args:
        reader: The language model.
        projector: In front of it.
        batches: Whose pictures and grid.
        shown: Pictures of each set.
    """
    found: dict[str, Any] = {}
    for name, rows in sets(batches).items():
        rows = rows[:: max(1, -(-len(rows) // shown))]
        said = captions(reader, projector, batches.features[rows])
        hits = [[names(text, noun) for noun in batches.nouns_of(row)] for row, text in zip(rows, said, strict=True)]
        found[name] = {"named": round(float(np.mean([all(hit) for hit in hits])), 3), "n": len(rows)}
        found[name]["two"] = round(float(np.mean([" and " in text for text in said])), 3)
        if name == "collages":
            found[name]["one"] = round(float(np.mean([any(hit) for hit in hits])), 3)
        else:
            first = [
                names(text.partition(" and ")[0], batches.nouns_of(row)[0])
                for row, text in zip(rows, said, strict=True)
            ]
            found[name]["first"] = round(float(np.mean(first)), 3)
            found[name]["most"] = Counter(said).most_common(2)
        found[name]["such as"] = [f"{'+'.join(batches.nouns_of(row))}: {said[i]}" for i, row in enumerate(rows)][::9]
    return found


def sets(batches: Batches) -> dict[str, list[int]]:
    """The views that are judged, by set."""
    pictures, views = batches.pictures, batches.views
    made: dict[str, list[int]] = {"val": [], "imagenette": [], "imagenet": [], "collages": []}
    many = Counter(picture.noun for picture in pictures if picture.split == "train")
    for i, view in enumerate(views):
        picture = pictures[view.pictures[0]]
        if picture.split == "train":
            continue
        if view.kind == "collage":
            made["collages"].append(i)
        elif picture.split == "val" and many[picture.noun] >= 20:
            made["val"].append(i)
        elif picture.path.name.startswith("imagenet-"):
            made["imagenet"].append(i)
        elif "imagenette" in picture.path.name and many[picture.noun]:
            made["imagenette"].append(i)
    return made


def noted(out: Path, line: dict[str, Any]) -> None:
    """Print a line, and add it to the log of a run."""
    print(line, flush=True)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    """Judge one projector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--projector", type=Path, required=True, help="with the plan that train.py keeps in it")
    parser.add_argument("--random", action="store_true", help="its weights drawn, as wide as they are")
    parser.add_argument("--shown", type=int, default=SHOWN, help="pictures of each set")
    options = parser.parse_args()
    with safe_open(options.projector, "pt") as file:
        told = json.loads((file.metadata() or {}).get("plan", "{}"))
    plan, tensors = Plan(side=told["side"], window=told["window"]), load_file(options.projector)
    if options.random:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randn(tensor.shape, generator=generator) * tensor.float().std() if tensor.dim() == 2 else tensor
            for name, tensor in tensors.items()
        }
    batches = Batches(options.work, read_pictures(options.pictures), plan)
    print(json.dumps(judged(Reader(options.work), read(tensors), batches, options.shown), ensure_ascii=False))


if __name__ == "__main__":
    main()
