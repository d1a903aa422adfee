"""The experiments over a set of images, each image's results kept as they come, so that a run that was stopped goes on.

A folder holds, of each experiment, `NAME.jsonl`: a line for each image (`Store`), under a key made of all that its
result depends on. Images that are added, taken away or replaced leave the results of the others as they are. Of
specificity there is a folder beside it, with a file `KEY.f32` for each image: what every neuron gives to each noun, a
row a noun, float32.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Unpack, get_args, overload

import numpy as np
from torch import Tensor

from mmneurons.data.content import image_hash, key_of, reason, truth_hash
from mmneurons.data.dataset import Item
from mmneurons.data.store import LOCK, Store, no_number, one_writer
from mmneurons.errors import ImageError, SettingError
from mmneurons.files import write_whole
from mmneurons.finding.finder import find
from mmneurons.finding.result import Finding
from mmneurons.inspection.causal import NounCausal, causal
from mmneurons.inspection.faithfulness import NounTruth, finder_truth, mean_activations
from mmneurons.inspection.rows import (
    ALIKE,
    DIFFERENT,
    ELSEWHERE,
    EQUAL_CHANGE,
    MATCHED,
    CausalRow,
    FinderRow,
    SensitivityRow,
    SpecificityRow,
    rows_of,
)
from mmneurons.inspection.sensitivity import NounSensitivity, sensitivity
from mmneurons.inspection.specificity import NounScores, Specificity, noun_scores, specificity
from mmneurons.progress import Progress, untold
from mmneurons.settings import InspectOptions, InspectSettings, settled
from mmneurons.vlm import provenance
from mmneurons.vlm.vlm import VLM

Experiment = Literal["sensitivity", "specificity", "causal", "finders"]
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
SLOW_LIMIT = 50
"""Images of `causal` and `finders` where nobody says how many: they make hundreds of passes for each noun."""
COMPARED_WITH: Mapping[str, Sequence[str]] = {
    "sensitivity": (MATCHED, ELSEWHERE),
    "specificity": (DIFFERENT, ALIKE),
    "causal": (MATCHED, EQUAL_CHANGE),
}
"""Of an experiment what its results are compared with, kept in the head of its file.

A folder whose results lack a comparison that was added later is so refused, instead of being half filled.
"""
MEANS_FROM = 32
"""Images whose answers give the mean activations."""

EXAMPLES = 3
"""Images whose maps are drawn."""


@dataclass(frozen=True)
class Inspection:
    """An inspection holds what the experiments found: of each the results by image, None if it was not run."""

    settings: InspectSettings
    made_by: Mapping[str, Any]
    images: Mapping[str, str]
    """By name the hash of the pixels of every image that was used."""
    left_out: Mapping[str, str]
    """By name why an image could not be used."""
    given: Mapping[str, str]
    """By name the answer that the model was given to read, where it did not answer itself."""
    sensitivity: Mapping[str, list[NounSensitivity]] | None = None
    specificity: Specificity | None = None
    causal: Mapping[str, list[NounCausal]] | None = None
    finders: Mapping[str, list[NounTruth]] | None = None

    @overload
    def rows(self, experiment: Literal["sensitivity"]) -> list[SensitivityRow]: ...
    @overload
    def rows(self, experiment: Literal["specificity"]) -> list[SpecificityRow]: ...
    @overload
    def rows(self, experiment: Literal["causal"]) -> list[CausalRow]: ...
    @overload
    def rows(self, experiment: Literal["finders"]) -> list[FinderRow]: ...
    def rows(self, experiment: Experiment) -> list[Any]:
        """List what an experiment found as flat rows, in order of images; none if it was not run.

        The columns are those of docs/reference/format.md.
        """
        found = getattr(self, experiment)
        if found is None:
            return []
        return list(found.rows()) if isinstance(found, Specificity) else rows_of(found)


@dataclass(frozen=True)
class _Rows:
    """A line of the store says what the rows of an image's file are."""

    lemmas: tuple[str, ...]
    steps: tuple[int, ...]
    """The place of each in the answer."""
    sha256: str
    """Of the file."""


