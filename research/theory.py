"""How far the assumptions behind the scores hold: the tables of docs/measurements/theory.md.

python -m research.theory --images pocket:find-500 --limit 20
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from jaxtyping import Float

import mmneurons as mmn
from mmneurons.attribution.finders import FinderScores, finder_scores
from mmneurons.data.dataset import read_items
from mmneurons.inspection.faithfulness import DELETED
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import spearman

SHARES = (0.1, 0.25, 0.5, 1.0)
"""How far an activation is lowered, of all the way to zero."""
LOUDEST = 100
"""The size of a change is varied for so many neurons with the highest scores."""


def explained(score: Float[np.ndarray, "n"], effect: Float[np.ndarray, "n"]) -> float | None:
    """Share of the effects' sum of squares that the score accounts for; below 0: further off than saying nothing."""
    total = float((effect**2).sum())
    return 1 - float(((effect - score) ** 2).sum()) / total if total else None


class Tables:
    """Numbers of all nouns, by the row that they belong to."""

    def __init__(self) -> None:
        self.depth: dict[tuple, list[float]] = defaultdict(list)
        self.together: dict[tuple, list[float]] = defaultdict(list)
        self.size: dict[tuple, list[float]] = defaultdict(list)

    def add(self, judged: FinderScores) -> None:
        """Measure one noun."""
        replay = judged.replay
        effects = replay.effects([torch.tensor([slot]) for slot in range(replay.n_slots)])
        true = {"logit": effects.logit.double().numpy(), "logprob": effects.logprob.double().numpy()}
        layers = torch.tensor([ffn.layer for ffn in replay.anatomy.ffns])
        layer_of = layers[torch.bucketize(torch.arange(replay.n_slots), replay.slot_starts, right=True) - 1].numpy()
        for name in ("logit", "logprob"):
            score = judged.scores[name].double().numpy()
            for layer in range(len(replay.anatomy.blocks)):
                here = layer_of == layer
                for measure, value in (
                    ("explained", explained(score[here], true[name][here])),
                    ("rank", spearman(score[here], true[name][here])),
                    ("weight", float((true[name][here] ** 2).sum() / (true[name] ** 2).sum())),
                ):
                    if value is not None:
                        self.depth[layer, name, measure].append(value)
            order = top_k(judged.scores[name], max(DELETED))
            falls = replay.effects([order[:k] for k in DELETED])
            fell = {"logit": falls.logit, "logprob": falls.logprob}[name].tolist()
            for k, fall in zip(DELETED, fell, strict=True):
                self.together[name, k, "fell"].append(fall)
                self.together[name, k, "sum of scores"].append(float(score[order[:k].numpy()].sum()))
                self.together[name, k, "sum of single effects"].append(float(true[name][order[:k].numpy()].sum()))
        fired = torch.cat(replay.activations)
        top = top_k(judged.scores["logprob"], LOUDEST)
        score = judged.scores["logprob"][top].double().numpy()
        for share in SHARES:
            part = replay.effects([slot[None] for slot in top], fired * (1 - share)).logprob.double().numpy()
            value = explained(share * score, part)
            if value is not None:
                self.size["score", share].append(value)

    def show(self) -> None:
        """Print the three tables."""
        print("| block | score | effects explained | rank agreement | share of all squared effects |")
        print("| --- | --- | --- | --- | --- |")
        for layer, name in dict.fromkeys((layer, name) for layer, name, _ in self.depth):
            cells = [shown(self.depth[layer, name, measure]) for measure in ("explained", "rank", "weight")]
            print(f"| {layer} | `{name}` | " + " | ".join(cells) + " |")
        print("\n| score | top k silent together | truly fell | sum of scores | sum of single effects |")
        print("| --- | --- | --- | --- | --- |")
        for name, k in dict.fromkeys((name, k) for name, k, _ in self.together):
            measures = ("fell", "sum of scores", "sum of single effects")
            cells = [shown(self.together[name, k, measure]) for measure in measures]
            print(f"| `{name}` | {k} | " + " | ".join(cells) + " |")
        print(f"\n| activation lowered by | effects of the top {LOUDEST} explained by `logprob` |\n| --- | --- |")
        for _, share in self.size:
            print(f"| {share:.0%} | {shown(self.size['score', share])} |")


def shown(values: list[float]) -> str:
    """Median and middle half: a noun whose effects are all but zero would drown a mean."""
    return f"{np.median(values):.3f} (middle half {np.percentile(values, 25):.3f} to {np.percentile(values, 75):.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--images", default="pocket:find-500")
    parser.add_argument("--limit", type=int, default=20)
    arguments = parser.parse_args()
    vlm = mmn.load(arguments.model, dtype="float32")
    tables = Tables()
    n_nouns = 0
    for item in read_items(arguments.images)[: arguments.limit]:
        for judged in finder_scores(vlm, item.image(), ["logit", "logprob"]):
            tables.add(judged)
            n_nouns += 1
    print(f"{n_nouns} nouns of {arguments.limit} images; medians over nouns\n")
    tables.show()


if __name__ == "__main__":
    main()
