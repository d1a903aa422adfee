"""What an edit does to what is generated, and to what comes next in texts: METRICS, Editing.

bench = Bench(edit=..., held_out=..., unrelated=..., texts=...)
before = Before(vlm, bench)              # once for any number of edits
judged = evaluate(vlm, patch, before, source="dog", target="cat")
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.editing.ledger import ledger_of
from mmneurons.editing.patch import Patch
from mmneurons.editing.steps import text_batches
from mmneurons.inspection.causal import rest_unchanged
from mmneurons.maths.statistics import Estimate, estimate
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT, WORDINGS
from mmneurons.vlm.recording import record
from mmneurons.vlm.vlm import VLM, Picture, batches, open_row
from mmneurons.words import says

TOP = 10
"""Of M-locality."""
TOPS_ON = 200
"""M-locality is measured on at most so many of the unrelated images: the first ones."""


class Edit(Protocol):
    """Anything that edits a model and takes it back: a `Patch`, or a rival."""

    def applied(self, vlm: VLM) -> AbstractContextManager[Any]:
        """Edited inside the `with`."""
        ...


@dataclass(frozen=True, eq=False)
class Bench:
    """What edits are judged on."""

    edit: Sequence[Picture]
    """The images that the edit was made with."""
    held_out: Sequence[Picture]
    """Others of which the model says SOURCE."""
    unrelated: Sequence[Picture]
    """Images of which it does not; those of which it does are left out."""
    texts: Sequence[str] = ()
    """Texts without an image; those that name SOURCE are judged apart."""
    prompt: str = PROMPT
    answer_prefix: str = ANSWER_PREFIX
    wordings: Sequence[str] = WORDINGS
    """Other ways to ask."""
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 8


@dataclass(frozen=True)
class Pair:
    """What was said of one image, unedited and edited."""

    before: str
    after: str
    image: int
    """Which of the held-out, or of the unrelated images."""


@dataclass(frozen=True)
class Judged:
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


@dataclass(frozen=True)
class _Answers:
    texts: list[str]
    token_ids: list[tuple[int, ...]]


class Before:
    """What the unedited model says and would say, worked out once, each part when it is first asked for."""

    def __init__(self, vlm: VLM, bench: Bench) -> None:
        self.vlm, self.bench = vlm, bench

    def on(self, bench: Bench) -> Before:
        """The same with the edit's own images of another bench; unrelated images, texts and prompt must be the same."""
        other = Before(self.vlm, bench)
        other.__dict__.update(unrelated=self.unrelated, unrelated_tops=self.unrelated_tops, texts=self.texts)
        return other

    @cached_property
    def unrelated(self) -> _Answers:
        """Answers about the unrelated images."""
        return _answers(self.vlm, self.bench.unrelated, self.bench)

    @cached_property
    def unrelated_tops(self) -> list[Int[Tensor, "steps 10"]]:
        """The likeliest tokens at each step of them."""
        return [
            logits.topk(TOP).indices
            for logits in forced(self.vlm, self.bench.unrelated[:TOPS_ON], self.unrelated.token_ids, self.bench)
        ]

    @cached_property
    def texts(self) -> list[Int[Tensor, "positions"]]:
        """The likeliest token behind each position of each text."""
        return _likeliest(self.vlm, self.bench.texts)


