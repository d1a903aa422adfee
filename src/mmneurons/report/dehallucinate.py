"""Hallucination before and after a patch, objects named that are not there: as text, as JSON, and as a page."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from mmneurons.files import json_bytes, write_whole
from mmneurons.report.page import asset, policy_hash, template
from mmneurons.report.pictures import small
from mmneurons.report.text import flatten

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mmneurons.editing.dehallucinate import ChairChange
    from mmneurons.report.edit import Shown

SHOWN = 150
"""The most answers that the page shows."""
FIGURES = (
    ("chair_i", "named, but not there (CHAIR-i)"),
    ("chair_s", "answers with such (CHAIR-s)"),
    ("recall", "there, and named (recall)"),
    ("named", "objects named in an answer"),
)
"""The figures of CHAIR, with the words that the page uses for them."""
STATES = (
    ("before", "before"),
    ("after", "with the patch"),
    ("rival", "least likely nouns deleted"),
)
"""The answers that are compared. The baseline (`rival`) is the answers before, less their least likely nouns, as many
as the patch makes the model name less."""


class _Row(NamedTuple):
    """One image on the page: what is there, what was said before and after, and what of that is not there."""

    picture: str
    there: str
    before: str
    after: str
    absent_before: str
    absent_after: str


def chair_text(judged: ChairChange) -> str:
    """Write every figure as lines of text."""
    lines = [f"on {len(judged.texts)} images that the patch was not made with:"]
    for state, title in STATES:
        lines.append(f"  {title}")
        found = getattr(judged, state)
        lines += [f"    {label:32s} {getattr(found, name)}" for name, label in FIGURES]
    return "\n".join(lines)


def chair_json(judged: ChairChange) -> bytes:
    """Write every figure, and what is said of each image, as JSON."""
    return json_bytes(asdict(judged))


def write_dehallucination(
    judged: ChairChange,
    path: str | os.PathLike[str],
    images: Sequence[Shown],
    objects: Sequence[Collection[str]],
    made_by: Mapping[str, Any],
) -> None:
    """Write the page; it loads nothing from elsewhere.

    Args:
        judged: The figures, and the answers before and after.
        path: The HTML file to write.
        images: The images that were judged on.
        objects: The objects that are there, image by image.
        made_by: The patch's provenance.
    """
    changed = [i for i, (before, after) in enumerate(judged.texts) if before != after]
    changed.sort(key=lambda i: len(judged.absent[i][1]) <= len(judged.absent[i][0]))  # what became worse comes first
    # The style is inlined, and the page's policy allows this one by its hash, and nothing else.
    style = asset("inspection.css")
    rows = [
        # Only the images that are shown are opened: thousands may have been judged.
        _Row(small(images[i].image()), ", ".join(objects[i]), *judged.texts[i], *map(", ".join, judged.absent[i]))
        for i in changed[:SHOWN]
    ]
    page = template("dehallucinate.html.j2").render(
        title="Objects that are not there",
        figures=[(label, [getattr(getattr(judged, state), name) for state, _ in STATES]) for name, label in FIGURES],
        states=[title for _, title in STATES],
        rows=rows,
        n_images=len(judged.texts),
        n_changed=len(changed),
        facts=flatten({k: v for k, v in made_by.items() if k != "source"}),
        style=Markup(style),
        style_hash=policy_hash(style),
    )
    write_whole(path, page.encode("utf-8", "replace"))
