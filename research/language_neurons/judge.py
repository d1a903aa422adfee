"""Are there neurons of a noun, and what are they for? Judged by photographs and sentences that chose none of them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

import mmneurons as mmn
from mmneurons.attribution.controls import matched
from mmneurons.maths.statistics import estimate
from mmneurons.progress import Progress
from mmneurons.vlm.hooks.interventions import intervene
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says
from research.language_neurons.observe import SIZES, TOP, Numbers, Observer, Seen, sentences

LEAST = 4
"""Photographs of a noun whose answers say it: two choose, two judge."""


@dataclass(frozen=True, eq=False)
class Noun:
    """What the photographs of one noun chose, and what is left to judge it."""

    noun: str
    chosen: NDArray[np.int64]
    """The neurons with the highest mean score over the first half, as many as the largest set has, best first."""
    signs: Numbers
    """The sign of each one's mean activation there."""
    loud: Numbers
    """Of every neuron, its mean |activation| there."""
    choosing: list[Seen]
    judging: list[Seen]


def nouns_of(seen: Sequence[Seen]) -> list[Noun]:
    """The nouns that enough answers say: the first, third, ... photograph chooses, the others judge."""
    by_noun: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_noun[one.noun].append(one)
    found = []
    for noun, mine in by_noun.items():
        if len(mine) >= LEAST:
            choosing, judging = mine[::2], mine[1::2]
            chosen = np.argsort(-np.mean([one.scores for one in choosing], axis=0), kind="stable")[: max(SIZES)]
            fired = np.mean([one.activations for one in choosing], axis=0)
            loud = np.mean([np.abs(one.activations) for one in choosing], axis=0)
            signs = np.where(fired[chosen] < 0, -1, 1).astype(np.float32)
            found.append(Noun(noun, chosen, signs, loud, choosing, judging))
    return found


def random_of(noun: Noun, norms: Sequence[Tensor], k: int, *, as_many: bool, draws: int = 1) -> list[Tensor]:
    """Random neurons of the same blocks: one for one about as loud as the chosen ones, or as loud together."""
    starts = torch.tensor([0, *map(len, norms)]).cumsum(0)[:-1]
    loud = torch.from_numpy(noun.loud) * torch.cat(list(norms))
    return matched(starts, loud, torch.from_numpy(noun.chosen[:k]), draws, 0, as_many=as_many).sets


SILENCED = ("noun", "size", "neurons", "where", "name", "value")


def silence(observer: Observer, out: Path, found: Sequence[Noun], paths: dict[str, Path], progress: Progress) -> None:
    """Silence the chosen neurons, and random ones as loud, in whole answers and behind sentences; a row each."""
    vlm, path = observer.vlm, out / "silenced.csv"
    done = {row["noun"] for row in rows_of(path)}
    starts = torch.tensor([0, *map(len, observer.norms)]).cumsum(0)
    for number, noun in enumerate(found):
        if noun.noun in done:
            continue
        rows: list[tuple[object, ...]] = []
        files = [paths[one.name] for one in noun.judging]
        for k in SIZES:
            top, random = torch.from_numpy(noun.chosen[:k]), random_of(noun, observer.norms, k, as_many=False)[0]
            for kind, slots in (("top", top), ("random", random)):
                with intervene(vlm, [_neuron(vlm, starts, int(slot)) for slot in slots], scale=0):
                    texts = vlm.caption([str(file) for file in files])
                for file, text in zip(files, texts, strict=True):
                    rows.append((noun.noun, k, kind, "answers", file.name, int(says(text, noun.noun))))
            for text in sentences()[noun.noun]:
                fallen = observer.sentence_without(noun.noun, text, top)
                rows += [(noun.noun, k, kind, "sentences", text, value) for kind, value in fallen.items()]
        # All rows of a noun at once, so that a noun that is there is there as a whole.
        with path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(([] if done or file.tell() else [SILENCED]) + rows)
        progress("silenced", number + 1, len(found))


def _neuron(vlm: VLM, starts: Tensor, slot: int) -> mmn.Neuron:
    i = int(torch.bucketize(torch.tensor(slot), starts, right=True)) - 1
    return vlm.anatomy.ffns[i].neuron(slot - int(starts[i]))


