"""The pieces of the app's pages as HTML, in the look of the report; what a model or a visitor says is text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from mmneurons.errors import MmneuronsError
from mmneurons.finding.lookup import NeuronCard
from mmneurons.finding.result import Finding
from mmneurons.neurons import Neuron
from mmneurons.report import pictures
from mmneurons.report.atlas import Section
from mmneurons.report.page import asset, environment, framed
from mmneurons.web.editing import Outcome, Said
from mmneurons.web.neuron import Excited
from mmneurons.words import turned


@cache
def _macros() -> Any:
    template = environment().from_string(_asset("parts.html.j2"))
    return template.module


def style() -> str:
    """Return the app's style sheet: the colours and fonts of the report, and what the app adds."""
    report = asset("report.css")
    variables = report[: report.index("* {")]
    # The report follows the system's choice of light or dark; Gradio marks the page with a class, by the same choice.
    dark = variables[variables.index("{", variables.index("@media")) + 1 : variables.rindex("}")]
    light = variables[: variables.index("@media")]
    return f"{light}\n{dark.replace(':root', ':root:has(body.dark)')}\n{_asset('app.css')}"


def notice(error: MmneuronsError | None) -> str:
    """Write what went wrong, and what to do; nothing where nothing did."""
    return "" if error is None else str(_macros().notice(error))


def card(finding: Finding) -> str:
    """Put the report's card of a finding in a frame of its own, which runs the report's script and nothing else."""
    return framed(finding)


def chosen(word: str, neuron: str) -> str:
    """Say which word and neuron are chosen on the card."""
    return str(_macros().chosen(word, neuron))


def head(models: str) -> str:
    """Write the heading of the page, with the models of the server."""
    return str(_macros().head(models))


def empty() -> str:
    """Say what to do where no picture was given yet."""
    return str(_macros().said("Give a picture, or choose a sample."))


def no_edit() -> str:
    """Say what to do where no edit was made yet."""
    text = "Under Find, click the word that is to go. The model is changed for your page alone, and only in memory."
    return str(_macros().said(text))


def slider_help() -> str:
    """Say what the slider does."""
    text = (
        "Scale the neuron, and a random one of its block that is about as loud, while the model looks at your picture."
    )
    return str(_macros().said(text))


def neuron_page(found: NeuronCard, fired: Sequence[Excited]) -> str:
    """Write what a neuron says, and over which pictures it fires."""
    heats = pictures.heat_over(
        [pictures.Picture(one.view.convert("RGB"), as_seen=True) for one in fired],
        [np.asarray(one.grid, dtype="<f4") for one in fired],
    )
    shown = [{"uri": uri, "name": one.name, "peak": one.peak} for one, uri in zip(fired, heats, strict=True)]
    return f"{_macros().neuron(found)}{_macros().excited(shown)}"


def tables(note: str, sections: Sequence[Section]) -> str:
    """Write tables of a run, with a note above them."""
    return str(_macros().tables(note, sections))


def scaled(image: Image.Image, scale: float, usual: str, said: Sequence[tuple[Neuron, str]]) -> str:
    """Write the captions with a neuron scaled and, where it was asked already, with a random one beside it."""
    rows = [(f"{one}, random and as loud," if i else str(one), caption) for i, (one, caption) in enumerate(said)]
    return str(_macros().scaled(pictures.small(image), scale, usual, rows))


def outcome(made: Outcome) -> str:
    """Write what an edit did: to the picture, to others that show the word, to those that do not."""

    def done(one: dict[str, str]) -> bool:
        return turned(one["after"], made.source, made.target)

    def same(one: dict[str, str]) -> bool:
        return one["before"] == one["after"]

    checks: tuple[Callable[[dict[str, str]], bool], ...] = (done, same)
    rows = [[_said(one) for one in said] for said in ([made.own], made.held_out, made.unrelated)]
    return str(_macros().outcome(made, rows[0][0], rows[1], rows[2], *checks))


def _said(one: Said) -> dict[str, str]:
    return {"uri": pictures.small(one.image), "before": one.before, "after": one.after}


def _asset(name: str) -> str:
    return resources.files("mmneurons.web").joinpath(name).read_text(encoding="utf-8")
