"""An edit is evaluated by what the model then generates, and by the tokens that it predicts in texts.

bench = Bench(edit=..., held_out=..., unrelated=..., texts=...)
before = Before(vlm, bench)              # once for any number of edits
evaluation = evaluate(vlm, patch, before, source="dog", target="cat")
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from jaxtyping import Int
from torch import Tensor

from mmneurons.data.pictures import Picture
from mmneurons.editing.answers import answers, likeliest_tokens
from mmneurons.editing.known import KnownAnswers, forced
from mmneurons.editing.request import prompt_hash
from mmneurons.maths.statistics import Estimate, estimate, share
from mmneurons.metrics.captions import rest_unchanged
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Edit, Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import Question
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.prompts import WORDINGS
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says, turned

TOPS_ON = 200
"""M-locality is measured on at most so many of the unrelated images: the first ones."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A Bench holds the images and texts that edits are evaluated on."""

    edit: Sequence[Picture]
    """The images that the edit was made with."""
    held_out: Sequence[Picture]
    """Others of which the model says SOURCE."""
    unrelated: Sequence[Picture]
    """Images of which it does not; those of which it does are left out."""
    texts: Sequence[str] = ()
    """Texts without an image; those that name SOURCE are evaluated apart."""
    question: Question = Question()
    further: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    """Unrelated images of other kinds, by what they are: of each kind locality alone is measured."""
    further_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Texts of other kinds, likewise; those that name SOURCE are left out."""
    wordings: Sequence[str] = WORDINGS
    """Other ways to ask; answers begin with the same words."""
    limit: int | None = None
    """At most so many unrelated images are evaluated on, the first of which the model does not say SOURCE."""


@dataclass(frozen=True)
class Pair:
    """A Pair is what was said about one image, unedited and edited."""

    before: str
    after: str
    image: int
    """Which of the held-out, or of the unrelated images."""


@dataclass(frozen=True)
class Size:
    """A Size says how far a patch moves the columns that it changes."""

    mean: float
    """Of |change| / |column|, over these columns."""
    largest: float
    """The largest of them."""
    of_matrix: float
    """|change| / |w_out|, Frobenius norms over every w_out that it changes."""


@dataclass(frozen=True)
class Evaluation:
    """An Evaluation holds every figure of one edit; None where nothing could be measured."""

    source: str
    target: str | None
    efficacy: Estimate | None
    """Edit images of which the model says TARGET (a removal: anything) and no longer SOURCE, without those by which the
    strength was chosen."""
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
    """Images of which the unedited model says neither SOURCE nor TARGET, and now TARGET."""
    rest_unchanged: Estimate | None
    """Of held-out answers: everything but SOURCE is said as before."""
    entropy: tuple[float, float] | None
    """Of word pairs and triples of held-out answers, unedited and edited: the mean of both, in bits."""
    perplexity: tuple[float, float] | None
    """Of held-out answers under the unedited model, unedited and edited."""
    n_columns: int | None
    """Columns that change; None for what is no patch."""
    size: Size | None
    """How far they change; None for what is no patch."""
    held_out: tuple[Pair, ...]
    changed: tuple[Pair, ...]
    """Unrelated answers that changed."""
    further: dict[str, Estimate | None] = field(default_factory=dict)
    """Locality on unrelated images of other kinds."""
    further_texts: dict[str, Estimate | None] = field(default_factory=dict)
    """T-locality on texts of other kinds."""


class Before:
    """A Before holds what the unedited model says and predicts; each part is computed when it is first asked for."""

    def __init__(self, vlm: VLM, bench: Bench) -> None:
        self.vlm, self.bench = vlm, bench

    def on(self, bench: Bench) -> Before:
        """Return the same with the edit images of another bench, whose other images, texts and prompt are equal."""
        other = Before(self.vlm, bench)
        # Where `cached_property` keeps what it has worked out.
        shared = ("unrelated", "texts", "further", "further_texts")
        other.__dict__.update({name: getattr(self, name) for name in shared})
        return other

    @cached_property
    def unrelated(self) -> KnownAnswers:
        """The answers about the unrelated images."""
        return KnownAnswers(self.vlm, self.bench.unrelated, self.bench.question, self.bench.limit)

    @cached_property
    def texts(self) -> list[Int[Tensor, "positions"]]:
        """The likeliest token behind each position of each text."""
        return likeliest_tokens(self.vlm, self.bench.texts)

    @cached_property
    def further(self) -> dict[str, KnownAnswers]:
        """Answers about the images of other kinds."""
        return {name: KnownAnswers(self.vlm, mine, self.bench.question) for name, mine in self.bench.further.items()}

    @cached_property
    def further_texts(self) -> dict[str, list[Int[Tensor, "positions"]]]:
        """The likeliest token behind each position of the texts of other kinds."""
        return {name: likeliest_tokens(self.vlm, texts) for name, texts in self.bench.further_texts.items()}


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
    held = answers(vlm, bench.held_out, question)
    shown = [i for i, text in enumerate(held.texts) if says(text, source)]
    images, usual = [bench.held_out[i] for i in shown], [held.texts[i] for i in shown]
    otherwise = [replace(question, prompt=prompt, answer_prefix=question.prefix) for prompt in bench.wordings]
    reworded_before = [answers(vlm, images, asked).texts for asked in otherwise]
    kept = before.unrelated.without(source)
    for known in (before.unrelated, *before.further.values()):
        known.prepare(edit)
    usual_tops, usual_texts, usual_further = before.unrelated.usual_tops(), before.texts, before.further_texts
    tell(0.2)
    # Edited: the same questions, and the likeliest tokens of the same answers and texts.
    with edit.applied(vlm):
        edited = answers(vlm, unsearched(edit, bench.edit), question)
        held_after = answers(vlm, images, question)
        reworded = [answers(vlm, images, asked).texts for asked in otherwise]
        tell(0.4)
        tops = before.unrelated.tops()
        after = before.unrelated.texts(tops)
        tell(0.7)
        further = {name: known.texts(known.tops()) for name, known in before.further.items()}
        tell(0.8)
        next_tokens, next_further = Before(vlm, bench).texts, Before(vlm, bench).further_texts
        tell(0.9)
    # Compared, answer by answer.
    done = partial(turned, source=source, target=target)
    said = before.unrelated.said.texts
    others = [(said[i], after[i]) for i in kept]
    pairs = list(zip(usual, held_after.texts, strict=True))
    asked_otherwise = [
        done(now)
        for first, second in zip(reworded_before, reworded, strict=True)
        for was, now in zip(first, second, strict=True)
        if says(was, source)
    ]
    top_pairs = [(usual_tops[i], tops[i]) for i in kept if i < TOPS_ON]
    same, naming = _unflipped(usual_texts, next_tokens), [says(text, source) for text in bench.texts]
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
        bleed=None if target is None else share(says(b, target) for a, b in others if not says(a, target)),
        rest_unchanged=share(rest_unchanged(a, b, source) for a, b in pairs),
        entropy=(ngram_entropy(usual), ngram_entropy(held_after.texts)) if usual else None,
        perplexity=(
            _perplexity(vlm, images, [held.token_ids[i] for i in shown], question),
            _perplexity(vlm, images, held_after.token_ids, question),
        )
        if usual
        else None,
        n_columns=len(edit.neurons) if isinstance(edit, Patch) else None,
        size=size_of(vlm, edit) if isinstance(edit, Patch) else None,
        held_out=tuple(Pair(a, b, i) for (a, b), i in zip(pairs, shown, strict=True)),
        changed=tuple(Pair(a, b, i) for (a, b), i in zip(others, kept, strict=True) if a != b),
        further={
            name: share(a == b for a, b in zip(known.said.texts, further[name], strict=True) if not says(a, source))
            for name, known in before.further.items()
        },
        further_texts={
            name: estimate(
                [
                    kept
                    for kept, text in zip(_unflipped(usual, next_further[name]), texts, strict=True)
                    if not says(text, source)
                ]
            )
            for (name, texts), usual in zip(bench.further_texts.items(), usual_further.values(), strict=True)
        },
    )


def unsearched(edit: Edit, images: Sequence[Picture]) -> list[Picture]:
    """Return the images without those by which the strength was chosen, as the edit's provenance names them."""
    # Provenance is read from files, and may say anything.
    hashes = getattr(edit, "provenance", {}).get("searched")
    searched = hashes if isinstance(hashes, list | tuple) else ()
    return [image for image in images if prompt_hash(image) not in searched]


