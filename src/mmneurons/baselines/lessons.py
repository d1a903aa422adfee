"""What baselines that learn by gradient are taught: captions that say TARGET in the place of SOURCE.

task.lessons; task.reminders; learn(task, [change], within, Schedule(...))

The weights are never touched while learning: what is learned is float32, whatever the model's dtype, and acts by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.data.pictures import Picture, open_row
from mmneurons.editing.edit import EditSettings
from mmneurons.editing.goals import Asked, rewritten, share_turned
from mmneurons.editing.reference import Reference
from mmneurons.editing.steps import Steps
from mmneurons.settings import Question
from mmneurons.vlm.context import evaluating, hooked
from mmneurons.vlm.vlm import VLM

REFERENCES = 128
"""Reference images that are learned from, drawn by seed."""


@dataclass(frozen=True)
class Schedule:
    """How a change is learned."""

    rate: float
    """Of Adam."""
    steps: int
    """At most; fewer if all images of the edit turn before."""
    keep: float
    """Weight of the divergence from the unedited model, against the target's log probability."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """Captions of one batch with TARGET in the place of SOURCE, read by the model in one pass."""

    batch: Mapping[str, Any]
    """Inputs of the model: prompts and captions, less the last token of the longest."""
    n_rows: int
    n_steps: int
    """Of the longest caption: the last `n_steps` positions predict its tokens."""
    wanted: Int[Tensor, "n 3"]
    """Row, step and token: where which token of TARGET shall be said."""
    kept: Int[Tensor, "m 2"]
    """Row and step: what shall stay as it is."""
    unedited: Float[Tensor, "m vocab"]
    """Log probabilities of the unedited model where `kept`, float32."""

    def picked(self, values: Float[Tensor, "..."], places: Int[Tensor, "n _"]) -> Float[Tensor, "n _"]:
        """What a module gave or was given at some steps; a few modules see rows and positions as one axis."""
        rows, steps = places[:, 0].to(values.device), places[:, 1].to(values.device)
        return values.reshape(self.n_rows, -1, values.shape[-1])[rows, steps - self.n_steps]


Within = Callable[[Lesson], AbstractContextManager[Any]]
"""What is in force while a lesson is read."""


@dataclass(frozen=True, eq=False)
class Task:
    """What all baselines are given."""

    vlm: VLM
    asked: Sequence[Asked]
    source: str
    target: str
    reference: Reference | None
    settings: EditSettings
    seed: int
    tell: Callable[[str], None]

    @cached_property
    def kept(self) -> list[Steps]:
        """Steps that write anything but SOURCE: of the edit's own captions, and of the reference."""
        found = [one.others for one in self.asked]
        return found if self.reference is None else [*found, self.reference.without(self.vlm, self.source)]

    def turned(self) -> float:
        """Share of the answers that said SOURCE which now say TARGET in its place."""
        return share_turned(self.vlm, self.asked, self.source, self.target)

    @cached_property
    def lessons(self) -> list[Lesson]:
        """The images of the edit."""
        made = []
        for one in self.asked:
            ids, places = [], []
            for answer, said in enumerate(one.said.token_ids):
                words = [word for of, word in one.found if of == answer]
                new, written = rewritten(self.vlm, said, words, self.target)
                ids.append(new)
                places.append([(start + k, token) for start, wanted in written for k, token in enumerate(wanted)])
            made += self._lessons(one.images, one.question, ids, places, [set() for _ in ids])
        return made

    @cached_property
    def reminders(self) -> list[Lesson]:
        """Images of the reference, in a random order: nothing wanted, all kept but SOURCE."""
        reference = self.reference
        if reference is None or reference.said is None:
            return []
        says_source = reference.says(self.vlm, self.source)
        ids, left = [], []
        for answer, said in enumerate(reference.said.token_ids):
            ids.append(said)
            left.append({step for step in range(len(said)) if says_source[reference.said.row(answer, step)]})
        random = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(ids), generator=random)[:REFERENCES].tolist()
        images, ids, left = ([each[i] for i in order] for each in (reference.images, ids, left))
        return self._lessons(images, reference.question, ids, [[] for _ in ids], left)

    def _lessons(
        self,
        images: Sequence[Picture],
        question: Question,
        ids: Sequence[Sequence[int]],
        wanted: Sequence[list[tuple[int, int]]],
        left_out: Sequence[set[int]],
    ) -> list[Lesson]:
        made = []
        for rows in torch.arange(len(ids)).split(1 if self.vlm.family.one_at_a_time else self.settings.batch_size):
            mine = rows.tolist()
            places = [(row, *place) for row, i in enumerate(mine) for place in wanted[i]]
            taken = {place[:2] for place in places} | {(row, s) for row, i in enumerate(mine) for s in left_out[i]}
            kept = [(row, s) for row, i in enumerate(mine) for s in range(len(ids[i])) if (row, s) not in taken]
            batch = [[o.image for o in open_row(images[i])] for i in mine]
            inputs = self.vlm.encode(batch, question.prompt, question.prefix)
            n_steps = max(len(ids[i]) for i in mine)
            given = self.vlm.given(inputs, [ids[i][:-1] for i in mine])
            lesson = Lesson(
                self.vlm.extended(inputs, given) | self.vlm.once(n_steps),
                len(mine),
                n_steps,
                torch.tensor(places, dtype=torch.long).view(-1, 3),
                torch.tensor(kept, dtype=torch.long).view(-1, 2),
                torch.empty(0, dtype=torch.float32),
            )
            with torch.no_grad():
                usual = lesson.picked(logits_of(self.vlm, lesson), lesson.kept).log_softmax(-1)
            made.append(replace(lesson, unedited=usual))
        return made


