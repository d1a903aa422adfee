"""One run's findings as one HTML file that needs nothing but itself.

The template draws everything a reader needs without a script: answer, tables, heat maps of the top 10 per noun.
The script adds choice. Neither carries a style attribute or an address, so that the page's own policy can forbid both.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
}
"""What each score asks, in one line."""
_UNITS = {"logit": "logits", "logprob": "nats", "paper": "the paper's units"}
_FIRST_K = 10
"""The region a reader sees first."""
_FRAME = 640
"""Height in a notebook, in pixels; the page scrolls in it."""


class Bar(NamedTuple):
    """A signed bar in a strip 100 wide; `zero` is where the axis stands."""

    x: float
    width: float
    zero: float
    sign: str


@dataclass(frozen=True)
class _Noun:
    """One noun as the template reads it."""

    id: str
    found: NounFinding
    pictures: list[str | None]
    """The heat maps over the pictures, ready-made."""
    maps: dict[int, str]
    """The regions by k, of all pictures, packed for the script."""
    first_k: int | None
    parts: list[tuple[str, str, float, Bar]]
    """Kind ("whole", "within", "total"), what, how many logits, its bar."""
    bars: list[Bar]
    """One for each neuron's score."""
    neuron_maps: bool
    has_losses: bool

    @property
    def drawable(self) -> bool:
        """Whether there is any map."""
        return bool(self.maps) or self.neuron_maps


@dataclass(frozen=True)
class _Card:
    """One prompt as the template reads it."""

    id: str
    name: str
    found: Finding
    pictures: list[tuple[str, pictures.Picture | None]]
    """File name and picture."""
    caption: list[tuple[str, _Noun | None]]
    unplaced: list[_Noun]
    """Nouns that are not where they say they are in the caption."""
    nouns: list[_Noun]

    @property
    def at_hand(self) -> list[pictures.Picture]:
        """The pictures that can be shown."""
        return [picture for _, picture in self.pictures if picture]

    @property
    def doubtful(self) -> bool:
        """Whether a note warns of its numbers."""
        return any(map(text.is_warning, self.found.notes))


@dataclass(frozen=True)
class _Run:
    """Choices and provenance that some of the findings share."""

    found: Finding
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
        findings: Of one run or several, in the order to be shown; may be empty.
        path: Replaced if it exists.
        title: Heading of the page; a neutral one when None.
    """
    page = render([findings] if isinstance(findings, Finding) else findings, title=title)
    write_whole(path, page.encode("utf-8", "replace"))


def render(findings: Sequence[Finding], *, title: str | None = None) -> str:
    """The page that `write_report` writes."""
    cards = [_card(finding, f"finding-{i}") for i, finding in enumerate(findings)]
    style, script = asset("report.css"), asset("report.js")
    page = environment().from_string(asset("report.html.j2"))
    return page.render(
        title=title or "Multi-modal neurons",
        cards=cards,
        counted=_counted(cards),
        scores=list(dict.fromkeys((card.found.score, card.found.against) for card in cards)),
        runs=_runs(cards),
        style=Markup(style),
        script=Markup(script),
        style_hash=policy_hash(style),
        script_hash=policy_hash(script),
    )


def framed(finding: Finding) -> str:
    """The page of one finding as a part of another page, a notebook's, neither of which changes how the other looks."""
    page = html.escape(render([finding]).encode("utf-8", "replace").decode())
    return f'<iframe srcdoc="{page}" sandbox="allow-scripts" width="100%" height="{_FRAME}"></iframe>'


def environment() -> jinja2.Environment:
    """Templates that escape, and print no character that hides."""
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
    environment.globals |= {
        "colour_scale": pictures.colour_scale,
        "colour_table": pictures.colour_table,
        "meaning": lambda score: MEANINGS.get(score, "a score this version does not know"),
        "packed": pictures.packed,
        "small_maps": pictures.small_maps,
        "unit": lambda score: _UNITS.get(score, "unit unknown"),
        "usable": pictures.usable,
    }
    environment.filters |= {"number": text.number, "percent": text.percent, "pieces": text.pieces}
    environment.tests |= {"warning": text.is_warning}
    return environment


def asset(name: str) -> str:
    """A file of this package."""
    return resources.files("mmneurons.report").joinpath(name).read_text(encoding="utf-8")


def policy_hash(inline: str) -> str:
    """What a content security policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode('utf-8')).digest()).decode('ascii')}'"


def _card(finding: Finding, card_id: str) -> _Card:
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
    )


def _counted(cards: Sequence[_Card]) -> str:
    """How much the page shows: '3 images', '1 prompt with 2 images', '2 prompts, words alone'."""
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
    parts = noun.parts
    rows = [
        ("whole", "all FFN neurons", parts.ffn),
        ("within", f"of which the {len(noun.neurons)} below", parts.top),
        ("whole", "attention", parts.attention),
        *([("whole", "side paths", parts.other)] if parts.other else []),
        ("whole", "embedding, last token", parts.embedding),
        ("whole", "biases", parts.bias),
        ("total", "together", parts.total),
    ]
    bars = _bars([value for _, _, value in rows])
    return [(*row, bar) for row, bar in zip(rows, bars, strict=True)]


def _bars(values: Sequence[float]) -> list[Bar]:
    """Bars of one common scale that holds zero and every value."""
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
    """The findings grouped by how they were made: one group for one run."""
    runs: list[_Run] = []
    for card in cards:
        for run in runs:
            if _choices(run.found) == _choices(card.found):
                run.cards.append(card)
                break
        else:
            runs.append(_Run(card.found, [card], text.flatten(card.found.provenance)))
    return runs


def _choices(finding: Finding) -> tuple[str, str | None, str, str, Mapping[str, Any]]:
    return finding.score, finding.against, finding.prompt, finding.answer_prefix, dict(finding.provenance)
