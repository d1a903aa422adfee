"""References that change the head's output alone: two of its logits, or two of its rows, and no neuron."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.baselines.applied_only import AppliedOnly
from mmneurons.baselines.task import Facts, Task
from mmneurons.editing.answers import TracedSteps
from mmneurons.editing.strength import find_strength
from mmneurons.errors import SettingError
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import restored
from mmneurons.vlm.tokens import tokens_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import inflected


@dataclass(frozen=True, eq=False)
class HeadChange(AppliedOnly):
    """What is done to the logits of some tokens, by a hook on the head's output; its weights, tied or not, stay."""

    changes = "the output of the head"

    pairs: tuple[tuple[int, int], ...]
    """SOURCE's token and TARGET's, for each form."""
    bias: float | None
    """Taken from the first and added to the second of each pair; None: they change places."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What made it, as plain data."""

    def __rmul__(self, factor: float) -> HeadChange:
        """A bias `factor` times as large."""
        return HeadChange(self.pairs, None if self.bias is None else factor * self.bias)

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The head's output, changed."""
        new, sources = output.clone(), sorted({said for said, _ in self.pairs})
        for target in sorted({wanted for _, wanted in self.pairs}):
            if self.bias is not None:
                new[..., target] += self.bias
                continue
            # Forms of SOURCE can share one of TARGET (cow, cows: sheep); the likeliest of them changes place with it.
            mine = [said for said, wanted in self.pairs if wanted == target]
            new[..., target] = output[..., mine].max(-1).values
            new[..., mine] = output[..., [target]].expand(*output.shape[:-1], len(mine))
        if self.bias is not None:
            new[..., sources] -= self.bias
        return new

    @restored
    def applied(self, vlm: VLM) -> Iterator[HeadChange]:
        """Set the hook, and remove it whatever happens."""
        with vlm.alone(), hooked([partial(vlm.anatomy.head.register_forward_hook, self)]):
            yield self


def head_rows(task: Task, block: int | None) -> tuple[HeadChange, Facts]:
    """SOURCE's row of the head and TARGET's change places."""
    return HeadChange(_pairs(task), None), {"steps": 0}


def logit_bias(task: Task, block: int | None) -> tuple[HeadChange, Facts]:
    """TARGET up and SOURCE down, as far as the reference tolerates: found as `edit` finds the strength of its patch."""
    unit, reference = HeadChange(_pairs(task), 1.0), task.reference
    needed: list[Tensor] = []
    risk = None
    # Where SOURCE is said, as much must be added as TARGET is behind; half of it by taking from SOURCE.
    for one in task.requests:
        if not one.found:
            continue
        rows = one.answers.steps.at(
            torch.tensor([one.answers.row(answer, word.steps[0]) for answer, word in one.found])
        )
        needed.append(_behind(task, rows, unit) / 2)  # as much is taken from SOURCE
    if reference is not None:
        # What the reference says is in danger by as much as TARGET is near; where it is SOURCE's token, it is to go.
        risk = -_behind(task, reference.steps, unit)
        risk[torch.isin(reference.steps.token_ids, torch.tensor([said for said, _ in unit.pairs]))] = -torch.inf
    search = find_strength(
        task.vlm,
        unit,
        task.requests,
        task.source,
        task.target,
        start=max(0.1, max(float(each.max()) for each in needed)),
        lowest=len(task.vlm.anatomy.blocks) - 1,  # the head is behind all blocks
        reference=reference,
        risk=risk,
        tell=task.tell,
    )
    return search.strength * unit, {"steps": 0, "search": asdict(search)}


def _pairs(task: Task) -> tuple[tuple[int, int], ...]:
    """First tokens of SOURCE and of TARGET, for each form in which SOURCE was said."""
    tokenizer, found = task.vlm.tokenizer, set()
    # One pair for each form: dog and cat, dogs and cats.
    for one in task.requests:
        for answer, word in one.found:
            said = one.answers.token_ids[answer][word.steps[0]]
            found.add((said, tokens_of(tokenizer, inflected(task.target, word.text), like=said)[0]))
    pairs = tuple(sorted(pair for pair in found if pair[0] != pair[1]))
    if not pairs:
        raise SettingError(f"'{task.source}' and '{task.target}' begin with the same token.")
    return pairs


def _behind(task: Task, steps: TracedSteps, change: HeadChange) -> Float[Tensor, "steps"]:
    """How far the likeliest token of TARGET is behind what was said."""
    wanted = sorted({target for _, target in change.pairs})
    logits = [task.vlm.anatomy.logits(rows)[:, wanted].max(-1).values.cpu() for rows in steps.residual.split(256)]
    return steps.logits - torch.cat(logits)
