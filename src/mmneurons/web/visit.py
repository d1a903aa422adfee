"""What the app does for a visitor, request by request: plain functions of a session, without a browser or Gradio."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from mmneurons import pocket
from mmneurons.data.images import open_image
from mmneurons.errors import SettingError
from mmneurons.finding.finder import find
from mmneurons.finding.lookup import explain_neuron
from mmneurons.finding.result import Finding
from mmneurons.neurons import Neuron
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import PROMPT, FindSettings, Score
from mmneurons.vlm.vlm import VLM
from mmneurons.web import views
from mmneurons.web.atlas import Runs
from mmneurons.web.editing import Outcome, checked_words, make_edit
from mmneurons.web.limits import Limits, check_text, open_upload
from mmneurons.web.neuron import excitement, scaled_caption, stand_in
from mmneurons.web.pool import Pool
from mmneurons.web.session import Session, Shown, patched, title


class Asked(NamedTuple):
    """What a visitor asks about a picture."""

    picture: str | None
    """The path of the file that was uploaded."""
    prompt: str = PROMPT
    caption: str = ""
    """An answer to be scored instead of the model's own; empty: none."""
    against: str = ""
    score: Score = "logit"


@dataclass(frozen=True, eq=False)
class Server:
    """A server has its models, which were loaded when it began, its pictures and its limits."""

    models: Mapping[str, VLM]
    pools: Mapping[str, Pool]
    limits: Limits = field(default_factory=Limits)
    runs: Runs | None = None
    """What sweeps of one of the models found."""

    def model(self, name: str | None) -> tuple[str, VLM]:
        """Return one of the models; the first where none is named.

        Raises:
            SettingError: there is no such model: none is ever loaded for a visitor.
        """
        name = name or next(iter(self.models))
        if name not in self.models:
            raise SettingError("This server does not have that model.")
        return name, self.models[name]

    def find(self, session: Session, model: str | None, asked: Asked) -> Finding:
        """Let the model answer about a picture, with the visitor's patches on, and find the neurons of each noun.

        Raises:
            ImageError: there is no picture, or it cannot be used.
            SettingError: a text is too long, or the time is over.
            WordError: a word cannot be scored.
        """
        name, vlm = self.model(model)
        session.stop.clear()
        if not asked.picture:
            raise SettingError("There is no picture yet.", fix="Give one, or choose a sample.")
        prompt, caption, against = (check_text(text, self.limits) for text in asked[1:4])
        opened = open_upload(asked.picture, self.limits)
        settings = FindSettings(prompt=prompt or PROMPT, against=against or None, score=asked.score, maps=True)
        with patched(vlm, session.active(name), self.limits, session.stop):
            finding = find(vlm, opened.image, caption=caption or None, settings=settings)
        session.show(Shown(name, opened.image, opened.name, settings.question, finding.caption), self.limits)
        notes = dict.fromkeys((*opened.notes, *finding.notes))
        return replace(finding, images=(opened.name,), notes=tuple(notes))

    def neuron(self, session: Session, model: str | None, neuron: str) -> str:
        """Make the page of a neuron: what it says, and where it fires over the visitor's pictures and the samples.

        Raises:
            SettingError: it is no neuron of the model.
        """
        name, vlm = self.model(model)
        one = Neuron.parse(check_text(neuron, self.limits))
        seen = [(shown.name, shown.image) for shown in session.shown if shown.model == name]
        if vlm.is_pocket:
            mine = {image.tobytes() for _, image in seen}
            samples = ((sample.name, open_image(sample.path).image) for sample in pocket.samples())
            seen += [(label, image) for label, image in samples if image.tobytes() not in mine]
        session.stop.clear()
        with patched(vlm, session.active(name), self.limits, session.stop):
            page = views.neuron_page(explain_neuron(vlm, one), excitement(vlm, one, seen))
        return page + (self.runs.neuron(str(one)) if self.runs and self.runs.are_of(vlm) else "")

    def word(self, word: str) -> str:
        """Make the page of a noun in the runs of this server; of no word, the nouns that were said.

        Raises:
            SettingError: no image says the word, or the server has no run.
        """
        if self.runs is None:
            raise SettingError("This server has no run.", fix="mmneurons app --run RUN")
        return self.runs.word(check_text(word, self.limits))

    def scale(self, session: Session, model: str | None, neuron: str, scale: float) -> Iterator[str]:
        """Let the model answer about the visitor's picture with a neuron scaled, then with a random one.

        Yields:
            The captions as HTML: as soon as the neuron's own is there, and with the random one's below it.

        Raises:
            SettingError: no picture, no such neuron, or a scale that is not from 0 to 3.
        """
        name, vlm = self.model(model)
        one, shown = Neuron.parse(check_text(neuron, self.limits)), session.last(name)
        if not 0 <= scale <= 3:
            raise SettingError("A neuron is scaled from 0 to 3 times.", seen=f"{scale}")
        session.stop.clear()
        patches = session.active(name)

        def say(asked: Neuron) -> tuple[Neuron, str]:
            with patched(vlm, patches, self.limits, session.stop):
                return asked, scaled_caption(vlm, shown.image, shown.question, asked, scale)

        said = [say(one)]
        yield views.scaled(shown.image, scale, shown.caption, said)
        # Drawn once for a picture, a neuron and patches, since that costs a caption more; the slider moves many times.
        drawn_for = (shown, one, *(patch.hash for patch in patches))
        other = session.stand_ins.get(drawn_for)
        if other is None:
            with patched(vlm, patches, self.limits, session.stop):
                other = stand_in(vlm, shown.image, shown.question, one)
            session.stand_ins = {drawn_for: other}
        yield views.scaled(shown.image, scale, shown.caption, [*said, say(other)])

    def edit(
        self, session: Session, model: str | None, source: str, target: str, remove: bool, progress: Progress = untold
    ) -> Iterator[Outcome]:
        """Make an edit of the visitor's picture, and yield its outcome as it comes.

        Raises:
            SettingError, WordError: a word is missing, or the model does not say it.
        """
        name, vlm = self.model(model)
        words = checked_words(check_text(source, self.limits), check_text(target, self.limits), remove)
        shown = session.last(name)
        if len(session.patches) >= self.limits.patches:
            raise SettingError(f"There are {self.limits.patches} patches already.", fix="Undo one first.")
        session.stop.clear()
        yield from make_edit(vlm, self.pools[name], session, shown, words, self.limits, progress)

    def upload(self, session: Session, model: str | None, path: str) -> Patch:
        """Put a patch of the visitor's on the stack, if it fits the model; the file is read as nobody's.

        Raises:
            FormatError: it is no patch.
            ModelError: it is of another model.
        """
        name, vlm = self.model(model)
        patch = Patch.load(path)
        with patched(vlm, [patch], self.limits):  # refuses what does not fit
            pass
        session.add(name, patch, self.limits)
        return patch


def stack_of(session: Session) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the patches of a session as choices, title and hash, and the hashes of those that are on."""
    choices = [(f"{i}. {title(patch)}", patch.hash) for i, (_, patch) in enumerate(session.patches, start=1)]
    return choices, [key for _, key in choices if key in session.on]


def switch(session: Session, on: Sequence[str]) -> None:
    """Switch patches on, and all others off."""
    session.on = {patch.hash for _, patch in session.patches} & set(on)


def saved_patches(session: Session, folder: Path | None = None) -> list[str]:
    """Save the patches that are on as files, to be downloaded; return their paths.

    Raises:
        SettingError: none is on.
    """
    on = [patch for _, patch in session.patches if patch.hash in session.on]
    if not on:
        raise SettingError("No patch is switched on.")
    folder = folder or Path(tempfile.mkdtemp(prefix="mmneurons-"))
    paths = [folder / f"patch-{patch.hash[:12]}.safetensors" for patch in on]  # no visitor's word in a file's name
    for patch, path in zip(on, paths, strict=True):
        patch.save(path)
    return [str(path) for path in paths]
