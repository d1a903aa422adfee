"""How strong an edit must be, by what the model then generates: as strong as the reference bears.

The smallest strength that turns every image of the edit turns few others that are less clear. So it is raised, as long
as the answers about those reference images that the edit is likeliest to change stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmneurons.editing.goals import Asked, share_turned
from mmneurons.editing.patch import Edit
from mmneurons.editing.reference import Reference
from mmneurons.errors import SettingError
from mmneurons.vlm.vlm import VLM

STEP = 1.3
"""Strengths tried one after the other differ by this factor."""
TRIES = 10
"""Upwards, before it is given up."""
MARGINS = (3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0)
"""How many times the smallest strength that turns the images of the edit, the largest first."""
HARDEST = 16
"""Reference images looked at."""
ALLOWED = 0.005
"""Share of all reference images whose answers may change."""


@dataclass(frozen=True)
class Search:
    """What was found."""

    strength: float
    smallest: float
    """The smallest strength tried that turns as many answers as any does."""
    turned: float
    """Share of the answers that said SOURCE which no longer say it, and say TARGET."""
    changed: int
    """Reference answers that changed, of those looked at."""
    looked_at: int
    generated: int
    """Answers generated on the way."""


class Scalable(Edit, Protocol):
    """An edit of any strength."""

    def __rmul__(self, factor: float) -> Edit:
        """The same, `factor` times as strong."""
        ...


@dataclass
class _Trials:
    """Strengths tried, by what the model then generates."""

    vlm: VLM
    unit: Scalable
    asked: Sequence[Asked]
    source: str
    target: str | None
    limits: dict[str, int]
    tell: Callable[[str], None]
    generated: int = 0

    def turned(self, factor: float) -> float:
        """Share of the edit's answers that turn."""
        self.tell(f"trying strength {factor:.3g}")
        self.generated += sum(len(one.saying) for one in self.asked)
        with (factor * self.unit).applied(self.vlm):
            return share_turned(self.vlm, self.asked, self.source, self.target, **self.limits)

    def changed(self, factor: float, reference: Reference, numbers: Sequence[int]) -> int:
        """How many of some of the reference's answers change."""
        assert reference.said is not None
        self.generated += len(numbers)
        with (factor * self.unit).applied(self.vlm):
            said = self.vlm.caption(
                [reference.images[i] for i in numbers],
                reference.prompt,
                reference.answer_prefix,
                max_new_tokens=reference.max_new_tokens,
                batch_size=self.limits["batch_size"],
            )
        return sum(text != reference.said.texts[i] for i, text in zip(numbers, said, strict=True))

    def smallest(self, start: float) -> tuple[float, float]:
        """The smallest strength tried that turns as many answers as any does, and their share."""
        factor, share = start, self.turned(start)
        best = factor, share
        for _ in range(TRIES):
            if best[1] < 1:  # upwards until all turn
                factor *= STEP
                share = self.turned(factor)
                best = (factor, share) if share > best[1] else best
                if share == 1:
                    break
            else:  # downwards as long as all turn
                factor /= STEP
                if self.turned(factor) < 1:
                    break
                best = factor, 1.0
        return best


def find_strength(
    vlm: VLM,
    unit: Scalable,
    asked: Sequence[Asked],
    source: str,
    target: str | None,
    *,
    start: float,
    reference: Reference | None,
    harm: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[str], None],
) -> Search:
    """Try strengths; the model is left as it was.

    Args:
        vlm: The model.
        unit: The edit of strength 1.
        asked: The images of the edit and what was said about them.
        source: What is to go.
        target: What is to come, if anything.
        start: The strength to begin with, above 0.
        reference: What is to stay. The smallest strength that turns the edit's images is taken even where it changes
            more than is allowed: `Search.changed` tells.
        harm: For each reference image, how near the edit comes to changing its answer; the most endangered are
            looked at.
        max_new_tokens: Of each answer about the images of the edit.
        batch_size: Images in one batch.
        tell: Told the strength that is tried.

    Raises:
        SettingError: no strength turns any answer.
    """
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    trials = _Trials(vlm, unit, asked, source, target, limits, tell)
    smallest, share = trials.smallest(start)
    if share == 0:
        raise SettingError(
            f"No strength makes the model say {'something else' if target is None else repr(target)} for '{source}'.",
            seen=f"Tried up to {STEP**TRIES:.1f} times what should do.",
            fix="Take more columns (top=2000), or of more blocks (blocks=None), or more images.",
        )
    if reference is None or reference.said is None:
        return Search(smallest, smallest, share, 0, 0, trials.generated)
    hardest = sorted(range(len(harm)), key=lambda i: -harm[i])[:HARDEST]
    changed = 0
    for margin in MARGINS:
        changed = trials.changed(margin * smallest, reference, hardest)
        few = changed <= int(ALLOWED * len(reference.images))
        if margin == 1 or (few and trials.turned(margin * smallest) >= share):
            return Search(margin * smallest, smallest, share, changed, len(hardest), trials.generated)
    raise AssertionError("a margin of 1 is always taken")
