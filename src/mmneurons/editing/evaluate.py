"""What an edit does to what is generated, and to what comes next in texts, measured on images and texts.

bench = Bench(edit=..., held_out=..., unrelated=..., texts=...)
before = Before(vlm, bench)              # once for any number of edits
evaluation = evaluate(vlm, patch, before, source="dog", target="cat")
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.data.pictures import Picture
from mmneurons.editing.answers import Answered, answers, likeliest_tokens, no_neurons
from mmneurons.maths.statistics import Estimate, estimate, share
from mmneurons.metrics.captions import rest_unchanged
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Edit, Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.prompts import WORDINGS
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says, turned

TOP = 10
"""Of M-locality."""
TOPS_ON = 200
"""M-locality is measured on at most so many of the unrelated images: the first ones."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What edits are evaluated on."""

    edit: Sequence[Picture]
    """The images that the edit was made with."""
    held_out: Sequence[Picture]
    """Others of which the model says SOURCE."""
    unrelated: Sequence[Picture]
    """Images of which it does not; those of which it does are left out."""
    texts: Sequence[str] = ()
    """Texts without an image; those that name SOURCE are evaluated apart."""
    question: Question = Question()
    wordings: Sequence[str] = WORDINGS
    """Other ways to ask; answers begin with the same words."""


@dataclass(frozen=True)
class Pair:
    """What was said of one image, unedited and edited."""

    before: str
    after: str
    image: int
    """Which of the held-out, or of the unrelated images."""


@dataclass(frozen=True)
class Evaluation:
    """Every figure of one edit; None where nothing could be measured."""

    source: str
    target: str | None
    efficacy: Estimate | None
    """Edit images of which the model says TARGET (a removal: anything) and no longer SOURCE."""
    generality: Estimate | None
    """The same of images not used for the edit, of which the unedited model says SOURCE."""
    locality: Estimate | None
    """Unrelated images whose answer is the same, word for word."""
    m_locality: Estimate | None
    """Share of the ten likeliest tokens that stay so, mean over the positions of an unrelated answer."""
    m_locality_ranked: Estimate | None
    """The same place by place: MMEdit's form."""
    t_locality: Estimate | None
    """Share of a text's positions at which the likeliest token stays so; texts that do not name SOURCE."""
    t_locality_source: Estimate | None
    """The same of texts that name it."""
    wordings: Estimate | None
    """Generality under other wordings of the prompt."""
    bleed: Estimate | None
    """Unrelated images of which the model says TARGET, and did not."""
    rest_unchanged: Estimate | None
    """Of held-out answers: everything but SOURCE is said as before."""
    entropy: tuple[float, float] | None
    """Of word pairs and triples of held-out answers, unedited and edited: the mean of both, in bits."""
    perplexity: tuple[float, float] | None
    """Of held-out answers under the unedited model, unedited and edited."""
    n_columns: int | None
    """Columns that change; None for what is no patch."""
    relative_size: float | None
    """Mean of |change| / |column|."""
    held_out: tuple[Pair, ...]
    changed: tuple[Pair, ...]
    """Unrelated answers that changed."""


class Before:
    """What the unedited model says and would say, worked out once, each part when it is first asked for."""

    def __init__(self, vlm: VLM, bench: Bench) -> None:
        self.vlm, self.bench = vlm, bench

    def on(self, bench: Bench) -> Before:
        """The same with the edit's own images of another bench; unrelated images, texts and prompt must be the same."""
        other = Before(self.vlm, bench)
        # Where `cached_property` keeps what it has worked out.
        other.__dict__.update(unrelated=self.unrelated, unrelated_tops=self.unrelated_tops, texts=self.texts)
        return other

    @cached_property
    def unrelated(self) -> Answered:
        """Answers about the unrelated images."""
        return answers(self.vlm, self.bench.unrelated, self.bench.question)

    @cached_property
    def unrelated_tops(self) -> list[Int[Tensor, "steps 10"]]:
        """The likeliest tokens at each step of the first of them."""
        return self.tops(range(min(TOPS_ON, len(self.bench.unrelated))))

    def tops(self, numbers: Sequence[int]) -> list[Int[Tensor, "steps 10"]]:
        """The likeliest tokens now, edited or not, at each step of some of the unedited answers."""
        # The unedited answers are read, not new ones: positions must be the same before and after.
        images, ids = [self.bench.unrelated[i] for i in numbers], [self.unrelated.token_ids[i] for i in numbers]
        return [logits.topk(TOP).indices for logits in forced(self.vlm, images, ids, self.bench.question)]

    @cached_property
    def texts(self) -> list[Int[Tensor, "positions"]]:
        """The likeliest token behind each position of each text."""
        return likeliest_tokens(self.vlm, self.bench.texts)


