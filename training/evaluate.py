"""Measure what the pocket model says of scenes that it has never seen.

    python training/evaluate.py --model FOLDER --out training/evaluation.json

Recall: of the objects shown, the share whose noun is in the caption (as a whole word; greedy answer to the usual
prompt). Per kind of drawing and number of objects, over fresh scenes (seeds that training never uses) with nouns and
backgrounds drawn evenly, with a 95 % bootstrap interval over scenes. Kinds of drawings: those of training; those kept
from training, of all nouns that have such and of those with at least eight drawings to learn from; icons in a style
that training has none of; Tux Paint's stamps (drawings and photographs, Debian's tuxpaint-stamps-default), where
installed. Then: scenes as usual in the world, other wordings of the prompt, questions (POPE's three kinds, "What is on
the left?"), facts as text, and images a second.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collage import EXTRA
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.pocket import Scene, facts, scenes, world
from mmneurons.settings import ANSWER_PREFIX
from mmneurons.vlm.prompts import WORDINGS
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

FIRST_SEED = 500_000_000
"""Training's seeds begin at 1,000,000,000, evaluation sets' at 700,000,000; tests and samples use small ones."""
STAMPS = Path("/usr/share/tuxpaint/stamps")
BATCH = 50
Pairs = list[tuple[Scene, str]]


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


def measure(pairs: Pairs) -> dict[str, Any]:
    """Recall, background and false mentions of one set of scenes and captions."""

    def said_wrongly(s: Scene, caption: str) -> tuple[int, int]:
        said = [noun for noun in world.FREQUENCY if says(caption, noun)]
        return sum(noun not in s.objects for noun in said), len(said)

    counts: dict[str, Callable[[Scene, str], tuple[int, int]]] = {
        "recall": lambda s, c: (sum(says(c, noun) for noun in s.objects), len(s.objects)),
        "background": lambda s, c: (int(c.endswith(s.background)), 1),
        "whole caption right": lambda s, c: (int(c == s.caption), 1),
        "objects said that are not there": said_wrongly,
    }
    return {name: interval([count(s, c) for s, c in pairs]) for name, count in counts.items()}


def training_drawings() -> Counter[str]:
    """How many drawings of each noun the model was trained on, those not shipped included."""
    counts = Counter(d.noun for drawings in scenes.sprites().values() for d in drawings if d.split == "seen")
    with np.load(EXTRA) as extra:
        counts.update(label for label in extra["labels"].tolist() if label in counts)
    return counts


def stamps() -> dict[str, list[Image.Image]]:
    """Tux Paint's stamps whose English name has exactly one noun."""
    found: dict[str, list[Image.Image]] = defaultdict(list)
    for path in sorted(STAMPS.rglob("*.png")):
        label = path.with_suffix(".txt")
        if not label.exists() or path.stem.endswith(("_mirror", "_flip")):
            continue
        name = label.read_text(encoding="utf-8").splitlines()[0].lower()
        named = {noun for noun in world.FREQUENCY if re.search(rf"\b{noun}s?\b", name)}
        image = Image.open(path).convert("RGBA")
        if len(named) == 1 and np.asarray(image)[..., 3].mean() < 250:
            image = image.crop(image.getchannel("A").getbbox())
            image.thumbnail((128, 128))
            found[named.pop()].append(image)
    return found


def captioned(vlm: VLM, made: list[Scene], **how: Any) -> Pairs:
    """Each scene with the model's answer."""
    return list(zip(made, vlm.caption([s.image for s in made], batch_size=BATCH, **how), strict=True))


def by_objects(vlm: VLM, n_scenes: int, known: Sequence[str], draw: Callable[[int, list[str]], Scene]) -> Pairs:
    """`n_scenes` scenes each of one, two and three of the nouns in `known`, drawn evenly."""
    pairs: Pairs = []
    for n_objects in (1, 2, 3):
        random = np.random.default_rng(n_objects)
        first = FIRST_SEED + n_objects * 1_000_000
        picks = [random.choice(known, n_objects, replace=False).tolist() for _ in range(n_scenes)]
        pairs += captioned(vlm, [draw(first + i, pick) for i, pick in enumerate(picks)])
    return pairs


def table(name: str, pairs: Pairs) -> dict[str, Any]:
    """The numbers of `pairs`, by number of objects and in all."""
    parts = {f"{n} object{'s' * (n > 1)}": [p for p in pairs if len(p[0].objects) == n] for n in (1, 2, 3)}
    return {f"{name}, {part}": measure(some) for part, some in {**parts, "all": pairs}.items() if some}


def answers(vlm: VLM, n_scenes: int) -> dict[str, Any]:
    """Accuracy of answers to questions."""
    results: dict[str, Any] = {}
    for negatives in ("random", "popular", "adversarial"):
        asked = pocket.pope(negatives)
        by_text: dict[str, list[pocket.Question]] = defaultdict(list)
        for question in asked:
            by_text[question.text].append(question)
        right = {True: [0, 0], False: [0, 0]}
        for text, questions in by_text.items():
            said = vlm.caption([q.scene.image for q in questions], prompt=text, answer_prefix="", batch_size=BATCH)
            for question, answer in zip(questions, said, strict=True):
                right[question.answer][0] += answer == ("yes" if question.answer else "no")
                right[question.answer][1] += 1
        (yes, n_yes), (no, n_no) = right[True], right[False]
        results[f"is there, {negatives}"] = {
            "accuracy": round((yes + no) / (n_yes + n_no), 4),
            "precision": round(yes / max(1, yes + n_no - no), 4),
            "recall": round(yes / n_yes, 4),
            "questions": n_yes + n_no,
        }
    for side, place in (("left", 0), ("right", -1)):
        made = [pocket.scene(FIRST_SEED + 5_000_000 + i) for i in range(n_scenes)]
        pairs = captioned(
            vlm, [s for s in made if len(s.objects) > 1], prompt=f"What is on the {side}?", answer_prefix=""
        )
        right_side = [(int(said == scenes.with_article(s.objects[place])), 1) for s, said in pairs]
        results[f"what is on the {side}"] = interval(right_side)
    return results


