"""Are there multi-modal neurons in a language model that never saw a picture? docs/measurements/language-neurons.md.

    python -m research.language_neurons OUT --pictures pictures.csv            # collects, judges, prints the tables
    python -m research.language_neurons OUT --table                            # the tables of what is there

The photo model's language model was trained on text alone, and stays frozen while a projector learns to show it
photographs. For each noun of `sentences.csv`, photographs of one split of the list are captioned. Where the
answer says the noun, all neurons are scored where it is predicted. Every second photograph of a noun chooses: its
**chosen** neurons are the ten with the highest mean score. The other photographs, and sentences without any picture
that end just before the noun, judge. Nothing is picked by eye. A run that is stopped goes on behind the last
photograph.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import mmneurons as mmn
from mmneurons.attribution.controls import column_norms
from mmneurons.settings import FindSettings
from research.language_neurons.judge import figures, nouns_of, rows_of, silence, table
from research.language_neurons.observe import TOP, Observer, collect, kept, photographs, sentences


def main() -> None:
    """Collect what is missing, judge, print."""
    parser = argparse.ArgumentParser(
        "python -m research.language_neurons", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of what is measured")
    parser.add_argument("--pictures", type=Path, help="CSV with the columns file, noun and split")
    parser.add_argument("--folder", type=Path, help="where its files lie; default: pictures/ beside it")
    parser.add_argument("--split", nargs="+", default=["val"])
    parser.add_argument("--nouns", type=int, default=10**9, help="so many of the list's nouns, the first")
    parser.add_argument("--most", type=int, default=6, help="photographs of each noun")
    parser.add_argument("--model", default="photo")
    parser.add_argument("--score", default="logprob", choices=["logit", "logprob"])
    parser.add_argument("--table", action="store_true", help="print what OUT holds")
    asked = parser.parse_args()
    vlm = mmn.load(asked.model, device="cpu")
    norms = column_norms(vlm.anatomy)
    if not asked.table:
        observer = Observer(vlm, norms, FindSettings(top=TOP, score=asked.score))
        folder = asked.folder or asked.pictures.parent / "pictures"
        shown = photographs(asked.pictures, folder, asked.split, [*sentences()][: asked.nouns], asked.most)
        collect(observer, asked.out, shown, printed)
        paths = {photograph.path.name: photograph.path for photograph in shown}
        silence(observer, asked.out, nouns_of(kept(asked.out / "photographs")), paths, printed)
    found, texts = nouns_of(kept(asked.out / "photographs")), kept(asked.out / "sentences")
    by_noun = figures(found, texts, norms, rows_of(asked.out / "silenced.csv"))
    names = list(dict.fromkeys(name for row in by_noun.values() for name in row))
    with (asked.out / "nouns.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["noun", *names])
        writer.writeheader()
        writer.writerows({"noun": noun} | {k: f"{v:.4g}" for k, v in row.items()} for noun, row in by_noun.items())
    print("\n".join(table(by_noun)))


def printed(stage: str, done: float, total: int) -> None:
    """Progress, a line each."""
    print(f"{stage}: {done:g} of {total}", flush=True)


if __name__ == "__main__":
    main()