def ngram_entropy(texts: Sequence[str]) -> float:
    """Compute the entropy of word pairs and triples of some texts: the mean of both, in bits (Meng et al., 2022)."""
    found = []  # in bits; repetition brings it down
    for n in (2, 3):
        grams = Counter(
            tuple(words[i : i + n]) for text in texts if (words := text.split()) for i in range(len(words) - n + 1)
        )
        total = sum(grams.values())
        found.append(-sum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0)
    return sum(found) / len(found)


def size_of(vlm: VLM, patch: Patch) -> Size:
    """Measure how far a patch moves the columns that it changes, compared with the columns before any edit."""
    # Whatever patches are applied now.
    ledger, sizes, shares = ledger_of(vlm), [], []
    for part in patch.parts:
        moved = patch.deltas(part).norm(dim=1)
        lengths = ledger.pristine(part.place).float().cpu().norm(dim=1)
        shares.append((moved / lengths[part.indices]).where(moved > 0, 0.0))
        sizes.append((moved.norm(), lengths.norm()))
    moved, whole = (torch.stack(each).norm() for each in zip(*sizes, strict=True))
    every = torch.cat(shares)
    return Size(float(every.mean()), float(every.max()), float(moved / whole))


def _perplexity(vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], question: Question) -> float:
    # Mean over answers of each answer's own mean: a long one does not count for more.
    losses = [
        -float(logits.log_softmax(-1)[torch.arange(len(ids)), list(ids)].mean())
        for logits, ids in zip(forced(vlm, images, token_ids, question), token_ids, strict=True)
    ]
    return math.exp(sum(losses) / len(losses)) if losses else math.nan


def _unflipped(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """Compute for each text the share of positions whose likeliest token is the same."""
    return [float((a == b).float().mean()) for a, b in zip(before, after, strict=True)]


def _shared(a: Int[Tensor, "steps 10"], b: Int[Tensor, "steps 10"]) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())
