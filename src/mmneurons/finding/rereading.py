"""The same answer read again: without the picture, with another one, or with one that is changed on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor

from mmneurons.finding.result import NounFinding
from mmneurons.finding.scoring import (
    Scored,
    Target,
    directions_of,
    recorder_for,
    scored_activations,
    traced,
    unembed_rows,
)
from mmneurons.maths.ranking import top_k
from mmneurons.settings import FindSettings
from mmneurons.vlm.traces import Trace
from mmneurons.vlm.vlm import VLM, Answers, Inputs

BLANK = (128, 128, 128)
"""The blank image: one grey."""


def blank_like(picture: Image.Image) -> Image.Image:
    """A picture of nothing, of the same size, so that every token stands where it stood."""
    return Image.new("RGB", picture.size, BLANK)


@dataclass(frozen=True, eq=False)
class Reread:
    """The scores of all neurons for the same words after another prompt: another image, or one changed on its way."""

    neurons: list[Int[Tensor, "targets _"]]
    """Per FFN: which neuron, counted through all its experts, each slot is."""
    scores: list[Float[Tensor, "targets _"]]
    """Per FFN."""

    def of(self, target: int, places: Sequence[tuple[int, int]]) -> list[float]:
        """Scores of neurons given as (FFN, neuron); 0 where a neuron's expert was not asked."""
        return [float(self.scores[ffn][target][self.neurons[ffn][target] == neuron].sum()) for ffn, neuron in places]

    def top(self, target: int, k: int) -> list[tuple[int, int]]:
        """The k neurons that score highest, as (FFN, neuron)."""
        whole = torch.cat([scores[target] for scores in self.scores])
        ends = torch.tensor([scores.shape[1] for scores in self.scores]).cumsum(0)
        found = []
        for slot in top_k(whole, k).tolist():
            ffn = int(torch.bucketize(torch.tensor(slot), ends, right=True))
            inside = slot - int(ends[ffn]) + self.scores[ffn].shape[1]
            found.append((ffn, int(self.neurons[ffn][target, inside])))
        return found


def reread(vlm: VLM, inputs: Inputs, answers: Answers, targets: Sequence[Target], choices: FindSettings) -> Reread:
    """Score all neurons anew where the same words are read after `inputs`, in one pass over prompt and answer.

    Everything is that of the new pass: activations, norm scales and probabilities.
    """
    return rescored(vlm, trace_again(vlm, inputs, answers, targets, choices), targets, choices)


def trace_again(vlm: VLM, inputs: Inputs, answers: Answers, targets: Sequence[Target], choices: FindSettings) -> Trace:
    """The model's state where the words are predicted when the same answer is read after `inputs`."""
    steps: list[list[int]] = [[] for _ in range(len(answers.token_ids))]
    spots = []
    end = answers.sequences.shape[1]  # counted from the end: some models put the picture before the first position
    for target in targets:
        spots.append([target.row, len(steps[target.row])])
        steps[target.row].append(answers.n_prompt + target.step - 1 - end)
    width = max(map(len, steps))
    positions = torch.tensor([row + [-1] * (width - len(row)) for row in steps])
    with recorder_for(vlm, choices)(vlm.anatomy, keep_positions(positions)) as recording:
        vlm.read(inputs, answers)
    return traced(vlm, recording, answers, torch.tensor(spots), targets, choices, inputs)


def rescored(
    vlm: VLM,
    trace: Trace,
    targets: Sequence[Target],
    choices: FindSettings,
    baseline: Sequence[Float[Tensor, "targets _"]] | None = None,
) -> Reread:
    """The scores of all neurons, of that pass alone; the choice of baseline does not count, but the one given here.

    Args:
        vlm: The model.
        trace: The state of that pass.
        targets: The words.
        choices: How they are scored.
        baseline: Per FFN what the activations of all its experts are compared with; None: zero.
    """
    if baseline is not None:
        trace = trace.of_all_experts()
    token_ids = [target.token_id for target in targets]
    rows = unembed_rows(vlm.anatomy, token_ids, trace.residual)
    directions = directions_of(vlm, trace, token_ids, rows, choices)
    activations = scored_activations(trace, choices)
    if baseline is not None:
        activations = [fired - usual.to(fired.device) for fired, usual in zip(activations, baseline, strict=True)]
    return Reread(
        [trace.neurons(i) for i in range(len(activations))],
        [
            fired * trace.projected(i, direction)
            for i, (fired, direction) in enumerate(zip(activations, directions, strict=True))
        ],
    )


def with_blank(vlm: VLM, grey: Trace, scored: Scored, nouns: list[NounFinding]) -> list[NounFinding]:
    """Add what share of each top neuron's score is lost when the same words are read with a grey image.

    Over the means of other pictures both are; over a blank image's own activations all would be lost, of any neuron.
    """
    widths = [part.shape[1] for part in scored.trace.activations]
    usual = None if scored.baseline is None else scored.baseline.split(widths, dim=1)
    again = rescored(vlm, grey, scored.targets, scored.choices, usual)
    compared = []
    for i, noun in enumerate(nouns):
        listed = scored.ranked[i][: len(noun.neurons)]
        left, whole = again.of(i, scored.places(i, listed.tolist())), scored.scores[i, listed].tolist()
        neurons = (
            replace(neuron, lost_without_image=1 - value / before if before else None)
            for neuron, value, before in zip(noun.neurons, left, whole, strict=True)
        )
        compared.append(replace(noun, neurons=tuple(neurons)))
    return compared


def keep_positions(positions: Int[Tensor, "batch kept"]) -> Callable[[Tensor], Tensor]:
    """For `record`: some positions of each row."""

    def keep(values: Shaped[Tensor, "batch positions *width"]) -> Shaped[Tensor, "batch kept *width"]:
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, positions.to(values.device)]

    return keep
