"""Are the nouns that the picture does not support told from the others? Every figure of docs/measurements/grounded.md.

    python -m benchmarks.quality.grounded FILE.csv           # the rows, if FILE is not there yet, and the tables
    python -m benchmarks.quality.grounded FILE.csv --shipped # calibration.json: the pocket model's own, made anew
    python -m benchmarks.quality.grounded --given            # captions that the model did not say

Five random halves of `hallucination-500`: on one half of the images a curve is fitted and a threshold chosen, on the
other they are judged; then the other way round.
"""

from __future__ import annotations

import csv
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import expit

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.finding.calibration import fit, log_odds, threshold_for
from mmneurons.maths.statistics import auroc
from mmneurons.metrics.grounding import NamedObject, named_objects
from mmneurons.metrics.grounding import curve as curve_of
from mmneurons.words import inflected

JUDGED_ON = "hallucination-500"
FOREIGN, N_FOREIGN = "find-500", 200
"""Pictures for captions of others; their scenes are of other seeds."""
WORDINGS = (
    "something strange next to a {0} and, far away, some {1} or other",
    "two or three {3}, and a {0}",
    "{2} beside a {1}",
    "a {0} with a {1}",
)
"""Captions that the model would not write: words in other places, forms and letters."""
BATCH = 32
HALVES = 5
LOST = (0.0, 0.01, 0.02, 0.05)
"""Shares of the objects truly named that may fall below the threshold, where it is chosen."""
FEATURES = ("internal confidence", "probability", "frequency")
"""What curves can be of: log odds of the internal confidence and of the noun's probability, and log frequency."""
SCORES = {
    "probability alone (the rival)": (1,),
    "internal confidence alone": (0,),
    "both": (0, 1),
    "both, and frequency": (0, 1, 2),
}
"""Which of `FEATURES` each curve is of; the package's calibration is of the second."""


def rows(path: Path) -> list[NamedObject]:
    """Every object named in the captions of the set, measured once and kept."""
    if not path.exists():
        items = mmn.read_items(f"pocket:{JUDGED_ON}")
        found = named_objects(mmn.load(), items, mmn.Vocabulary([pocket.nouns()]), batch_size=BATCH)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
            writer.writeheader()
            for one in found:
                writer.writerow(
                    {**asdict(one), "probability": f"{one.probability:.7g}", "confidence": f"{one.confidence:.7g}"}
                )
    with path.open(encoding="utf-8") as file:
        return [
            NamedObject(
                row["image"],
                row["noun"],
                row["present"] in ("True", "1"),
                float(row["probability"]),
                float(row["confidence"]),
                int(row["layer"]),
            )
            for row in csv.DictReader(file)
        ]


def halves(images: np.ndarray) -> Iterator[tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]]:
    """Of each random split both ways: what a curve is fitted to, and what it is judged on."""
    order = np.random.default_rng(0)
    for _ in range(HALVES):
        first = np.isin(images, order.permutation(500)[:250])
        yield first, ~first
        yield ~first, first


def features(found: Sequence[NamedObject], made: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "n features"]:
    """`FEATURES` of every object named; how often one is named is counted in the half that curves are made with."""
    counts = Counter(one.noun for one, mine in zip(found, made, strict=True) if mine)
    frequency = np.log((np.array([counts[one.noun] for one in found]) + 1.0) / 251)
    odds = [log_odds([one.confidence for one in found]), log_odds([one.probability for one in found])]
    return np.stack([*odds, frequency], axis=1)


def judged(scores: Float[np.ndarray, "n"], threshold: float, present: Bool[np.ndarray, "n"]) -> tuple[float, float]:
    """By how much CHAIR-i falls when only what reaches the threshold is named, and what share of the recall is lost."""
    named = scores >= threshold
    before, after = (~present).mean(), (~present[named]).mean()
    return float(1 - after / before), float(1 - (named & present).sum() / present.sum())


def table(found: Sequence[NamedObject], kept: Bool[np.ndarray, "n"], title: str) -> None:
    """Print one table: each curve, judged on halves that it was not made with; means and deviations over ten."""
    images = np.array([int(one.image.rsplit("/", 1)[1]) for one in found])
    present = np.array([one.present for one in found])
    print(f"\n{title}: {kept.sum()} objects named, {(~present[kept]).sum()} of them absent\n")
    heads = " | ".join(f"{lost:.0%} chosen: CHAIR-i down by | recall lost" for lost in LOST)
    print(f"| score | AUROC | {heads} |\n| --- | --- {'| --- ' * (2 * len(LOST))}|")
    for name, columns in SCORES.items():
        areas, cells = list[float](), {lost: list[tuple[float, float]]() for lost in LOST}
        for made, other in halves(images):
            x = features(found, made)[:, columns]
            coefficients, intercept = fit(x[made & kept], present[made & kept])
            scores = expit(x @ coefficients + intercept)
            areas.append(auroc(scores[other & kept], present[other & kept]) or float("nan"))
            for lost in LOST:
                threshold = threshold_for(scores[made & kept], present[made & kept], lost)
                cells[lost].append(judged(scores[other & kept], threshold, present[other & kept]))
        told = [f"{np.mean(part):.3f} ({np.std(part):.3f})" for lost in LOST for part in zip(*cells[lost], strict=True)]
        print(f"| {name} | {np.mean(areas):.3f} ({np.std(areas):.3f}) | {' | '.join(told)} |")


