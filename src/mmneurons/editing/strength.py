"""How strong an edit must be, by what the model then generates: as strong as the reference bears.

The smallest strength that turns every image of the edit turns few others that are less clear. So it is raised, as long
as the answers about those reference images that the edit is likeliest to change stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmneurons.editing.goals import Asked
from mmneurons.editing.patch import Patch
from mmneurons.editing.reference import Reference
from mmneurons.errors import SettingError
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

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


def find_strength(
    vlm: VLM,
    unit: Patch,
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
        unit: The patch of strength 1.
        asked: The images of the edit and what was said about them.
        source: What is to go.
        target: What is to come, if anything.
        start: The strength to begin with, above 0.
        reference: What is to stay.
        harm: For each reference image, how near the patch comes to changing its answer; the most endangered are
            looked at.
        max_new_tokens: Of each answer about the images of the edit.
        batch_size: Images in one batch.
        tell: Told the strength that is tried.

    Raises:
        SettingError: no strength turns any answer.
    """
    generated = 0

    def answers(factor: float, images: Sequence, prompt: str, prefix: str, longest: int) -> list[str]:
        nonlocal generated
        generated += len(images)
        with (factor * unit).applied(vlm):
            return vlm.caption(list(images), prompt, prefix, max_new_tokens=longest, batch_size=batch_size)

    def turned(factor: float) -> float:
        tell(f"trying strength {factor:.3g}")
        done = []
        for one in asked:
            wanted = sorted({answer for answer, _ in one.found})
            images = [one.images[i] for i in wanted]
            said = answers(factor, images, one.prompt, one.answer_prefix, max_new_tokens)
            done += [not says(text, source) and (target is None or says(text, target)) for text in said]
        return sum(done) / len(done)

    share, factor = turned(start), start
    best = (share, factor)
    if share < 1:
        for _ in range(TRIES):
            factor *= STEP
            share = turned(factor)
            if share > best[0]:
                best = (share, factor)
            if share == 1:
                break
    else:
        for _ in range(TRIES):
            factor /= STEP
            if turned(factor) < 1:
                break
            best = (1.0, factor)
    share, smallest = best
    if share == 0:
        raise SettingError(
            f"No strength makes the model say {'something else' if target is None else repr(target)} for '{source}'.",
            seen=f"Tried up to {factor:.3g}, {factor / start:.1f} times what should do.",
            fix="Take more columns (top=2000), or of more blocks (blocks=None), or more images.",
        )
    if reference is None or reference.said is None:
        return Search(smallest, smallest, share, 0, 0, generated)
    hardest = sorted(range(len(harm)), key=lambda i: -harm[i])[:HARDEST]
    endangered = [reference.images[i] for i in hardest]
    allowed = int(ALLOWED * len(reference.images))
    changed = 0
    for margin in MARGINS:
        said = answers(
            margin * smallest, endangered, reference.prompt, reference.answer_prefix, reference.max_new_tokens
        )
        changed = sum(text != reference.said.texts[i] for i, text in zip(hardest, said, strict=True))
        if margin == MARGINS[-1] or (changed <= allowed and turned(margin * smallest) >= share):
            return Search(margin * smallest, smallest, share, changed, len(hardest), generated)
    raise AssertionError("the last margin is always taken")
