"""The commands `check` and `calibrate`: which nouns of a caption the picture supports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmneurons.cli.bars import bar
from mmneurons.cli.options import (
    Calibrated,
    Images,
    Json,
    Load,
    app,
    check_json,
    check_outputs,
    check_suffix,
    err,
    given_files,
    images_or_sample,
    loads_model,
    out,
    with_settings,
    write_json,
)
from mmneurons.cli.sources import SOURCES, fitting_items, or_pocket, readable_items
from mmneurons.errors import SettingError
from mmneurons.settings import Question


@app.command()
@loads_model
@with_settings(Question)
def check(
    load: Load,
    settings: Question,
    images: Images = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            metavar="TEXT",
            help="A caption of any origin to check instead of the model's own: one for all images, or one for each.",
        ),
    ] = None,
    calibration: Calibrated = None,
    json_path: Json = None,
) -> None:
    """Show which nouns of a caption the picture supports.

    For each noun: how much of it the model's own image tokens say (its internal confidence), where, and how likely its
    object is to be in the picture. Without a calibration for the model, the confidence alone is shown.
    """
    # 1. What can be refused before a model is loaded.
    paths = images_or_sample(images)
    check_json(json_path, [*paths, *given_files(calibration), *load.files])
    from mmneurons.data.images import open_image
    from mmneurons.finding.calibration import Calibration
    from mmneurons.finding.checking import check as check_captions
    from mmneurons.finding.finder import captions_for
    from mmneurons.report.terminal import show_checked

    captions = captions_for(len(paths), given[0] if len(given) == 1 else given, settings) if given else None
    read = None if calibration is None else Calibration.load(calibration)
    for path in paths:
        open_image(path)
    # 2. The captions, checked.
    vlm = load()
    with bar(err, len(paths)) as progress:
        found = check_captions(vlm, paths, caption=captions, calibration=read, settings=settings, progress=progress)
    if write_json([row for one in found for row in one.rows()], json_path):
        for one in found:
            show_checked(one, out)


@app.command()
@loads_model
@with_settings(Question)
def calibrate(
    load: Load,
    settings: Question,
    images: Annotated[
        list[str] | None, typer.Option(help=f"Images with their true objects. {SOURCES} Default: pocket's own.")
    ] = None,
    out_path: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="The file of the calibration.")] = Path(
        "calibration.json"
    ),
    synonyms: Annotated[
        str | None, typer.Option(metavar="FILE|coco", help="Other words for the objects: a table, or that of MSCOCO.")
    ] = None,
    recall_lost: Annotated[
        float,
        typer.Option(min=0, max=0.5, help="The share of objects truly named that may be called not seen."),
    ] = 0.02,
) -> None:
    """Measure what internal confidence means in a model.

    The model captions images whose objects are known; a logistic curve is fitted to which of the objects that it names
    are there, by their internal confidence.
    """
    check_suffix(out_path, "--out", ".json")
    check_outputs([out_path], [*given_files(images, synonyms), *load.files])
    from mmneurons.metrics.chair import Vocabulary, coco_synonyms, read_synonyms
    from mmneurons.metrics.grounding import calibrate as make

    table = None if synonyms is None else coco_synonyms() if synonyms == "coco" else read_synonyms(synonyms)
    kept = readable_items(images)
    vlm = load()
    items = or_pocket(vlm, fitting_items(vlm, kept), "hallucination-8000", "--images")
    items = [item for item in items if item.objects is not None]
    if not items:
        raise SettingError("The objects of none of the images are known.", fix="Give a manifest with them.")
    vocabulary = Vocabulary([item.objects or () for item in items], table)
    with bar(err, len(items)) as progress:
        made = make(vlm, items, vocabulary, recall_lost=recall_lost, settings=settings, progress=progress)
    made.save(out_path)
    err.print(f"wrote {out_path}", soft_wrap=True)
    facts = made.made_by
    out.print(f"{facts['objects named']} objects named in {facts['images']} captions, {facts['of them there']} there")
    out.print(f"not seen: below {made.threshold:.3f}, which {made.recall_lost:.1%} of those there are")
