"""The command `dehallucinate`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mmneurons.cli.bars import bar, bars
from mmneurons.cli.edit import checked_patch_path, save, tell_patched
from mmneurons.cli.options import (
    Json,
    Load,
    app,
    check_outputs,
    check_suffix,
    err,
    given_files,
    goes_on,
    loads_model,
    out,
    with_settings,
    write_stdout,
)
from mmneurons.cli.sources import (
    SOURCES,
    Texts,
    fitting_items,
    lines_of,
    or_pocket,
    pocket_texts,
    readable_items,
    tell_no_reference,
)
from mmneurons.errors import SettingError
from mmneurons.files import write_whole
from mmneurons.settings import DehallucinateSettings


@app.command()
@loads_model
@with_settings(DehallucinateSettings, without=("say", "n_asked"))
def dehallucinate(
    load: Load,
    settings: DehallucinateSettings,
    images: Annotated[
        list[str] | None, typer.Option(help="Thousands of images with their true objects: a manifest, or pocket:SET.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", help="Other such images, to judge on. Default: half of --images.")
    ] = None,
    out_path: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The file of the patch.")] = Path(
        "dehallucinate.safetensors"
    ),
    say: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="The word, one token, to say in place of an absent object. Default: thing."),
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help=f"Images whose answers are to stay as they are. {SOURCES}")
    ] = None,
    texts: Texts = None,
    synonyms: Annotated[
        str | None,
        typer.Option(
            metavar="coco|FILE",
            help="Other words for objects: coco for those of MSCOCO, or a file with an object a line, 'dog, puppy'.",
        ),
    ] = None,
    json_path: Json = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write the results as an HTML page.")
    ] = None,
) -> None:
    """Make a patch against naming absent objects.

    The patch is made from images with their true objects, and judged on other images. A run that was stopped goes on
    when the same command is given again.
    """
    # 1. What is asked for, and whether its files can be read and written, before the model loads.
    path = checked_patch_path(out_path)
    partly = path.with_name(f"{path.name}.part")
    check_suffix(json_path, "--json", ".json")
    check_suffix(report, "--report", ".html")
    check_outputs([path, partly, json_path, report], given_files(images, held_out, reference, texts, load.files))
    from mmneurons.data.store import lock_of
    from mmneurons.editing.dehallucinate import chair_change
    from mmneurons.editing.dehallucinate import dehallucinate as make_patch
    from mmneurons.editing.reference import make_reference
    from mmneurons.metrics.chair import Vocabulary, coco_synonyms, read_synonyms
    from mmneurons.report.dehallucinate import chair_json, chair_text, write_dehallucination

    # Damaged images are found now; those that the model's processor refuses, once the model is there.
    shown, others, kept = map(readable_items, (images, held_out, reference))
    lines = lines_of(texts)
    table = None if synonyms is None else coco_synonyms() if synonyms == "coco" else read_synonyms(synonyms)
    vlm = load()
    shown, others, kept = (fitting_items(vlm, items) for items in (shown, others, kept))
    # 2. Images to learn from, others to judge on, and what is to stay.
    if shown is None and others is None:
        others = or_pocket(vlm, None, "hallucination-500", "--images")
    shown = or_pocket(vlm, shown, "hallucination-8000", "--images")
    if kept is None:
        kept = or_pocket(vlm, None, "reference-400", None)
        lines = lines or pocket_texts(vlm, 0)
    shown, others = _with_objects(shown), None if others is None else _with_objects(others)
    if others is None:
        shown, others = _halves(shown)
        err.print(f"{len(others)} of the images are held out, to judge on", style="dim")
    _check_held_out(shown, others)
    # The word must be one token, which "thing" is not in the small vocabulary of the pocket model.
    settings = replace(settings, say=("image" if vlm.is_pocket else "thing") if say is None else say)
    lists = [item.objects for item in [*shown, *others]]
    if vlm.is_pocket:
        from mmneurons import pocket

        lists.append(pocket.nouns())
    vocabulary = Vocabulary(lists, table)
    held_back = None
    if kept or lines:
        with bar(err, len(kept)) as progress:
            pictures = [item.image() for item in kept]
            held_back = make_reference(vlm, pictures, lines, question=settings.question, progress=progress)
    else:
        tell_no_reference()
    # 3. The patch, saved before it is judged.
    with bars(err, "done") as tell, goes_on():
        patch = make_patch(
            vlm, [item.source for item in shown], [item.objects for item in shown], vocabulary=vocabulary,
            reference=held_back, settings=settings, checkpoint=partly, progress=tell,
        )  # fmt: skip
        save(patch, path)
        tell_patched(vlm)
        for left in (partly, lock_of(partly)):
            left.unlink(missing_ok=True)
        objects = [item.objects for item in others]
        judged = chair_change(vlm, patch, [item.source for item in others], objects, vocabulary, progress=tell)
    err.print(f"wrote {path} ({path.stat().st_size / 1000:.1f} kB)", soft_wrap=True)
    try:  # files first, as in `find`
        if json_path not in (None, "-"):
            write_whole(json_path, chair_json(judged))
            err.print(f"wrote {json_path}", soft_wrap=True)
        if report is not None:
            write_dehallucination(judged, report, others, objects, patch.provenance)
            err.print(f"wrote {report}", soft_wrap=True)
    finally:
        if json_path == "-":
            write_stdout(chair_json(judged))
        else:
            out.print(chair_text(judged), soft_wrap=True)


def _with_objects(items: list[Any]) -> list[Any]:
    """Refuse images whose true objects are not known."""
    unknown = [item.name for item in items if item.objects is None]
    if unknown:
        raise SettingError(
            f"Nobody says what is truly in {unknown[0]}.",
            seen=f"{len(unknown)} of {len(items)} images without a list of objects",
            fix='Name a manifest: [{"image": "park.png", "objects": ["dog"]}]',
        )
    return items


def _check_held_out(shown: list[Any], others: list[Any]) -> None:
    """Refuse images that are both learned from and judged on: the figures are told as of other images."""

    def place(item: Any) -> str:
        return os.path.realpath(item.source) if isinstance(item.source, Path) else item.name

    learned = {place(item) for item in shown}
    if both := [item.name for item in others if place(item) in learned]:
        raise SettingError(
            "Images to judge on are among those to learn from.",
            seen=f"{len(both)} of {len(others)}, first {both[0]}",
            fix="Name others, or leave out --held-out: half of --images are then held out.",
        )


def _halves(items: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split images into two halves, at random but always alike."""
    import numpy as np

    if len(items) < 4:
        raise SettingError(f"Of {len(items)} images none can be held out.", fix="Give more, or --held-out others.")
    order = np.random.default_rng(0).permutation(len(items))
    first, second = sorted(order[: len(items) // 2].tolist()), sorted(order[len(items) // 2 :].tolist())
    return [items[i] for i in first], [items[i] for i in second]
