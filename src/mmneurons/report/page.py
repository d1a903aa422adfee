"""The report: findings as one HTML file that needs nothing but itself.

The template draws everything that a reader needs without a script: answer, tables, heat maps of the top 10 per noun.
The script adds choice. Neither has a style attribute or an address, so that the page's own policy can forbid both.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from mmneurons.files import write_whole
from mmneurons.finding.result import Finding, NounFinding
from mmneurons.report import pictures, text

MEANINGS = {
    "logit": "how many logits of the word did this neuron write",
    "logprob": "how far it pushes log p of the word, to first order",
    "paper": "as the released MM_Neurons code",
    "followed": "how far it pushes log p of the word, to first order, through the FFNs above it; does not add up",
    "gradient": "gradient of log p of the word by its activation, times that; does not add up",
}
"""The question that each score asks of a neuron, in one line."""
_UNITS = {"logit": "logits", "logprob": "nats", "paper": "the paper's units", "followed": "nats", "gradient": "nats"}
_FIRST_K = 10
"""The k of the region that a reader sees first."""
_FRAME = 640
"""The height of a report in a notebook, in pixels; the page scrolls inside."""


class Bar(NamedTuple):
    """A signed bar in a strip 100 wide."""

    x: float
    """The left end of the bar."""
    width: float
    """The width of the bar."""
    zero: float
    """The place of the axis."""
    sign: str
    """Either "plus" or "minus", the class of the style sheet."""


@dataclass(frozen=True)
class _Noun:
    """One noun as the template reads it."""

    id: str
    found: NounFinding
    pictures: list[str | None]
    """The heat maps over the pictures, drawn ready for a reader without a script."""
    maps: dict[int, str]
    """The regions by k, of all pictures, packed for the script."""
    first_k: int | None
    """The k of the region that is drawn first; None without any region."""
    parts: list[tuple[str, str, float, Bar]]
    """The parts of the logit: kind ("whole", "within", "total"), name, logits, bar."""
    bars: list[Bar]
    """A bar for the score of each neuron."""
    neuron_maps: bool
    """Whether a neuron has a map that can be drawn."""
    has_losses: bool
    """Whether it was measured what is lost without the image."""
    has_baseline: bool
    """Whether its activations are compared with others."""

    @property
    def drawable(self) -> bool:
        """Whether there is any map to draw."""
        return bool(self.maps) or self.neuron_maps


@dataclass(frozen=True)
class _Card:
    """One prompt as the template reads it."""

    id: str
    name: str
    found: Finding
    pictures: list[tuple[str, pictures.Picture | None]]
    """The file name of each picture, and the picture if it is at hand."""
    caption: list[tuple[str, _Noun | None]]
    """The caption in stretches, each with the noun that it is, or None."""
    unplaced: list[_Noun]
    """The nouns that do not stand in the caption where they say they do."""
    nouns: list[_Noun]

    @property
    def at_hand(self) -> list[pictures.Picture]:
        """The pictures that can be shown."""
        return [picture for _, picture in self.pictures if picture]

    @property
    def doubtful(self) -> bool:
        """Whether a note warns that the numbers may be off."""
        return any(map(text.is_warning, self.found.notes))


@dataclass(frozen=True)
class _Run:
    """The findings of one run, which share choices and provenance."""

    found: Finding
    """The first of them, whose choices and provenance are shown for all."""
    cards: list[_Card]
    provenance: list[tuple[str, str]]


def write_report(
    findings: Finding | Sequence[Finding], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write one HTML file that shows `findings`, whole or not at all; the same findings give the same bytes.

    The file loads nothing from elsewhere, holds its pictures, and shows whatever a caption, a token or a file name
    contains as text. Where a finding has no `views`, as one that was loaded, its pictures are read from the files
    named in `images` if they are there.

    Args:
        findings: The findings of one run or several, in the order to be shown; may be empty.
        path: The HTML file; it is replaced if it exists.
        title: The heading of the page; None: a neutral one.
    """
    page = render([findings] if isinstance(findings, Finding) else findings, title=title)
    write_whole(path, page.encode("utf-8", "replace"))


