"""Are there multi-modal neurons in a language model that never saw a picture? docs/measurements/language-neurons.md.

    python -m research.language_neurons OUT --pictures pictures.csv            # collects, judges, prints the tables
    python -m research.language_neurons OUT --table                            # the tables of what is there

The photo model's language model was trained on text alone, and stays frozen while a projector learns to show it
photographs. For each noun of `language_neurons.csv`, photographs of one split of the list are captioned. Where the
answer says the noun, all neurons are scored where it is predicted. Every second photograph of a noun chooses: its
**chosen** neurons are the ten with the highest mean score. The other photographs, and sentences without any picture
that end just before the noun, judge. Nothing is picked by eye. A run that is stopped goes on behind the last
photograph.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

import mmneurons as mmn
from mmneurons.attribution.ablation import Replay, replays
from mmneurons.attribution.controls import column_norms, loudness, matched
from mmneurons.data.images import open_image
from mmneurons.finding.batch import targets_of
from mmneurons.finding.reading import columns_of, reader_for
from mmneurons.finding.rereading import blank_like, rescored, trace_again
from mmneurons.finding.scoring import Scored, Target, score_targets
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import estimate
from mmneurons.progress import Progress
from mmneurons.settings import FindSettings
from mmneurons.vlm.asking import ask
from mmneurons.vlm.hooks.interventions import intervene
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM, Inputs
from mmneurons.words import Word, same_stem, says

SENTENCES = Path(__file__).with_suffix(".csv")
TOP = 10
"""Neurons of each noun."""
SIZES = (10, 100)
"""Sizes of the sets that are silenced."""
DRAWS = 5
"""Matched random sets for each set silenced."""
LEAST = 4
"""Photographs of a noun whose answers say it: two choose, two judge."""
WORDS = 10
"""Words of each neuron."""
HALF = 0.5
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """What was measured where a noun is predicted, once: after a photograph, or after a sentence."""

    noun: str
    name: str
    scores: Numbers
    """Of all neurons, (neurons,)."""
    activations: Numbers
    """Of all neurons, (neurons,)."""
    figures: dict[str, float]
    """The rest, by name."""
    highest: Numbers | None = None
    """The highest activation at any image token, (neurons,); None after a sentence."""
    lowest: Numbers | None = None


def keep(path: Path, seen: Seen) -> None:
    """Write what was measured; the file is there as a whole or not at all."""
    arrays: dict[str, Any] = {k: v for k, v in vars(seen).items() if isinstance(v, np.ndarray)}
    with path.with_suffix(".tmp").open("wb") as file:
        told: dict[str, Any] = {"names": [*seen.figures], "values": [*seen.figures.values()]}
        np.savez(file, noun=seen.noun, name=seen.name, **told, **arrays)
    os.replace(path.with_suffix(".tmp"), path)


def kept(folder: Path) -> list[Seen]:
    """What is there, in the order of the file names; empty files stand for answers that do not say the noun."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        if path.stat().st_size:
            with np.load(path) as file:
                arrays = {k: file[k] for k in file.files if file[k].dtype == np.float32}
                figures = dict(zip(file["names"].tolist(), file["values"].tolist(), strict=True))
                found.append(Seen(str(file["noun"]), str(file["name"]), figures=figures, **arrays))
    return found


