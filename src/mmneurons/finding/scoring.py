"""Recorded activations -> contributions of all neurons to each word -> the top ones, described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.finding.result import NeuronFinding, NounFinding, Parts, Score
from mmneurons.maths.ranking import said_tokens, top_k
from mmneurons.maths.readout import expected_row, jacobian_direction
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy import Anatomy, Ffn
from mmneurons.vlm.moments import Moments, Written, pick_moments, written
from mmneurons.vlm.prompts import token_of
from mmneurons.vlm.recording import Recording
from mmneurons.vlm.vlm import VLM, Answers
from mmneurons.vlm.ways import Directions, frozen_rows, in_stream
from mmneurons.words import Word

SCORES: tuple[Score, ...] = ("logit", "logprob", "paper")
HISTOGRAM_SIZES = (10, 100, 1000)
REGION_SIZES = (1, 10, 50, 100, 500, 1000)
"""How many top neurons are averaged into a heat map (Pan et al., figure 3)."""


@dataclass(frozen=True)
class Choices:
    """What `find` was asked for; its arguments, checked."""

    prompt: str
    answer_prefix: str
    top: int
    score: Score
    words: tuple[str, ...] | None
    token_ids: tuple[int, ...] | None
    against: str | None
    maps: bool
    blank: bool
    max_new_tokens: int


@dataclass(frozen=True)
class Target:
    """One word to explain: in which row of the batch, and which generated token of it is scored."""

    row: int
    word: Word
    step: int
    token_id: int


@dataclass(frozen=True, eq=False)
class Scored:
    """All targets of one batch with the scores of all neurons; the slots of all FFNs are laid end to end."""

    targets: list[Target]
    choices: Choices
    moments: Moments
    probabilities: list[float]
    logits: list[float]
    """Before any softcap."""
    written: Written
    activations: Float[Tensor, "targets slots"]
    """What was scored: activations, or gates if the score is `paper`."""
    scores: Float[Tensor, "targets slots"]
    ranked: list[Int[Tensor, "ranks"]]
    """Per target, the slots with the highest scores, as many as the largest region needs."""

    def places(self, i: int, slots: Int[Tensor, "n"]) -> list[tuple[int, int]]:
        """Slots of target i as (FFN, neuron counted through all its experts)."""
        ends = slot_ends(self.moments)
        ffns = torch.bucketize(slots.cpu(), ends, right=True)
        starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])[ffns]
        found = []
        for ffn, slot in zip(ffns.tolist(), (slots.cpu() - starts).tolist(), strict=True):
            experts, width = self.moments.experts[ffn], self.moments.anatomy.ffns[ffn].n_neurons
            if experts is not None:
                slot = int(experts[i, slot // width]) * width + slot % width
            found.append((ffn, slot))
        return found


def score_targets(vlm: VLM, recording: Recording, answers: Answers, targets: list[Target], choices: Choices) -> Scored:
    """Score every neuron for every target: one read of each `w_out` for all of them."""
    places = torch.tensor([[target.row, target.step] for target in targets])
    moments = pick_moments(recording, places)
    rows, steps = places.to(answers.logits.device).unbind(1)
    given = answers.logits[rows, steps].float()
    probabilities = (given - answers.log_totals[rows, steps].float()).exp()
    token_ids = [target.token_id for target in targets]
    unembed = unembed_rows(vlm.anatomy, token_ids, moments.residual)
    asked = read_out(vlm, moments, token_ids, unembed, choices)
    plain = None
    if choices.score != "logit" or choices.against is not None:  # the parts of the logit are told whatever the score
        plain = Directions(vlm.anatomy, frozen_rows(vlm.anatomy, unembed, moments.residual), moments.norms)
    activations = scored_activations(moments, choices)
    scores, ffn = _contributions(moments, activations, asked, plain, through=choices.score != "paper")
    bias = vlm.anatomy.head_bias
    parts = written(moments, unembed, plain or asked, ffn, None if bias is None else bias[token_ids].float())
    whole = torch.cat(scores, dim=1)
    ranked = [top_k(row, max(*REGION_SIZES, choices.top)) for row in whole]
    logits = vlm.anatomy.logit_rule.undo(given).tolist()
    fired = torch.cat(activations, dim=1)
    return Scored(targets, choices, moments, probabilities.tolist(), logits, parts, fired, whole, ranked)


def _contributions(
    moments: Moments,
    activations: list[Float[Tensor, "targets _"]],
    asked: Directions,
    plain: Directions | None,
    *,
    through: bool,
) -> tuple[list[Float[Tensor, "targets _"]], Float[Tensor, "targets"]]:
    """Scores of each FFN's neurons, and what all neurons wrote into the logit; both from one read of each matrix.

    `through` False leaves out what a write passes on its way: the paper's code projects columns as they are.
    """
    n = len(moments.residual)
    scores, total = [], torch.zeros(n, device=moments.residual.device)
    for i, ffn in enumerate(moments.anatomy.ffns):
        directions = asked.at(ffn.way if through else None)
        if plain is None:
            scores.append(activations[i] * moments.projected(i, directions))
            total += scores[-1].sum(-1)
        else:
            both = moments.projected_all(i, torch.stack([directions, plain.at(ffn.way)]))
            scores.append(activations[i] * both[0])
            total += (moments.activations[i] * both[1]).sum(-1)
    return scores, total


def scored_activations(moments: Moments, choices: Choices) -> list[Float[Tensor, "targets _"]]:
    """What the score multiplies: the activations, or the gates alone if it is the paper's."""
    return moments.gates if choices.score == "paper" else moments.activations


