"""The sensitivity experiment asks whether neurons depend on the image, on the thing in it, on where it is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image

from mmneurons.attribution.controls import DRAWS, Matched, column_norms, loudness, matched
from mmneurons.data.dataset import Item
from mmneurons.finding.batch import targets_of
from mmneurons.finding.maps import region_maps, with_maps
from mmneurons.finding.rereading import Reread, blank_like, reread
from mmneurons.finding.result import NounFinding
from mmneurons.finding.scoring import REGION_SIZES, Scored, describe, recorder_for, score_targets
from mmneurons.inspection.rows import (
    AREA,
    AUROC,
    DECODED,
    ELSEWHERE,
    IOU,
    IOU_EQUAL_AREA,
    LEAD,
    LOST_BLANK,
    LOST_OTHER,
    LOUDNESS,
    MATCHED,
    POINTING,
    STAYS,
    TOP,
    SensitivityRow,
)
from mmneurons.metrics.regions import RegionMatch, match, mean_match
from mmneurons.settings import FindSettings, Question, Score
from mmneurons.vlm.asking import ask
from mmneurons.vlm.grid import Grids, find_grids, model_views
from mmneurons.vlm.hooks.interventions import shuffled
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM, Answers, Inputs

NOT_MASKED, EMPTY, WHOLE = (
    "no mask of the noun",
    "the mask is empty, or outside of what the model sees",
    "the mask covers all that the model sees",
)
"""Why there are no regions of a noun."""
SHARED = (10, 100)
"""Of how many top neurons it is counted how many stay when the image tokens are shuffled."""
HALF = 0.5


@dataclass(frozen=True)
class MatchedRegion:
    """A matched region is where random neurons look, as many, of the same blocks and about as loud as the top k."""

    match: RegionMatch
    loudness: float
    """Of the random neurons over that of the top k."""
    n_neurons: float


@dataclass(frozen=True)
class NounSensitivity:
    """A noun of an image has what its top neurons lose with other images, what they say, and where they look."""

    word: str
    lemma: str
    is_shown: bool | None
    """Whether the image truly shows it; None where nobody said."""
    lost_blank: tuple[float, ...]
    """Per top neuron, the share of its score that is lost with a blank image; a score of 0 is left out."""
    lost_other: tuple[float, ...]
    """With another image."""
    hits: tuple[bool, ...]
    """Per top neuron, whether the noun's token is among the ten that it promotes most."""
    stays: Mapping[int, float]
    """For k = 10, 100: which share of the top k stays when the image tokens are shuffled; none without a grid."""
    regions: Mapping[int, RegionMatch]
    """For k = 1 to 1000: the mean map of the top k against the object's mask; none without a grid or a mask."""
    matched: Mapping[int, MatchedRegion]
    """The same of matched random neurons."""
    elsewhere: Mapping[int, RegionMatch]
    """The map of the top k against the mask of another object of the picture, mean over these; none without one."""
    unmeasured: str | None = None
    """Why an image with masks has no regions of it; None where there are, or the model has no grid."""

    @property
    def dependence(self) -> float | None:
        """The share of the top neurons that lose at least half of their score with a blank image."""
        return _share_that_loses_half(self.lost_blank)

    @property
    def dependence_other(self) -> float | None:
        """The share of the top neurons that lose at least half of their score with another image."""
        return _share_that_loses_half(self.lost_other)

    def rows(self, image: str = "", noun: int = 0) -> Iterator[SensitivityRow]:
        """Yield a row for each measure, set of neurons and k; the columns are those of docs/reference/format.md.

        Args:
            image: The name of the image, for its column.
            noun: Place among the nouns of the answer.
        """
        for measure, neurons, k, value in self._measures():
            yield SensitivityRow(
                image=image,
                noun=noun,
                word=self.word,
                lemma=self.lemma,
                is_shown=self.is_shown,
                measure=measure,
                neurons=neurons,
                k=k,
                value=value,
            )

    def _measures(self) -> Iterator[tuple[str, str, int, float | None]]:
        """Yield measure, neurons, k and value of each row."""
        tested = len(self.hits)
        yield LOST_BLANK, TOP, tested, self.dependence
        yield LOST_OTHER, TOP, tested, self.dependence_other
        yield DECODED, TOP, tested, float(np.mean(self.hits)) if self.hits else None
        for k, share in self.stays.items():
            yield STAYS, TOP, k, share
        # Beside each map of the top ones lies one of random neurons, and another object's mask, or they are missing.
        for k, top in self.regions.items():
            for measure, value in _region_measures(top).items():
                yield measure, TOP, k, value
            random = self.matched.get(k)
            for measure, value in _region_measures(top if random is None else random.match).items():
                if measure != AREA:  # which is the same whatever the map
                    yield measure, MATCHED, k, None if random is None else value
            yield LOUDNESS, MATCHED, k, None if random is None else random.loudness
            other = self.elsewhere.get(k)
            for measure, value in _region_measures(top if other is None else other).items():
                yield measure, ELSEWHERE, k, None if other is None else value