@dataclass(frozen=True, eq=False)
class Observer:
    """Measures one photograph or sentence after the other."""

    vlm: VLM
    norms: list[Tensor]
    settings: FindSettings

    def photograph(self, noun: str, path: Path) -> Seen | None:
        """What happens where the answer says the noun; None if it does not say it."""
        vlm, settings = self.vlm, self.settings
        picture = open_image(path).image
        (batch,) = ask(vlm, [picture], settings)
        targets = [t for t in targets_of(vlm, batch.answers, 0, settings) if t.word.lemma == noun][:1]
        if not targets:
            return None
        # 1. All neurons scored, once more with a blank picture, and their activations at the image tokens.
        known = replays(vlm, batch.inputs, [targets[0].step])
        scored = score_targets(vlm, known.recording, known.answers, targets, settings)
        blank = vlm.encode([[blank_like(picture)]], settings.prompt, settings.prefix)
        without = rescored(vlm, trace_again(vlm, blank, known.answers, targets, settings), targets, settings)
        highest, lowest = self.at_image(batch.inputs)
        # 2. The top ones: words, dependence on the picture, deletion; beside random ones of the same blocks.
        top = top_k(scored.scores[0], TOP).cpu()
        figures = self.deleted(known.replays[0], scored)
        for kind, slots in (("top", top), ("random", self.alike(scored, top))):
            places = scored.places(0, slots)
            whole, left = scored.contributions[0, slots].tolist(), without.of(0, places)
            figures[f"hit@{WORDS} {kind}"] = self.hits(scored, slots, targets[0])
            lost = [1 - b / a >= HALF for a, b in zip(whole, left, strict=True) if a]
            figures[f"dependence {kind}"] = float(np.mean(lost))
        return Seen(noun, path.name, _array(scored.scores[0]), _array(scored.activations[0]), figures, highest, lowest)

    def sentence(self, noun: str, text: str) -> Seen:
        """What happens where the noun is predicted behind a sentence, without any picture."""
        known, target = self._behind(noun, text)
        scored = score_targets(self.vlm, known.recording, known.answers, [target], self.settings)
        figures = self.deleted(known.replays[0], scored) | {"probability": scored.probabilities[0]}
        for kind, slots in (("top", top := top_k(scored.scores[0], TOP).cpu()), ("random", self.alike(scored, top))):
            figures[f"hit@{WORDS} {kind}"] = self.hits(scored, slots, target)
        return Seen(noun, text, _array(scored.scores[0]), _array(scored.activations[0]), figures)

    def sentence_without(self, noun: str, text: str, chosen: Tensor) -> dict[str, float]:
        """How far log p of the noun falls behind a sentence without what photographs chose, and without others."""
        known, target = self._behind(noun, text)
        scored = score_targets(self.vlm, known.recording, known.answers, [target], self.settings)
        return self._fall(known.replays[0], scored, chosen)

    def _behind(self, noun: str, text: str) -> tuple[Any, Target]:
        """The one step behind a sentence, ready to be run again, and the noun's first token there."""
        vlm = self.vlm
        ids = torch.tensor([vlm.tokenizer(text).input_ids])
        token = vlm.tokenizer(f" {noun}", add_special_tokens=False).input_ids[0]
        known = replays(vlm, vlm.placed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), [0])
        known.replays[0].token_id = token  # the noun, whatever the model would say
        return known, Target(0, Word(noun, noun, 0, 0, (0,)), 0, token)

    def at_image(self, inputs: Inputs) -> tuple[Numbers, Numbers]:
        """The highest and the lowest activation of every neuron at the image tokens of a prompt."""
        vlm = self.vlm
        places = (inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero().flatten()
        with record(vlm.anatomy, lambda values: values[:, places]) as recording, torch.no_grad():
            vlm.model(**inputs)
        whole = torch.cat([part[0][0].float().cpu() for part in recording.raw], dim=-1)
        return _array(whole.amax(0)), _array(whole.amin(0))

    def deleted(self, replay: Replay, scored: Scored) -> dict[str, float]:
        """How far log p of the noun falls without the top neurons of this very place, and without others as loud."""
        figures = {}
        for k in SIZES:
            fallen = self._fall(replay, scored, top_k(scored.scores[0], k).cpu())
            figures |= {f"deletion of {k} {kind}": value for kind, value in fallen.items()}
        return figures

    def _fall(self, replay: Replay, scored: Scored, chosen: Tensor) -> dict[str, float]:
        others = matched(self._starts(scored), self._loud(scored), chosen, DRAWS, 0).sets
        fallen = replay.effects([chosen, *others]).logprob.tolist()
        return {"top": fallen[0], "random": float(np.mean(fallen[1:]))}

    def alike(self, scored: Scored, chosen: Tensor, seed: int = 0) -> Tensor:
        """As many random neurons of the same blocks, one for one about as loud."""
        return matched(self._starts(scored), self._loud(scored), chosen, 1, seed, as_many=True).sets[0]

    def _starts(self, scored: Scored) -> Tensor:
        return torch.nn.functional.pad(scored.slot_ends, (1, 0))[:-1]

    def _loud(self, scored: Scored) -> Tensor:
        fired = [part[0].float().cpu() for part in scored.trace.activations]
        return loudness(fired, [None] * len(fired), self.norms)

    def hits(self, scored: Scored, slots: Tensor, target: Target) -> float:
        """Share of neurons among whose words the noun stands, by its token or by its stem."""
        vlm, places = self.vlm, scored.places(0, slots)
        signs = torch.where(scored.activations[0, slots] < 0, -1.0, 1.0)
        reader = reader_for(vlm, "standardised")
        told, _ = reader.tokens(reader.read(columns_of(vlm.anatomy, places, signs.device), places, signs), WORDS)
        said = vlm.token_text(target.token_id)
        return float(np.mean([any(same_stem(target.word.lemma, token, said) for token in tokens) for tokens in told]))


def _array(values: Float[Tensor, "n"]) -> Numbers:
    return values.float().cpu().numpy()


# Where a noun's photographs are, and what is done with each


@dataclass(frozen=True)
class Photograph:
    """One photograph of the list, with the noun that its caption should have."""

    noun: str
    path: Path


def photographs(listed: Path, folder: Path, splits: Sequence[str], nouns: Sequence[str], most: int) -> list[Photograph]:
    """So many photographs of each noun, in a fixed random order of the whole list's."""
    with listed.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] in splits]
    found = []
    for noun in nouns:
        mine = [row["file"] for row in rows if row["noun"] == noun]
        order = np.random.default_rng(0).permutation(len(mine))[:most]
        found += [Photograph(noun, folder / mine[i]) for i in order]
    return found


def sentences() -> dict[str, tuple[str, str]]:
    """Two sentences for each noun, each ending before it."""
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        return {row["noun"]: (row["first"], row["second"]) for row in csv.DictReader(file)}


def collect(observer: Observer, out: Path, shown: Sequence[Photograph], progress: Progress) -> None:
    """Measure every photograph and every sentence once; a file each."""
    for name in ("photographs", "sentences"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for number, photograph in enumerate(shown):
        path = out / "photographs" / f"{photograph.noun}.{photograph.path.stem}.npz"
        if not path.exists():
            seen = observer.photograph(photograph.noun, photograph.path)
            path.touch() if seen is None else keep(path, seen)
            progress("photographs", number + 1, len(shown))
    nouns = {photograph.noun for photograph in shown}
    texts = [(noun, i, text) for noun, two in sentences().items() if noun in nouns for i, text in enumerate(two)]
    for number, (noun, i, text) in enumerate(texts):
        path = out / "sentences" / f"{noun}.{i}.npz"
        if not path.exists():
            keep(path, observer.sentence(noun, text))
            progress("sentences", number + 1, len(texts))


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


def _top(seen: Seen) -> list[int]:
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


def main() -> None:
    """Collect what is missing, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
