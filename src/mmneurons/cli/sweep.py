"""The command `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmneurons.cli.bars import bars
from mmneurons.cli.options import Load, app, check_results_folder, err, goes_on, loads_model, out, with_settings
from mmneurons.settings import SweepSettings

SHOWN = 10
"""How many failures are named."""


@app.command()
@loads_model
@with_settings(SweepSettings, without=("token_ids", "tagger", "maps", "blank", "baseline", "grounded", "calibration"))
def sweep(
    load: Load,
    settings: SweepSettings,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="The data set: a folder, a pattern in quotes ('photos/**/*.jpg'), COCO's instances or captions, SBU's "
            "JSON, a manifest (JSON, CSV, Parquet), WebDataset archives (.tar), hub:NAME of Hugging Face, or "
            "pocket:SET.",
        ),
    ],
    out_folder: Annotated[Path, typer.Option("--out", metavar="RUN", help="The folder of the run.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Take at most this many images.")] = None,
    shuffle_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Take the images in an order drawn with this seed; --limit then samples."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many threads read images ahead of the model.")] = 2,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where it runs: in this process (local), or on the machines of a Ray cluster (ray)."),
    ] = "local",
    actors: Annotated[int, typer.Option(min=1, help="With ray: how many processes hold the model, at most.")] = 1,
    actor_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="With ray: the share of a GPU that each takes. Default: one, if there are any."),
    ] = None,
    actor_cpus: Annotated[float, typer.Option(min=0.1, help="With ray: the CPUs that each takes.")] = 1.0,
) -> None:
    """Put a whole data set through find.

    The neurons of every noun of every image are kept in RUN, shard by shard, to be asked by mmneurons atlas. A sweep
    that was stopped, or killed, goes on when the same command is given again.
    """
    check_results_folder(out_folder, source)
    from mmneurons.sweeping.by_ray import Actors
    from mmneurons.sweeping.sweep import sweep as sweep_all

    def tell(note: str) -> None:
        err.print(note, style="yellow", soft_wrap=True)

    with bars(err, "", rate=True) as progress, goes_on():
        run = sweep_all(
            load,
            source,
            out_folder,
            settings,
            limit=limit,
            shuffle_seed=shuffle_seed,
            workers=workers,
            engine=engine,
            actors=Actors(actors, actor_gpus, actor_cpus),
            tell=tell,
            progress=progress,
        )
    if failures := run.failures:
        err.print(f"{len(failures)} of {run.facts.n_images} images could not be used:", style="yellow")
        for failure in failures[:SHOWN]:
            err.print(f"  {failure.name}: {failure.reason}", soft_wrap=True)
        if len(failures) > SHOWN:
            err.print(f"  and {len(failures) - SHOWN} more, in {run.folder / 'failures.jsonl'}", soft_wrap=True)
    if smaller := sum(len(facts.smaller_batches) for facts in run.done.values()):
        err.print(f"memory was too small for {smaller} batches: halves of them ran", style="yellow")
    n_bytes = sum(facts.images.bytes + facts.neurons.bytes for facts in run.done.values())
    n_rows = sum(facts.neurons.rows for facts in run.done.values())
    n_images = sum(facts.images.rows for facts in run.done.values())
    size = n_bytes / max(n_images, 1) / 1000
    out.print(f"{run.folder}: {n_images} images, {n_rows:,} rows, {size:.1f} kB an image", soft_wrap=True)