def _region_measures(match: RegionMatch) -> dict[str, float | None]:
    """Name the numbers of a match as the rows do."""
    return {
        POINTING: match.pointing,
        AREA: match.area,
        LEAD: match.pointing - match.area,
        IOU: match.iou,
        IOU_EQUAL_AREA: match.iou_equal_area,
        AUROC: match.auroc,
    }


def _share_that_loses_half(lost: Sequence[float]) -> float | None:
    """Take the share of neurons that lose at least half of their score; None without any."""
    return float(np.mean([share >= HALF for share in lost])) if lost else None


@by_one_thread
def sensitivity(
    vlm: VLM,
    item: Item,
    other: Image.Image | None = None,
    *,
    score: Score = "logit",
    top: int = 10,
    question: Question = Question(),
    seed: int = 0,
) -> list[NounSensitivity]:
    """Find the neurons of each noun, then read the same words with a blank image, another one, and shuffled patches.

    Args:
        vlm: The model, from `load`.
        item: The image, with its objects and masks where known.
        other: Another image, to be read in place of this one; left out where None.
        score: Which neurons are the top ones.
        top: How many of them.
        question: What the model is asked.
        seed: Of the order of shuffled patches, and of random neurons.

    Returns:
        One entry for each noun of the answer.

    Raises:
        ImageError: the image, or a mask, cannot be read or used.
    """
    image = item.image()
    choices = FindSettings(**asdict(question), top=top, score=score, says="raw", maps=True, blank=True)
    captions = None if item.caption is None else [item.caption]
    # 1. The neurons of each noun, as `find` finds them.
    (batch,) = ask(vlm, [image], question, captions=captions, recorder=recorder_for(vlm, choices))
    inputs, answers = batch.inputs, batch.answers
    targets = targets_of(vlm, answers, 0, choices)
    if not targets:
        return []
    scored = score_targets(vlm, batch.recording, answers, targets, choices, inputs=inputs)
    nouns = describe(vlm, scored)
    grids = find_grids(vlm.model, inputs, 1)
    seen: dict[str, np.ndarray] = {}
    random: list[dict[int, MatchedRegion]] = [{} for _ in nouns]
    mixed = None
    if not isinstance(grids, str):
        # 2. Where they look, next to the masks and to matched random neurons; and with the image tokens shuffled.
        nouns = with_maps(vlm, inputs, grids, scored, nouns)
        seen = {noun.lower(): as_seen(vlm, mask, image, question) for noun, mask in item.masks().items()}
        masks = [seen.get(noun.lemma) for noun in nouns]
        usable = [None if _why_unmeasured(item, mask) else mask for mask in masks]
        random = _random_regions(vlm, inputs, grids, scored, usable, seed)
        with shuffled(vlm, _positions(grids), seed):
            mixed = reread(vlm, inputs, answers, targets, choices)
    # 3. The same words after a blank image, and after another one.
    blank = blank_like(image)
    readings = [
        None if picture is None else _read(vlm, picture, answers, scored, choices) for picture in (blank, other)
    ]
    return [_noun(scored, i, noun, item, readings, mixed, seen, random[i]) for i, noun in enumerate(nouns)]


def _random_regions(
    vlm: VLM, inputs: Inputs, grids: Grids, scored: Scored, masks: list[np.ndarray | None], seed: int
) -> list[dict[int, MatchedRegion]]:
    """Match what random neurons look at with the mask of each noun that has one."""
    norms = column_norms(vlm.anatomy)
    starts = torch.nn.functional.pad(scored.slot_ends, (1, 0))[:-1]
    trace = scored.trace
    # 1. Of each noun and k, sets of random neurons of the top neurons' blocks, one for one about as loud.
    others: list[dict[int, Matched]] = []
    for i, (mask, ranked) in enumerate(zip(masks, scored.ranked.cpu(), strict=True)):
        fired = [part[i].float().cpu() for part in trace.activations]
        loud = loudness(fired, [None if of is None else of[i].cpu() for of in trace.experts], norms)
        sizes = [] if mask is None else [k for k in REGION_SIZES if k <= len(ranked)]
        others.append({k: matched(starts, loud, ranked[:k], DRAWS, seed, as_many=True) for k in sizes})
    # 2. One prefill for the maps of all sets; where a block has no others, a set is empty and has no map.
    sets = [[(k, one) for k, drawn in mine.items() for one in drawn.sets if len(one)] for mine in others]
    maps = region_maps(vlm, inputs, grids, scored, [[one for _, one in mine] for mine in sets])
    # 3. The mean over the draws.
    found: list[dict[int, MatchedRegion]] = []
    for mask, drawn, mine, mapped in zip(masks, others, sets, maps, strict=True):
        matches: dict[int, list[RegionMatch]] = defaultdict(list)
        for (k, _), grid in zip(mine, mapped, strict=True):
            if mask is not None:
                matches[k].append(match(grid[0], mask))
        found.append(
            {k: MatchedRegion(mean_match(ones), drawn[k].loudness, drawn[k].n_neurons) for k, ones in matches.items()}
        )
    return found