def render(findings: Sequence[Finding], *, title: str | None = None) -> str:
    """Make the page that `write_report` writes."""
    # Ids are numbers, never words of a caption, so that nothing a model says gets into an attribute or the script.
    cards = [_card(finding, f"finding-{i}") for i, finding in enumerate(findings)]
    style, script = asset("report.css"), asset("report.js")
    return template("report.html.j2").render(
        title=title or "Multi-modal neurons",
        cards=cards,
        counted=_counted(cards),
        scores=list(dict.fromkeys((card.found.score, card.found.against, card.found.baseline) for card in cards)),
        runs=_runs(cards),
        style=Markup(style),
        script=Markup(script),
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
    )


def framed(finding: Finding) -> str:
    """Put the page of one finding into a frame for a notebook, so that neither page changes how the other looks."""
    # A frame of its own, in a sandbox: its script runs, but reaches neither the notebook nor anything else.
    page = html.escape(render([finding]).encode("utf-8", "replace").decode())
    attributes = f'title="Caption and neurons" sandbox="allow-scripts" width="100%" height="{_FRAME}"'
    return f'<iframe srcdoc="{page}" {attributes}></iframe>'


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of this package, compiled once: that takes longer than to fill it."""
    return environment().from_string(asset(name))


def environment() -> jinja2.Environment:
    """Make the environment of all templates, which escapes what it prints and shows hidden characters as marks."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Whatever the template prints goes through here first: no character that hides or that UTF-8 refuses.
        finalize=lambda value: (
            value if isinstance(value, Markup) or not isinstance(value, str) else text.printable(value)
        ),
    )
    # Functions for the templates; a score or unit that a newer version wrote into a file is named as unknown.
    environment.globals |= {
        "colour_scale": pictures.colour_scale,
        "colour_table": pictures.colour_table,
        "meaning": lambda score: MEANINGS.get(score, "a score this version does not know"),
        "packed": pictures.packed,
        "baseline": lambda name: text.BASELINES.get(name, "a baseline this version does not know"),
        "reading": lambda says: text.READINGS.get(says, "a reading this version does not know"),
        "small_maps": pictures.small_maps,
        "unit": lambda score: _UNITS.get(score, "unit unknown"),
        "usable": pictures.usable,
    }
    environment.filters |= {"number": text.number, "percent": text.percent, "shown": _shown}
    environment.tests |= {"warning": text.is_warning}
    return environment


@lru_cache(maxsize=4096)  # a page says the same tokens again and again
def _shown(string: str, *, spaces: bool = True) -> Markup:
    """Write a text with a mark for what cannot be seen in it; see `text.pieces`."""
    mark = Markup('<i class="mark">{}</i>')
    found = text.pieces(string, spaces=spaces)
    return Markup("").join(mark.format(piece.text) if piece.is_mark else piece.text for piece in found)


def asset(name: str) -> str:
    """Read a template, style sheet or script of this package."""
    return resources.files("mmneurons.report").joinpath(name).read_text(encoding="utf-8")


