"""Edits judged, as a page: the figures of each, and what was said before and after; and as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from markupsafe import Markup
from PIL import Image

from mmneurons.files import json_bytes, write_whole
from mmneurons.maths.statistics import Estimate
from mmneurons.report.page import asset, environment, policy_hash
from mmneurons.report.pictures import small
from mmneurons.words import turned

if TYPE_CHECKING:
    from mmneurons.editing.evaluation import Evaluation, Pair

SCHEMA = 1
SHOWN = 60
"""Answers of each kind on the page, of each edit."""


class Shown(Protocol):
    """An image that can be opened."""

    def image(self) -> Image.Image:
        """RGB."""
        ...


class _Row(NamedTuple):
    picture: str
    before: str
    after: str
    good: bool


class _Section(NamedTuple):
    title: str
    figures: list[tuple[str, str]]
    held_out: list[_Row]
    changed: list[_Row]
    n_held_out: int
    n_changed: int


def figures(judged: Evaluation) -> list[tuple[str, str]]:
    """Every figure of an edit with its name, as text: mean, interval, number, or that there was nothing to measure."""
    removal = judged.target is None
    named: list[tuple[str, Estimate | None]] = [
        ("efficacy", judged.efficacy),
        ("generality", judged.generality),
        ("  under other wordings", judged.wordings),
        ("locality", judged.locality),
        ("M-locality@10", judged.m_locality),
        ("  place by place (MMEdit)", judged.m_locality_ranked),
        ("T-locality@1", judged.t_locality),
        ("  texts that name the source", judged.t_locality_source),
        ("rest of the answer unchanged", judged.rest_unchanged) if removal else ("target bleed", judged.bleed),
    ]
    lines = [(name, "not measured" if value is None else f"{value} of {value.n}") for name, value in named]
    if judged.entropy is not None:
        lines.append(("n-gram entropy, before and after", "{:.2f} {:.2f} bits".format(*judged.entropy)))
    if judged.perplexity is not None:
        lines.append(("perplexity, before and after", "{:.3f} {:.3f}".format(*judged.perplexity)))
    if judged.n_columns is not None and judged.relative_size is not None:
        lines.append(("columns, mean change of each", f"{judged.n_columns}, {judged.relative_size:.2f} of its length"))
    return lines


def write_edits(
    judged: Mapping[str, Evaluation],
    folder: str | os.PathLike[str],
    held_out: Callable[[str], Sequence[Shown]],
    unrelated: Sequence[Shown],
) -> Path:
    """Write `edits.json` and `edits.html`.

    Args:
        judged: By name.
        folder: Where to; must be there.
        held_out: The held-out images of a source word, as they were judged on.
        unrelated: The unrelated images.

    Returns:
        The page.
    """
    folder = Path(folder)
    document = {"schema": SCHEMA, "edits": {name: asdict(one) for name, one in judged.items()}}
    write_whole(folder / "edits.json", json_bytes(document))
    page = folder / "edits.html"
    write_whole(page, render_edits(judged, held_out, unrelated).encode("utf-8", "replace"))
    return page


def render_edits(
    judged: Mapping[str, Evaluation], held_out: Callable[[str], Sequence[Shown]], unrelated: Sequence[Shown]
) -> str:
    """The page; nothing is loaded from elsewhere."""
    style = asset("inspection.css")
    return (
        environment()
        .from_string(asset("edit.html.j2"))
        .render(
            title="Edits, judged",
            sections=[_section(name, one, held_out(one.source), unrelated) for name, one in judged.items()],
            style=Markup(style),
            style_hash=policy_hash(style),
        )
    )


def _section(name: str, one: Evaluation, held_out: Sequence[Shown], unrelated: Sequence[Shown]) -> _Section:
    def done(pair: Pair) -> bool:
        return turned(pair.after, one.source, one.target)

    worst_first = sorted(one.held_out, key=done)
    return _Section(
        f"{one.source} → {one.target or 'anything else'} ({Path(name).name})",
        figures(one),
        [_Row(small(held_out[p.image].image()), p.before, p.after, done(p)) for p in worst_first[:SHOWN]],
        [_Row(small(unrelated[p.image].image()), p.before, p.after, False) for p in one.changed[:SHOWN]],
        len(one.held_out),
        len(one.changed),
    )