def inspect(
    vlm: VLM,
    items: Sequence[Item],
    folder: str | os.PathLike[str],
    experiments: Experiment | Sequence[Experiment] = EXPERIMENTS,
    settings: InspectSettings | None = None,
    *,
    limit: int | None = None,
    progress: Progress = untold,
    **options: Unpack[InspectOptions],
) -> Inspection:
    """Run experiments over images; what an earlier run left in the folder is read, not made again.

    An image that cannot be read, or that the model's processor refuses, is left out and named.

    Args:
        vlm: The model, from `load`.
        items: From `read_items`.
        folder: Where results are kept; one run writes there at a time.
        experiments: Which.
        settings: What is asked and how neurons are ranked; None: as `find` does.
        limit: At most so many images for each experiment, the first ones; None: all, but `SLOW_LIMIT` of causal and
            finders.
        progress: Told of each experiment how many images are done; a share of one counts.
        **options: Fields of `InspectSettings`, such as `top=20`, over those of `settings`.

    Raises:
        SettingError: the folder holds results of another model or other settings, or another run writes there; an
            image stands twice; more top neurons than the model has; captions for an experiment in which the model
            answers by itself; or no image gave a noun.
        ImageError: no image can be used.
        FormatError: what the folder holds is damaged.
    """
    # 1. What is asked; what cannot be is refused before anything is written or made.
    settings = settled(InspectSettings, settings, options)
    settings = replace(settings, answer_prefix=settings.question.prefix)
    n_neurons = sum(ffn.size for ffn in vlm.anatomy.ffns)
    if not 1 <= settings.top <= n_neurons:
        raise SettingError(f"There is no top {settings.top} of the model's {n_neurons} neurons.", fix="--top 10")
    experiments = (experiments,) if isinstance(experiments, str) else tuple(experiments)
    if unknown := [name for name in experiments if name not in EXPERIMENTS]:
        raise SettingError(f"There is no experiment '{unknown[0]}'.", fix=f"Choose of: {', '.join(EXPERIMENTS)}.")
    generating = [name for name in experiments if name in ("causal", "finders")]
    if generating and any(item.caption is not None for item in items):
        raise SettingError(
            f"{generating[0]} lets the model answer by itself, and the manifest gives captions.",
            fix="Run sensitivity or specificity on these, or leave the captions out.",
        )
    if twice := [name for name, count in Counter(item.name for item in items).items() if count > 1]:
        raise SettingError(f"The image {twice[0]} stands twice in the list.", fix="Name each image once.")
    # 2. The experiments. The folder first: who may not write there is told so, and does not wait for a model that is
    # busy for hours.
    folder = Path(folder)
    with one_writer(folder, folder / LOCK), vlm.alone():
        chosen = asdict(settings)
        del chosen["batch_size"]  # no result depends on it
        made_by = {"model": dict(vlm.facts), "packages": provenance.versions(), "settings": chosen}
        bench = _Bench(vlm, items, folder, settings, made_by, limit, progress)
        found = {name: getattr(bench, name)() for name in dict.fromkeys(experiments)}
    # 3. What they found, with all that tells which images and answers it was found on.
    pictures = {name: pixels for name, pixels in bench.pictures.items() if pixels is not None}
    given = {item.name: item.caption for item in items if item.name in pictures and item.caption is not None}
    return Inspection(settings, made_by, pictures, bench.left_out, given, **found)


def examples(vlm: VLM, items: Sequence[Item], settings: InspectSettings) -> list[Finding]:
    """Find the neurons of the first few images, with maps that are to be drawn for each k."""
    shown = items[:EXAMPLES]
    asked = asdict(settings.question)
    how = {"top": settings.top, "score": settings.score, "maps": True, **asked}
    found = [find(vlm, item.image(), caption=item.caption, **how) for item in shown]
    return [replace(one, images=(item.name,)) for one, item in zip(found, shown, strict=True)]


