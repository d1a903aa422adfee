"""The causal experiment: top neurons are noised, silenced or doubled while the model captions.

The noise is that of Pan et al. (2024), section 4.4, the random neurons to compare with are ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.controls import DRAWS, column_norms, loudness, matched
from mmneurons.attribution.equal_change import changes, equally_changing
from mmneurons.attribution.finders import Finder, finder_scores
from mmneurons.data.dataset import Item
from mmneurons.inspection.rows import (
    CHANGE,
    EQUAL_CHANGE,
    GONE,
    LOUDNESS,
    MATCHED,
    NEURONS,
    TIMES,
    TOP,
    UNCHANGED,
    CausalRow,
)
from mmneurons.maths.ranking import top_k
from mmneurons.metrics.captions import rest_unchanged
from mmneurons.neurons import Neuron
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.hooks.interventions import Intervention, intervene
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

SIZES = (1, 10, 50, 100)
SIGMAS = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class How:
    """A way to disturb neurons scales their activations or adds noise to their columns."""

    scale: float | None = None
    """Activations times this: 0 silent, 2 twice as loud."""
    sigma: float | None = None
    """Noise on the columns, in units of their root mean square."""

    def __str__(self) -> str:
        return f"noise {self.sigma:g}" if self.scale is None else f"times {self.scale:g}"


HOW: tuple[How, ...] = (*(How(sigma=sigma) for sigma in SIGMAS), How(scale=0.0), How(scale=2.0))


@dataclass(frozen=True)
class Outcome:
    """An outcome is what the model says while some neurons are disturbed, over draws of noise or of random neurons."""

    how: str
    k: int
    neurons: str
    """`top`, `matched random`, or `matched random, equal change`: scaled so that they change as much as the silence."""
    captions: tuple[str, ...]
    """One for each draw; a single one where nothing is drawn: top neurons silenced or doubled."""
    gone: float
    """Share of them that no longer say the noun."""
    rest_unchanged: float
    """Share of them that say before and after the noun what was said."""
    loudness: float
    """Of the neurons disturbed, over that of the top k; mean over draws."""
    n_neurons: float
    """Disturbed; mean over draws."""
    change: float | None
    """How far they move the residual stream where the noun is chosen, when silent or scaled, over the top k's silence;
    mean over draws. None where that moves nothing."""
    times: float | None
    """By what their activations are multiplied, mean over draws; None for noise."""


@dataclass(frozen=True)
class NounCausal:
    """A noun of an image has an outcome for each disturbance, k, and set of neurons."""

    word: str
    lemma: str
    caption: str
    outcomes: tuple[Outcome, ...]

    def rows(self, image: str = "", noun: int = 0) -> Iterator[CausalRow]:
        """Yield a row for each disturbance, k, set of neurons and measure; columns: docs/reference/format.md.

        Args:
            image: The name of the image, for its column.
            noun: Place among the nouns of the answer.
        """
        for outcome in self.outcomes:
            # Of the top neurons loudness and change are 1 and their number k by definition.
            measures = {GONE: outcome.gone, UNCHANGED: outcome.rest_unchanged}
            if outcome.neurons != TOP:
                measures |= {LOUDNESS: outcome.loudness, NEURONS: outcome.n_neurons, CHANGE: outcome.change}
            if outcome.neurons == EQUAL_CHANGE and outcome.times is not None:
                measures[TIMES] = outcome.times
            for measure, value in measures.items():
                yield CausalRow(
                    image=image,
                    noun=noun,
                    word=self.word,
                    lemma=self.lemma,
                    disturbance=outcome.how,
                    neurons=outcome.neurons,
                    k=outcome.k,
                    measure=measure,
                    value=value,
                )


def causal(
    vlm: VLM,
    item: Item,
    *,
    finder: Finder = "logit",
    sizes: Sequence[int] = SIZES,
    ways: Sequence[How] = HOW,
    draws: int = DRAWS,
    question: Question = Question(),
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = untold,
) -> list[NounCausal]:
    """Caption the image anew with the top neurons of each noun disturbed, and with matched random ones.

    Beside silence there are the matched random neurons a second time, scaled until the residual stream changes as much.

    Args:
        vlm: The model, from `load`.
        item: The image.
        finder: Which neurons are the top ones.
        sizes: How many of them at once; sizes larger than half of the model are left out.
        ways: How.
        draws: Of noise, and of matched random neurons.
        question: What the model is asked.
        batch_size: Captions made at once, each with its own neurons disturbed.
        seed: Of noise and of random neurons.
        progress: Told how many captions are made.

    Returns:
        One entry for each noun of the answer.
    """
    image = item.image()
    norms = column_norms(vlm.anatomy)
    # 1. The nouns of the usual caption, their top neurons, and random ones as loud.
    judged = finder_scores(vlm, image, [finder], question=question)
    (usual,) = texts_of(vlm, [image], question)
    trials = [_trials(one.replay, one.scores[finder], norms, sizes, ways, draws, seed) for one in judged]
    # 2. A caption for each disturbance, kept under what it is of.
    asked = [(trial, change) for mine in trials for trial in mine for change in trial.changes]
    said = _captions(vlm, image, [change for _, change in asked], question, batch_size, progress)
    captions: dict[_Trial, list[str]] = defaultdict(list)
    for (trial, _), caption in zip(asked, said, strict=True):
        captions[trial].append(caption)
    # 3. What became of the noun and of the rest.
    return [
        NounCausal(
            one.word.text,
            one.word.lemma,
            usual,
            tuple(_outcome(trial, tuple(captions[trial]), usual, one.word.text) for trial in mine),
        )
        for one, mine in zip(judged, trials, strict=True)
    ]


def _captions(
    vlm: VLM,
    image: Image.Image,
    changes: Sequence[Intervention],
    question: Question,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """Caption the image under each change: several in a batch, each row with its own neurons disturbed."""
    said: list[str] = []
    width = 1 if vlm.family.one_at_a_time else batch_size
    for start in range(0, len(changes), width):
        batch = changes[start : start + width]
        # Each row of the batch is a model of its own: its neurons alone are disturbed.
        with ExitStack() as disturbed:
            for row, change in enumerate(batch):
                disturbed.enter_context(intervene(vlm, replace(change, rows=(row,))))
            said += texts_of(vlm, [image] * len(batch), replace(question, batch_size=width))
        progress("captions", len(said), len(changes))
    return said


@dataclass(frozen=True, eq=False)
class _Trial:
    """A trial is what is done in one way to one set of neurons, or to the sets that stand for it."""

    how: How
    k: int
    neurons: str
    loudness: float
    change: float | None
    changes: list[Intervention]
    """A draw each."""


def _trials(
    replay: Replay,
    scores: Tensor,
    norms: list[Tensor],
    sizes: Sequence[int],
    ways: Sequence[How],
    draws: int,
    seed: int,
) -> list[_Trial]:
    """List what is done to the top k of a noun, and to the random neurons beside them, for each k and way."""
    # Loudness at the noun's own step: random neurons are to write there as much as the top ones.
    loud = loudness(replay.activations, replay.experts, norms)
    trials = []
    for k in sizes:
        if k > replay.n_slots // 2:
            continue
        # The top neurons as often as random sets are drawn: of them it is the noise that differs.
        top = top_k(scores, k)
        others = matched(replay.slot_starts, loud, top, draws, seed)
        (whole, *parts) = changes(replay, [top, *others.sets]).tolist()
        moved = sum(parts) / draws / whole if whole else None
        for which, sets, share, change in (
            (TOP, [top] * draws, 1.0, 1.0 if whole else None),
            (MATCHED, others.sets, others.loudness, moved),
        ):
            neurons = [_named(replay, slots) for slots in sets]
            for how in ways:
                # Where nothing is drawn, one caption says all.
                asked = neurons[:1] if which == TOP and how.sigma is None else neurons
                made = [Intervention(ones, how.scale, None, how.sigma, seed + i) for i, ones in enumerate(asked)]
                trials.append(_Trial(how, k, which, share, change, made))
        # Beside silence the same random neurons once more, so strongly scaled that they change as much as it does.
        if silence := [how for how in ways if how.scale == 0]:
            factors, reached = equally_changing(replay, top, others.sets)
            made = [
                Intervention(_named(replay, slots), factor)
                for slots, factor in zip(others.sets, factors.tolist(), strict=True)
            ]
            trials.append(
                _Trial(silence[0], k, EQUAL_CHANGE, others.loudness, float(reached.mean()) if whole else None, made)
            )
    return trials


def _named(replay: Replay, slots: Tensor) -> tuple[Neuron, ...]:
    """Name the neurons of some slots."""
    return tuple(replay.neuron(slot) for slot in slots.tolist())


def _outcome(trial: _Trial, captions: tuple[str, ...], usual: str, noun: str) -> Outcome:
    """Count in which captions of a trial the noun is gone, and in which all else is said as before."""
    n = len(captions)  # draws
    scales = [change.scale for change in trial.changes if change.scale is not None]
    return Outcome(
        str(trial.how),
        trial.k,
        trial.neurons,
        captions,
        gone=sum(not says(caption, noun) for caption in captions) / n,
        rest_unchanged=sum(rest_unchanged(usual, caption, noun) for caption in captions) / n,
        loudness=trial.loudness,
        n_neurons=sum(len(change.neurons) for change in trial.changes) / n,
        change=trial.change,
        times=sum(scales) / n if scales else None,
    )