def policy_hash(inline: str) -> str:
    """Compute the hash by which a content security policy allows one inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode('utf-8')).digest()).decode('ascii')}'"


def _card(finding: Finding, card_id: str) -> _Card:
    """Prepare one finding for the template."""
    shown = pictures.pictures_of(finding)
    nouns = [_noun(noun, f"{card_id}-noun-{i}", shown) for i, noun in enumerate(finding.nouns)]
    cut, unplaced = text.placed(finding.caption, [(noun.word, noun.start) for noun in finding.nouns])
    names = [PurePath(image).name or "image" for image in finding.images]
    return _Card(
        id=card_id,
        name=" + ".join(names) or text.without_pictures(finding),
        found=finding,
        pictures=list(zip(names, shown, strict=True)),
        caption=[(part, None if i is None else nouns[i]) for part, i in cut],
        unplaced=[nouns[i] for i in unplaced],
        nouns=nouns,
    )


def _noun(noun: NounFinding, noun_id: str, shown: Sequence[pictures.Picture | None]) -> _Noun:
    """Prepare one noun for the template: its first region drawn ready, all regions packed for the script."""
    # A finding that was loaded from a file can hold any regions: only those that can be drawn count.
    usable = {k: pictures.usable(grids) for k, grids in sorted(noun.regions.items())}
    maps = {k: maps for k, maps in usable.items() if maps}
    first_k = _FIRST_K if _FIRST_K in maps else min(maps, default=None)
    return _Noun(
        id=noun_id,
        found=noun,
        pictures=[] if first_k is None else pictures.heat_over(shown, maps[first_k]),
        maps={k: pictures.packed(of_all) for k, of_all in maps.items()},
        first_k=first_k,
        parts=_parts(noun),
        bars=_bars([neuron.score for neuron in noun.neurons]),
        neuron_maps=any(pictures.usable(neuron.maps) for neuron in noun.neurons),
        has_losses=any(neuron.lost_without_image is not None for neuron in noun.neurons),
        has_baseline=any(neuron.baseline is not None for neuron in noun.neurons),
    )


def _counted(cards: Sequence[_Card]) -> str:
    """Say how much the page shows: '3 images', '1 prompt with 2 images', '2 prompts, words alone'."""
    n_images = sum(len(card.found.images) for card in cards)
    images = f"{n_images} image{'' if n_images == 1 else 's'}"
    if cards and all(len(card.found.images) == 1 for card in cards):
        return images
    prompts = f"{len(cards) or 'no'} prompt{'' if len(cards) == 1 else 's'}"
    if n_images:
        return f"{prompts} with {images}"
    kinds = {text.without_pictures(card.found) for card in cards}
    return f"{prompts}, {kinds.pop()}" if len(kinds) == 1 else prompts


def _parts(noun: NounFinding) -> list[tuple[str, str, float, Bar]]:
    """List the parts of a noun's logit, with bars on one scale."""
    parts = noun.parts
    # Parts are of the logit that the model gave: no baseline is taken off them, whatever the scores below are.
    plain = "" if all(neuron.baseline is None for neuron in noun.neurons) else ", without baseline"
    rows = [
        ("whole", "all FFN neurons", parts.ffn),
        ("within", f"of which the {len(noun.neurons)} below{plain}", parts.top),
        ("whole", "attention", parts.attention),
        *([("whole", "side paths", parts.other)] if parts.other else []),  # most models have none
        ("whole", "embedding, last token", parts.embedding),
        ("whole", "biases", parts.bias),
        ("total", "together", parts.total),
    ]
    bars = _bars([value for _, _, value in rows])
    return [(*row, bar) for row, bar in zip(rows, bars, strict=True)]


def _bars(values: Sequence[float]) -> list[Bar]:
    """Make bars on one common scale that holds zero and every value."""
    finite = [value if abs(value) < float("inf") else 0.0 for value in values]  # also false for not-a-number
    low, high = min([0.0, *finite]), max([0.0, *finite])
    scale = 100 / (high - low) if high > low else 0.0
    zero = round(-low * scale, 2)
    bars = []
    for value in finite:
        width = round(abs(value) * scale, 2)
        bars.append(Bar(zero if value >= 0 else round(zero - width, 2), width, zero, "plus" if value >= 0 else "minus"))
    return bars


def _runs(cards: Iterable[_Card]) -> list[_Run]:
    """Group the findings by how they were made: one group for each run."""
    # Compared one by one: provenance holds dictionaries, which cannot be keys.
    runs: list[_Run] = []
    for card in cards:
        for run in runs:
            if _choices(run.found) == _choices(card.found):
                run.cards.append(card)
                break
        else:
            runs.append(_Run(card.found, [card], text.flatten(card.found.provenance)))
    return runs


def _choices(finding: Finding) -> tuple[str, str | None, str, str, str, str, Mapping[str, Any]]:
    """Collect what findings of one run have in common."""
    chosen = finding.score, finding.against, finding.says, finding.baseline
    return *chosen, finding.prompt, finding.answer_prefix, dict(finding.provenance)