def as_seen(
    vlm: VLM, mask: Bool[np.ndarray, "height width"], image: Image.Image, question: Question
) -> Bool[np.ndarray, "height width"]:
    """Resize and crop a mask as the model's processor does with its image; leave it where that cannot be told."""
    # Through the processor as a black and white picture: so that it is cropped exactly as the image is.
    picture = Image.fromarray(np.repeat(mask[..., None], 3, axis=-1).astype(np.uint8) * 255)
    inputs = vlm.encode([[picture]], question.prompt, question.prefix)
    [[view]] = model_views(vlm.model, vlm.processor, inputs, find_grids(vlm.model, inputs, 1), [1])
    return mask if view is None else np.asarray(view)[..., 0] > 127


def _read(vlm: VLM, picture: Image.Image, answers: Answers, scored: Scored, choices: FindSettings) -> Reread:
    """Score all neurons where the same words are read behind another picture."""
    inputs = vlm.encode([[picture]], choices.question.prompt, choices.question.prefix)
    return reread(vlm, inputs, answers, scored.targets, choices)


def _positions(grids: Grids) -> torch.Tensor:
    """Collect the positions of each prompt's image tokens, a row for each."""
    return torch.stack([torch.cat([grid.positions for grid in row]) for row in grids])


def _noun(
    scored: Scored,
    i: int,
    noun: NounFinding,
    item: Item,
    readings: list[Reread | None],
    mixed: Reread | None,
    seen: Mapping[str, np.ndarray],
    random: Mapping[int, MatchedRegion],
) -> NounSensitivity:
    """Put together what was measured of one noun, whose place among the targets is i."""
    # What is left of each top neuron's score with another picture.
    places = scored.places(i, scored.ranked[i, : len(noun.neurons)].tolist())
    blank, other = (() if again is None else _lost(noun, again.of(i, places)) for again in readings)
    # Which of the top neurons are among the top ones still.
    stays = {}
    if mixed is not None:
        for k in SHARED:
            if k <= len(scored.ranked[i]):
                stays[k] = len(set(scored.places(i, scored.ranked[i, :k].tolist())) & set(mixed.top(i, k))) / k
    # Where they look, if there is a mask to compare with.
    mask = seen.get(noun.lemma)
    unmeasured = _why_unmeasured(item, mask) if noun.regions else None
    maps = {} if mask is None or unmeasured else {k: grids[0] for k, grids in noun.regions.items()}
    others = [one for name, one in seen.items() if name != noun.lemma and _why_unmeasured(item, one) is None]
    return NounSensitivity(
        word=noun.word,
        lemma=noun.lemma,
        is_shown=None if item.objects is None else noun.lemma in {one.lower() for one in item.objects},
        lost_blank=blank,
        lost_other=other,
        hits=tuple(noun.token in neuron.tokens for neuron in noun.neurons),
        stays=stays,
        regions={} if mask is None else {k: match(grid, mask) for k, grid in maps.items()},
        matched=random,
        elsewhere={k: mean_match([match(grid, one) for one in others]) for k, grid in maps.items()} if others else {},
        unmeasured=unmeasured,
    )


def _why_unmeasured(item: Item, mask: np.ndarray | None) -> str | None:
    """Say why a noun has no region to be compared; None where it has one, or no image has masks."""
    if mask is None:
        return NOT_MASKED if item.mask_sources else None
    return None if mask.any() and not mask.all() else WHOLE if mask.any() else EMPTY


def _lost(noun: NounFinding, left: list[float]) -> tuple[float, ...]:
    """Take what share of its score each top neuron loses; those of score 0 are left out."""
    return tuple(1 - value / neuron.score for neuron, value in zip(noun.neurons, left, strict=True) if neuron.score)


def unmeasured(found: Mapping[str, Sequence[NounSensitivity]], items: Sequence[Item]) -> list[tuple[str, int]]:
    """Count nouns and objects without a region, by reason; none at all where no image has masks."""
    there = [item for item in items if item.name in found]
    if not any(item.mask_sources for item in there):
        return []
    # Nouns that were said and have no mask, or nothing beside it; then objects that are there and were not said.
    counts = Counter(
        f"nouns not measured: {one.unmeasured}" for ones in found.values() for one in ones if one.unmeasured
    )
    counts["nouns not held against another object: their picture has the mask of no other"] = sum(
        bool(one.regions) and not one.elsewhere for ones in found.values() for one in ones
    )
    for item in there:
        said = {one.lemma for one in found[item.name]}
        if item.mask_sources:
            objects = {noun.lower() for noun in item.objects or ()}
            counts["objects not measured: the caption does not name them"] += len(objects - said)
        else:
            counts["nouns not measured: their image has no masks"] += len(found[item.name])
    return [(reason, count) for reason, count in sorted(counts.items()) if count]