def curve(found: Sequence[NamedObject]) -> None:
    """Print precision and recall of "absent", and how well the probabilities are calibrated, over the same halves."""
    images = np.array([int(one.image.rsplit("/", 1)[1]) for one in found])
    present = np.array([one.present for one in found])
    said, truth = list[np.ndarray](), list[np.ndarray]()
    for made, other in halves(images):
        x = features(found, made)[:, [0]]
        coefficients, intercept = fit(x[made], present[made])
        said.append(expit(x[other] @ coefficients + intercept))
        truth.append(present[other])
    scores, there = np.concatenate(said), np.concatenate(truth)
    print("\n| absent: probability below | precision of absent | recall of absent |\n| --- | --- | --- |")
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95):
        called = scores < threshold
        print(f"| {threshold} | {(~there[called]).mean():.3f} | {(called & ~there).sum() / (~there).sum():.3f} |")
    print("\n| probability | objects | of them there |\n| --- | --- | --- |")
    for low, high in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 1.01)):
        mine = (scores >= low) & (scores < high)
        print(f"| {low} to {min(high, 1)} | {mine.sum()} | {there[mine].mean():.3f} |")


def captions_of_others(seed: int = 0) -> None:
    """Print how captions fare that the model did not say: one object that is there and one that is not, in any form."""
    items, order = mmn.read_items(f"pocket:{FOREIGN}")[:N_FOREIGN], random.Random(seed)
    nouns, asked = pocket.nouns(), list[tuple[mmn.Item, str, str, str]]()
    for item in items:
        there = order.choice([noun for noun in nouns if noun in (item.objects or ())])
        absent = order.choice([noun for noun in nouns if noun not in (item.objects or ())])
        first, second = order.sample([there, absent], 2)
        text = order.choice(WORDINGS).format(first, second, first.capitalize(), inflected(second, "dogs"))
        asked.append((item, there, absent, text))
    found = mmn.check(
        mmn.load(), [one[0].image() for one in asked], caption=[one[3] for one in asked], batch_size=BATCH
    )
    rows = [
        (noun.lemma == there, noun.grounded.confidence, noun.probability, noun.grounded.seen)
        for (_, there, absent, _), checked in zip(asked, found, strict=True)
        for noun in checked.nouns
        if noun.lemma in (there, absent)
    ]
    present, confidence, likely, seen = (np.array(part) for part in zip(*rows, strict=True))
    print(f"\n{present.sum()} nouns that are there and {(~present).sum()} that are not, of {len(items)} pictures\n")
    print("| | |\n| --- | --- |")
    print(f"| AUROC by internal confidence | {auroc(confidence, present):.3f} |")
    print(f"| AUROC by the probability where it stands | {auroc(likely, present):.3f} |")
    print(f"| median probability of nouns that are there | {np.median(likely[present]):.1e} |")
    print(f"| there, and called not seen | {(~seen[present]).mean():.3f} |")
    print(f"| not there, and called not seen | {(~seen[~present]).mean():.3f} |")


def shipped(found: Sequence[NamedObject]) -> None:
    """Make the pocket model's own calibration of all the rows; how far it holds is told by the halves above."""
    made_by = {"model": mmn.load().facts, "images": 500, "objects named": len(found)}
    made_by |= {"of them there": sum(one.present for one in found), "set": JUDGED_ON}
    made_by["model"] = {"weights_hash": made_by["model"]["weights_hash"]}
    curve_of(found, mmn.Vocabulary([pocket.nouns()]), 0.02, made_by).save("calibration.json")


def main(arguments: Sequence[str]) -> None:
    """Measure and print, or make the shipped calibration."""
    torch.set_num_threads(1)
    if "--given" in arguments:
        captions_of_others()
        return
    found = rows(Path(arguments[0]))
    if "--shipped" in arguments:
        shipped(found)
        return
    groups = pocket.evaluation_set(JUDGED_ON).groups
    style = np.array([groups[int(one.image.rsplit("/", 1)[1])] == "other style" for one in found])
    print(f"Features: {', '.join(FEATURES)}")
    table(found, np.ones(len(found), dtype=bool), "All four kinds")
    table(found, ~style, "Three kinds, without the other style")
    curve(found)


if __name__ == "__main__":
    main(sys.argv[1:])
