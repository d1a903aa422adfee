"""Edits of a pre-trained language model that reads photographs: ten words replaced, three removed.

    python -m benchmarks.quality.photo_edits DIR --pictures pictures.csv    # makes, judges, prints; it resumes
    python -m benchmarks.quality.photo_edits DIR --pictures pictures.csv --reference train

The photo model; the default reference (sentences, no photographs), or the same sentences and a hundred photographs of
one split. Each edit is made with eight photographs of a noun
that the model names, of one split of the list, in the list's order; it is judged on the following ones of the same
noun, and on photographs of other nouns of another split, drawn by a fixed seed.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

import mmneurons as mmn
from mmneurons.data.dataset import Item
from mmneurons.editing.edit import edit
from mmneurons.editing.evaluate_edits import Case, evaluate_edits
from mmneurons.editing.reference import Reference, default_reference, make_reference
from mmneurons.editing.reference import sentences as kept_sentences
from mmneurons.settings import Question
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

from .edits import made, table
from .elsewhere import sentences

PAIRS = (
    "dog cat",
    "dog horse",
    "fish bird",
    "fish shark",
    "horn drum",
    "horn guitar",
    "ball apple",
    "church castle",
    "truck bus",
    "parachute balloon",
)
REMOVED = ("dog", "horn", "church")
N_EDIT, N_HELD_OUT, N_UNRELATED, N_REFERENCE = 8, 16, 40, 100
QUESTION = Question(max_new_tokens=20)


def photographs(pictures: Path, folder: Path, split: str) -> list[Item]:
    """The photographs of one split of a list, in its order."""
    with pictures.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [Item(row["file"], folder / row["file"], (row["noun"],)) for row in rows]


def named(vlm: VLM, items: Sequence[Item], noun: str, n: int) -> list[Item]:
    """The first photographs of a noun of which the model says it."""
    found: list[Item] = []
    for item in (item for item in items if noun in (item.objects or ())):
        (text,) = vlm.caption([item.image()], max_new_tokens=QUESTION.max_new_tokens)
        if says(text, noun):
            found.append(item)
        if len(found) == n:
            return found
    raise SystemExit(f"The model says '{noun}' of {len(found)} photographs, not {n}.")


def main() -> None:
    """Make what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of patches and figures")
    parser.add_argument("--pictures", type=Path, required=True, help="CSV with the columns file, noun and split")
    parser.add_argument("--folder", type=Path, help="where its files lie; default: pictures/ beside it")
    parser.add_argument("--split", default="judge", help="of the photographs of each edit")
    parser.add_argument("--unrelated", default="val", metavar="SPLIT", help="of the photographs of other nouns")
    parser.add_argument("--reference", metavar="SPLIT", help="of a hundred photographs that are to stay as they are")
    asked = parser.parse_args()
    folder = asked.folder or asked.pictures.parent / "pictures"
    vlm, known, shown = mmn.load("photo", device="cpu"), list[Reference | None](), dict[str, list[Item]]()
    mine, others = (photographs(asked.pictures, folder, split) for split in (asked.split, asked.unrelated))

    def with_photographs() -> Reference:
        items = photographs(asked.pictures, folder, asked.reference)
        chosen = np.random.default_rng(1).permutation(len(items))[:N_REFERENCE].tolist()
        return make_reference(vlm, [items[i].image() for i in chosen], kept_sentences(), question=QUESTION)

    def of(source: str) -> list[Item]:
        if source not in shown:
            shown[source] = named(vlm, mine, source, N_EDIT + N_HELD_OUT)
        return shown[source]

    def patch(source: str, target: str | None) -> mmn.Patch:
        def make() -> mmn.Patch:
            if not known:
                known.append(default_reference(vlm, QUESTION) if asked.reference is None else with_photographs())
            images = [item.image() for item in of(source)[:N_EDIT]]
            length = QUESTION.max_new_tokens
            return edit(vlm, images, source=source, target=target, reference=known[0], max_new_tokens=length)

        return made(asked.out, f"selective-{source}-{target}", make)

    pairs: list[tuple[str, str | None]] = [(pair.split()[0], pair.split()[1]) for pair in PAIRS]
    cases = {
        ("removal" if target is None else "selective") + f" {source} {target}": Case(
            partial(patch, source, target), source, target, QUESTION
        )
        for source, target in [*pairs, *((source, None) for source in REMOVED)]
    }
    order = np.random.default_rng(0).permutation(len(others)).tolist()
    evaluate_edits(
        vlm,
        cases,
        asked.out,
        edit=lambda source: of(source)[:N_EDIT],
        held_out=lambda source: of(source)[N_EDIT:],
        unrelated=[others[i] for i in order[:N_UNRELATED]],
        further_texts={"free text": sentences()},
        progress=lambda name, done, total: print(f"{name}: {done:.1f} of {total}", flush=True),
    )
    table(asked.out)


if __name__ == "__main__":
    main()