def evaluate(
    vlm: VLM,
    edit: Edit,
    before: Before,
    *,
    source: str,
    target: str | None,
    progress: Callable[[str], None] | None = None,
) -> Judged:
    """Judge one edit; the model is left as it was.

    Args:
        vlm: The model, unedited.
        edit: A patch or a rival.
        before: What the model did unedited, on the images and texts to judge on.
        source: The word that is to go.
        target: The word that is to come; None for a removal.
        progress: Told what is being done.

    Returns:
        Means over images or texts, each with its 95 % bootstrap interval and number.

    Source: METRICS; locality of texts and of images after Cheng et al., EMNLP 2023 (MMEdit), fluency after Meng et al.,
        NeurIPS 2022 (ROME).
    """
    bench, tell = before.bench, progress or (lambda what: None)
    kept = [i for i, text in enumerate(before.unrelated.texts) if not says(text, source)]
    unrelated, ids = [bench.unrelated[i] for i in kept], [before.unrelated.token_ids[i] for i in kept]
    tell("answers before")
    held = _answers(vlm, bench.held_out, bench)
    shown = [i for i, text in enumerate(held.texts) if says(text, source)]
    held_images, said = [bench.held_out[i] for i in shown], [held.texts[i] for i in shown]
    asked = [(w, _answers(vlm, held_images, replace_prompt(bench, w)).texts) for w in bench.wordings]
    topped = [i for i in kept if i < TOPS_ON]
    tops_before, texts_before = [before.unrelated_tops[i] for i in topped], before.texts

    def done(text: str) -> bool:
        return not says(text, source) and (target is None or says(text, target))

    with edit.applied(vlm):
        tell("answers after")
        edited = _answers(vlm, bench.edit, bench)
        held_after = _answers(vlm, held_images, bench)
        after = _answers(vlm, unrelated, bench).texts
        reworded = [
            done(text)
            for wording, texts in asked
            for said_before, text in zip(
                texts, _answers(vlm, held_images, replace_prompt(bench, wording)).texts, strict=True
            )
            if says(said_before, source)
        ]
        tell("next tokens after")
        tops = [logits.topk(TOP).indices for logits in forced(vlm, unrelated[: len(topped)], ids, bench)]
        texts = _likeliest(vlm, bench.texts)
    tell("fluency")
    same_text = [float((a == b).float().mean()) for a, b in zip(texts_before, texts, strict=True)]
    naming = [says(text, source) for text in bench.texts]
    usual = [before.unrelated.texts[i] for i in kept]
    bleeds = (
        [] if target is None else [says(a, target) and not says(b, target) for a, b in zip(after, usual, strict=True)]
    )
    perplexities = [
        _perplexity(vlm, held_images, token_ids, bench)
        for token_ids in ([held.token_ids[i] for i in shown], held_after.token_ids)
    ]
    return Judged(
        source,
        target,
        efficacy=_share([done(text) for text in edited.texts]),
        generality=_share([done(text) for text in held_after.texts]),
        locality=_share([a == b for a, b in zip(after, usual, strict=True)]),
        m_locality=estimate([_shared(a, b) for a, b in zip(tops_before, tops, strict=True)]),
        m_locality_ranked=estimate([float((a == b).float().mean()) for a, b in zip(tops_before, tops, strict=True)]),
        t_locality=estimate([same for same, names in zip(same_text, naming, strict=True) if not names]),
        t_locality_source=estimate([same for same, names in zip(same_text, naming, strict=True) if names]),
        wordings=_share(reworded),
        bleed=_share(bleeds),
        rest_unchanged=_share([rest_unchanged(a, b, source) for a, b in zip(said, held_after.texts, strict=True)]),
        entropy=(ngram_entropy(said), ngram_entropy(held_after.texts)) if said else None,
        perplexity=(perplexities[0], perplexities[1]) if said else None,
        n_columns=len(edit.neurons) if isinstance(edit, Patch) else None,
        relative_size=relative_size(vlm, edit) if isinstance(edit, Patch) else None,
        held_out=tuple(Pair(*pair) for pair in zip(said, held_after.texts, shown, strict=True)),
        changed=tuple(Pair(b, a, i) for b, a, i in zip(usual, after, kept, strict=True) if a != b),
    )


