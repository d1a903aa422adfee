"""Make an edit for a visitor, step by step, so that a page can show each result as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from mmneurons.editing.edit import edit
from mmneurons.editing.reference import make_reference
from mmneurons.errors import SettingError
from mmneurons.maths.statistics import Estimate, share
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress
from mmneurons.settings import Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.vlm import VLM
from mmneurons.web.limits import Limits
from mmneurons.web.pool import Pool
from mmneurons.web.session import Session, Shown, patched
from mmneurons.words import turned


@dataclass(frozen=True)
class Said:
    """What is said of one picture, without the new patch and with it."""

    image: Image.Image
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """What an edit did, as far as it has been looked at."""

    source: str
    target: str | None
    patch: Patch
    n_images: int
    """How many pictures it was made with."""
    own: Said
    held_out: list[Said] = field(default_factory=list)
    unrelated: list[Said] = field(default_factory=list)
    judged: bool = False
    """Whether both strips are complete."""

    @property
    def generality(self) -> Estimate | None:
        """Share of the held-out pictures of which the model said the source that are edited successfully."""
        return share(turned(one.after, self.source, self.target) for one in self.held_out)

    @property
    def locality(self) -> Estimate | None:
        """Share of the unrelated pictures whose answer is the same, word for word."""
        return share(one.after == one.before for one in self.unrelated)


def make_edit(
    vlm: VLM,
    pool: Pool,
    session: Session,
    shown: Shown,
    words: tuple[str, str | None],
    limits: Limits,
    progress: Progress,
) -> Iterator[Outcome]:
    """Make an edit, put it on the stack, and judge it on the strips; no model is held between two results.

    Args:
        vlm: The model.
        pool: The server's pictures.
        session: Whose edit it is; the patches that it has switched on are on the model meanwhile.
        shown: The visitor's picture.
        words: Source and target; no target is a removal.
        limits: Of the visitor.
        progress: Told the stages.

    Yields:
        The outcome: once the patch is made, and again with each strip.
    """
    source, target = words
    before = session.active(shown.model)
    with patched(vlm, [], limits, session.stop):  # what the unedited model says decides which pictures are which
        parts = pool.split(source, progress)
    images = [shown.image, *parts.edit]
    with patched(vlm, before, limits, session.stop):
        kept = make_reference(vlm, parts.reference, progress=progress) if parts.reference else "own"
        patch = edit(
            vlm, images, source=source, target=target, reference=kept, progress=progress, prompt=shown.question.prompt
        )
    session.add(shown.model, patch, limits)
    after = [*before, patch]

    def say(pictures: Sequence[Image.Image], question: Question, what: str) -> list[Said]:
        progress(what, 0, 0)
        answers: list[list[str]] = []
        for patches in (before, after):
            with patched(vlm, patches, limits, session.stop):
                answers.append(texts_of(vlm, pictures, question))
        return [Said(*one) for one in zip(pictures, *answers, strict=True)]

    own = say([shown.image], shown.question, "the picture again")[0]
    made = Outcome(source, target, patch, len(images), own)
    yield made
    made = replace(made, held_out=say(parts.held_out, Question(), "pictures that show it") if parts.held_out else [])
    yield made
    others = say(parts.unrelated, Question(), "pictures that do not") if parts.unrelated else []
    yield replace(made, unrelated=others, judged=True)


def checked_words(source: str, target: str, remove: bool) -> tuple[str, str | None]:
    """Return source and target of an edit; refuse what is missing.

    Raises:
        SettingError: a word is missing.
    """
    if not source:
        raise SettingError("Which word is to go?", fix="Click a word of the caption under Find, or type it.")
    if not target and not remove:
        raise SettingError("Which word is to come?", fix="Type it, or choose to remove the word.")
    return source, None if remove else target
