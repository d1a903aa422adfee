"""The finders experiment compares what each finder says of a neuron with what its silence does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.attribution.ablation import Replay
from mmneurons.attribution.controls import DRAWS, column_norms, loudness, matched
from mmneurons.attribution.finders import Finder, FinderScores, finder_scores
from mmneurons.data.pictures import Picture
from mmneurons.finding.reading import columns_of, reader_for
from mmneurons.inspection.rows import AGREEMENT, ANY, DECODED, FALL, LOUDNESS, MATCHED, NEURONS, TOP, FinderRow
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import spearman
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.vlm import VLM, Answers

DELETED = (1, 2, 5, 10, 20, 50, 100)
"""How many top neurons are silenced together."""
SMALL = 20_000
"""Up to this many neurons, every one of them is silenced; of more, a pool."""
POOL, POOL_TOP = 1000, 100
"""Of a pool: how many neurons are drawn evenly over blocks, and each finder's top ones beside them."""
DESCRIBED = 10
"""Of how many top neurons it is kept what they say."""
ALL_BLOCKS, LAST_THIRD = "all blocks", "last third"
TRUE_EFFECT = "true effect"
"""In the place of a finder: neurons by what silence of each does."""


@dataclass(frozen=True)
class Agreement:
    """An agreement is Spearman of one finder's scores with the true effects; None where either tells none apart."""

    finder: Finder
    scope: str
    """`ALL_BLOCKS` or `LAST_THIRD`; "finders' top 100" for that part of a pool."""
    effect: str
    """On "logit" or "logprob", its activation set to zero; "logprob, mean": set to its mean."""
    rho: float | None


@dataclass(frozen=True)
class Deletion:
    """A deletion is how far log p falls with a finder's top k silent together, next to sets of random neurons."""

    finder: str
    """A finder; `TRUE_EFFECT` for the neurons whose own silence does most."""
    k: int
    fall: float
    matched: float
    """Mean over the matched random sets."""
    matched_loudness: float
    """Of a matched random set, over that of the top k."""
    n_matched: float
    """Neurons in a matched random set, mean."""
    unmatched: float
    """Of k random neurons of any block and loudness."""


@dataclass(frozen=True)
class NounTruth:
    """A noun of an image has an agreement for each finder and effect, and a deletion for each finder and k."""

    word: str
    caption: str
    probability: float
    agreements: tuple[Agreement, ...]
    deletions: tuple[Deletion, ...]
    n_silenced: int
    """Neurons that were silenced one by one."""
    token: str
    """The noun's first token, which is what neurons are judged by."""
    says: Mapping[str, tuple[tuple[str, ...], ...]]
    """Of each finder (and `TRUE_EFFECT`) the top 10: for each neuron the ten tokens that it promotes most."""
    refused: Mapping[Finder, str] = field(default_factory=dict)
    """Why finders are missing: the model refuses them."""

    def rows(self, image: str = "", noun: int = 0) -> Iterator[FinderRow]:
        """Yield a row for each finder and measure; the columns are those of docs/reference/format.md.

        Args:
            image: The name of the image, for its column.
            noun: Place among the nouns of the answer.
        """
        for finder, measure, effect, scope, neurons, k, value in self._measures():
            yield FinderRow(
                image=image,
                noun=noun,
                word=self.word,
                token=self.token,
                finder=finder,
                measure=measure,
                effect=effect,
                scope=scope,
                neurons=neurons,
                k=k,
                value=value,
            )

    def _measures(self) -> Iterator[tuple[str, str, str | None, str | None, str | None, int | None, float | None]]:
        """Yield finder, measure, effect, scope, neurons, k and value of each row."""
        # How well scores foretell single effects, what the top ones do together, and what they say.
        for one in self.agreements:
            yield one.finder, AGREEMENT, one.effect, one.scope, None, None, one.rho
        for one in self.deletions:
            yield one.finder, FALL, None, None, TOP, one.k, one.fall
            yield one.finder, FALL, None, None, MATCHED, one.k, one.matched
            yield one.finder, LOUDNESS, None, None, MATCHED, one.k, one.matched_loudness
            yield one.finder, NEURONS, None, None, MATCHED, one.k, one.n_matched
            yield one.finder, FALL, None, None, ANY, one.k, one.unmatched
        for finder, told in self.says.items():
            yield finder, DECODED, None, None, TOP, len(told), float(np.mean([self.token in tokens for tokens in told]))


