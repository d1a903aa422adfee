"""How strong an edit must be: as strong as the reference tolerates.

The smallest strength that turns every image of the edit turns few others that are less clear. So it is raised, as long
as what the reference holds stays as it is: answers about images, and the likeliest next tokens of texts. Looked at are
those that the edit is likeliest to change.

Strengths are tried on answers that the model reads: the blocks below the edit are run once, and no answer is generated
token by token. What was found is then generated, and that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.editing.reference import Reference
from mmneurons.editing.request import EditRequest, given, share_turned
from mmneurons.errors import SettingError
from mmneurons.patches.patch import Edit
from mmneurons.vlm.context import evaluating
from mmneurons.vlm.teacher_forcing import Batch, Reader
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
CACHED = 64
"""Answers of an edit for which what enters the lowest edited block is kept in memory; with more of them the whole model
reads each time."""
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


class Kept:
    """What is looked at of a reference, read again with the edit: some answers, and some positions of its texts."""

    def __init__(
        self, reader: Reader, reference: Reference, source: str, images: Sequence[int], positions: Sequence[int]
    ) -> None:
        self.reader, self.answers = reader, list[Batch]()
        if images:
            said = reference.given(reader.vlm, source)
            pictures = [reference.images[i] for i in images]
            self.answers = reader.read(pictures, reference.question, [said[i] for i in images])
        # Of the texts, those that hold the positions; each position counts for all that read the same.
        held: dict[int, dict[int, int]] = {}
        for text, step, count in reference.places_of(positions):
            held.setdefault(text, {})[step] = count
        counts = [*held.values()]
        self.texts = reader.read_texts([reference.texts[i] for i in held], [[*mine] for mine in counts])
        self.counts = [torch.tensor([n for i in batch.numbers for n in counts[i].values()]) for batch in self.texts]
        self.n_positions = int(reference.text_counts.sum())
        self.usual = [reader.likeliest(batch, unedited=True) for batch in (*self.answers, *self.texts)]

    def changes(self) -> tuple[int, float]:
        """How many of the answers the model would change now, and at which share of all positions of the texts.

        Greedily, an answer stays as it is if and only if the likeliest token of each of its steps does.
        """
        now = [self.reader.likeliest(batch) for batch in (*self.answers, *self.texts)]
        differ = [one != other for one, other in zip(now, self.usual, strict=True)]
        n_answers = len(self.answers)
        changed = sum(len(batch.places[0][mine].unique()) for batch, mine in zip(self.answers, differ, strict=False))
        flipped = sum(int(count[mine].sum()) for count, mine in zip(self.counts, differ[n_answers:], strict=True))
        return changed, flipped / max(1, self.n_positions)


@dataclass
class _Trials:
    """Strengths tried: by what the model reads, and by what it then generates."""

    vlm: VLM
    unit: Scalable
    requests: Sequence[EditRequest]
    source: str
    target: str | None
    tell: Callable[[str], None]
    reader: Reader
    generated: int = 0

    @cached_property
    def own(self) -> list[Batch]:
        """The answers by which the strength is chosen, to be read with TARGET in the place of SOURCE."""
        made = list[Batch]()
        for one in self.requests:
            answers = given(self.vlm, one, self.target)
            images = [one.images[i] for i in one.searched]
            made += self.reader.read(images, one.question, [answers[i] for i in one.searched])
        return made

    @property
    def n_own(self) -> int:
        """How many answers the strength is chosen by."""
        return sum(len(one.searched) for one in self.requests)

    def generates(self, factor: float) -> float:
        """Share of the edit's answers that turn, generated anew."""
        self.tell(f"trying strength {factor:.3g}")
        self.generated += self.n_own
        with (factor * self.unit).applied(self.vlm):
            return share_turned(self.vlm, self.requests, self.source, self.target)

    def reads(self, factor: float) -> float:
        """Share of the edit's answers in which TARGET would be said where SOURCE was; without a target, not SOURCE.

        The answer up to there is given; what would come behind is not looked at.
        """
        self.tell(f"reading with strength {factor:.3g}")
        missed, own = 0, self.own  # read unedited the first time
        with (factor * self.unit).applied(self.vlm):
            for batch in own:
                # The tokens of a step are what is wanted there or, without a target, what is not.
                said = (self.reader.likeliest(batch)[:, None] == batch.tokens).any(1)
                fails = batch.turn & (said if self.target is None else ~said)
                missed += len(batch.places[0][fails].unique())
        return 1 - missed / self.n_own

    def smallest(self, start: float) -> tuple[float, float]:
        """The smallest strength tried that turns as many answers as any does, and their share.

        It is found by reading, which is cheap, and tried by what is generated, which decides. Only where less is
        generated than was read is it found by generating.
        """
        factor, share = _smallest(self.reads, start)
        made = self.generates(factor)
        return (factor, made) if made >= share > 0 else _smallest(self.generates, factor)


