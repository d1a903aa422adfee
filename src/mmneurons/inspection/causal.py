"""Do the neurons found cause the word? Their columns shaken, silenced or doubled while the model captions.

METRICS, Causal effect; the noise is that of Pan et al. (2024), section 4.4, the matched random neurons are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmneurons.finding.finders import Finder, judge
from mmneurons.inspection.items import Item
from mmneurons.inspection.matching import column_norms, loudness, matched
from mmneurons.maths.ranking import top_k
from mmneurons.vlm.interventions import Intervention, intervene
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.replay import Replay
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

SIZES = (1, 5, 10, 20, 50, 100)
SIGMAS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class How:
    """One way to disturb neurons."""

    scale: float | None = None
    """Activations times this: 0 silent, 2 twice as loud."""
    sigma: float | None = None
    """Noise on the columns, in units of their root mean square."""

    def __str__(self) -> str:
        return f"noise {self.sigma:g}" if self.scale is None else f"times {self.scale:g}"


HOW: tuple[How, ...] = (*(How(sigma=sigma) for sigma in SIGMAS), How(scale=0.0), How(scale=2.0))


@dataclass(frozen=True)
class Outcome:
    """What the model says while some neurons are disturbed."""

    how: str
    k: int
    is_top: bool
    """The top neurons; else matched random ones."""
    caption: str
    gone: bool
    """It no longer says the noun."""
    rest_unchanged: bool
    """Before and after the noun it says what it said."""


@dataclass(frozen=True)
class NounCausal:
    """One noun of one image."""

    word: str
    lemma: str
    caption: str
    outcomes: tuple[Outcome, ...]


def causal(
    vlm: VLM,
    item: Item,
    *,
    finder: Finder = "logit",
    sizes: Sequence[int] = SIZES,
    ways: Sequence[How] = HOW,
    prompt: str = PROMPT,
    answer_prefix: str = ANSWER_PREFIX,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[NounCausal]:
    """Caption the image anew with the top neurons of each noun disturbed, and with matched random ones.

    Args:
        vlm: The model, from `load`.
        item: The image.
        finder: Which neurons are the top ones.
        sizes: How many of them at once; sizes larger than half of the model are left out.
        ways: How.
        prompt: What the model is asked.
        answer_prefix: Words that the answer is made to begin with.
        max_new_tokens: Where to stop if the model does not.
        seed: Of noise and of random neurons.
        progress: Called with captions made and captions to make.

    Returns:
        One entry for each noun of the answer.
    """
    image = item.image()
    norms = column_norms(vlm.anatomy)
    judged = judge(vlm, image, [finder], prompt=prompt, answer_prefix=answer_prefix, max_new_tokens=max_new_tokens)
    usual = vlm.caption(image, prompt, answer_prefix, max_new_tokens=max_new_tokens)
    found = []
    n_sets = sum(2 * len(ways) * (k <= one.replay.n_slots // 2) for one in judged for k in sizes)
    done = 0
    for one in judged:
        outcomes = []
        for k, is_top, slots in _sets(one.replay, one.scores[finder], norms, sizes, seed):
            neurons = tuple(one.replay.neuron(slot) for slot in slots.tolist())
            for how in ways:
                with intervene(vlm, Intervention(neurons, how.scale, None, how.sigma, seed)):
                    said = vlm.caption(image, prompt, answer_prefix, max_new_tokens=max_new_tokens)
                gone = not says(said, one.word.text)
                outcomes.append(Outcome(str(how), k, is_top, said, gone, rest_unchanged(usual, said, one.word.text)))
                done += 1
                if progress is not None:
                    progress(done, n_sets)
        found.append(NounCausal(one.word.text, one.word.lemma, usual, tuple(outcomes)))
    return found


def _sets(
    replay: Replay, scores: Tensor, norms: list[Tensor], sizes: Sequence[int], seed: int
) -> list[tuple[int, bool, Tensor]]:
    """The top neurons of each size, each followed by a set of others that are as loud."""
    loud = loudness(replay, norms)
    sets = []
    for k in sizes:
        if k <= replay.n_slots // 2:
            top = top_k(scores, k)
            sets += [(k, True, top), (k, False, matched(replay, loud, top, 1, seed)[0])]
    return sets


def rest_unchanged(before: str, after: str, noun: str) -> bool:
    """Whether a caption still says what it said before and after `noun`, whatever now stands in its place.

    An article right before the noun belongs to it: 'a dog' may become 'an owl' or 'some bread'.
    """
    found = re.search(rf"(\b(?:a|an|the|some)\s+)?\b{re.escape(noun)}\b", before, flags=re.IGNORECASE)
    if found is None:
        return before == after
    start, end = before[: found.start()], before[found.end() :]
    return len(after) >= len(start) + len(end) and after.startswith(start) and after.endswith(end)
