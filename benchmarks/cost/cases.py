"""One model and one batch of images; and the checks that what is timed does what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

import mmneurons as mmn
from mmneurons.finding.scoring import Target, score_targets
from mmneurons.settings import ANSWER_PREFIX, PROMPT, FindSettings, Score
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.vlm import Answers
from mmneurons.words import Word

from .gradients import Scaled, gradient_cached, gradient_whole, integrated_cached, log_p, prefix
from .rivals import Said, generate, released

NEW_TOKENS = 12
COMPLETE = 0.03
FINE = 300
"""Of the largest block's share of log p: what 20 steps may miss of any block's."""


@dataclass(frozen=True, eq=False)
class Case:
    """One model and one batch of images."""

    vlm: mmn.VLM
    images: list[Image.Image]
    name: str

    @property
    def column(self) -> str:
        """Where its numbers stand."""
        return f"{self.name}, batch {len(self.images)}"

    def find(self, **choices) -> list[mmn.Finding]:
        """All images in one batch."""
        return mmn.find(self.vlm, [*self.images], max_new_tokens=NEW_TOKENS, batch_size=len(self.images), **choices)

    def generate(self) -> Answers:
        """The plain baseline: what `find` does besides finding."""
        return self.vlm.generate(self.vlm.encode(self.images, PROMPT, ANSWER_PREFIX), NEW_TOKENS)

    def recorded(self, score: Score) -> tuple[Recording, Answers]:
        """What `find` scores."""
        inputs = self.vlm.encode(self.images, PROMPT, ANSWER_PREFIX)
        with record(self.vlm.anatomy, gates=score == "paper") as recording:
            answers = self.vlm.generate(inputs, NEW_TOKENS)
        return recording, answers

    def said(self) -> list[Said]:
        """The nouns of the first image."""
        return [Said(noun.step, noun.token_id) for noun in self.find()[0].nouns]


def check_baseline(case: Case) -> list[mmn.Finding]:
    """The baseline says what a raw `model.generate` says, and `find` the same; what it found."""
    raw, plain, found = _three_ways(case)
    assert torch.equal(raw, plain.sequences), "our generate is not model.generate"
    assert tuple(finding.token_ids for finding in found) == plain.token_ids, "find captions otherwise"
    return found


def look_at_baseline(case: Case) -> tuple[list[mmn.Finding], str]:
    """The same where rounding decides near ties: what it found, and how many captions are those of `model.generate`.

    Beside them: those of a second `model.generate`, which nothing of ours has touched.
    """
    raw, plain, found = _three_ways(case)
    again = generate(case.vlm, case.vlm.encode(case.images, PROMPT, ANSWER_PREFIX), NEW_TOKENS).sequences
    same = [sum(map(torch.equal, raw, other)) for other in (again, plain.sequences)]
    usual = [tuple(row.tolist()) for row in raw[:, plain.n_prompt :]]
    told = sum(row[: len(finding.token_ids)] == finding.token_ids for row, finding in zip(usual, found, strict=True))
    return found, f"{same[0]} / {same[1]} / {told} of {len(raw)}"


def _three_ways(case: Case) -> tuple[torch.Tensor, Answers, list[mmn.Finding]]:
    """What a raw `model.generate` says, what the baseline, what `find`."""
    plain, found = case.generate(), case.find()
    raw = generate(case.vlm, case.vlm.encode(case.images, PROMPT, ANSWER_PREFIX), NEW_TOKENS).sequences
    return raw, plain, found


def check_released(case: Case, projections: list[torch.Tensor]) -> None:
    """`score="paper"` and the released algorithm give the same neurons in the same order.

    Up to what its float16 leaves open: scores closer than that may change places.
    """
    (finding,) = case.find(score="paper")
    said = [Said(noun.step, noun.token_id) for noun in finding.nouns]
    token_ids, found = released(case.vlm, case.images[0], said, projections, NEW_TOKENS)
    assert token_ids[: len(finding.token_ids)] == finding.token_ids, "the released algorithm captions otherwise"
    for noun, ranked in zip(finding.nouns, found, strict=True):
        ours = {entry.neuron: entry.score for entry in noun.neurons}
        for entry, neuron, score in zip(noun.neurons, ranked.neurons, ranked.scores, strict=True):
            margin = 2e-3 * abs(entry.score)
            same = abs(score - entry.score) < margin and abs(ours.get(neuron, noun.neurons[-1].score) - score) < margin
            assert same, f"{noun.word}: {neuron} {score} where find has {entry.neuron} {entry.score}"


def check_gradients(case: Case, said: Sequence[Said]) -> None:
    """In the last block `score="logprob"` is gradient x activation, and both ways to that agree everywhere."""
    whole = gradient_whole(case.vlm, case.images[0], said, NEW_TOKENS)
    cached = gradient_cached(case.vlm, case.images[0], said, NEW_TOKENS)
    targets = [target_at(noun.step, noun.token_id) for noun in said]
    scores = score_targets(case.vlm, *case.recorded("logprob"), targets, choices_of("logprob")).scores
    last = case.vlm.anatomy.ffns[-1].n_neurons
    for ours, one, other in zip(scores, whole, cached, strict=True):
        assert (one - other).abs().max() < 1e-3 * one.abs().max(), "the two gradients differ"
        apart = (ours[-last:] - one[-last:]).abs().max() / one[-last:].abs().max()
        assert apart < 1e-3, f"logprob and gradient x activation differ in the last block by {apart}"


def check_integrated(case: Case, said: Sequence[Said]) -> float:
    """Integrated gradients scale what they say, and add up to what each block changes.

    With the scale 1 alone they are gradient x activation; with the scale 0 they leave out a block's activations; and
    over many scales their sum over a block is log p less log p without it.

    Returns:
        The most that the sum over 20 scales misses of any block's share of log p, over the largest block's share.
    """
    vlm, image = case.vlm, case.images[0]
    full = integrated_cached(vlm, image, said, NEW_TOKENS, (1.0,))
    for one, other in zip(full, gradient_cached(vlm, image, said, NEW_TOKENS), strict=True):
        apart = (one.scores - other).abs().max() / other.abs().max()
        assert apart < 1e-3, f"integrated gradients at scale 1 and gradient x activation differ by {apart}"
    empty = integrated_cached(vlm, image, said, NEW_TOKENS, (0.0,))
    layer = len(vlm.anatomy.ffns) // 2
    alone = _without(case, said[0], layer)
    assert abs(alone - float(empty[0].log_p[layer, 0])) < 1e-3 * max(1, abs(alone)), "a block is left out otherwise"
    gap = _incompleteness(case, integrated_cached(vlm, image, said, NEW_TOKENS), empty)
    if gap >= COMPLETE:  # log p bends too much between 20 scales: more of them must close the gap
        fine = [(k + 0.5) / FINE for k in range(FINE)]
        left = _incompleteness(case, integrated_cached(vlm, image, said, NEW_TOKENS, fine), empty)
        assert left < COMPLETE, f"integrated gradients miss {left:.2%} of the largest block's share at {FINE} scales"
    return gap


def _incompleteness(case: Case, made: Sequence[Scaled], empty: Sequence[Scaled]) -> float:
    sizes = [ffn.size for ffn in case.vlm.anatomy.ffns]
    gaps = []
    for noun, without in zip(made, empty, strict=True):
        shares = without.whole - without.log_p[:, 0]
        sums = torch.stack([part.sum() for part in noun.scores.split(sizes)])
        gaps.append(float((sums - shares).abs().max() / shares.abs().max()))
    return max(gaps)


def _without(case: Case, noun: Said, layer: int) -> float:
    """Log p of a noun with the activations of one block at its predicting position set to 0, nothing cached."""
    vlm = case.vlm
    inputs = vlm.encode(case.images[:1], PROMPT, ANSWER_PREFIX)
    sequences = generate(vlm, inputs, NEW_TOKENS).sequences

    def zero(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.cat([args[0][:, :-1], torch.zeros_like(args[0][:, -1:])], dim=1),)

    hook = vlm.anatomy.ffns[layer].module.register_forward_pre_hook(zero)
    try:
        with torch.no_grad():
            logits = vlm.model(**prefix(inputs, sequences, noun)).logits[0, -1:]
    finally:
        hook.remove()
    return float(log_p(logits, [noun.token_id]))


def choices_of(score: Score) -> FindSettings:
    """What `find` would be asked for."""
    return FindSettings(max_new_tokens=NEW_TOKENS, score=score)


def target_at(step: int, token_id: int) -> Target:
    """A token of the caption, whatever word it belongs to."""
    return Target(0, Word("word", "word", 0, 4, (step,)), step, token_id)
