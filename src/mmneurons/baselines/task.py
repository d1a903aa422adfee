"""What baselines that learn by gradient are taught: captions that say TARGET in the place of SOURCE.

lessons = task.lessons(lowest); learn(task, lessons, parameters, Schedule(...))

The weights are never touched while learning: what is learned is float32, whatever the model's dtype, and acts by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.editing.answers import TracedSteps
from mmneurons.editing.fit import fit
from mmneurons.editing.losses import divergence, log_p
from mmneurons.editing.reference import Reference
from mmneurons.editing.request import EditRequest, given, share_turned
from mmneurons.errors import ModelError, SettingError
from mmneurons.settings import EditSettings
from mmneurons.vlm.anatomy.parts import Ffn
from mmneurons.vlm.teacher_forcing import Batch, Reader
from mmneurons.vlm.vlm import VLM

REFERENCES = 128
"""Reference images that are learned from, drawn by seed."""
CHECK = 2
"""Steps of Adam between two looks at the captions."""
TURNED = 0.1
"""Fine-tuning and LoRA go on until -log p of the target is below this too: a few steps that turn more other images."""

Facts = dict[str, Any]
"""What a rival says of how it was made; `steps` of Adam among it."""


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
class Lessons:
    """Captions as they shall be, read from the lowest block that changes upwards."""

    reader: Reader
    own: list[Batch]
    """Of the images of the edit: TARGET wanted where SOURCE was said, all else kept."""
    reminders: list[Batch]
    """Of images of the reference, in a random order: nothing wanted, all kept but SOURCE."""

    @property
    def wanted(self) -> Int[Tensor, "n"]:
        """The tokens of TARGET, place after place."""
        return torch.cat([batch.tokens[batch.turn, 0] for batch in self.own])

    def at(self, module: nn.Module, *, inputs: bool) -> Float[Tensor, "n width"]:
        """What a module is given, or gives, where TARGET is wanted, place after place; float32, on the CPU."""
        seen = [self.reader.at(batch, module, inputs=inputs)[batch.turn] for batch in self.own]
        return torch.cat([values.float().cpu() for values in seen])


@dataclass(frozen=True, eq=False)
class Task:
    """What all baselines are given."""

    vlm: VLM
    requests: Sequence[EditRequest]
    source: str
    target: str
    reference: Reference | None
    settings: EditSettings
    seed: int
    tell: Callable[[str], None]

    @cached_property
    def kept(self) -> list[TracedSteps]:
        """Steps that write anything but SOURCE: of the edit's own captions, and of the reference."""
        found = [one.others for one in self.requests]
        return found if self.reference is None else [*found, self.reference.without(self.vlm, self.source)]

    def lessons(self, lowest: int) -> Lessons:
        """What is to be said, and what is to stay, for changes of block `lowest` and above; read unedited."""
        # Each answer in full: TARGET where SOURCE was, all its other steps as they are.
        reader = Reader(self.vlm, lowest, True, self.settings.batch_size)
        own, reminders, reference = list[Batch](), list[Batch](), self.reference
        for one in self.requests:
            own += reader.read(one.images, one.question, given(self.vlm, one, self.target))
        if reference is not None and reference.answers is not None:
            # Texts are left out: these baselines are about captions.
            answers = reference.given(self.vlm, self.source)
            random = torch.Generator().manual_seed(self.seed)
            # Another order for each seed, so that figures can be given over several.
            order = torch.randperm(len(answers), generator=random)[:REFERENCES].tolist()
            images = [reference.images[i] for i in order]
            reminders = reader.read(images, reference.question, [answers[i] for i in order])
        return Lessons(reader, own, reminders)

    def turned(self, step: int, missing: float) -> bool:
        """For `learn`, to stop where TARGET is likely and all images of the edit turn; captions are generated."""
        # Generating is slow: first what is known anyway.
        enough = step % CHECK == 0 and missing < TURNED
        return enough and share_turned(self.vlm, self.requests, self.source, self.target) == 1


def learn(
    task: Task,
    lessons: Lessons,
    parameters: Sequence[Tensor],
    schedule: Schedule,
    *,
    stop: Callable[[int, float], bool],
    within: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext(),
    penalty: Callable[[], Tensor] | None = None,
) -> int:
    """Fit parameters by Adam until `stop`; of the model's own, none is changed, and none has a gradient afterwards.

    Args:
        task: What is to be said where.
        lessons: The same, read. At each step all images of the edit, and one batch of the reference, the next at the
            next.
        parameters: What is learned; leaves that require gradients, float32, which act.
        schedule: How.
        stop: Told after each step how many were taken, and the mean of -log p of the target before the last.
        within: What is in force, besides, while a batch is read.
        penalty: Added to the loss.

    Returns:
        Steps taken.
    """
    own, reminders, n_wanted = lessons.own, lessons.reminders, len(lessons.wanted)
    missing = float("inf")

    # One batch's graph at a time; `missing` is what `stop` and `tell` are told of the step.
    def losses(step: int) -> Iterator[Tensor]:
        nonlocal missing
        missing = 0.0
        for batch in [*own, *reminders[step % len(reminders) :][:1]] if reminders else own:
            with within(batch):
                logits = lessons.reader.logits(batch)
            # -log p of TARGET where it is wanted, and the divergence where the caption is to stay as it is.
            wanted, kept = int(batch.turn.sum()), batch.stay
            loss = logits.new_zeros(())
            # What is wanted counts by the token, the divergence as a mean over batches of means over their steps: with
            # another batch size a short last batch weighs more, and the change that is found differs a little.
            if wanted:
                tokens = batch.tokens[batch.turn, 0].to(logits.device)
                lost = wanted / n_wanted * -log_p(logits[batch.turn], tokens).mean()
                missing += lost.item()
                loss = loss + lost
            if bool(kept.any()):
                moved = divergence(logits[kept], lessons.reader.base(batch)[kept]) / int(kept.sum())
                loss = loss + schedule.keep * moved / (len(own) + bool(reminders))
            yield loss
        if penalty is not None:
            yield penalty()

    return fit(
        torch.optim.Adam(parameters, lr=schedule.rate),
        losses,
        range(schedule.steps),
        stop=lambda step: stop(step, missing),
        after=lambda step, loss: task.tell(f"step {step} of {schedule.steps}: -log p {missing:.3f}"),
    )


def dense_ffn(vlm: VLM, layer: int) -> tuple[int, Ffn]:
    """The one dense FFN of a block, and its number.

    Raises:
        SettingError: there is no such block.
        ModelError: the block has experts, or a gate behind its `w_out`.
    """
    n_blocks = len(vlm.anatomy.blocks)
    if not 0 <= layer < n_blocks:
        raise SettingError(f"The model has {n_blocks} blocks.", seen=f"block {layer}")
    # A block may have an FFN beside its experts, or two, one behind the other.
    found = [(i, ffn) for i, ffn in enumerate(vlm.anatomy.ffns) if ffn.layer == layer]
    if len(found) != 1 or found[0][1].n_experts is not None or found[0][1].gate is not None:
        raise ModelError(
            f"Block {layer} has no single dense FFN.",
            seen=", ".join(ffn.name for _, ffn in found) or "none",
            fix="This baseline is defined for dense FFNs only; choose another block.",
        )
    return found[0]