def text_facts(vlm: VLM) -> dict[str, Any]:
    """Share of sentences, cut before their last word, that the model ends so that they are true."""
    true = set(facts())
    starts = sorted({fact.rsplit(" ", 1)[0] for fact in true})
    tokenizer = vlm.processor.tokenizer
    hits = []
    for start in starts:
        ids = torch.tensor([tokenizer(start).input_ids])
        with torch.inference_mode():
            for _ in range(6):
                ids = torch.cat([ids, vlm.model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        said = tokenizer.decode(ids[0], skip_special_tokens=True)
        hits.append((int(said.split(".")[0] + "." in true), 1))
    return interval(hits)


def speed(vlm: VLM) -> list[float]:
    """Images captioned a second, three times, after a first batch; scenes and processor's loading left out."""
    images = [scene.image for scene in pocket.evaluation_set("find-500")]
    vlm.caption(images[:BATCH], batch_size=BATCH)
    found = []
    for _ in range(3):
        started = time.perf_counter()
        vlm.caption(images, batch_size=BATCH)
        found.append(round(len(images) / (time.perf_counter() - started), 1))
    return found


def main() -> None:
    """Evaluate and print; write all numbers, the recall of each noun and the curve over drawings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--scenes", type=int, default=1000, help="per kind of drawing and number of objects")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    n = arguments.scenes
    vlm = mmn.load(arguments.model, dtype="float32", device="cpu")
    results: dict[str, Any] = {"model": vlm.facts["weights_hash"]}
    drawings = training_drawings()
    started = time.perf_counter()
    seen = by_objects(vlm, n, scenes.nouns("seen"), lambda seed, pick: pocket.scene(seed, pick, "seen"))
    results["scenes made and captioned a second"] = round(len(seen) / (time.perf_counter() - started), 1)
    results["find-500 captioned, images a second"] = speed(vlm)
    results |= table("seen", seen)
    unseen = by_objects(vlm, n, scenes.nouns("unseen"), lambda seed, pick: pocket.scene(seed, pick, "unseen"))
    results |= table("unseen", unseen)
    often = [noun for noun in scenes.nouns("unseen") if drawings[noun] >= 8]
    many = by_objects(vlm, n, often, lambda seed, pick: pocket.scene(seed, pick, "unseen"))
    results |= table(f"unseen ({len(often)} nouns with 8 or more drawings)", many)
    style = by_objects(vlm, n // 2, scenes.nouns("style"), lambda seed, pick: pocket.scene(seed, pick, "style"))
    results |= table("other style", style)
    if STAMPS.exists():
        found = stamps()

        def stamped(seed: int, pick: list[str]) -> Scene:
            random = np.random.default_rng(seed)
            place = tuple(scenes.BACKGROUNDS)[random.integers(len(scenes.BACKGROUNDS))]
            return scenes.draw(random, pick, place, lambda noun: found[noun][random.integers(len(found[noun]))])

        results |= table(f"stamps ({len(found)} nouns)", by_objects(vlm, n // 2, sorted(found), stamped))
    usual = [pocket.scene(FIRST_SEED + 6_000_000 + i, natural=True) for i in range(n)]
    results |= table("seen, as usual in the world", captioned(vlm, usual))
    for wording in WORDINGS:
        pairs = captioned(vlm, [s for s, _ in seen[: 3 * n : 6]], prompt=wording, answer_prefix=ANSWER_PREFIX)
        results[f"seen, asked '{wording}'"] = measure(pairs)
    for name, numbers in results.items():
        if isinstance(numbers, dict):
            line = [
                f"{key} {v['share']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" for key, v in numbers.items()
            ]
            print(f"{name} ({numbers['recall']['scenes']} scenes): {'; '.join(line)}")
    results["questions"] = answers(vlm, n)
    results["facts ended truly"] = text_facts(vlm)
    results["seen recall by noun, [named, shown, drawings], worst first"] = recall_by_noun(seen, drawings)
    results["unseen recall by noun, [named, shown, drawings], worst first"] = recall_by_noun(unseen, drawings)
    for name in ("questions", "facts ended truly"):
        print(name, json.dumps(results[name]))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def recall_by_noun(pairs: Pairs, drawings: Counter[str]) -> dict[str, list[int]]:
    """How often each noun was named, how often shown, and of how many drawings the model could learn it."""
    shown = Counter(noun for s, _ in pairs for noun in s.objects)
    named = Counter(noun for s, c in pairs for noun in s.objects if says(c, noun))
    return {
        noun: [named[noun], shown[noun], drawings[noun]] for noun in sorted(shown, key=lambda n: named[n] / shown[n])
    }


if __name__ == "__main__":
    main()
