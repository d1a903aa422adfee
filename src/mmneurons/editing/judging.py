"""Patches judged one after the other, each result kept as it comes, so that a run that was stopped goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmneurons.editing.evaluation import Before, Bench, Edit, Judged, evaluate
from mmneurons.editing.patch import Patch
from mmneurons.errors import SettingError
from mmneurons.inspection.items import Item
from mmneurons.inspection.shelf import Shelf
from mmneurons.vlm import provenance
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True, eq=False)
class Asked:
    """One edit to judge."""

    edit: Edit
    source: str
    target: str | None
    prompt: str = PROMPT
    answer_prefix: str = ANSWER_PREFIX
    max_new_tokens: int = MAX_NEW_TOKENS
    key: str = ""
    """What tells it from another of the same name: a patch's hash."""


def judge_patches(
    vlm: VLM,
    patches: Mapping[str, Patch],
    folder: str | os.PathLike[str],
    *,
    edit: Callable[[str], Sequence[Item]],
    held_out: Callable[[str], Sequence[Item]],
    unrelated: Sequence[Item],
    texts: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[str, float, int], None] | None = None,
) -> dict[str, Judged]:
    """Judge patches that `edit` made, each by itself.

    Args:
        vlm: The model, unedited.
        patches: By name; their provenance says what they were made for.
        folder: Where results are kept.
        edit: The images that an edit of a word was made with.
        held_out: Others that show it.
        unrelated: Images of which nothing is to change.
        texts: Texts of which nothing is to change.
        batch_size: Images in one batch.
        progress: Called with a name, patches done and patches to do.

    Returns:
        By name.

    Raises:
        SettingError: a patch does not say what it was made for, or the folder holds other results.
    """
    asked = {}
    for name, patch in patches.items():
        source, settings = patch.provenance.get("source"), patch.provenance.get("settings")
        if not isinstance(source, str) or not isinstance(settings, Mapping):
            raise SettingError(
                f"{name} does not say which word it edits.", fix="Judge patches that `mmneurons edit` made, one by one."
            )
        limits = {name: settings[name] for name in ("answer_prefix", "max_new_tokens")}
        asked[name] = Asked(
            patch, source, patch.provenance.get("target"), settings["prompts"][0], key=patch.hash, **limits
        )
    return judge(
        vlm,
        asked.items(),
        folder,
        total=len(asked),
        edit=edit,
        held_out=held_out,
        unrelated=unrelated,
        texts=texts,
        batch_size=batch_size,
        progress=progress,
    )


def judge(
    vlm: VLM,
    asked: Iterable[tuple[str, Asked]],
    folder: str | os.PathLike[str],
    *,
    total: int,
    edit: Callable[[str], Sequence[Item]],
    held_out: Callable[[str], Sequence[Item]],
    unrelated: Sequence[Item],
    texts: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[str, float, int], None] | None = None,
) -> dict[str, Judged]:
    """The same for anything that edits, made one by one as they are asked for; `total` of them."""
    made_by = {
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
        "unrelated": [item.name for item in unrelated],
        "texts": len(texts),
    }
    shelf = Shelf(Path(folder) / "edits.jsonl", made_by, Judged)
    images = [item.image() for item in unrelated]
    befores: dict[tuple[str, str, int], Before] = {}
    found = {}
    for done, (name, one) in enumerate(asked):
        kept = f"{name} {one.key}"
        if kept not in shelf.found:
            if progress is not None:
                progress("patches", done, total)
            bench = Bench(
                [item.image() for item in edit(one.source)],
                [item.image() for item in held_out(one.source)],
                images,
                texts,
                one.prompt,
                one.answer_prefix,
                max_new_tokens=one.max_new_tokens,
                batch_size=batch_size,
            )
            before = befores.setdefault((one.prompt, one.answer_prefix, one.max_new_tokens), Before(vlm, bench))
            judged = evaluate(vlm, one.edit, before.on(bench), source=one.source, target=one.target)
            shelf.add(kept, judged)
        found[name] = shelf.found[kept]
        if progress is not None:
            progress("patches", done + 1, total)
    return found
