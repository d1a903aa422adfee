"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmneurons.cli.bars import bars, working
from mmneurons.cli.options import (
    Load,
    app,
    check_results_folder,
    err,
    goes_on,
    loads_model,
    out,
    with_settings,
)
from mmneurons.cli.sources import items_of, tell_left_out
from mmneurons.settings import InspectSettings


@app.command("inspect")
@loads_model
@with_settings(InspectSettings)
def inspect_(
    load: Load,
    settings: InspectSettings,
    images: Annotated[
        str,
        typer.Option(
            help="The images: a folder, a manifest, COCO instances (docs/guide/inspect.md), or pocket:find-500."
        ),
    ],
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder in which results are kept.")],
    what: Annotated[
        Literal["sensitivity", "specificity", "causal", "finders", "all"],
        typer.Argument(help="The experiment to run, or all four."),
    ] = "all",
    masks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of masks, STEM.NOUN.png, that goes with a folder of images."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many images. Default: all; 50 for causal, finders.")
    ] = None,
    text_model: Annotated[
        str | None, typer.Option(help="The model behind BERTScore, such as roberta-large. Default: MiniLM.")
    ] = None,
    clip_model: Annotated[
        str | None,
        typer.Option(help="The model behind CLIPScore, such as openai/clip-vit-base-patch16. Default: no CLIPScore."),
    ] = None,
) -> None:
    """Test whether top neurons are what they seem.

    Do they depend on the image (sensitivity)? Do different words have different neurons (specificity)? Does the caption
    lose the word when they are disturbed (causal)? Does their ranking agree with what silencing each of them does
    (finders)? A run that was stopped goes on when the same command is given again.
    """
    # 1. The folder of results must be writable, and apart from the images: plots among them would be read as images.
    check_results_folder(out_folder, images, masks)
    from mmneurons.data.table import shown
    from mmneurons.inspection.faithfulness import left_out_finders
    from mmneurons.inspection.run import EXPERIMENTS, examples, inspect
    from mmneurons.inspection.tables import tables
    from mmneurons.metrics.similarity import PACKAGED, meaning
    from mmneurons.report.inspection import write_inspection

    # 2. The experiments; each result is kept as soon as it is there, so that a stopped run can go on.
    items = items_of([images], masks)
    vlm = load()
    experiments = EXPERIMENTS if what == "all" else (what,)
    with bars(err, "images") as progress, goes_on():
        found = inspect(
            vlm,
            items,
            out_folder,
            experiments,
            settings,
            limit=limit,
            progress=progress,
        )
    tell_left_out(found.left_out, len(items))
    if found.given:
        err.print(
            f"{len(found.given)} answers are captions of the manifest: the model did not choose them", style="yellow"
        )
    for line in left_out_finders(found.finders or {}):
        err.print(line, style="yellow", soft_wrap=True)
    # 3. Tables and plots, made of what is kept; the terminal shows the short tables, the page all of them.
    with working(err, "drawing"):
        items = [item for item in items if item.name not in found.left_out]
        made = tables(found, meaning(text_model or PACKAGED, clip_model), items)
        drawn = examples(vlm, items, settings) if found.sensitivity is not None else []
        page = write_inspection(found, made, out_folder, drawn, n_images=len(items[:limit]))
    for table in made:
        if len(table.rows) <= 16:  # longer ones would push the others off the screen
            out.print(f"{table.title}. {table.note}".strip(), soft_wrap=True)
            for labels, value in table.rows:
                mean, interval, _ = shown(value)
                out.print(f"  {'  '.join(labels):60s} {mean}  {interval}".rstrip(), soft_wrap=True)
    err.print(f"wrote {page}", soft_wrap=True)
