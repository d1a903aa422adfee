"""One model and one batch of images; and the checks that what is timed does what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from rivals import Said, generate, gradient_cached, gradient_whole, released

import mmneurons as mmn
from mmneurons.finding.result import Score
from mmneurons.finding.scoring import Choices, Target, score_targets
from mmneurons.vlm.prompts import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.recording import Recording, record
from mmneurons.vlm.vlm import Answers
from mmneurons.words import Word

NEW_TOKENS = 12


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
            answers = self.vlm.generate(inputs, NEW_TOKENS, logits=True)
        return recording, answers


def check_baseline(case: Case) -> list[mmn.Finding]:
    """The baseline says what a raw `model.generate` says, and `find` the same; what it found."""
    answers, found = case.generate(), case.find()
    raw = generate(case.vlm, case.vlm.encode(case.images, PROMPT, ANSWER_PREFIX), NEW_TOKENS).sequences
    assert torch.equal(raw, answers.sequences), "our generate is not model.generate"
    assert tuple(finding.token_ids for finding in found) == answers.token_ids, "find captions otherwise"
    return found


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
    last = case.vlm.anatomy.blocks[-1].n_neurons
    for ours, one, other in zip(scores, whole, cached, strict=True):
        assert (one - other).abs().max() < 1e-3 * one.abs().max(), "the two gradients differ"
        apart = (ours[-last:] - one[-last:]).abs().max() / one[-last:].abs().max()
        assert apart < 1e-3, f"logprob and gradient x activation differ in the last block by {apart}"


def choices_of(score: Score) -> Choices:
    """What `find` would be asked for."""
    return Choices(PROMPT, ANSWER_PREFIX, 10, score, None, None, False, False, NEW_TOKENS)


def target_at(step: int, token_id: int) -> Target:
    """A token of the caption, whatever word it belongs to."""
    return Target(0, Word("word", "word", 0, 4, (step,)), step, token_id)