@dataclass(frozen=True)
class _Bench:
    """A bench runs experiments on one model and one list of images, and keeps their results in one folder."""

    vlm: VLM
    items: Sequence[Item]
    folder: Path
    settings: InspectSettings
    made_by: Mapping[str, Any]
    limit: int | None
    progress: Progress
    pictures: dict[str, str | None] = field(default_factory=dict)
    """By name the hash of the pixels of every image that was opened; None where it cannot be read."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By name why an image could not be used."""

    def sensitivity(self) -> dict[str, list[NounSensitivity]]:
        """Run the sensitivity experiment, each image with the next one in its place, too."""

        def one(item: Item, tell: Progress) -> list[NounSensitivity]:
            s, other = self.settings, self._another(item)
            how = {"score": s.score, "top": s.top, "seed": s.seed, "question": s.question}
            try:
                return sensitivity(self.vlm, item, None if other is None else other.image(), **how)
            except ImageError:  # perhaps of the other one, which this one is not to pay for
                return sensitivity(self.vlm, item, None, **how)

        def key(item: Item) -> str:
            other = self._another(item)
            return self._key(item, truth_hash(item), None if other is None else self.pictures[other.name])

        return self._each("sensitivity", list[NounSensitivity], self._items(None), one, key)

    def causal(self) -> dict[str, list[NounCausal]]:
        """Run the causal experiment: the model captions while the top neurons of each noun are disturbed."""

        def one(item: Item, tell: Progress) -> list[NounCausal]:
            s = self.settings
            how = {"finder": s.score, "seed": s.seed, "batch_size": s.batch_size, "question": s.question}
            return causal(self.vlm, item, progress=tell, **how)

        return self._each("causal", list[NounCausal], self._items(SLOW_LIMIT), one, self._key)

    def finders(self) -> dict[str, list[NounTruth]]:
        """Run the finders experiment: every finder that the model allows is compared with the true effects."""
        answering = self._usable(self.items[:MEANS_FROM])
        means_of = [self.pictures[item.name] for item in answering]

        @cache  # when the first image asks: a run that finds all of its results there needs none
        def means() -> list[Tensor]:
            return mean_activations(self.vlm, [item.image() for item in answering], question=self.settings.question)

        def one(item: Item, tell: Progress) -> list[NounTruth]:
            s = self.settings
            how = {"means": means(), "seed": s.seed, "question": s.question}
            return finder_truth(self.vlm, item.image(), progress=tell, **how)

        def key(item: Item) -> str:
            return self._key(item, means_of)

        return self._each("finders", list[NounTruth], self._items(SLOW_LIMIT), one, key)

    def specificity(self) -> Specificity:
        """Run the specificity experiment: all that neurons give to the nouns of all images is kept, then compared."""
        store: Store[_Rows] = self._store("specificity", _Rows)
        rows = self.folder / "specificity"
        rows.mkdir(exist_ok=True)
        items = self._usable(self._items(None))
        # 1. The scores of the images whose results are not there yet; the same picture of two names is one.
        missing = list({key: item for item in items if (key := self._key(item)) not in store.found}.values())
        done = len(items) - len(missing)
        if done:
            self.progress("specificity, kept from before", done, len(items))
        for start in range(0, len(missing), self.settings.batch_size):
            batch = missing[start : start + self.settings.batch_size]
            for item, mine in self._noun_scores(batch):
                if not all(np.isfinite(one.scores).all() for one in mine):
                    raise no_number(item.name)
                key, content = self._key(item), b"".join(one.scores.astype("<f4").tobytes() for one in mine)
                write_whole(rows / f"{key}.f32", content)  # before its line: a line never lacks its rows
                lemmas, steps = tuple(one.lemma for one in mine), tuple(one.step for one in mine)
                store.add(key, item.name, _Rows(lemmas, steps, hashlib.sha256(content).hexdigest()))
            self.progress("specificity", done + start + len(batch), len(items))
        # 2. All images, from their files: they may be more than fit into memory.
        items = [item for item in items if self._key(item) in store.found]
        found = [one for item in items for one in self._rows(store, rows, item)]
        if not found:
            raise self._nothing(items)
        layers = [ffn.layer for ffn in self.vlm.anatomy.ffns for _ in range(ffn.size)]
        return specificity(found, layers, seed=self.settings.seed)

    def _noun_scores(self, items: Sequence[Item]) -> list[tuple[Item, list[NounScores]]]:
        """Score the nouns of images in one batch; where one of them cannot be used, the others one by one."""
        try:
            found = noun_scores(self.vlm, items, score=self.settings.score, question=self.settings.question)
        except ImageError as error:
            if len(items) > 1:
                return [pair for item in items for pair in self._noun_scores([item])]
            self.left_out[items[0].name] = reason(error)
            return []
        return [(item, [one for one in found if one.image == item.name]) for item in items]

    def _rows(self, store: Store[_Rows], folder: Path, item: Item) -> list[NounScores]:
        """Read the scores of one image from its file, which must be as it was written."""
        key = self._key(item)
        kept, path = store.found[key], folder / f"{key}.f32"
        shape = (len(kept.lemmas), sum(ffn.size for ffn in self.vlm.anatomy.ffns))
        if not kept.lemmas:
            return []
        if not path.is_file() or path.stat().st_size != shape[0] * shape[1] * 4:
            raise store.damaged(f"{path} is missing, or not as long as it says.")
        whole = np.memmap(path, dtype="<f4", mode="r", shape=shape)
        if hashlib.sha256(whole.tobytes()).hexdigest() != kept.sha256:
            raise store.damaged(f"{path} is not as it was written.")
        told = zip(kept.lemmas, whole, kept.steps, strict=True)
        return [NounScores(item.name, lemma, row, step) for lemma, row, step in told]

    def _items(self, usual: int | None) -> Sequence[Item]:
        """Take the first images, as many as were asked for or else as many as is usual."""
        return self.items[: self.limit or usual]

    def _store(self, name: str, kind: Any) -> Store[Any]:
        """Open the store of one experiment, whose head says what made it and what its results are compared with."""
        compared = {"compared_with": COMPARED_WITH[name]} if name in COMPARED_WITH else {}
        return Store(self.folder / f"{name}.jsonl", {**self.made_by, **compared}, kind)

    def _usable(self, items: Sequence[Item]) -> list[Item]:
        """List the images that can be read; the others are named in `left_out`."""
        for item in items:
            if item.name not in self.pictures:
                try:
                    self.pictures[item.name] = image_hash(item.image())
                except ImageError as error:
                    self.pictures[item.name] = None
                    self.left_out[item.name] = reason(error)
        return [item for item in items if self.pictures[item.name] is not None]

    def _key(self, item: Item, *more: Any) -> str:
        """Make the key of an image that can be read, and of what else its result depends on."""
        return key_of(self.pictures[item.name], *more, *(() if item.caption is None else ("caption", item.caption)))

    def _another(self, item: Item) -> Item | None:
        """Find the next image of other pixels, the first behind the last; images added elsewhere leave it as it is."""
        place, n = self.items.index(item), len(self.items)
        following = (self.items[(place + step) % n] for step in range(1, n))
        mine = self.pictures[item.name]
        return next((one for one in following if self._usable([one]) and self.pictures[one.name] != mine), None)

    def _each(
        self, name: str, kind: Any, items: Sequence[Item], one: Callable[..., Any], key: Callable[[Item], str]
    ) -> dict[str, Any]:
        """Run one experiment image by image; the images whose results are in the store are not asked about again."""
        # 1. What each result depends on, as far as it can be read.
        store = self._store(name, kind)
        keys: dict[str, str] = {}
        for item in self._usable(items):
            try:
                keys[item.name] = key(item)
            except ImageError as error:  # a mask
                self.left_out[item.name] = reason(error)
        # 2. In the order of the images, whichever were there before: intervals depend on it.
        done = sum(mine in store.found for mine in keys.values())
        if done:
            self.progress(f"{name}, kept from before", done, len(keys))
        found: dict[str, Any] = {}
        for item in (item for item in items if item.name in keys):
            mine = keys[item.name]
            if mine not in store.found:
                try:
                    result = one(item, partial(self._tell_part, name, done, len(keys)))
                except ImageError as error:
                    self.left_out[item.name] = reason(error)
                    continue
                store.add(mine, item.name, result)
                done += 1
                self.progress(name, done, len(keys))
            found[item.name] = store.found[mine]
        if not any(found.values()):
            raise self._nothing(list(found))
        return found

    def _nothing(self, used: Sequence[Any]) -> ImageError | SettingError:
        """Make the error for an experiment without any result."""
        if not used:
            return ImageError("None of the images can be used.", seen="\n".join(list(self.left_out.values())[:5]))
        return SettingError("There is no noun in any of the answers.", seen=f"{len(used)} images")

    def _tell_part(self, name: str, done: int, total: int, stage: str, part: float, of: int) -> None:
        """Tell that a share of one image is done."""
        self.progress(name, done + part / of, total)
