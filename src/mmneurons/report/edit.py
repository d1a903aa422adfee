"""The evaluation of edits as a page and as JSON: the figures of each, and what was said before and after."""

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
from mmneurons.report.page import asset, policy_hash, template
from mmneurons.report.pictures import small
from mmneurons.words import turned

if TYPE_CHECKING:
    from mmneurons.editing.evaluate import Evaluation, Pair

SCHEMA = 1
"""The version of the JSON's form."""
SHOWN = 60
"""The most answers of each kind that the page shows of each edit."""


class Shown(Protocol):
    """An image that can be opened."""

    def image(self) -> Image.Image:
        """Open the image, in mode RGB."""
        ...


class _Row(NamedTuple):
    """One image of an edit: the answers before and after, and whether the edit did what it should."""

    picture: str
    before: str
    after: str
    good: bool


class _Section(NamedTuple):
    """One edit as the template reads it; the numbers count all answers, the lists hold those that are shown."""

    title: str
    figures: list[tuple[str, str]]
    held_out: list[_Row]
    changed: list[_Row]
    n_held_out: int
    n_changed: int


def figures(judged: Evaluation) -> list[tuple[str, str]]:
    """List every figure of an edit with its name, as text: mean, interval and number, or "not measured"."""
    # A removal has no target that could appear elsewhere; of it the rest of the answer is compared instead.
    removal = judged.target is None
    named: list[tuple[str, Estimate | None]] = [
        ("efficacy", judged.efficacy),
        ("generality", judged.generality),
        ("  under other wordings", judged.wordings),  # indented: a variant of the figure above
        ("locality", judged.locality),
        *((f"  {kind}", value) for kind, value in judged.further.items()),
        ("M-locality@10", judged.m_locality),
        ("  place by place (MMEdit)", judged.m_locality_ranked),
        ("T-locality@1", judged.t_locality),
        ("  texts that name the source", judged.t_locality_source),
        *((f"  {kind}", value) for kind, value in judged.further_texts.items()),
        ("rest of the answer unchanged", judged.rest_unchanged) if removal else ("target bleed", judged.bleed),
    ]
    # What could not be measured is listed, too, as "not measured": never as a 0.
    lines = [(name, "not measured" if value is None else f"{value} of {value.n}") for name, value in named]
    if judged.entropy is not None:
        lines.append(("n-gram entropy, before and after", "{:.2f} {:.2f} bits".format(*judged.entropy)))
    if judged.perplexity is not None:
        lines.append(("perplexity, before and after", "{:.3f} {:.3f}".format(*judged.perplexity)))
    if judged.n_columns is not None and judged.size is not None:
        size = judged.size
        lines.append(("columns, mean change of each", f"{judged.n_columns}, {size.mean:.2f} of its length"))
        lines.append(("largest change, change of w_out", f"{size.largest:.2f} and {size.of_matrix:.2f} of its length"))
    return lines


def write_edits(
    judged: Mapping[str, Evaluation],
    folder: str | os.PathLike[str],
    held_out: Callable[[str], Sequence[Shown]],
    unrelated: Sequence[Shown],
) -> Path:
    """Write `edits.json` and `edits.html` into a folder.

    Args:
        judged: The evaluation of each edit, by the name of the patch.
        folder: The folder to write into; it must be there.
        held_out: Gives for a source word its held-out images, in the order in which they were judged.
        unrelated: The unrelated images, in the order in which they were judged.

    Returns:
        The path of the page.
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
    """Make the page `edits.html`, which loads nothing from elsewhere."""
    style = asset("inspection.css")
    return template("edit.html.j2").render(
        title="Edits, judged",
        sections=[_section(name, one, held_out(one.source), unrelated) for name, one in judged.items()],
        style=Markup(style),
        style_hash=policy_hash(style),
    )


def _section(name: str, one: Evaluation, held_out: Sequence[Shown], unrelated: Sequence[Shown]) -> _Section:
    def done(pair: Pair) -> bool:
        return turned(pair.after, one.source, one.target)

    # False sorts before True: images that the edit failed on come first, and are not cut off by the limit.
    worst_first = sorted(one.held_out, key=done)
    return _Section(
        f"{one.source} → {one.target or 'anything else'} ({Path(name).name})",
        figures(one),
        [_Row(small(held_out[p.image].image()), p.before, p.after, done(p)) for p in worst_first[:SHOWN]],
        [_Row(small(unrelated[p.image].image()), p.before, p.after, False) for p in one.changed[:SHOWN]],
        len(one.held_out),
        len(one.changed),
    )
