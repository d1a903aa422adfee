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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.attribution.ablation import Replay, replays
from mmneurons.data.pictures import Picture
from mmneurons.errors import SettingError
from mmneurons.finding.batch import targets_of
from mmneurons.finding.scoring import recorder_for, score_targets
from mmneurons.settings import FindSettings, Question, Score
from mmneurons.vlm.asking import ask
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word

Finder = Literal["logit", "logprob", "paper", "followed", "activation", "gradient", "integrated", "random"]
FINDERS: tuple[Finder, ...] = get_args(Finder)
OF_FIND: tuple[Score, ...] = ("logit", "logprob", "paper", "followed")
"""Finders that are scores of `find`, had here from one recording; its `gradient` is the finder of this name, too."""
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


@by_one_thread
def finder_scores(
    vlm: VLM,
    image: Picture,
    finders: Sequence[Finder] = FINDERS,
    *,
    words: Sequence[str] | None = None,
    seed: int = 0,
    question: Question = Question(),
) -> list[FinderScores]:
    """Let the model answer, and let every finder score all neurons for each noun of the answer.

    Args:
        vlm: The model, from `load`.
        image: A path, PIL image or array.
        finders: The finders to use; see the table of this module.
        words: Words of the answer to explain instead of its nouns; those that are not in it are left out.
        seed: The seed of the finder `random`.
        question: What the model is asked.

    Returns:
        One entry for each noun; an empty list if the answer has none.

    Raises:
        SettingError: there is no such finder.
        ModelError: `paper` where activation functions cannot be recorded, or blocks that cannot be run again.
    """
    unknown = [finder for finder in finders if finder not in FINDERS]
    if unknown:
        raise SettingError(f"There is no finder '{unknown[0]}'.", fix=f"Choose of: {', '.join(FINDERS)}.")
    # 1. The answer and its nouns: without any there is nothing to record.
    choices = FindSettings(**asdict(question), top=1, words=words)
    (batch,) = ask(vlm, [image], question)
    inputs, answers = batch.inputs, batch.answers
    targets = targets_of(vlm, answers, 0, choices)
    if not targets:
        return []
    # 2. The same answer, generated once more up to its last noun, with what ablation and gradients need.
    asked = {score: replace(choices, score=score) for score in OF_FIND if score in finders}
    kept = replays(vlm, inputs, [target.step for target in targets], recorder=recorder_for(vlm, *asked.values()))
    by_score: dict[str, Tensor] = {
        score: score_targets(vlm, kept.recording, kept.answers, targets, mine).scores.cpu()
        for score, mine in asked.items()
    }
    # 3. All finders, noun by noun; one stream of random numbers, so that each noun has others.
    random = torch.Generator().manual_seed(seed)
    return [
        FinderScores(
            target.word,
            answers.texts[0],  # those kept end with the last noun
            replay,
            {finder: _scores(finder, replay, by_score, i, random) for finder in finders},
        )
        for i, (target, replay) in enumerate(zip(targets, kept.replays, strict=True))
    ]


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
