"""One run's findings as one HTML file that needs nothing but itself.

The template draws everything a reader needs without a script: caption, tables, a heat map of the top 10 per noun.
The script adds choice. Neither carries a style attribute or an address, so that the page's own policy can forbid both.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

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
    picture: str | None
    """The heat map over the picture, ready-made."""
    maps: dict[int, str]
    """The regions by k, packed for the script."""
    first_k: int | None
    parts: list[tuple[str, str, float, Bar]]
    """Kind ("whole", "within", "total"), what, how many logits, its bar."""
    total: float
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
    """One image as the template reads it."""

    id: str
    name: str
    found: Finding
    picture: pictures.Picture | None
    caption: list[tuple[str, _Noun | None]]
    unplaced: list[_Noun]
    """Nouns that are not where they say they are in the caption."""
    nouns: list[_Noun]


@dataclass(frozen=True)
class _Run:
    """Choices and provenance that some of the images share."""

    found: Finding
    cards: list[_Card]
    provenance: list[tuple[str, str]]


def write_report(
    findings: Finding | Sequence[Finding], path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Write one HTML file that shows `findings`, whole or not at all; the same findings give the same bytes.

    The file loads nothing from elsewhere, holds its pictures, and shows whatever a caption, a token or a file name
    contains as text. Where a finding has no `view`, its picture is read from `finding.image` if that file is there.

    Args:
        findings: Of one run or several, in the order to be shown; may be empty.
        path: Replaced if it exists.
        title: Heading of the page; a neutral one when None.
    """
    path = Path(path)
    page = render([findings] if isinstance(findings, Finding) else findings, title=title).encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render(findings: Sequence[Finding], *, title: str | None = None) -> str:
    """The page that `write_report` writes."""
    cards = [_card(finding, f"image-{i}") for i, finding in enumerate(findings)]
    style, script = _asset("report.css"), _asset("report.js")
    page = _environment().from_string(_asset("report.html.j2"))
    return page.render(
        title=title or "Multi-modal neurons",
        cards=cards,
        runs=_runs(cards),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _environment() -> jinja2.Environment:
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
        "small_map": pictures.small_map,
        "unit": lambda score: _UNITS.get(score, "unit unknown"),
        "usable": pictures.usable,
    }
    environment.filters |= {"number": text.number, "percent": text.percent, "pieces": text.pieces}
    return environment


def _asset(name: str) -> str:
    return resources.files("mmneurons.report").joinpath(name).read_text(encoding="utf-8")


def _hash(inline: str) -> str:
    """What a content security policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode('utf-8')).digest()).decode('ascii')}'"


def _card(finding: Finding, card_id: str) -> _Card:
    picture = pictures.picture_of(finding)
    nouns = [_noun(noun, f"{card_id}-noun-{i}", picture) for i, noun in enumerate(finding.nouns)]
    caption, unplaced = _place(finding.caption, nouns)
    return _Card(card_id, PurePath(finding.image).name or "image", finding, picture, caption, unplaced, nouns)


def _noun(noun: NounFinding, noun_id: str, picture: pictures.Picture | None) -> _Noun:
    usable = {k: pictures.usable(grid) for k, grid in sorted(noun.regions.items())}
    grids = {k: patches for k, patches in usable.items() if patches is not None}
    first_k = _FIRST_K if _FIRST_K in grids else min(grids, default=None)
    parts, total = _parts(noun)
    return _Noun(
        id=noun_id,
        found=noun,
        picture=pictures.heat_over(picture.image, grids[first_k]) if picture and first_k is not None else None,
        maps={k: pictures.packed(patches) for k, patches in grids.items()},
        first_k=first_k,
        parts=parts,
        total=total,
        bars=_bars([neuron.score for neuron in noun.neurons]),
        neuron_maps=any(pictures.usable(neuron.map) is not None for neuron in noun.neurons),
        has_losses=any(neuron.lost_without_image is not None for neuron in noun.neurons),
    )


def _parts(noun: NounFinding) -> tuple[list[tuple[str, str, float, Bar]], float]:
    parts = noun.parts
    total = parts.ffn + parts.attention + parts.embedding + parts.bias
    rows = [
        ("whole", "all FFN neurons", parts.ffn),
        ("within", f"of which the {len(noun.neurons)} below", parts.top),
        ("whole", "attention", parts.attention),
        ("whole", "embedding, last token", parts.embedding),
        ("whole", "biases", parts.bias),
        ("total", "together", total),
    ]
    bars = _bars([value for _, _, value in rows])
    return [(*row, bar) for row, bar in zip(rows, bars, strict=True)], total


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


def _place(caption: str, nouns: Iterable[_Noun]) -> tuple[list[tuple[str, _Noun | None]], list[_Noun]]:
    """The caption cut at its nouns, and the nouns that do not stand where they say."""
    cut: list[tuple[str, _Noun | None]] = []
    unplaced: list[_Noun] = []
    end = 0
    for noun in sorted(nouns, key=lambda noun: noun.found.start):
        word, start = noun.found.word, noun.found.start
        if not word or start < end or not caption.startswith(word, start):
            unplaced.append(noun)
            continue
        if start > end:
            cut.append((caption[end:start], None))
        cut.append((word, noun))
        end = start + len(word)
    if end < len(caption):
        cut.append((caption[end:], None))
    return cut, unplaced


def _runs(cards: Iterable[_Card]) -> list[_Run]:
    """The images grouped by how they were read: one group for one run."""
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