@by_one_thread
def evaluate(
    vlm: VLM,
    edit: Edit,
    before: Before,
    *,
    source: str,
    target: str | None,
    progress: Progress = untold,
) -> Evaluation:
    """Evaluate one edit; the model is left as it was.

    Args:
        vlm: The model, unedited.
        edit: A patch or a rival.
        before: What the model did unedited, on the images and texts to evaluate on.
        source: The word that is to go.
        target: The word that is to come; None for a removal.
        progress: Told which share is done, of one.

    Returns:
        Means over images or texts, each with its 95 % interval and number.

    Source: locality of texts and of images after Cheng et al., EMNLP 2023 (MMEdit), fluency after Meng et al.,
        NeurIPS 2022 (ROME).
    """
    bench, question = before.bench, before.bench.question

    def tell(share: float) -> None:
        progress("judging", share, 1)

    # Unedited: what does not say SOURCE, what does, and the latter asked in other words.
    kept = [i for i, text in enumerate(before.unrelated.texts) if not says(text, source)]
    held = answers(vlm, bench.held_out, question)
    shown = [i for i, text in enumerate(held.texts) if says(text, source)]
    images, usual = [bench.held_out[i] for i in shown], [held.texts[i] for i in shown]
    otherwise = [replace(question, prompt=prompt, answer_prefix=question.prefix) for prompt in bench.wordings]
    reworded_before = [answers(vlm, images, asked).texts for asked in otherwise]
    tell(0.2)
    # Edited: the same questions, and the likeliest tokens of the same answers and texts.
    with edit.applied(vlm):
        edited = answers(vlm, bench.edit, question)
        held_after = answers(vlm, images, question)
        reworded = [answers(vlm, images, asked).texts for asked in otherwise]
        tell(0.4)
        after = answers(vlm, [bench.unrelated[i] for i in kept], question).texts
        tell(0.7)
        tops = before.tops([i for i in kept if i < TOPS_ON])
        next_tokens = likeliest_tokens(vlm, bench.texts)
        tell(0.9)
    # Compared, answer by answer.
    done = partial(turned, source=source, target=target)
    others = [(before.unrelated.texts[i], text) for i, text in zip(kept, after, strict=True)]
    pairs = list(zip(usual, held_after.texts, strict=True))
    asked_otherwise = [
        done(now)
        for first, second in zip(reworded_before, reworded, strict=True)
        for was, now in zip(first, second, strict=True)
        if says(was, source)
    ]
    top_pairs = [(before.unrelated_tops[i], now) for i, now in zip(kept, tops, strict=False)]
    same = [float((a == b).float().mean()) for a, b in zip(before.texts, next_tokens, strict=True)]
    naming = [says(text, source) for text in bench.texts]
    return Evaluation(
        source,
        target,
        efficacy=share(map(done, edited.texts)),
        generality=share(map(done, held_after.texts)),
        locality=share(a == b for a, b in others),
        m_locality=estimate([_shared(a, b) for a, b in top_pairs]),
        m_locality_ranked=estimate([float((a == b).float().mean()) for a, b in top_pairs]),
        t_locality=estimate([kept for kept, names in zip(same, naming, strict=True) if not names]),
        t_locality_source=estimate([kept for kept, names in zip(same, naming, strict=True) if names]),
        wordings=share(asked_otherwise),
        bleed=None if target is None else share(says(b, target) and not says(a, target) for a, b in others),
        rest_unchanged=share(rest_unchanged(a, b, source) for a, b in pairs),
        entropy=(ngram_entropy(usual), ngram_entropy(held_after.texts)) if usual else None,
        perplexity=(
            _perplexity(vlm, images, [held.token_ids[i] for i in shown], question),
            _perplexity(vlm, images, held_after.token_ids, question),
        )
        if usual
        else None,
        n_columns=len(edit.neurons) if isinstance(edit, Patch) else None,
        relative_size=relative_size(vlm, edit) if isinstance(edit, Patch) else None,
        held_out=tuple(Pair(a, b, i) for (a, b), i in zip(pairs, shown, strict=True)),
        changed=tuple(Pair(a, b, i) for (a, b), i in zip(others, kept, strict=True) if a != b),
    )


def forced(
    vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], question: Question
) -> Iterator[Float[Tensor, "steps vocab"]]:
    """Logits at each step of answers that the model is given, image by image; float32, on the CPU."""
    recorder = partial(record, neurons=no_neurons(vlm.anatomy))
    # The residual stream is recorded, and the head run answer by answer: logits of a batch would be large.
    for batch in ask(vlm, images, question, given=token_ids, recorder=recorder):
        residual = batch.recording.stacked(batch.recording.residual)
        for row, mine in enumerate(batch.answers.token_ids):
            yield vlm.anatomy.logits(residual[row, : len(mine)])[:, : vlm.n_tokens].float().cpu()


def ngram_entropy(texts: Sequence[str]) -> float:
    """Entropy of the word pairs and of the word triples of some texts, bits, the mean of both (Meng et al., 2022)."""
    found = []  # in bits; repetition brings it down
    for n in (2, 3):
        grams = Counter(
            tuple(words[i : i + n]) for text in texts if (words := text.split()) for i in range(len(words) - n + 1)
        )
        total = sum(grams.values())
        found.append(-sum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0)
    return sum(found) / len(found)


def relative_size(vlm: VLM, patch: Patch) -> float:
    """Mean over the columns that a patch changes of |change| / |column before any edit|."""
    # Against the columns before any edit, whatever patches are applied now.
    ledger = ledger_of(vlm)
    shares = [
        patch.deltas(part).norm(dim=1) / ledger.pristine(part.place, part.indices).float().cpu().norm(dim=1)
        for part in patch.parts
    ]
    return float(torch.cat(shares).mean())


def _perplexity(vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], question: Question) -> float:
    # Mean over answers of each answer's own mean: a long one does not count for more.
    losses = [
        -float(logits.log_softmax(-1)[torch.arange(len(ids)), list(ids)].mean())
        for logits, ids in zip(forced(vlm, images, token_ids, question), token_ids, strict=True)
    ]
    return math.exp(sum(losses) / len(losses)) if losses else math.nan


def _shared(a: Int[Tensor, "steps 10"], b: Int[Tensor, "steps 10"]) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())
