"""The experiments over a set of images, each image's results kept as they come, so that a run that was stopped goes on.

A folder holds, of each experiment, `NAME.jsonl`: a line for each image (`Shelf`). Of specificity `specificity.f32`
beside it: what every neuron gives to each noun, a row a noun, float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.finding.finder import find
from mmneurons.finding.finders import FINDERS
from mmneurons.finding.result import Finding, Score
from mmneurons.inspection.causal import NounCausal, causal
from mmneurons.inspection.items import Item
from mmneurons.inspection.sensitivity import NounSensitivity, sensitivity
from mmneurons.inspection.shelf import Shelf
from mmneurons.inspection.specificity import NounScores, Specificity, noun_scores, specificity
from mmneurons.inspection.truth import NounTruth, finder_truth, mean_activations
from mmneurons.vlm import provenance
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.vlm import VLM

Experiment = Literal["sensitivity", "specificity", "causal", "finders"]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
SLOW_LIMIT = 50
"""Images of `causal` and `finders` where nobody says how many: they make hundreds of passes for each noun."""
MEANS_FROM = 32
"""Images whose answers give the mean activations."""

EXAMPLES = 3
"""Images whose maps are drawn."""

Progress = Callable[[str, float, int], None]


@dataclass(frozen=True)
class Settings:
    """What is asked of the model, and how its neurons are ranked."""

    score: Score = "logit"
    top: int = 10
    prompt: str = PROMPT
    answer_prefix: str = ANSWER_PREFIX
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0

    @property
    def answer(self) -> dict[str, Any]:
        """The part that decides the answers."""
        return {
            "prompt": self.prompt,
            "answer_prefix": self.answer_prefix,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Inspection:
    """What the experiments found: of each the results by image, None if it was not run."""

    settings: Settings
    made_by: Mapping[str, Any]
    sensitivity: Mapping[str, list[NounSensitivity]] | None = None
    specificity: Specificity | None = None
    causal: Mapping[str, list[NounCausal]] | None = None
    finders: Mapping[str, list[NounTruth]] | None = None


@dataclass(frozen=True)
class _NounRow:
    """Which noun a row of `specificity.f32` is of."""

    lemma: str


@by_one_thread
def inspect(
    vlm: VLM,
    items: Sequence[Item],
    folder: str | os.PathLike[str],
    experiments: Sequence[Experiment] = EXPERIMENTS,
    settings: Settings | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Inspection:
    """Run experiments over images; what an earlier run left in the folder is read, not made again.

    Args:
        vlm: The model, from `load`.
        items: From `read_items`.
        folder: Where results are kept.
        experiments: Which.
        settings: What is asked and how neurons are ranked; None: as `find` does.
        limit: At most so many images for each experiment, the first ones; None: all, but `SLOW_LIMIT` of causal and
            finders.
        batch_size: Images in one batch where they can be run together.
        progress: Called with the experiment, images done (a share of one counts) and images to do.

    Raises:
        SettingError: the folder holds results of another model, other images or settings; an image stands twice; more
            top neurons than the model has; or no image gave a noun.
    """
    settings = settings or Settings()
    n_neurons = sum(ffn.size for ffn in vlm.anatomy.ffns)
    if not 1 <= settings.top <= n_neurons:
        raise SettingError(f"There is no top {settings.top} of the model's {n_neurons} neurons.", fix="--top 10")
    names = [item.name for item in items]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingError(f"The image {twice} stands twice in the list.", fix="Name each image once.")
    made_by = {
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
        "settings": asdict(settings),
        "images": names,
    }
    bench = _Bench(vlm, items, Path(folder), settings, made_by, limit, batch_size, progress)
    return Inspection(settings, made_by, **{name: getattr(bench, name)() for name in dict.fromkeys(experiments)})


def examples(vlm: VLM, items: Sequence[Item], settings: Settings) -> list[Finding]:
    """Findings with maps of the first few images, to be drawn for each k."""
    shown = items[:EXAMPLES]
    found = find(
        vlm, [item.image() for item in shown], top=settings.top, score=settings.score, maps=True, **settings.answer
    )
    return [replace(one, images=(item.name,)) for one, item in zip(found, shown, strict=True)]


@dataclass(frozen=True)
class _Bench:
    vlm: VLM
    items: Sequence[Item]
    folder: Path
    settings: Settings
    made_by: Mapping[str, Any]
    limit: int | None
    batch_size: int
    progress: Progress | None

    def sensitivity(self) -> dict[str, list[NounSensitivity]]:
        """Each image with the next one in its place, too."""

        def one(item: Item, tell: Callable[[int, int], None]) -> list[NounSensitivity]:
            after = self.items[(self.items.index(item) + 1) % len(self.items)]
            other = None if after is item else after.image()
            s = self.settings
            return sensitivity(self.vlm, item, other, score=s.score, top=s.top, seed=s.seed, **s.answer)

        return self._each("sensitivity", list[NounSensitivity], self._items(None), one)

    def causal(self) -> dict[str, list[NounCausal]]:
        """The top neurons of each noun disturbed."""

        def one(item: Item, tell: Callable[[int, int], None]) -> list[NounCausal]:
            s = self.settings
            how = {"finder": s.score, "seed": s.seed, "batch_size": self.batch_size}
            return causal(self.vlm, item, progress=tell, **how, **s.answer)

        return self._each("causal", list[NounCausal], self._items(SLOW_LIMIT), one)

    def finders(self) -> dict[str, list[NounTruth]]:
        """Every finder against the true effects."""

        @cache  # when the first image asks: a run that finds all of its results there needs none
        def means() -> list[Tensor]:
            images = [item.image() for item in self.items[:MEANS_FROM]]
            return mean_activations(self.vlm, images, **self.settings.answer)

        def one(item: Item, tell: Callable[[int, int], None]) -> list[NounTruth]:
            s = self.settings
            return finder_truth(self.vlm, item.image(), FINDERS, means=means(), seed=s.seed, progress=tell, **s.answer)

        return self._each("finders", list[NounTruth], self._items(SLOW_LIMIT), one)

    def specificity(self) -> Specificity:
        """What every neuron gives to every noun of every image, then compared."""
        shelf = Shelf(self.folder / "specificity.jsonl", self.made_by, list[_NounRow])
        path = self.folder / "specificity.f32"
        width = sum(ffn.size for ffn in self.vlm.anatomy.ffns)
        done = sum(map(len, shelf.found.values()))
        path.touch()
        if path.stat().st_size < done * width * 4:
            raise SettingError(f"{path} is damaged.", seen="It is too short.", fix="Delete the folder and run again.")
        os.truncate(path, done * width * 4)  # rows come before their line: a stop in between leaves rows too many
        items = self._items(None)
        missing = [item for item in items if item.name not in shelf.found]
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            found = noun_scores(self.vlm, batch, score=self.settings.score, **self.settings.answer)
            for item in batch:
                mine = [one for one in found if one.image == item.name]
                with path.open("ab") as file:
                    for one in mine:
                        file.write(one.scores.astype("<f4").tobytes())
                shelf.add(item.name, [_NounRow(one.lemma) for one in mine])
            self._tell("specificity", len(items) - len(missing) + start + len(batch), len(items))
        names = [(image, row.lemma) for image, rows in shelf.found.items() for row in rows]
        if not names:
            raise SettingError("The model said no noun of any of the images.", seen=f"{len(items)} images")
        whole = np.memmap(path, dtype="<f4", mode="r", shape=(len(names), width))
        wanted = {item.name for item in items}
        layers = [ffn.layer for ffn in self.vlm.anatomy.ffns for _ in range(ffn.size)]
        rows = [NounScores(*name, row) for name, row in zip(names, whole, strict=True) if name[0] in wanted]
        return specificity(rows, layers, seed=self.settings.seed)

    def _items(self, usual: int | None) -> Sequence[Item]:
        return self.items[: self.limit or usual]

    def _each(self, name: str, kind: Any, items: Sequence[Item], one: Callable[..., Any]) -> dict[str, Any]:
        """One experiment, image by image; those on the shelf are taken from there."""
        shelf = Shelf(self.folder / f"{name}.jsonl", self.made_by, kind)
        done = sum(item.name in shelf.found for item in items)
        for item in items:
            if item.name in shelf.found:
                continue
            shelf.add(item.name, one(item, lambda part, of, done=done: self._tell(name, done + part / of, len(items))))
            done += 1
            self._tell(name, done, len(items))
        found = {item.name: shelf.found[item.name] for item in items}
        if not any(found.values()):
            raise SettingError("The model said no noun of any of the images.", seen=f"{len(items)} images")
        return found

    def _tell(self, name: str, done: float, total: int) -> None:
        if self.progress is not None:
            self.progress(name, done, total)
