"""Other ways to score neurons, to compare `find` with: same image, same nouns, same neurons.

| finder | score of a neuron |
| --- | --- |
| `logit`, `logprob`, `paper`, `followed` | as in `find` |
| `activation` | the size of its activation |
| `gradient` | gradient of log p by its activation, times the activation (Schwettmann et al., ICCV-W 2023) |
| `integrated` | integrated gradients, all activations of a block scaled together, 20 steps (Dai et al., ACL 2022) |
| `random` | a random number |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.attribution.ablation import Replay, replays
from mmneurons.data.content import reason
from mmneurons.data.pictures import Picture
from mmneurons.errors import ModelError, SettingError
from mmneurons.finding.batch import targets_of
from mmneurons.finding.scoring import recorder_for, score_targets
from mmneurons.settings import FindSettings, Question, Score
from mmneurons.vlm.asking import ask
from mmneurons.vlm.backward import check_differentiable
from mmneurons.vlm.hooks.recording import last_position
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word

Finder = Literal["logit", "logprob", "paper", "followed", "activation", "gradient", "integrated", "random"]
FINDERS: tuple[Finder, ...] = get_args(Finder)
OF_FIND: tuple[Score, ...] = ("logit", "logprob", "paper", "followed")
"""Finders that are scores of `find`, had here from one recording; its `gradient` is the finder of this name, too."""
BY_GRADIENTS: tuple[Finder, ...] = ("gradient", "integrated")
INTEGRATION_STEPS = 20
"""At how many scales of the activations the gradient is averaged by `integrated`."""


@dataclass(frozen=True, eq=False)
class FinderScores:
    """One noun of an answer, and the score that each finder gives to every neuron there."""

    word: Word
    """The noun, and the generated tokens that wrote it."""
    caption: str
    """The whole answer that it stands in."""
    replay: Replay
    """The step that wrote the noun's first token, to be run again without neurons."""
    scores: dict[Finder, Float[Tensor, "slots"]]
    """For each finder a score of each slot, as `Replay` counts them; float32, on the CPU."""
    refused: Mapping[Finder, str] = field(default_factory=dict)
    """Why finders are missing that nobody named: this model refuses them."""


@by_one_thread
def finder_scores(
    vlm: VLM,
    image: Picture,
    finders: Sequence[Finder] | None = None,
    *,
    words: Sequence[str] | None = None,
    seed: int = 0,
    question: Question = Question(),
) -> list[FinderScores]:
    """Let the model answer, and let every finder score all neurons for each noun of the answer.

    Args:
        vlm: The model, from `load`.
        image: A path, PIL image or array.
        finders: The finders to use; see the table of this module. None: all that this model allows; each entry says
            which it refuses, and why.
        words: Words of the answer to explain instead of its nouns; those that are not in it are left out.
        seed: The seed of the finder `random`.
        question: What the model is asked.

    Returns:
        One entry for each noun; an empty list if the answer has none.

    Raises:
        SettingError: there is no such finder.
        ModelError: a finder was named that this model refuses (`paper` where activation functions cannot be recorded,
            `followed` of experts), or its blocks cannot be run again.
    """
    wanted: Sequence[Finder] = FINDERS if finders is None else finders
    if unknown := [finder for finder in wanted if finder not in FINDERS]:
        raise SettingError(f"There is no finder '{unknown[0]}'.", fix=f"Choose of: {', '.join(FINDERS)}.")
    # 1. The answer and its nouns: without any there is nothing to record.
    choices = FindSettings(**asdict(question), top=1, words=words)
    (batch,) = ask(vlm, [image], question)
    inputs, answers = batch.inputs, batch.answers
    targets = targets_of(vlm, answers, 0, choices)
    if not targets:
        return []
    # 2. What this model refuses is raised where it was named, else left out.
    refusals = _Refusals(named=finders is not None)
    for finder in wanted:
        with refusals.of(finder):
            _check(vlm, finder, choices)
    # 3. The same answer, generated once more up to its last noun, with what ablation and gradients need.
    asked: dict[Score, FindSettings] = {
        one: replace(choices, score=one) for one in OF_FIND if one in wanted and one not in refusals.told
    }
    kept = replays(vlm, inputs, [target.step for target in targets], recorder=recorder_for(vlm, *asked.values()))
    by_score: dict[str, Tensor] = {}
    for score, mine in asked.items():
        with refusals.of(score):
            by_score[score] = score_targets(vlm, kept.recording, kept.answers, targets, mine).scores.cpu()
    # 4. All finders, noun by noun; one stream of random numbers, so that each noun has others.
    random = torch.Generator().manual_seed(seed)
    used: list[Finder] = [finder for finder in wanted if finder not in refusals.told]
    return [
        FinderScores(
            target.word,
            answers.texts[0],  # those kept end with the last noun
            replay,
            {finder: _scores(finder, replay, by_score, i, random) for finder in used},
            refusals.told,
        )
        for i, (target, replay) in enumerate(zip(targets, kept.replays, strict=True))
    ]


@dataclass(frozen=True)
class _Refusals:
    """Why a model refuses finders: raised where they were named, else put down."""

    named: bool
    told: dict[Finder, str] = field(default_factory=dict)

    @contextmanager
    def of(self, finder: Finder) -> Iterator[None]:
        """Put down why this finder is refused inside the `with`, if it was not named."""
        try:
            yield
        except ModelError as error:
            if self.named:
                raise
            self.told[finder] = reason(error)


def _check(vlm: VLM, finder: Finder, choices: FindSettings) -> None:
    """Refuse a finder that the model's parts do not allow, before anything is run.

    Raises:
        ModelError: with the reason.
    """
    if finder in OF_FIND:
        with recorder_for(vlm, replace(choices, score=finder))(vlm.anatomy, last_position):
            pass
    elif finder in BY_GRADIENTS:
        check_differentiable(vlm)


def _scores(
    finder: Finder, replay: Replay, by_score: Mapping[str, Tensor], i: int, random: torch.Generator
) -> Float[Tensor, "slots"]:
    """Compute the scores that one finder gives to all slots for noun number `i`."""
    if finder in by_score:
        return by_score[finder][i]
    fired = torch.cat(replay.activations)
    if finder == "activation":
        return fired.abs()
    if finder == "gradient":
        return replay.gradients() * fired
    if finder == "integrated":
        # The integral from 0 to the activations, by the midpoint rule, block by block; each block's gradients are zero
        # in the slots of the others, so that the sum puts them side by side.
        midpoints = (torch.arange(INTEGRATION_STEPS, dtype=torch.float32) + 0.5) / INTEGRATION_STEPS
        layers = sorted({ffn.layer for ffn in replay.anatomy.ffns})
        return torch.stack([replay.gradients(layer, midpoints) for layer in layers]).sum(0) * fired
    return torch.rand(len(fired), generator=random, dtype=torch.float32)