def logits_of(vlm: VLM, lesson: Lesson) -> Float[Tensor, "rows steps vocab"]:
    """What the model says at each step, float32; differentiable where gradients are enabled."""
    seen: list[Tensor] = []
    watching = partial(vlm.anatomy.owner.register_forward_hook, lambda module, args, output: seen.append(output.logits))
    with vlm.alone(), hooked([watching]), evaluating(vlm.model):
        vlm.model(**lesson.batch)
    return seen[-1][:, -lesson.n_steps :].float()


def loss_of(vlm: VLM, lesson: Lesson, keep: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-log p of the tokens that are wanted; `keep` times the divergence from the unedited model elsewhere; means."""
    logits = logits_of(vlm, lesson)
    zero = logits.sum() * 0
    said = lesson.picked(logits, lesson.wanted).log_softmax(-1)
    tokens = lesson.wanted[:, 2:].to(said.device)
    missing = -said.gather(1, tokens).mean() if len(tokens) else zero
    now = lesson.picked(logits, lesson.kept).log_softmax(-1)
    moved = F.kl_div(now, lesson.unedited, log_target=True, reduction="batchmean") if len(now) else zero
    return missing, keep * moved


def learn(
    task: Task,
    parameters: Sequence[Tensor],
    within: Within,
    schedule: Schedule,
    *,
    reminders: bool = True,
    done: Callable[[float], bool] = lambda missing: False,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> int:
    """Fit parameters by Adam until `done`; of the model's own, none is changed, and none has a gradient afterwards.

    Args:
        task: What is to be said where.
        parameters: What is learned; leaves that require gradients, float32.
        within: Makes them act.
        schedule: How.
        reminders: Whether a batch of the reference is read at each step, beside all images of the edit.
        done: Told the mean of -log p of the target after each step.
        penalty: Added to the loss.

    Returns:
        Steps taken.
    """
    lessons, others = task.lessons, task.reminders if reminders else []
    n_wanted = sum(len(lesson.wanted) for lesson in lessons)
    optimiser = torch.optim.Adam(parameters, lr=schedule.rate)
    for step in range(schedule.steps):
        total, missing = [torch.zeros_like(parameter) for parameter in parameters], 0.0
        for lesson in [*lessons, *others[step % len(others) :][:1]] if others else lessons:
            with torch.enable_grad(), within(lesson):
                lost, moved = loss_of(task.vlm, lesson, schedule.keep)
                # Batches count by what they hold, so that the batch size does not change what is learned.
                share = len(lesson.wanted) / n_wanted
                loss = share * lost + moved / (len(lessons) + bool(others))
                found = torch.autograd.grad(loss, parameters)
            total = [a + b for a, b in zip(total, found, strict=True)]
            missing += share * lost.item()
        with torch.enable_grad():
            extra = penalty()
        if isinstance(extra, Tensor):
            total = [a + b for a, b in zip(total, torch.autograd.grad(extra, parameters), strict=True)]
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        optimiser.step()
        task.tell(f"step {step + 1} of {schedule.steps}: -log p {missing:.3f}")
        if done(missing):
            return step + 1
    return schedule.steps