def unembed_rows(anatomy: Anatomy, token_ids: Sequence[int], like: Tensor) -> Float[Tensor, "n hidden"]:
    """Rows of the unembedding, float32, on the device of `like`."""
    return anatomy.unembed[list(token_ids)].float().to(like.device)


def read_out(
    vlm: VLM,
    moments: Moments,
    token_ids: list[int],
    rows: Float[Tensor, "targets hidden"],
    choices: Choices,
) -> Directions:
    """g_t of the score chosen, on every way: what a neuron's write is multiplied by."""
    anatomy = vlm.anatomy
    rule, norm = anatomy.logit_rule, anatomy.norm.to(rows.device)
    if choices.against is not None:
        rows = rows - unembed_rows(anatomy, [token_of(vlm.tokenizer, choices.against)], rows)
    if choices.score == "paper":
        return Directions(anatomy, rows, moments.norms)
    if choices.score == "logit":
        return Directions(anatomy, frozen_rows(anatomy, rows, moments.residual), moments.norms)
    if choices.against is None:  # in a difference of log probabilities, what is expected drops out
        # u_t - sum_v p_v u_v without t's own share, which would cancel badly where p_t is close to 1. A softcap
        # lets less of a change through the nearer a logit is to it.
        logits = anatomy.logits(moments.residual).to(rows.device)
        place = torch.arange(len(token_ids)), token_ids
        slopes, others = rule.slope(logits), logits.softmax(-1)
        others[place] = 0
        own = (slopes[place] * others.sum(-1))[:, None]
        rows = rows * own - expected_row(others * slopes, anatomy.unembed).to(rows.device)
    final = rule.scale * rule.before * jacobian_direction(rows, moments.residual, norm)
    return Directions(anatomy, final, moments.norms)


def describe(vlm: VLM, scored: Scored) -> list[NounFinding]:
    """Numbers -> NounFindings: top neurons with their words, parts of the logit, layers.

    The columns of all targets are read off together: the unembedding is large, and so is read once.
    """
    anatomy, top = vlm.anatomy, scored.choices.top
    listed = [order[:top] for order in scored.ranked]
    places = [scored.places(i, slots) for i, slots in enumerate(listed)]
    flat = [place for row in places for place in row]
    columns = columns_of(anatomy, flat, scored.scores.device)
    activations = torch.cat([scored.activations[i, slots] for i, slots in enumerate(listed)])
    signs = torch.where(activations < 0, -1.0, 1.0)[:, None]
    promoted, suppressed = said(vlm, signs * as_read(anatomy, columns, flat, scored.choices.score))
    nouns, start = [], 0
    for i, row in enumerate(places):
        neurons = tuple(
            NeuronFinding(
                neuron=anatomy.ffns[ffn].neuron(neuron),
                score=float(scored.scores[i, slot]),
                activation=float(scored.activations[i, slot]),
                tokens=texts(vlm, promoted[start + rank]),
                suppressed=texts(vlm, suppressed[start + rank]),
            )
            for rank, ((ffn, neuron), slot) in enumerate(zip(row, listed[i].tolist(), strict=True))
        )
        nouns.append(
            _noun(vlm, scored, i, neurons, _top_share(scored, i, listed[i], columns[start : start + len(row)]))
        )
        start += len(row)
    return nouns