def finder_truth(
    vlm: VLM,
    image: Picture,
    finders: Sequence[Finder] | None = None,
    *,
    words: Sequence[str] | None = None,
    means: Sequence[Float[Tensor, "neurons"]] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress = untold,
    question: Question = Question(),
) -> list[NounTruth]:
    """Silence neurons one by one and top ones together, for each noun of the answer, and compare with each finder.

    Args:
        vlm: The model, from `load`.
        image: A path, PIL image or array.
        finders: Which to compare; None: all that the model allows.
        words: Words of the answer instead of its nouns.
        means: From `mean_activations`: neurons are then also set to these, one by one.
        seed: Of random neurons.
        batch_size: Silences computed at once.
        progress: Told how many neurons are silenced.
        question: What the model is asked.

    Source: deletion as in Pan et al. (2024), section 4.4, at the scored position only; matched controls are ours.
    """
    # 1. What each finder says of every neuron at each noun, and which neurons are silenced one by one.
    norms = column_norms(vlm.anatomy)
    judged = finder_scores(vlm, image, finders, words=words, seed=seed, question=question)
    pools = [_pool(one, seed + i) for i, one in enumerate(judged)]
    passes = 1 if means is None else 2
    *starts, total = accumulate((len(pool.slots) * passes for pool in pools), initial=0)

    def tell(before: int, done: int) -> None:
        progress("silences", before + done, total)

    # 2. The true effects, noun by noun, and how well each finder foretells them.
    found: list[NounTruth] = []
    for i, (one, pool, start) in enumerate(zip(judged, pools, starts, strict=True)):
        effects = _true_effects(one.replay, pool.slots, means, batch_size, partial(tell, start))
        found.append(_noun_truth(vlm, one, pool, effects, norms, seed + i, batch_size))
    return found


def _noun_truth(
    vlm: VLM,
    judged: FinderScores,
    pool: _Pool,
    effects: Mapping[str, Float[Tensor, "slots"]],
    norms: list[Tensor],
    seed: int,
    batch_size: int,
) -> NounTruth:
    """Judge every finder at one noun, and the true effects as one more: the best that single neurons can tell."""
    replay = judged.replay
    # The true effect of each neuron alone is a finder too: the ceiling of the others.
    orders = {finder: top_k(scores, max(DELETED)) for finder, scores in judged.scores.items()}
    orders[TRUE_EFFECT] = pool.slots[top_k(effects["logprob"], max(DELETED))]
    return NounTruth(
        word=judged.word.text,
        caption=judged.caption,
        probability=float(replay.base.softmax(-1)[replay.token_id]),
        agreements=tuple(_agreements(judged, pool, effects)),
        deletions=tuple(_deletions(replay, norms, orders, seed, batch_size)),
        n_silenced=len(pool.slots),
        token=vlm.token_text(replay.token_id),
        says={name: _said(vlm, replay, order[:DESCRIBED]) for name, order in orders.items()},
        refused=judged.refused,
    )


def left_out_finders(found: Mapping[str, Sequence[NounTruth]]) -> list[str]:
    """Name the finders that the model refused, each with the reason, and of how many nouns if not of all."""
    nouns = [noun for ones in found.values() for noun in ones]
    counts = Counter((finder, why) for noun in nouns for finder, why in noun.refused.items())
    return [
        f"{finder} is left out{'' if n == len(nouns) else f' of {n} of {len(nouns)} nouns'}: {why}"
        for (finder, why), n in counts.items()
    ]


