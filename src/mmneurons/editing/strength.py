"""How strong an edit must be, by what the model then generates: the largest that the reference tolerates.

The smallest strength that turns every image of the edit turns few others that are less clear. So it is raised, as long
as what the reference holds stays as it is: answers about images, and the likeliest next tokens of texts. Looked at are
those that the edit is likeliest to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from mmneurons.editing.reference import Reference
from mmneurons.editing.request import EditRequest, share_turned
from mmneurons.errors import SettingError
from mmneurons.patches.patch import Edit
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.vlm import VLM

STEP = 1.3
"""Strengths tried one after the other differ by this factor."""
TRIES = 10
"""Steps upwards before it is given up, and downwards."""
MARGINS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
"""How many times the smallest strength that turns the images of the edit; with no more than that, images that are a
little less clear do not turn."""
HARDEST, HARDEST_POSITIONS = 16, 64
"""Reference images, and positions of its texts, looked at."""
ALLOWED, ALLOWED_FLIPS = 0.005, 0.005
"""Share of all reference images whose answers may change, and of all positions of its texts."""


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
    flipped: float
    """Of all positions of reference texts, the share of those looked at whose likeliest token changed."""
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
    requests: Sequence[EditRequest]
    source: str
    target: str | None
    tell: Callable[[str], None]
    generated: int = 0

    def turned(self, factor: float) -> float:
        """Share of the edit's answers that turn."""
        # The answers that said SOURCE, generated anew with the edit at this strength.
        self.tell(f"trying strength {factor:.3g}")
        self.generated += sum(len(one.searched) for one in self.requests)
        with (factor * self.unit).applied(self.vlm):
            return share_turned(self.vlm, self.requests, self.source, self.target)

    def changes(
        self, factor: float, reference: Reference, images: Sequence[int], positions: Sequence[int]
    ) -> tuple[int, float]:
        """How many of some of the reference's answers change, and which share of its text positions, of some."""
        with (factor * self.unit).applied(self.vlm):
            # Texts are read, images answered: the first is far cheaper.
            flipped = reference.flipped(self.vlm, positions)
            if reference.answers is None:
                return 0, flipped
            self.generated += len(images)
            question = replace(reference.question, batch_size=self.requests[0].question.batch_size)
            said = texts_of(self.vlm, [reference.images[i] for i in images], question)
        return sum(text != reference.answers.texts[i] for i, text in zip(images, said, strict=True)), flipped

    def smallest(self, start: float) -> tuple[float, float]:
        """The smallest strength tried that turns as many answers as any does, and their share."""
        factor, share = start, self.turned(start)
        best, failed = (factor, share), 0.0
        for _ in range(TRIES // 2):  # upwards until all turn, two steps at a time
            if best[1] == 1:
                break
            failed, factor = factor, factor * STEP**2
            share = self.turned(factor)
            best = (factor, share) if share > best[1] else best
        for _ in range(TRIES):  # downwards as long as all turn
            below = best[0] / STEP
            if best[1] < 1 or below < 1.01 * failed or self.turned(below) < 1:
                break
            best = below, 1.0
        return best


def find_strength(
    vlm: VLM,
    unit: Scalable,
    requests: Sequence[EditRequest],
    source: str,
    target: str | None,
    *,
    start: float,
    reference: Reference | None,
    risk: Float[Tensor, "steps"] | None,
    tell: Callable[[str], None],
) -> Search:
    """Try strengths; the model is left as it was.

    Args:
        vlm: The model.
        unit: The edit of strength 1.
        requests: The images of the edit and what was said about them.
        source: What is to go.
        target: What is to come, if anything.
        start: The strength to begin with, above 0.
        reference: What is to stay. The least margin over the smallest strength that turns the edit's images is taken
            even where it changes more than is allowed: `Search.changed` and `Search.flipped` tell.
        risk: For each of the reference's steps, how near the edit comes to changing what is said; the riskiest
            are looked at, none where it is minus infinity, and no answer that says `source`.
        tell: Told the strength that is tried.

    Raises:
        SettingError: no strength turns any answer.
    """
    # 1. The smallest strength that turns the edit's own images.
    trials = _Trials(vlm, unit, requests, source, target, tell)
    smallest, share = trials.smallest(start)
    if share == 0:
        raise SettingError(
            f"No strength makes the model say {'something else' if target is None else repr(target)} for '{source}'.",
            seen=f"Tried up to {STEP**TRIES:.1f} times what should do.",
            fix="Take more columns (top=2000), or of more blocks (blocks='all'), or more images.    "
            "CLI: --top 2000 --blocks all",
        )
    if reference is None or risk is None:
        return Search(smallest, smallest, share, 0, 0, 0.0, trials.generated)
    images: list[int] = []
    if reference.answers is not None:
        # 2. The answers and positions of the reference that are likeliest to change.
        worst = reference.by_image(vlm, source, risk[: len(reference.answers.steps)])
        images = sorted(range(len(worst)), key=lambda i: -worst[i])[:HARDEST]
    positions = reference.positions(risk, HARDEST_POSITIONS)

    def tried(margin: float) -> tuple[Search, bool]:
        # Edits must go on turning what the smallest strength turns: what is generated need not grow with strength.
        changed, flipped = trials.changes(margin * smallest, reference, images, positions)
        few = changed <= int(ALLOWED * len(reference.images)) and flipped <= ALLOWED_FLIPS
        tolerated = few and trials.turned(margin * smallest) >= share
        return Search(margin * smallest, smallest, share, changed, len(images), flipped, trials.generated), tolerated

    # Of most edits the largest is tolerated; of others it is found by halves: below a margin that is, all are.
    low, high = 0, len(MARGINS) - 1
    found, tolerated = tried(MARGINS[high])
    while not tolerated and high - low > 1:
        middle = (low + high) // 2
        search, fits = tried(MARGINS[middle])
        if fits:
            low, found = middle, search
        else:
            high = middle
    if not tolerated and low == 0:
        # Even the least of them changes more than is allowed: it is taken all the same, if it turns as many.
        found, _ = tried(MARGINS[0] if trials.turned(MARGINS[0] * smallest) >= share else 1.0)
    return replace(found, generated=trials.generated)
