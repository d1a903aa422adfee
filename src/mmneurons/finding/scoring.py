"""Recorded activations -> contributions of all neurons to each word -> the top ones, described."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.finding.result import NeuronFinding, NounFinding, Parts, Score
from mmneurons.maths.ranking import said_tokens, top_k
from mmneurons.maths.readout import expected_row, frozen_direction, jacobian_direction
from mmneurons.neurons import Neuron
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy import Anatomy
from mmneurons.vlm.prompts import token_of
from mmneurons.vlm.recording import Recording
from mmneurons.vlm.vlm import VLM, Answers
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
class Moments:
    """The model's state where each target was predicted, float32."""

    activations: list[Float[Tensor, "targets neurons"]]
    """Per block, the inputs of `w_out`."""
    gates: list[Float[Tensor, "targets neurons"]]
    """Per block, the outputs of the activation function alone; empty unless the score is `paper`."""
    residual: Float[Tensor, "targets hidden"]
    embedding: Float[Tensor, "targets hidden"]
    attention: Float[Tensor, "targets hidden"]
    ffn: Float[Tensor, "targets hidden"]


@dataclass(frozen=True, eq=False)
class Scored:
    """All targets of one batch with the scores of all neurons; a neuron is its place in the blocks laid end to end."""

    targets: list[Target]
    choices: Choices
    moments: Moments
    logits: Float[Tensor, "targets vocab"]
    activations: Float[Tensor, "targets neurons"]
    """What was scored: activations, or gates if the score is `paper`."""
    scores: Float[Tensor, "targets neurons"]
    ranked: list[Int[Tensor, "ranks"]]
    """Per target, the neurons with the highest scores, as many as the largest region needs."""


def score_targets(vlm: VLM, recording: Recording, answers: Answers, targets: list[Target], choices: Choices) -> Scored:
    """Score every neuron for every target: one read of each `w_out` for all of them."""
    places = torch.tensor([[target.row, target.step] for target in targets])
    moments = pick_moments(recording, places)
    logits = torch.stack([answers.logits[target.step][target.row] for target in targets]).float()
    directions = read_out(vlm, moments, logits, [target.token_id for target in targets], choices)
    activations = scored_activations(moments, choices)
    projected = [weights.project(directions, block.w_out).to(logits.device) for block in vlm.anatomy.blocks]
    scores = activations * torch.cat(projected, dim=1)
    ranked = [top_k(row, max(*REGION_SIZES, choices.top)) for row in scores]
    return Scored(targets, choices, moments, logits, activations, scores, ranked)


def pick_moments(recording: Recording, places: Int[Tensor, "targets 2"]) -> Moments:
    """What was recorded at (row, step) of each target."""
    device = recording.residual[-1].device  # blocks may lie on several

    def pick(parts: list[Tensor]) -> Tensor:
        stacked = Recording.stacked(parts)
        rows, steps = places.to(stacked.device).unbind(1)
        return stacked[rows, steps].to(device).float()

    return Moments(
        activations=[pick(parts) for parts in recording.activations],
        gates=[pick(parts) for parts in recording.gates if parts],
        residual=pick(recording.residual),
        embedding=pick(recording.embedding),
        attention=pick(recording.attention),
        ffn=pick(recording.ffn),
    )


def scored_activations(moments: Moments, choices: Choices) -> Float[Tensor, "targets neurons"]:
    """What the score multiplies: the activations, or the gates alone if it is the paper's."""
    return torch.cat(moments.gates if choices.score == "paper" else moments.activations, dim=1)


def read_out(
    vlm: VLM, moments: Moments, logits: Float[Tensor, "targets vocab"], token_ids: list[int], choices: Choices
) -> Float[Tensor, "targets hidden"]:
    """g_t of the score chosen: what a neuron's write is multiplied by."""
    unembed, norm = vlm.anatomy.unembed, vlm.anatomy.norm
    rows = unembed[token_ids].float()
    if choices.against is not None:
        rows = rows - unembed[token_of(vlm.tokenizer, choices.against)].float()
    if choices.score == "paper":
        return rows
    if choices.score == "logit":
        return frozen_direction(rows, moments.residual, norm)
    if choices.against is None:  # in a difference of log probabilities, what is expected drops out
        # u_t - sum_v p_v u_v without t's own share, which would cancel badly where p_t is close to 1.
        others = logits.softmax(-1)
        others[torch.arange(len(token_ids)), token_ids] = 0
        rows = rows * others.sum(-1, keepdim=True) - expected_row(others, unembed)
    return jacobian_direction(rows, moments.residual, norm)


