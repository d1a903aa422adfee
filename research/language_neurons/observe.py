"""What happens in a language model where a noun is predicted: after a photograph, and after a sentence.

Each is measured once and kept as a file of its own, so that a run that was stopped goes on behind the last one.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mmneurons.attribution.ablation import Replay, replays
from mmneurons.attribution.controls import loudness, matched
from mmneurons.data.images import open_image
from mmneurons.finding.batch import targets_of
from mmneurons.finding.reading import columns_of, reader_for
from mmneurons.finding.rereading import blank_like, rescored, trace_again
from mmneurons.finding.scoring import Scored, Target, score_targets
from mmneurons.maths.ranking import top_k
from mmneurons.progress import Progress
from mmneurons.settings import FindSettings
from mmneurons.vlm.asking import ask
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM, Inputs
from mmneurons.words import Word, same_stem

SENTENCES = Path(__file__).with_name("sentences.csv")
TOP = 10
"""Neurons of each noun."""
SIZES = (10, 100)
"""Sizes of the sets that are silenced."""
DRAWS = 5
"""Matched random sets for each set silenced."""
WORDS = 10
"""Words of each neuron."""
HALF = 0.5
Numbers = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
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
            places = scored.places(0, slots.tolist())
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
        vlm, places = self.vlm, scored.places(0, slots.tolist())
        signs = torch.where(scored.activations[0, slots] < 0, -1.0, 1.0)
        reader = reader_for(vlm, "standardised")
        told, _ = reader.tokens(reader.read(columns_of(vlm.anatomy, places, signs.device), places, signs), WORDS)
        said = vlm.token_text(target.token_id)
        return float(np.mean([any(same_stem(target.word.lemma, token, said) for token in tokens) for tokens in told]))


def _array(values: Float[Tensor, "n"]) -> Numbers:
    return values.float().cpu().numpy()


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
