"""Measure what the photo model says of photographs that it did not learn from.

    python training/photo/evaluate.py --pictures pictures.csv --coco coco --out training/photo/evaluation.json

Greedy answers to the usual prompt. Per split but `train`: the share that names the labelled noun, by its own word, and
also counting the synonyms of synonyms.py; the share of nouns of which at least half are named; the noun that is said
most, and in how many captions. Then collages of two pictures of `val`, COCO pictures by their annotated objects, and
beside it all how often one of EfficientNet's own five likeliest classes is the noun. `--projector` measures another
projector: a file, or `random`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from imagined import CLASSES, Imagined
from pictures import Picture, centred, collage, opened, read_pictures
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synonyms import names

import mmneurons as mmn
from mmneurons.metrics.chair import Vocabulary, coco_synonyms
from mmneurons.photo.cache import projector
from mmneurons.photo.convert import write
from mmneurons.settings import Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.vlm import VLM

QUESTION = Question(max_new_tokens=9, batch_size=8)
"""Nine tokens hold two nouns."""


def judged(
    vlm: VLM, pictures: Sequence[Picture], likeliest: Sequence[set[str]], trained: set[str], words: Vocabulary
) -> dict[str, Any]:
    """How often captions name the noun, over pictures and over nouns.

    Args:
        vlm: The model.
        pictures: With their nouns.
        likeliest: Of each picture, the nouns of EfficientNet's five likeliest classes.
        trained: Nouns that photographs taught.
        words: The nouns of which the one that most captions hold is looked for.
    """
    captions = texts_of(vlm, [opened(picture) for picture in pictures], QUESTION)
    by: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    said = Counter(noun for caption in captions for noun in set(words.named(caption)))
    for picture, caption in zip(pictures, captions, strict=True):
        by[picture.noun].append((names(caption, picture.noun, strict=True), names(caption, picture.noun)))
    rows = [row for mine in by.values() for row in mine]
    shares = {noun: sum(ok for _, ok in mine) / len(mine) for noun, mine in by.items()}
    often, n_often = said.most_common(1)[0] if said else ("", 0)
    return {
        "pictures": len(pictures),
        "nouns": len(by),
        "own_word": mean(ok for ok, _ in rows),
        "named": mean(ok for _, ok in rows),
        "mean_over_nouns": mean(shares.values()),
        "nouns_at_half": mean(share >= 0.5 for share in shares.values()),
        "nouns_at_third": mean(share >= 1 / 3 for share in shares.values()),
        "top_five": mean(
            any(names(word, picture.noun) for word in words) for picture, words in zip(pictures, likeliest, strict=True)
        ),
        "most_said": [often, round(n_often / len(captions), 4)],
        "by_noun": {noun: [round(share, 3), len(by[noun])] for noun, share in sorted(shares.items())},
        "never_a_photograph": sorted({picture.noun for picture in pictures} - trained),
        "examples": [
            [picture.path.name, picture.noun, caption]
            for picture, caption in list(zip(pictures, captions, strict=True))[:: max(1, len(pictures) // 12)]
        ],
    }


def mean(values: Any) -> float:
    """Of numbers or truths; rounded, 0 of none."""
    numbers = [float(value) for value in values]
    return round(sum(numbers) / max(1, len(numbers)), 4)


def likeliest_nouns(vlm: VLM, pictures: Sequence[Picture]) -> list[set[str]]:
    """The labels and nouns of the five classes that EfficientNet itself thinks likeliest, as its eyes see a picture."""
    classes, labels = Imagined(), class_names()
    found = []
    for picture in pictures:
        pixels = vlm.processor.image_processor(centred(opened(picture)), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = vlm.model.model.vision_tower(pixels).last_hidden_state.mean(1)
        five = (features @ classes.weight.T + classes.bias).topk(5).indices[0].tolist()
        found.append({word for i in five for word in labels[i]})
    return found


def class_names() -> list[set[str]]:
    """Label and noun of each class of the classifier."""
    with CLASSES.open(encoding="utf-8", newline="") as table:
        return [{row["label"], row["noun"] or row["label"]} for row in csv.DictReader(table)]


def judged_collages(vlm: VLM, pictures: Sequence[Picture], n: int) -> dict[str, Any]:
    """Two pictures of two nouns side by side: how often both are named, and how often one."""
    rng, of = random.Random(7), defaultdict(list)
    for picture in pictures:
        of[picture.noun].append(picture)
    pairs = [[rng.choice(of[noun]) for noun in rng.sample(sorted(of), 2)] for _ in range(n)]
    made = [collage(opened(one), opened(other), upright=False, rng=None) for one, other in pairs]
    captions = texts_of(vlm, made, QUESTION)
    both = list(zip(pairs, captions, strict=True))
    hits = [sum(names(caption, picture.noun) for picture in pair) for pair, caption in both]
    return {
        "pictures": n,
        "both": mean(hit == 2 for hit in hits),
        "at_least_one": mean(hit >= 1 for hit in hits),
        "examples": [[*(picture.noun for picture in pair), caption] for pair, caption in both[:6]],
    }


def judged_coco(vlm: VLM, folder: Path, limit: int) -> dict[str, Any]:
    """COCO pictures: how often a caption names an object that is annotated, by CHAIR's table of synonyms."""
    there: dict[Path, set[str]] = {}
    for path in sorted(folder.glob("instances_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        name = {one["id"]: one["name"] for one in content["categories"]}
        files = {one["id"]: folder / one["file_name"] for one in content["images"]}
        for one in content["annotations"]:
            there.setdefault(files[one["image_id"]], set()).add(name[one["category_id"]])
    chosen = [path for path in there if path.is_file()]
    chosen = chosen[:: max(1, -(-len(chosen) // limit))]
    vocabulary = Vocabulary([], coco_synonyms())
    captions = texts_of(vlm, [Image.open(path).convert("RGB") for path in chosen], QUESTION)
    objects = [vocabulary.objects(there[path]) for path in chosen]
    said = [set(vocabulary.named(caption)) for caption in captions]
    people = ["person" in mine for mine in objects]
    return {
        "pictures": len(chosen),
        "names_an_object": mean(bool(a & b) for a, b in zip(said, objects, strict=True)),
        "names_one_of_coco": mean(bool(a) for a in said),
        "with_people": mean(people),
        "examples": [
            [path.name, sorted(b), caption]
            for path, b, caption in list(zip(chosen, objects, captions, strict=True))[:: max(1, len(chosen) // 12)]
        ],
    }


def loaded(given: str | None, place: Path) -> VLM:
    """The photo model, or with another projector.

    Args:
        given: A file; `random` for one that is drawn as wide as the one that is shipped; None for that.
        place: A folder to put the model together in.
    """
    if given is None:
        return mmn.load("photo", device="cpu")
    trained = Path(given)
    if given == "random":
        trained, generator = place / "random.safetensors", torch.Generator().manual_seed(0)
        tensors = load_file(projector())
        drawn = {
            name: torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            for name, tensor in tensors.items()
            if name.endswith("weight")
        }
        with safe_open(projector(), "pt") as file:
            save_file(tensors | drawn, trained, file.metadata())
    write(place / "model", trained)
    return mmn.load(str(place / "model"), device="cpu", dtype="float32")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--coco", type=Path, help="folder of pictures and instances_*.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--projector", help="a file, or `random`")
    parser.add_argument("--limit", type=int, default=10**9, help="pictures of each set, at most")
    options = parser.parse_args()
    place = tempfile.TemporaryDirectory()
    vlm, pictures = loaded(options.projector, Path(place.name)), read_pictures(options.pictures)
    trained = {picture.noun for picture in pictures if picture.split == "train"}
    many = Counter(picture.noun for picture in pictures if picture.split == "train")
    words = Vocabulary([{picture.noun for picture in pictures}.union(*class_names())])
    sets = {
        "val": [p for p in pictures if p.split == "val" and many[p.noun] >= 20],
        "imagenette, nouns of photographs": [p for p in pictures if "imagenette" in p.path.name and p.noun in trained],
        "imagenette, other nouns": [p for p in pictures if "imagenette" in p.path.name and p.noun not in trained],
        "imagenet, one a class": [p for p in pictures if p.path.name.startswith("imagenet-")],
    }
    measured: dict[str, Any] = {"projector": options.projector or "as shipped"}
    for name, mine in sets.items():
        start, mine = time.time(), mine[:: max(1, -(-len(mine) // options.limit))]
        if mine:
            measured[name] = judged(vlm, mine, likeliest_nouns(vlm, mine), trained, words)
            shown = {
                key: value for key, value in measured[name].items() if key not in ("by_noun", "never_a_photograph")
            }
            print(name, json.dumps(shown, ensure_ascii=False), f"{time.time() - start:.0f} s", flush=True)
            options.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    measured["collages"] = judged_collages(vlm, sets["val"], min(200, options.limit))
    print("collages", measured["collages"], flush=True)
    if options.coco:
        measured["coco"] = judged_coco(vlm, options.coco, options.limit)
        print("coco", measured["coco"], flush=True)
    options.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