def said(
    vlm: VLM, read: Float[Tensor, "n hidden"], n_tokens: int | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens that columns promote and suppress most; tokens that only pad the vocabulary are none."""
    counts = () if n_tokens is None else (n_tokens, n_tokens)
    up, down = said_tokens(read, vlm.anatomy.unembed[: vlm.n_tokens], *counts)
    return up.tolist(), down.tolist()


def _noun(vlm: VLM, scored: Scored, i: int, neurons: tuple[NeuronFinding, ...], top: float) -> NounFinding:
    target, order, parts = scored.targets[i], scored.ranked[i], scored.written
    return NounFinding(
        word=target.word.text,
        lemma=target.word.lemma,
        start=target.word.start,
        token=texts(vlm, [target.token_id])[0],
        token_id=target.token_id,
        step=target.step,
        n_tokens=len(target.word.steps),
        probability=scored.probabilities[i],
        logit=scored.logits[i],
        parts=Parts(
            ffn=float(parts.ffn[i]),
            top=top,
            attention=float(parts.attention[i]),
            other=float(parts.other[i]),
            embedding=float(parts.embedding[i]),
            bias=float(parts.bias[i]),
        ),
        neurons=neurons,
        layers={k: _histogram(scored.moments, order[:k]) for k in HISTOGRAM_SIZES if k <= len(order)},
    )


def as_read(
    anatomy: Anatomy, columns: Float[Tensor, "n hidden"], places: list[tuple[int, int]], score: Score
) -> Float[Tensor, "n hidden"]:
    """Columns as the unembedding reads them: through the norms' weights; in the paper's code, as they are."""
    if score == "paper":
        return columns
    read = torch.empty_like(columns)
    for ffn in {ffn for ffn, _ in places}:
        mine = torch.tensor([j for j, (other, _) in enumerate(places) if other == ffn], device=columns.device)
        read[mine] = anatomy.norm.unscaled(in_stream(columns[mine], anatomy.ffns[ffn].way))
    return read


def _top_share(scored: Scored, i: int, slots: Int[Tensor, "n"], columns: Float[Tensor, "n hidden"]) -> float:
    """What the neurons listed wrote into the logit of the target's token, with the norms' scales frozen."""
    if scored.choices.score == "logit" and scored.choices.against is None:
        return float(scored.scores[i, slots].sum())
    anatomy, moments = scored.moments.anatomy, scored.moments
    row = unembed_rows(anatomy, [scored.targets[i].token_id], moments.residual)
    inputs = [norm[i : i + 1] for norm in moments.norms]
    directions = Directions(anatomy, frozen_rows(anatomy, row, moments.residual[i : i + 1]), inputs)
    activations = torch.cat([part[i] for part in moments.activations])[slots]
    along = [columns[j] @ directions.at(anatomy.ffns[ffn].way)[0] for j, (ffn, _) in enumerate(scored.places(i, slots))]
    return float((activations * torch.stack(along)).sum())


def _histogram(moments: Moments, order: Int[Tensor, "ranks"]) -> tuple[int, ...]:
    ffns = torch.bucketize(order.cpu(), slot_ends(moments), right=True)
    layer_of = torch.tensor([ffn.layer for ffn in moments.anatomy.ffns])
    return tuple(torch.bincount(layer_of[ffns], minlength=len(moments.anatomy.blocks)).tolist())


def slot_ends(moments: Moments) -> Int[Tensor, "ffns"]:
    """Where each FFN's slots end when all are laid end to end."""
    return torch.tensor([part.shape[1] for part in moments.activations]).cumsum(0)


def columns_of(anatomy: Anatomy, places: list[tuple[int, int]], device: torch.device) -> Float[Tensor, "n hidden"]:
    """Columns of `w_out` of neurons given as (FFN, neuron counted through all its experts), float32."""
    columns = torch.empty(len(places), anatomy.hidden, device=device)
    groups: dict[tuple[int, int | None], list[int]] = {}
    for j, (i, neuron) in enumerate(places):
        groups.setdefault((i, anatomy.ffns[i].neuron(neuron).expert), []).append(j)
    for (i, expert), mine in groups.items():
        ffn: Ffn = anatomy.ffns[i]
        indices = torch.tensor([places[j][1] % ffn.n_neurons for j in mine])
        columns[torch.tensor(mine, device=device)] = weights.columns(ffn.module, indices, expert=expert).to(device)
    return columns


def texts(vlm: VLM, token_ids: list[int]) -> tuple[str, ...]:
    """Tokens as text, one by one."""
    return tuple(vlm.token_text(token_id) for token_id in token_ids)
