"""Where SOURCE is said, and what shall be said there instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.editing.steps import Said, Steps, forced_steps, join
from mmneurons.errors import WordError
from mmneurons.vlm.prompts import tokens_of
from mmneurons.vlm.vlm import VLM, Picture
from mmneurons.words import Word, inflected


@dataclass(frozen=True, eq=False)
class Goal:
    """Steps at which one token shall give way to another."""

    said: int
    """The token that is said there."""
    wanted: int | None
    """The token that shall be; None: any other."""
    steps: Steps
    runners_up: tuple[int, ...] = ()
    """Of a removal: what is likeliest at each step but for the token that is said."""

    def row(self, unembed: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "hidden"]:
        """What the logit of the one less that of the other reads; of a removal, the mean of the runners-up.

        To lower the token that is said alone would let in what is least like it, whether it fits there or not.
        """
        wanted = list(self.runners_up) if self.wanted is None else [self.wanted]
        return unembed[wanted].float().cpu().mean(0) - unembed[self.said].float().cpu()


@dataclass(frozen=True, eq=False)
class Asked:
    """The images of an edit, asked with one prompt."""

    images: Sequence[Picture]
    prompt: str
    answer_prefix: str
    said: Said
    found: Sequence[tuple[int, Word]]
    """Where SOURCE is: which answer, and the word there."""


def goals_of(vlm: VLM, asked: Sequence[Asked], target: str | None) -> list[Goal]:
    """One goal for each form in which SOURCE is said (dog, dogs, Dog), and one for each further token of TARGET.

    The further tokens are wanted behind those before them: at these steps the answer is forced, and where the model
    goes on by itself, nothing is to be done.

    Raises:
        WordError: a form of the target has no token, or its tokens are those that SOURCE begins with.
    """
    steps: dict[tuple[int, int | None], list[Steps]] = {}
    for one in asked:
        for answer, word in one.found:
            ids = one.said.token_ids[answer]
            wanted = [None] if target is None else tokens_of(vlm.tokenizer, inflected(target, word.text))
            row = one.said.steps.at(torch.tensor([one.said.row(answer, word.steps[0])]))
            steps.setdefault((int(row.token_ids), wanted[0]), []).append(row)
            if len(wanted) > 1:
                begun = [*ids[: word.steps[0]], *wanted[:-1]]
                forced = forced_steps(vlm, one.images[answer], begun, one.prompt, one.answer_prefix)
                for i, token in enumerate(wanted[1:], start=word.steps[0] + 1):
                    row = forced.at(torch.tensor([i]))
                    if int(row.token_ids) != token:
                        steps.setdefault((int(row.token_ids), token), []).append(row)
    goals = [_goal(vlm, *tokens, join(rows)) for tokens, rows in steps.items() if tokens[0] != tokens[1]]
    if not goals:
        raise WordError(
            f"What is said begins with all tokens of '{target}': there is none to be said instead.",
            fix="Choose another target.",
        )
    return goals


def _goal(vlm: VLM, said: int, wanted: int | None, steps: Steps) -> Goal:
    if wanted is not None:
        return Goal(said, wanted, steps)
    logits = vlm.anatomy.logits(steps.residual)[:, : vlm.n_tokens].float().clone()
    logits[:, said] = -torch.inf
    return Goal(said, None, steps, tuple(logits.argmax(-1).tolist()))