def _true_effects(
    replay: Replay,
    slots: Int[Tensor, "slots"],
    means: Sequence[Float[Tensor, "neurons"]] | None,
    batch_size: int,
    tell: Callable[[int], None],
) -> dict[str, Float[Tensor, "slots"]]:
    """Measure what logit and log p lose with each neuron set to zero, and log p with it set to its mean."""
    silences = [slot[None] for slot in slots]
    effects = replay.effects(silences, batch_size=batch_size, progress=tell)
    by_name = {"logit": effects.logit, "logprob": effects.logprob}
    if means is not None:
        # Zero is far from what a neuron does elsewhere, its mean is not.
        values = _of_slots(replay, means)
        again = replay.effects(
            silences, values, batch_size=batch_size, progress=lambda done: tell(len(silences) + done)
        )
        by_name["logprob, mean"] = again.logprob
    return by_name


def mean_activations(
    vlm: VLM,
    images: Sequence[Picture],
    *,
    question: Question = Question(),
) -> list[Float[Tensor, "neurons"]]:
    """Measure each neuron's mean activation where the model writes its answers to these images.

    They are run as one batch, where the model allows that.

    Returns:
        Per FFN, float32 on the CPU, experts one after the other; of an expert's neurons the mean where it is asked,
        0 where it never is.
    """
    # Added up in float64 as the answers come: recordings of all of them would not fit.
    question = replace(question, batch_size=max(1, len(images)))
    sums = [torch.zeros(2, ffn.size, dtype=torch.float64) for ffn in vlm.anatomy.ffns]
    for batch in ask(vlm, images, question, recorder=partial(record, writes=False)):
        _add(batch.recording, batch.answers, sums)
        del batch  # its recording is not to live beside the next one
    return [(total / count.clamp(min=1)).float() for total, count in sums]


def _add(recording: Recording, answers: Answers, sums: Sequence[Float[Tensor, "2 neurons"]]) -> None:
    """Add, per FFN, each neuron's activations at the steps of some answers, and how often it was asked."""
    n_steps = max(map(len, answers.token_ids))
    answered = torch.tensor([[step < len(ids) for step in range(n_steps)] for ids in answers.token_ids])
    for i, (ffn, (total, count)) in enumerate(zip(recording.anatomy.ffns, sums, strict=True)):
        for step in range(n_steps):
            # Where an answer has ended, its row of the batch goes on with padding, which is not counted.
            fired = recording.raw[i][step][:, -1].double().cpu()[answered[:, step]]
            if ffn.n_experts is None:
                total += fired.sum(0)
                count += len(fired)
                continue
            # Of a mixture only the experts that were asked have fired.
            of = recording.experts[i][step][:, -1].cpu()[answered[:, step]]
            width = ffn.n_neurons
            places = (of[..., None] * width + torch.arange(width)).flatten()
            total.index_add_(0, places, fired.flatten())
            count.index_add_(0, places, torch.ones(len(places), dtype=torch.float64))


def _of_slots(replay: Replay, means: Sequence[Float[Tensor, "neurons"]]) -> Float[Tensor, "slots"]:
    """Take the mean of every neuron that a step has a slot for."""
    parts = []
    for ffn, of, mean in zip(replay.anatomy.ffns, replay.experts, means, strict=True):
        parts.append(mean if of is None else mean.view(-1, ffn.n_neurons)[of].flatten())
    return torch.cat(parts)


def _said(vlm: VLM, replay: Replay, slots: Int[Tensor, "k"]) -> tuple[tuple[str, ...], ...]:
    """Name the ten tokens that each neuron promotes most with the sign that it fires with here."""
    places = [replay.place(slot) for slot in slots.tolist()]
    # A column as the final norm passes it on; with a negative activation it promotes what it is turned away from.
    reader, columns = reader_for(vlm, "raw"), columns_of(vlm.anatomy, places, vlm.model.device)
    signs = torch.cat(replay.activations)[slots].sign()
    return tuple(reader.tokens(reader.read(columns, places, signs))[0])