def _smallest(turned: Callable[[float], float], start: float) -> tuple[float, float]:
    """The smallest strength tried with as large a share as any has, and that share."""
    factor, share = start, turned(start)
    best, failed = (factor, share), 0.0
    for _ in range(TRIES // 2):  # upwards until all turn, two steps at a time
        if best[1] == 1:
            break
        failed, factor = factor, factor * STEP**2
        share = turned(factor)
        best = (factor, share) if share > best[1] else best
    for _ in range(TRIES):  # downwards as long as all turn
        below = best[0] / STEP
        if best[1] < 1 or below < 1.01 * failed or turned(below) < 1:
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
    lowest: int,
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
        lowest: The lowest block in which the edit changes anything; those below it are run once.
        reference: What is to stay. The least margin over the smallest strength that turns the edit's images is taken
            even where it changes more than is allowed: `Search.changed` and `Search.flipped` tell.
        risk: For each of the reference's steps, how near the edit comes to changing what is said; the riskiest
            are looked at, none where it is minus infinity, and no answer that says `source`.
        tell: Told the strength that is tried.

    Raises:
        SettingError: no strength turns any answer.
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(vlm.model):
        # 1. The smallest strength that turns the edit's own images.
        n_own = sum(len(one.searched) for one in requests)
        reader = Reader(vlm, lowest, cache=n_own <= CACHED, batch_size=requests[0].question.batch_size)
        trials = _Trials(vlm, unit, requests, source, target, tell, reader)
        smallest, share = trials.smallest(start)
        if share == 0:
            raise SettingError(
                f"No strength makes the model say {'something else' if target is None else repr(target)} "
                f"for '{source}'.",
                seen=f"Tried up to {STEP**TRIES:.1f} times what should do.",
                fix="Take more columns (top=2000), or of more blocks (blocks='all'), or more images.    "
                "CLI: --top 2000 --blocks all",
            )
        if reference is None or risk is None:
            return Search(smallest, smallest, share, 0, 0, 0.0, trials.generated)
        # 2. The answers and positions of the reference that are likeliest to change.
        images: list[int] = []
        if reference.answers is not None:
            worst = reference.by_image(vlm, source, risk[: len(reference.answers.steps)])
            riskiest = sorted(range(len(worst)), key=lambda i: -worst[i])[:HARDEST]
            images = [i for i in riskiest if worst[i] > -torch.inf]
        kept = Kept(reader, reference, source, images, reference.positions(risk, HARDEST_POSITIONS))

        @cache
        def changes(margin: float) -> tuple[int, float]:
            tell(f"reading what is to stay with strength {margin * smallest:.3g}")
            with (margin * smallest * unit).applied(vlm):
                return kept.changes()

        def tolerated(margin: float) -> bool:
            changed, flipped = changes(margin)
            return changed <= int(ALLOWED * len(reference.images)) and flipped <= ALLOWED_FLIPS

        # 3. Of most edits the largest margin is tolerated; of others it is found by halves: below one that is, all are.
        # The least is taken in any case.
        margins = [1.0, *MARGINS]
        low, high = 1, len(margins) - 1
        if tolerated(margins[high]):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tolerated(margins[middle]) else (low, middle)
        # 4. It must go on turning what the smallest strength turns: what is generated need not grow with strength.
        while low > 0 and trials.generates(margins[low] * smallest) < share:
            low -= 1
        changed, flipped = changes(margins[low])
        strength = margins[low] * smallest
        return Search(strength, smallest, share, changed, len(images), flipped, trials.generated)
