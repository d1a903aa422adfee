"""Recorded activations -> contributions of all neurons to each word -> the top ones, described."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.finding.reading import columns_of, reader_for, texts
from mmneurons.finding.result import NeuronFinding, NounFinding, Parts
from mmneurons.maths.ranking import top_k
from mmneurons.maths.readout import expected_row, jacobian_direction
from mmneurons.settings import FindSettings
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.anatomy.paths import Directions, frozen_rows
from mmneurons.vlm.asking import Recorder
from mmneurons.vlm.backward import Asked, log_p_goal, write_gradients
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.hooks.recording import Keep, Recording, record
from mmneurons.vlm.insides import followed_directions, watching_insides
from mmneurons.vlm.locking import restored
from mmneurons.vlm.pass_calls import keeping_calls
from mmneurons.vlm.tokens import token_of
from mmneurons.vlm.traces import Trace, Written, pick_trace, written
from mmneurons.vlm.vlm import VLM, Answers, Inputs
from mmneurons.words import Word

HISTOGRAM_SIZES = (10, 100, 1000)
REGION_SIZES = (1, 10, 50, 100, 500, 1000)
"""How many top neurons are averaged into a heat map (Pan et al., figure 3)."""


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
    choices: FindSettings
    trace: Trace
    probabilities: list[float]
    logits: list[float]
    """Before any softcap."""
    written: Written
    activations: Float[Tensor, "targets slots"]
    """What was scored: activations, or gates if the score is `paper`."""
    baseline: Float[Tensor, "targets slots"] | None
    """What they are compared with; None: zero."""
    scores: Float[Tensor, "targets slots"]
    contributions: Float[Tensor, "targets slots"]
    """The scores without a baseline: (activation - baseline) * projection is one, activation * projection the other."""
    pushes: Float[Tensor, "targets slots"]
    """What each neuron wrote into the target's logit; the contributions, if that is what was asked for."""
    ranked: Int[Tensor, "targets ranks"]
    """The slots with the highest scores, as many as the largest region needs."""

    @cached_property
    def slot_ends(self) -> Int[Tensor, "ffns"]:
        """Where each FFN's slots end when all are laid end to end."""
        return torch.tensor([part.shape[1] for part in self.trace.activations]).cumsum(0)

    def ffns_of(self, slots: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Which FFN each slot belongs to; on the CPU."""
        return torch.bucketize(slots.cpu(), self.slot_ends, right=True)

    def places(self, i: int, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Slots of target i as (FFN, neuron counted through all its experts)."""
        ends, found = self.slot_ends.tolist(), []
        for slot in slots:
            ffn = bisect_right(ends, slot)
            slot -= ends[ffn - 1] if ffn else 0
            experts, width = self.trace.experts[ffn], self.trace.anatomy.ffns[ffn].n_neurons
            if experts is not None:
                slot = int(experts[i, slot // width]) * width + slot % width
            found.append((ffn, slot))
        return found


def score_targets(
    vlm: VLM,
    recording: Recording,
    answers: Answers,
    targets: list[Target],
    choices: FindSettings,
    baseline: list[Float[Tensor, "targets _"]] | None = None,
    inputs: Inputs | None = None,
) -> Scored:
    """Score every neuron for every target: one read of each `w_out` for all of them.

    Args:
        vlm: The model.
        recording: What was recorded while the answers were generated, or read.
        answers: The answers.
        targets: Which words of them.
        choices: What is asked of them.
        baseline: From `baseline_of`; None: activations are compared with zero.
        inputs: Of the prompts; a gradient may need to read them again.
    """
    # 1. The model's state where each target was predicted, and the logit that it gave there.
    places = torch.tensor([[target.row, target.step] for target in targets])
    token_ids = [target.token_id for target in targets]
    trace = traced(vlm, recording, answers, places, targets, choices, inputs)
    if baseline is not None:
        trace = trace.of_all_experts()
    rows, steps = places.to(answers.logits.device).unbind(1)
    given = answers.logits[rows, steps].float()
    unembed = unembed_rows(vlm.anatomy, token_ids, trace.residual)
    # 2. The direction along which a write counts, and that of the plain logit where it is another.
    asked = directions_of(vlm, trace, token_ids, unembed, choices)
    plain = Directions(vlm.anatomy, frozen_rows(vlm.anatomy, unembed, trace.residual), trace.norms)
    differs = choices.score != "logit" or choices.against is not None  # the parts of the logit are told in any case
    activations = scored_activations(trace, choices)
    # 3. Every neuron's product with it; each matrix is read once.
    over = None if baseline is None else [b.to(a.device).float() for a, b in zip(activations, baseline, strict=True)]
    scores, contributions, pushes = _contributions(trace, activations, over, asked, plain if differs else None)
    bias = vlm.anatomy.head_bias
    head_bias = None if bias is None else bias[token_ids].float()
    return Scored(
        targets=targets,
        choices=choices,
        trace=trace,
        probabilities=probabilities_of(answers, targets).tolist(),
        logits=vlm.anatomy.logit_rule.undo(given).tolist(),
        written=written(trace, unembed, plain, pushes.sum(-1), head_bias),
        activations=torch.cat(activations, dim=1),
        baseline=None if over is None else torch.cat(over, dim=1),
        scores=scores,
        contributions=contributions,
        pushes=pushes,
        ranked=top_k(scores, max(*REGION_SIZES, choices.top)),
    )


def probabilities_of(answers: Answers, targets: Sequence[Target]) -> Float[Tensor, "targets"]:
    """The model's next-token probability of each target's token where it was said, or read."""
    # Of no target at all, torch would make floats, which are no places.
    places = torch.tensor([[target.row, target.step] for target in targets], dtype=torch.long).view(-1, 2)
    rows, steps = places.to(answers.logits.device).unbind(1)
    return (answers.logits[rows, steps].float() - answers.log_totals[rows, steps].float()).exp()


def _contributions(
    trace: Trace,
    activations: list[Float[Tensor, "targets _"]],
    baseline: list[Float[Tensor, "targets _"]] | None,
    asked: list[Float[Tensor, "targets hidden"]],
    plain: Directions | None,
) -> tuple[Float[Tensor, "targets slots"], Float[Tensor, "targets slots"], Float[Tensor, "targets slots"]]:
    """Of all neurons: scores, scores without baseline, what they wrote into the logit; each matrix is read once."""
    scores: list[Tensor] = []
    contributions: list[Tensor] = []
    pushes: list[Tensor] = []
    for i, ffn in enumerate(trace.anatomy.ffns):
        if plain is None:
            projected = trace.projected(i, asked[i])
        else:
            projected, plainly = trace.projected_all(i, torch.stack([asked[i], plain.at(ffn.path)]))
            pushes.append(trace.activations[i] * plainly)
        contributions.append(activations[i] * projected)
        if baseline is not None:
            scores.append((activations[i] - baseline[i]) * projected)
    whole = torch.cat(contributions, dim=1)
    return torch.cat(scores, dim=1) if scores else whole, whole, torch.cat(pushes, dim=1) if pushes else whole


def scored_activations(trace: Trace, choices: FindSettings) -> list[Float[Tensor, "targets _"]]:
    """What the score multiplies: the activations, or the gates alone if it is the paper's."""
    return trace.gates if choices.score == "paper" else trace.activations


def unembed_rows(anatomy: Anatomy, token_ids: Sequence[int], like: Tensor) -> Float[Tensor, "n hidden"]:
    """Rows of the unembedding, float32, on the device of `like`."""
    return anatomy.unembed[list(token_ids)].float().to(like.device)


def traced(
    vlm: VLM,
    recording: Recording,
    answers: Answers,
    places: Int[Tensor, "targets 2"],
    targets: Sequence[Target],
    choices: FindSettings,
    inputs: Inputs | None,
) -> Trace:
    """The model's state where each target was predicted, with the directions that only the pass itself can tell.

    Args:
        vlm: The model.
        recording: What was recorded in the pass.
        answers: The answers, as `inputs` goes on.
        places: Row of each target, and its place in the recording.
        targets: The words.
        choices: What is asked of them.
        inputs: Of the prompts; None where the pass cannot be run again.

    Raises:
        ModelError: for a model that the score cannot be had of, with the reason.
    """
    trace, token_ids = pick_trace(recording, places), [target.token_id for target in targets]
    if choices.score == "gradient":
        word, steps = choices.against, torch.tensor([target.step for target in targets])
        other = None if word is None else [token_of(vlm.tokenizer, word, like=token) for token in token_ids]
        asked = Asked(vlm, recording, answers, places, steps, log_p_goal(token_ids, other))
        return replace(trace, directions=write_gradients(asked, inputs))
    if choices.score == "followed":
        assert recording.insides is not None, "recorded without `recorder_for`"
        rows = unembed_rows(vlm.anatomy, token_ids, trace.residual)
        final = read_out(vlm, trace, token_ids, rows, choices).at(None)
        found = followed_directions(recording.insides, trace, places, final, tolerance(vlm))
        return replace(trace, directions=found)
    return trace


def recorder_for(vlm: VLM, *choices: FindSettings) -> Recorder:
    """What starts a recording of all that some scores need of a pass."""
    scores = {mine.score for mine in choices}

    @restored
    def recorder(anatomy: Anatomy, keep: Keep) -> Iterator[Recording]:
        calls = keeping_calls(anatomy) if "gradient" in scores else nullcontext()
        insides = watching_insides(vlm.model, anatomy, keep) if "followed" in scores else nullcontext()
        with record(anatomy, keep, gates="paper" in scores) as recording:  # noqa: SIM117 - the others are put into it
            with calls as recording.calls, insides as recording.insides:
                yield recording

    return recorder


def directions_of(
    vlm: VLM, trace: Trace, token_ids: list[int], rows: Float[Tensor, "targets hidden"], choices: FindSettings
) -> list[Float[Tensor, "targets hidden"]]:
    """What a neuron's write is multiplied by in the score chosen: per FFN, at the output of its `w_out`."""
    if trace.directions is not None:
        return trace.directions
    asked = read_out(vlm, trace, token_ids, rows, choices)
    # The paper's code projects columns as they are, whatever they pass on their way.
    return [asked.at(None if choices.score == "paper" else ffn.path) for ffn in trace.anatomy.ffns]


def read_out(
    vlm: VLM,
    trace: Trace,
    token_ids: list[int],
    rows: Float[Tensor, "targets hidden"],
    choices: FindSettings,
) -> Directions:
    """g_t of a score that the trace is enough for, on every path; of `followed`, where it starts: that of `logprob`."""
    anatomy = vlm.anatomy
    rule, norm = anatomy.logit_rule, anatomy.norm.to(rows.device)
    if choices.against is not None:
        others = [token_of(vlm.tokenizer, choices.against, like=token) for token in token_ids]
        rows = rows - unembed_rows(anatomy, others, rows)
    if choices.score == "paper":
        return Directions(anatomy, rows, trace.norms)
    if choices.score == "logit":
        return Directions(anatomy, frozen_rows(anatomy, rows, trace.residual), trace.norms)
    if choices.against is None:  # in a difference of log probabilities, what is expected drops out
        # u_t - sum_v p_v u_v without t's own share, which would cancel badly where p_t is close to 1. A softcap
        # lets less of a change through the nearer a logit is to it.
        logits = anatomy.logits(trace.residual).to(rows.device)
        place = torch.arange(len(token_ids)), token_ids
        slopes, others = rule.slope(logits), logits.softmax(-1)
        others[place] = 0
        own = (slopes[place] * others.sum(-1))[:, None]
        rows = rows * own - expected_row(others * slopes, anatomy.unembed).to(rows.device)
    final = rule.scale * rule.before * jacobian_direction(rows, trace.residual, norm)
    return Directions(anatomy, final, trace.norms)


def describe(vlm: VLM, scored: Scored) -> list[NounFinding]:
    """Numbers -> NounFindings: top neurons with their words, parts of the logit, layers.

    The columns of all targets are read off together: the unembedding is large, and so is read once.
    """
    anatomy, listed = vlm.anatomy, scored.ranked[:, : scored.choices.top]
    places = [scored.places(i, slots) for i, slots in enumerate(listed.tolist())]
    flat = [place for row in places for place in row]
    activations = scored.activations.gather(1, listed)
    baseline = None if scored.baseline is None else scored.baseline.gather(1, listed)
    excess = activations if baseline is None else activations - baseline
    fires = list(zip(flat, (excess < 0).flatten().tolist(), strict=True))
    once = {key: j for j, key in enumerate(dict.fromkeys(fires))}  # nouns share neurons, and the vocabulary is large
    different = [place for place, _ in once]
    # 1. What each of the neurons listed says, in the direction in which it fired: above its baseline, or below.
    columns = columns_of(anatomy, different, scored.scores.device)
    signs = torch.tensor([-1.0 if negative else 1.0 for _, negative in once], dtype=torch.float32)
    reader = reader_for(vlm, scored.choices.says, scored.choices.score)
    promoted, suppressed = reader.tokens(reader.read(columns, different, signs))
    # 2. Their numbers, and where the rest of the logit comes from.
    fired, scores = activations.tolist(), scored.scores.gather(1, listed).tolist()
    usual = None if baseline is None else baseline.tolist()
    tops = scored.pushes.gather(1, listed).sum(-1).tolist()
    names = ("ffn", "attention", "other", "embedding", "bias")
    parts = {name: getattr(scored.written, name).tolist() for name in names}
    histograms, nouns = _histograms(scored), []
    for i, row in enumerate(places):
        neurons = tuple(
            NeuronFinding(
                neuron=anatomy.ffns[ffn].neuron(neuron),
                score=scores[i][rank],
                activation=fired[i][rank],
                tokens=promoted[once[fires[i * len(row) + rank]]],
                suppressed=suppressed[once[fires[i * len(row) + rank]]],
                baseline=None if usual is None else usual[i][rank],
            )
            for rank, (ffn, neuron) in enumerate(row)
        )
        mine = Parts(top=tops[i], **{name: values[i] for name, values in parts.items()})
        nouns.append(_noun(vlm, scored, i, neurons, mine, histograms[i]))
    return nouns


def _noun(
    vlm: VLM,
    scored: Scored,
    i: int,
    neurons: tuple[NeuronFinding, ...],
    parts: Parts,
    layers: dict[int, tuple[int, ...]],
) -> NounFinding:
    target = scored.targets[i]
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
        parts=parts,
        neurons=neurons,
        layers=layers,
    )


def _histograms(scored: Scored) -> list[dict[int, tuple[int, ...]]]:
    """For each target and each k, how many of the top k lie in each block."""
    anatomy = scored.trace.anatomy
    layers = torch.tensor([ffn.layer for ffn in anatomy.ffns])[scored.ffns_of(scored.ranked)].numpy()
    sizes = [k for k in HISTOGRAM_SIZES if k <= layers.shape[1]]
    n_blocks = len(anatomy.blocks)
    return [{k: tuple(np.bincount(row[:k], minlength=n_blocks).tolist()) for k in sizes} for row in layers]