class _Pool(NamedTuple):
    """A pool holds the neurons that are silenced one by one."""

    slots: Int[Tensor, "slots"]
    n_even: int
    """The first so many are all there are, or drawn evenly over blocks; behind them stand the finders' top ones."""


def _pool(judged: FinderScores, seed: int) -> _Pool:
    """Take all neurons of a small model; of a large one as many of each block, and the finders' top ones."""
    replay = judged.replay
    if replay.n_slots <= SMALL:
        return _Pool(torch.arange(replay.n_slots), replay.n_slots)
    # As many of each block: drawn over all neurons, the widest blocks would have most of them.
    random = torch.Generator().manual_seed(seed)
    each = POOL // len(replay.activations)
    drawn = [
        start + torch.randperm(len(fired), generator=random)[:each]
        for start, fired in zip(replay.slot_starts, replay.activations, strict=True)
    ]
    even = torch.cat(drawn).sort().values
    tops = torch.cat([top_k(scores, POOL_TOP) for scores in judged.scores.values()]).unique()
    return _Pool(torch.cat([even, tops[~torch.isin(tops, even)]]), len(even))


def _agreements(judged: FinderScores, pool: _Pool, effects: Mapping[str, Float[Tensor, "slots"]]) -> list[Agreement]:
    """Correlate each finder's scores with each effect, over each part of the pool."""
    replay = judged.replay
    n_blocks = len(replay.anatomy.blocks)
    layers = torch.tensor([ffn.layer for ffn in replay.anatomy.ffns])
    layer_of = layers[torch.bucketize(pool.slots[: pool.n_even], replay.slot_starts, right=True) - 1]
    # The finders' top neurons are a part of their own: with them, the rest would not be drawn evenly.
    parts = {
        ALL_BLOCKS: torch.arange(pool.n_even),
        LAST_THIRD: torch.nonzero(layer_of >= n_blocks - max(1, round(n_blocks / 3))).squeeze(1),
    }
    if len(pool.slots) > pool.n_even:
        parts[f"finders' top {POOL_TOP}"] = torch.arange(pool.n_even, len(pool.slots))
    return [
        Agreement(
            finder, scope, name, spearman(scores[pool.slots[part]].double().numpy(), values[part].double().numpy())
        )
        for finder, scores in judged.scores.items()
        for scope, part in parts.items()
        for name, values in effects.items()
    ]


def _deletions(
    replay: Replay, norms: list[Tensor], orders: Mapping[str, Int[Tensor, "_"]], seed: int, batch_size: int
) -> list[Deletion]:
    """Measure how far log p falls with the top k of each order, with sets as loud, and with any neurons."""
    # 1. The sets: of each order and k the top ones and what stands for them; of each k any random ones.
    loud = loudness(replay.activations, replay.experts, norms)
    random = torch.Generator().manual_seed(seed)
    sizes = [k for k in DELETED if k <= replay.n_slots // 2]
    asked = [(name, k, order[:k]) for name, order in orders.items() for k in sizes]
    stand_ins = [matched(replay.slot_starts, loud, top, DRAWS, seed) for *_, top in asked]
    sets = [one for (*_, top), others in zip(asked, stand_ins, strict=True) for one in (top, *others.sets)]
    unmatched = [torch.randperm(replay.n_slots, generator=random)[:k] for k in sizes for _ in range(DRAWS)]
    # 2. All of them in one run, then a row for each of the first: the top ones before their stand-ins.
    falls = replay.effects([*sets, *unmatched], batch_size=batch_size).logprob.numpy()
    found = falls[: len(sets)].reshape(len(asked), 1 + DRAWS)
    plain = dict(zip(sizes, falls[len(sets) :].reshape(len(sizes), DRAWS).mean(1), strict=True))
    return [
        Deletion(
            name,
            k,
            fall=float(mine[0]),
            matched=float(mine[1:].mean()),
            matched_loudness=others.loudness,
            n_matched=others.n_neurons,
            unmatched=float(plain[k]),
        )
        for (name, k, _), others, mine in zip(asked, stand_ins, found, strict=True)
    ]