def forced(
    vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], bench: Bench
) -> Iterator[Float[Tensor, "steps vocab"]]:
    """Logits at each step of answers that the model is given, image by image; float32, on the CPU."""
    start = 0
    for batch in batches([open_row(image) for image in images], 1 if vlm.family.one_at_a_time else bench.batch_size):
        inputs = vlm.encode([[o.image for o in row] for row in batch], bench.prompt, bench.answer_prefix)
        ids = token_ids[start : start + len(batch)]
        start += len(batch)
        begun = vlm.begun(inputs)
        padded = torch.zeros(len(batch), max(map(len, ids)), dtype=begun.sequences.dtype)
        for row, mine in enumerate(ids):
            padded[row, : len(mine)] = torch.tensor(mine)
        sequences = torch.cat([begun.sequences[:, : begun.n_prompt], padded.to(begun.sequences.device)], dim=1)
        n_prompt = begun.n_prompt
        with record(vlm.anatomy, lambda values, n=n_prompt: values[:, n - 1 :], neurons=_none(vlm)) as recording:
            vlm.read(inputs, replace(begun, sequences=sequences))
        residual = recording.stacked(recording.residual)
        for row, mine in enumerate(ids):
            yield vlm.anatomy.logits(residual[row, : len(mine)])[:, : vlm.n_tokens].float().cpu()


def ngram_entropy(texts: Sequence[str]) -> float:
    """Entropy of the word pairs and of the word triples of some texts, bits, the mean of both (Meng et al., 2022)."""
    found = []
    for n in (2, 3):
        grams = Counter(
            tuple(words[i : i + n]) for text in texts if (words := text.split()) for i in range(len(words) - n + 1)
        )
        total = sum(grams.values())
        found.append(-sum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0)
    return sum(found) / len(found)


def relative_size(vlm: VLM, patch: Patch) -> float:
    """Mean over the columns that a patch changes of |change| / |column before any edit|."""
    ledger = ledger_of(vlm)
    shares = [
        patch.deltas(part).norm(dim=1) / ledger.pristine(part.place, part.indices).float().cpu().norm(dim=1)
        for part in patch.parts
    ]
    return float(torch.cat(shares).mean())


def replace_prompt(bench: Bench, prompt: str) -> Bench:
    """The same, asked otherwise."""
    return replace(bench, prompt=prompt)


def _answers(vlm: VLM, images: Sequence[Picture], bench: Bench) -> _Answers:
    texts: list[str] = []
    token_ids: list[tuple[int, ...]] = []
    for batch in batches([open_row(image) for image in images], 1 if vlm.family.one_at_a_time else bench.batch_size):
        inputs = vlm.encode([[o.image for o in row] for row in batch], bench.prompt, bench.answer_prefix)
        answers = vlm.generate(inputs, bench.max_new_tokens)
        texts += answers.texts
        token_ids += answers.token_ids
    return _Answers(texts, token_ids)


def _likeliest(vlm: VLM, texts: Sequence[str]) -> list[Int[Tensor, "positions"]]:
    """The likeliest token behind each position of each text."""
    found: dict[int, Tensor] = {}
    for numbers, inputs in text_batches(vlm, texts):
        with record(vlm.anatomy, lambda values: values, neurons=_none(vlm)) as recording:
            vlm.read(inputs)
        for i, residual in zip(numbers, recording.residual[0], strict=True):
            found[i] = vlm.anatomy.logits(residual)[:, : vlm.n_tokens].argmax(-1).cpu()
    return [found[i] for i in range(len(texts))]


def _none(vlm: VLM) -> list[Tensor]:
    """No neuron of any FFN is kept: the residual stream alone."""
    return [torch.empty(0, dtype=torch.long) for _ in vlm.anatomy.ffns]


def _perplexity(vlm: VLM, images: Sequence[Picture], token_ids: Sequence[tuple[int, ...]], bench: Bench) -> float:
    losses = [
        -float(logits.log_softmax(-1)[torch.arange(len(ids)), list(ids)].mean())
        for logits, ids in zip(forced(vlm, images, token_ids, bench), token_ids, strict=True)
    ]
    return math.exp(sum(losses) / len(losses)) if losses else math.nan


def _shared(a: Int[Tensor, "steps 10"], b: Int[Tensor, "steps 10"]) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())


def _share(hits: Sequence[bool]) -> Estimate | None:
    return estimate([float(hit) for hit in hits])