def describe(vlm: VLM, scored: Scored) -> list[NounFinding]:
    """Numbers -> NounFindings: top neurons with their words, parts of the logit, layers.

    The columns of all targets are read off together: the unembedding is large, and so is read once.
    """
    listed = torch.stack([order[: scored.choices.top] for order in scored.ranked])
    activations, scores = scored.activations.gather(1, listed), scored.scores.gather(1, listed)
    columns = columns_of(vlm.anatomy, listed.flatten())
    signs = torch.where(activations < 0, -1.0, 1.0).flatten()[:, None]
    said = said_tokens(signs * as_read(vlm.anatomy, columns, scored.choices.score), vlm.anatomy.unembed)
    promoted, suppressed = (ids.view(*listed.shape, -1).tolist() for ids in said)
    columns = columns.view(*listed.shape, -1)
    nouns = []
    for i in range(len(scored.targets)):
        neurons = tuple(
            NeuronFinding(
                neuron=name_of(vlm.anatomy, int(flat)),
                score=float(scores[i, rank]),
                activation=float(activations[i, rank]),
                tokens=texts(vlm, promoted[i][rank]),
                suppressed=texts(vlm, suppressed[i][rank]),
            )
            for rank, flat in enumerate(listed[i])
        )
        nouns.append(_noun(vlm, scored, i, neurons, _parts(vlm.anatomy, scored, i, listed[i], columns[i])))
    return nouns


def _noun(vlm: VLM, scored: Scored, i: int, neurons: tuple[NeuronFinding, ...], parts: Parts) -> NounFinding:
    target, order = scored.targets[i], scored.ranked[i]
    return NounFinding(
        word=target.word.text,
        lemma=target.word.lemma,
        start=target.word.start,
        token=texts(vlm, [target.token_id])[0],
        token_id=target.token_id,
        step=target.step,
        n_tokens=len(target.word.steps),
        probability=float(scored.logits[i].softmax(-1)[target.token_id]),
        logit=float(scored.logits[i, target.token_id]),
        parts=parts,
        neurons=neurons,
        layers={k: _histogram(vlm.anatomy, order[:k]) for k in HISTOGRAM_SIZES if k <= len(order)},
    )


def as_read(anatomy: Anatomy, columns: Float[Tensor, "n hidden"], score: Score) -> Float[Tensor, "n hidden"]:
    """Columns as the unembedding reads them: through the final norm's weight; in the paper's code, as they are."""
    return columns if score == "paper" else anatomy.norm.centre(columns) * anatomy.norm.weight


def _parts(
    anatomy: Anatomy, scored: Scored, i: int, listed: Int[Tensor, "n"], columns: Float[Tensor, "n hidden"]
) -> Parts:
    """Read each recorded write off in logits of the target's token, with the norm's scale frozen."""
    moments, token_id = scored.moments, scored.targets[i].token_id
    row = anatomy.unembed[token_id].float()
    direction = frozen_direction(row[None], moments.residual[i : i + 1], anatomy.norm)[0]
    w_out_bias = sum((b.float() for block in anatomy.blocks if (b := _bias(block.w_out)) is not None), torch.zeros(1))
    bias = direction @ w_out_bias.to(direction.device).expand_as(direction)
    head_bias = 0.0 if anatomy.head_bias is None else float(anatomy.head_bias[token_id])
    activations = torch.cat([part[i] for part in moments.activations])
    return Parts(
        ffn=float(direction @ moments.ffn[i] - bias),
        top=float(activations[listed] @ (columns.to(direction.device) @ direction)),
        attention=float(direction @ moments.attention[i]),
        embedding=float(direction @ moments.embedding[i]),
        bias=float(bias + anatomy.norm.bias @ row) + head_bias,
    )


def _bias(module: torch.nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _histogram(anatomy: Anatomy, order: Int[Tensor, "n"]) -> tuple[int, ...]:
    layers = torch.bucketize(order.cpu(), _ends(anatomy), right=True)
    return tuple(torch.bincount(layers, minlength=len(anatomy.blocks)).tolist())


def _ends(anatomy: Anatomy) -> Int[Tensor, "layers"]:
    """Where each block's neurons end when all are laid end to end."""
    return torch.tensor([block.n_neurons for block in anatomy.blocks]).cumsum(0)


def name_of(anatomy: Anatomy, flat: int) -> Neuron:
    """The neuron at a place in the blocks laid end to end."""
    for layer, block in enumerate(anatomy.blocks):
        if flat < block.n_neurons:
            return Neuron(layer, flat)
        flat -= block.n_neurons
    raise IndexError(flat)


def columns_of(anatomy: Anatomy, flat: Int[Tensor, "n"]) -> Float[Tensor, "n hidden"]:
    """Columns of `w_out` of neurons given by their place, float32, on the device of `flat`."""
    columns = torch.empty(len(flat), anatomy.hidden, device=flat.device)
    start = 0
    for block in anatomy.blocks:
        mine = torch.nonzero((flat >= start) & (flat < start + block.n_neurons)).squeeze(1)
        if len(mine):
            columns[mine] = weights.columns(block.w_out, flat[mine] - start).to(columns.device)
        start += block.n_neurons
    return columns


def texts(vlm: VLM, token_ids: list[int]) -> tuple[str, ...]:
    """Tokens as text, one by one."""
    return tuple(vlm.token_text(token_id) for token_id in token_ids)