def rows_of(path: Path) -> list[dict[str, str]]:
    """What a file of rows holds; nothing if it is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# The tables


def auc(positive: Sequence[Numbers], negative: Sequence[Numbers]) -> Numbers:
    """For each neuron the chance that it fires more in one of `positive` than in one of `negative`, ties half."""
    ranks = rankdata(np.stack([*positive, *negative]), axis=0)[: len(positive)]
    n, m = len(positive), len(negative)
    return ((ranks.sum(0) - n * (n + 1) / 2) / (n * m)).astype(np.float32)


def fired(seen: Seen, slots: NDArray[np.int64], signs: Numbers, where: str) -> Numbers:
    """How much neurons fire in the direction of their choice: at the noun, or at the image token where most."""
    if where == "noun":
        return signs * seen.activations[slots]
    assert seen.highest is not None
    assert seen.lowest is not None
    return np.where(signs > 0, seen.highest[slots], -seen.lowest[slots]).astype(np.float32)


def shared(a: Seen, b: Seen) -> float:
    """Share of the top ten of one that are in the top ten of the other."""
    return len({*_top(a)} & {*_top(b)}) / TOP


@cache
def _top(seen: Seen) -> list[int]:
    # Kept: each is compared with all others.
    return np.argsort(-seen.scores, kind="stable")[:TOP].tolist()


def figures(
    found: Sequence[Noun], texts: Sequence[Seen], norms: Sequence[Tensor], silenced: list[dict[str, str]]
) -> dict[str, dict[str, float]]:
    """For each noun every figure, by name."""
    behind: dict[str, list[Seen]] = defaultdict(list)
    for text in texts:
        behind[text.noun].append(text)
    made: dict[str, dict[str, float]] = {}
    for noun in found:
        mine, own = noun.choosing + noun.judging, behind[noun.noun]
        others = [one for other in found if other is not noun for one in other.judging]
        foreign = [one for other in found if other is not noun for one in behind[other.noun]]
        row = {"photographs": len(mine), "late": float(np.mean(noun.chosen[:TOP] >= 2 / 3 * len(noun.loud)))}
        # 1. What was measured at once: means over the noun's photographs, and over its sentences.
        row |= {name: _mean(one.figures[name] for one in mine) for name in mine[0].figures}
        row |= {f"sentence: {name}": _mean(one.figures[name] for one in own) for name in own[0].figures}
        # 2. Overlap of top tens: two photographs of the noun, of two nouns, a photograph and a sentence.
        row["shared, two photographs"] = _mean(shared(a, b) for i, a in enumerate(mine) for b in mine[:i])
        row["shared, other noun"] = _mean(shared(a, b) for a in mine for b in others)
        row["shared, its sentences"] = _mean(shared(a, b) for a in mine for b in own)
        row["shared, other sentences"] = _mean(shared(a, b) for a in mine for b in foreign)
        # 3. Does a neuron that was chosen on other photographs tell the noun from others?
        random = random_of(noun, norms, TOP, as_many=True)[0].numpy()
        usual = np.mean([one.activations[random] for one in noun.choosing], axis=0)
        drawn = random, np.where(usual < 0, -1, 1).astype(np.float32)
        for kind, of in (("top", (noun.chosen[:TOP], noun.signs[:TOP])), ("random", drawn)):
            row[f"AUC at the noun, {kind}"] = told_apart(noun.judging, others, *of, "noun")
            row[f"AUC at the image, {kind}"] = told_apart(noun.judging, others, *of, "image")
            row[f"AUC in sentences, {kind}"] = told_apart(own, foreign, *of, "noun")
        # 4. What silencing does.
        values: dict[str, list[float]] = defaultdict(list)
        for r in silenced:
            if r["noun"] == noun.noun:
                values[f"silenced {r['size']} in {r['where']}, {r['neurons']}"].append(float(r["value"]))
        made[noun.noun] = row | {name: _mean(each) for name, each in values.items()}
    return made


def told_apart(
    positive: Sequence[Seen], negative: Sequence[Seen], slots: NDArray[np.int64], signs: Numbers, where: str
) -> float:
    """How well each of some neurons tells a noun from others, by itself: the mean of their AUCs."""
    both = [[fired(one, slots, signs, where) for one in part] for part in (positive, negative)]
    return float(auc(*both).mean())


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


LINES = [
    ("share of the top ten that say the noun (hit@10)", "hit@10 {}"),
    ("the same, top ten behind sentences", "sentence: hit@10 {}"),
    ("share that lose half or more with a blank picture", "dependence {}"),
    ("log p lost without that place's top 10, nats", "deletion of 10 {}"),
    ("log p lost without that place's top 100, nats", "deletion of 100 {}"),
    ("the same behind sentences, its own top 10", "sentence: deletion of 10 {}"),
    ("the same behind sentences, its own top 100", "sentence: deletion of 100 {}"),
    ("AUC, chosen neurons: the noun against others, where it is predicted", "AUC at the noun, {}"),
    ("AUC, chosen neurons: the noun against others, at image tokens", "AUC at the image, {}"),
    ("AUC, chosen neurons: the noun against others, behind sentences", "AUC in sentences, {}"),
    ("log p lost behind sentences without the chosen 10", "silenced 10 in sentences, {}"),
    ("log p lost behind sentences without the chosen 100", "silenced 100 in sentences, {}"),
    ("answers that still say the noun without the chosen 10", "silenced 10 in answers, {}"),
    ("answers that still say the noun without the chosen 100", "silenced 100 in answers, {}"),
]
"""What is told of the noun's neurons, beside random ones of the same blocks."""
SHARED = [
    ("top ten shared by two photographs", "shared, two photographs", "shared, other noun"),
    ("top ten shared by a photograph and a sentence", "shared, its sentences", "shared, other sentences"),
]
"""What is told of one noun, beside two nouns."""


def table(by_noun: dict[str, dict[str, float]]) -> Iterator[str]:
    """Markdown: means over nouns with their intervals."""
    n = sum(int(row["photographs"]) for row in by_noun.values())
    late = estimate([row["late"] for row in by_noun.values()])
    yield f"{len(by_noun)} nouns, {n} photographs whose answers say them. Chosen neurons in the last third: {late}."
    both = [(words, name.format("top"), name.format("random")) for words, name in LINES]
    for heads, lines in (("of the noun | random", both), ("one noun | two nouns", SHARED)):
        yield from ("", f"| | {heads} | difference |", "| --- | --- | --- | --- |")
        for words, mine, other in lines:
            pairs = [(row[mine], row[other]) for row in by_noun.values() if mine in row]
            cells = [estimate(part) for part in ([a for a, _ in pairs], [b for _, b in pairs])]
            yield f"| {words} | {cells[0]} | {cells[1]} | {estimate([a - b for a, b in pairs])} |"
