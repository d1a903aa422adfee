"""Which neurons, silenced together, take most from a word: single scores, and greedy searches that score again.

python -m research.set_search --limit 10

A greedy search silences what it has chosen so far, scores all neurons anew in that state, and takes the next ones.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmneurons as mmn
from mmneurons.attribution.ablation import Replay, log_p
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import estimate

SIZES = (1, 2, 5, 10, 20, 50, 100)
ROUNDS = {"gradient again, ten rounds": 10, "gradient again, thirty rounds": 30}
"""Searches: in how many rounds, of as many neurons each, a hundred are found."""


def slopes_without(replay: Replay, chosen: Int[Tensor, "k"], *, logit: bool) -> Float[Tensor, "slots"]:
    """Derivatives of log p, or of how far the token is ahead of the next, by all activations, some silenced."""
    places, one = replay._places(chosen), torch.ones(1, dtype=torch.float32)
    added = [torch.zeros(1, len(part), requires_grad=True, dtype=torch.float32) for part in replay.activations]
    changes = [partial(replay._raise, i, zeros, one) for i, zeros in enumerate(added)]
    for i, slots in places.items():
        silent = torch.zeros(1, len(replay.activations[i]), dtype=torch.bool)
        silent[0, slots] = True
        changes.append(partial(replay._silence, i, silent, None))
    with torch.enable_grad():
        logits = replay.anatomy.logits(replay._run(0, 1, changes), grad=True)
        others = logits.index_fill(1, torch.tensor([replay.token_id]), -torch.inf)
        goal = logits[:, replay.token_id] - others.max(1).values if logit else log_p(logits, replay.token_id)
        found = torch.autograd.grad(goal.sum(), added)
    return torch.cat([part[0] for part in found])


def search(replay: Replay, n_rounds: int, *, logit: bool) -> Int[Tensor, "k"]:
    """The first hundred that a greedy search finds, in the order found."""
    fired, chosen = torch.cat(replay.activations), torch.tensor([], dtype=torch.long)
    edges = [round(k * max(SIZES) / n_rounds) for k in range(1, n_rounds + 1)]
    for edge in edges:
        scores = slopes_without(replay, chosen, logit=logit) * fired
        scores[chosen] = -torch.inf
        chosen = torch.cat([chosen, top_k(scores, edge - len(chosen))])
    return chosen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="pocket:find-500")
    parser.add_argument("--limit", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vlm, falls, n_nouns = mmn.load(), defaultdict[tuple[str, int], dict[str, list[float]]](dict), 0
    for item in mmn.read_items(arguments.images)[: arguments.limit]:
        for judged in mmn.finder_scores(vlm, item.image(), ["logit", "logprob", "followed", "gradient", "integrated"]):
            n_nouns += 1
            replay = judged.replay
            orders = {name: top_k(scores, max(SIZES)) for name, scores in judged.scores.items()}
            for name, n_rounds in ROUNDS.items():
                orders[f"{name}, of log p"] = search(replay, n_rounds, logit=False)
                orders[f"{name}, of the lead"] = search(replay, n_rounds, logit=True)
            sets = [order[:k] for order in orders.values() for k in SIZES]
            fell = replay.effects(sets).logprob.view(len(orders), len(SIZES)).tolist()
            for name, row in zip(orders, fell, strict=True):
                for k, fall in zip(SIZES, row, strict=True):
                    falls[name, k].setdefault(item.name, []).append(fall)
    print(f"{n_nouns} nouns of {arguments.limit} images; fall of log p, mean over images, 95 % BCa interval\n")
    print("| set | " + " | ".join(f"top {k}" for k in SIZES) + " |\n| --- " + "| --- " * len(SIZES) + "|")
    for name in dict.fromkeys(name for name, _ in falls):
        cells = [estimate([sum(v) / len(v) for v in falls[name, k].values()]) for k in SIZES]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
