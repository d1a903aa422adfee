"""The commands `caption`, `find`, `neuron`, `word`, `samples` and `doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mmneurons.cli.bars import bar
from mmneurons.cli.options import (
    Calibrated,
    Images,
    Json,
    Load,
    Reading,
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
    write_stdout,
)
from mmneurons.errors import SettingError
from mmneurons.settings import BASELINES, FindSettings, Question


@app.command()
@loads_model
@with_settings(Question)
def caption(
    load: Load,
    settings: Question,
    images: Images = None,
) -> None:
    """Let the model say what is in each image.

    With --prompt it answers a question about each image instead.
    """
    paths = images_or_sample(images)
    from mmneurons.data.images import open_image
    from mmneurons.vlm.asking import ask

    for path in paths:  # one that cannot be read to its end is told before a model is loaded
        open_image(path)
    vlm = load()
    said: list[tuple[str, str, tuple[str, ...]]] = []
    with bar(err, len(paths)) as progress:
        for batch in ask(vlm, paths, settings):
            for (opened,), text in zip(batch.rows, batch.answers.texts, strict=True):
                said.append((opened.name, text, vlm.notes(opened)))
            progress("images", len(said), len(paths))
    # Printed when the bar is gone, so that the two do not mix.
    for name, text, notes in said:
        out.print(f"{name}: {f'{settings.prefix} {text}'.strip()}", soft_wrap=True)
        for note in notes:
            err.print(f"  note: {note}", style="yellow")


@app.command()
@loads_model
@with_settings(
    FindSettings, without=("token_ids", "tagger", "blank", "baseline", "calibration"), maps=True, grounded=True
)
def find(
    load: Load,
    settings: FindSettings,
    images: Images = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            metavar="TEXT",
            help="An answer to explain instead of the model's own: one for all images, or one for each; repeatable.",
        ),
    ] = None,
    tagger: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The spaCy model that finds the nouns of other languages than English, German and Dutch, such as "
            "zh_core_web_sm.",
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="zero|blank|IMAGES",
            help="What activations are compared with: nothing (zero), the same with a blank image (blank), or their "
            "mean where the model says other nouns about other images: a folder, a manifest, COCO instances or "
            "pocket:SET.",
        ),
    ] = "zero",
    calibration: Calibrated = None,
    together: Annotated[
        bool, typer.Option("--together", help="Put all images into one prompt, instead of a prompt for each.")
    ] = False,
    no_image: Annotated[
        bool, typer.Option("--no-image", help="Ask without an image: a prompt of words alone.")
    ] = False,
    json_path: Json = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write the findings as an HTML page.")
    ] = None,
    blank: Annotated[
        bool | None,
        typer.Option(
            help="Also show how much of each score is lost with a blank image. Default: with --report, without "
            "--baseline blank."
        ),
    ] = None,
) -> None:
    """Show the neurons that wrote each noun.

    The model captions each image, or answers a question about it (--prompt); for each noun of the answer the neurons
    with the highest scores are listed, with what they say and where in the image they are active.
    """
    # 1. What is asked for, and whether its files can be read and written, before the model loads.
    if no_image and images:
        raise SettingError("--no-image goes without image files.", seen=f"Got {', '.join(images)}.")
    paths = [] if no_image else images_or_sample(images)
    prompts: list[Any] = [paths] if together else [None] if no_image else paths
    check_suffix(json_path, "--json", ".json")
    check_suffix(report, "--report", ".html")
    if no_image and baseline == "blank":
        raise SettingError("--baseline blank goes with an image.", seen="--no-image", fix="--baseline zero")
    if baseline != "zero" and settings.score == "paper":
        raise SettingError("The paper's score has no baseline.", seen=f"--baseline {baseline}", fix="--baseline zero")
    others = [*given_files(calibration), *([] if baseline in BASELINES else given_files(baseline))]
    check_outputs([json_path, report], [*paths, *others, *load.files])
    from mmneurons.cli.sources import fitting_items, readable_items
    from mmneurons.data.images import open_image
    from mmneurons.editing.reference import make_reference
    from mmneurons.finding import result
    from mmneurons.finding.calibration import Calibration
    from mmneurons.finding.finder import captions_for
    from mmneurons.finding.finder import find as find_neurons
    from mmneurons.report.terminal import show
    from mmneurons.words import SpacyTagger

    # A missing tagger, or captions that do not match the images, are told before the model loads, too.
    nouns = None if tagger is None else SpacyTagger(tagger)
    captions = captions_for(len(prompts), given[0] if len(given) == 1 else given, settings) if given else None
    # Without an image there is nothing to map or to blank out, whatever the defaults say.
    settings = replace(
        settings,
        tagger=nouns,
        maps=settings.maps and not no_image,
        blank=(report is not None and baseline != "blank" if blank is None else blank) and not no_image,
        grounded=settings.grounded and not no_image,
        calibration=None if calibration is None else Calibration.load(calibration),
        baseline=baseline if baseline in BASELINES else "zero",
    )
    kept = None if baseline in BASELINES else readable_items([baseline])
    for path in paths:  # one that cannot be read to its end is told before a model is loaded
        open_image(path)
    vlm = load()
    # 2. What the model says of other images, where that is what to compare with.
    if (kept := fitting_items(vlm, kept)) is not None:
        with bar(err, len(kept)) as progress:
            pictures = [item.image() for item in kept]
            reference = make_reference(vlm, pictures, question=settings.question, progress=progress)
        settings = replace(settings, baseline=reference)
    # 3. The findings, all of them.
    with bar(err, len(prompts)) as progress:
        findings = find_neurons(vlm, prompts, caption=captions, settings=settings, progress=progress)
    try:  # files first: a terminal that cannot be written to costs nobody what was asked for
        if json_path not in (None, "-"):
            result.save(findings, json_path)
            err.print(f"wrote {json_path}", soft_wrap=True)
        if report is not None:
            from mmneurons.report import write_report

            write_report(findings, report)
            err.print(f"wrote {report}", soft_wrap=True)
    finally:  # and a file that could not be written costs nobody what was found
        if json_path == "-":
            write_stdout(result.to_json(findings).encode("utf-8", "replace"))
        else:
            for finding in findings:
                show(finding, out)


@app.command()
@loads_model
def neuron(
    load: Load,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NEURON", help="Block and column, counted from 0: L23.u6012, or L23.e5.u6012 inside expert 5."
        ),
    ],
    tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens are listed for each sign of its activation.")
    ] = 10,
    neighbours: Annotated[int, typer.Option(min=0, help="How many of the neurons most like it are listed.")] = 10,
    says: Reading = "standardised",
    json_path: Json = None,
) -> None:
    """Show what a neuron says whenever it fires.

    Lists the tokens that its column promotes, and the neurons most like it. No image is needed.
    """
    from mmneurons.neurons import Neuron

    asked = Neuron.parse(name)  # what is no neuron is told before a model is loaded
    check_json(json_path, load.files)
    from mmneurons.finding.lookup import explain_neuron
    from mmneurons.report.cards import show_neuron

    vlm = load()
    card = explain_neuron(vlm, asked, n_tokens=tokens, n_neighbours=neighbours, says=says)
    if write_json(card.to_dict(), json_path):
        show_neuron(card, out)


@app.command()
@loads_model
def word(
    load: Load,
    text: Annotated[
        str, typer.Argument(metavar="WORD", help="The word; if it has several tokens, the first of them counts.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many neurons are listed.")] = 10,
    says: Reading = "standardised",
    json_path: Json = None,
) -> None:
    """Show the neurons that say a word.

    Lists the neurons of the whole model whose columns point most clearly to the word. No image is needed.
    """
    check_json(json_path, load.files)
    from mmneurons.finding.lookup import neurons_for
    from mmneurons.report.cards import show_word

    vlm = load()
    found = neurons_for(vlm, text, top=top, says=says)
    if write_json(found.to_dict(), json_path):
        show_word(found, out)


@app.command()
def samples() -> None:
    """List the sample images of this package, and photographs that scikit-image brings."""
    from mmneurons import pocket
    from mmneurons.photo.samples import PHOTOGRAPHS, PREFIX

    for sample in pocket.samples():
        out.print(f"{sample.path}  {sample.caption}", soft_wrap=True)
    for one in PHOTOGRAPHS:
        out.print(f"{PREFIX}{one.name}  {one.shows}; {one.licence}", soft_wrap=True)


@app.command()
@loads_model
@with_settings(Question, without=("max_new_tokens", "batch_size"))
def doctor(
    load: Load,
    settings: Question,
    image: Annotated[
        str | None, typer.Argument(metavar="IMAGE", help="The image to check with. Default: a sample image.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Check that the numbers of a model are right.

    Shows which parts were found in the model, and checks that contributions add up to the logits that it computes. The
    exit code is 1 if a check fails.
    """
    path = images_or_sample([image] if image else None)[0]
    check_json(json_path, [path, *load.files])
    from mmneurons.data.images import open_image
    from mmneurons.vlm.doctor import doctor as examine

    open_image(path)  # what is no image is told before a model is loaded
    vlm = load()
    report = examine(vlm, path, settings.prompt, settings.answer_prefix)
    if write_json(report.to_dict(), json_path):
        for group in (report.model, report.structure, report.packages):
            for name, value in group.items():
                out.print(f"  {name:16s} {value}", soft_wrap=True)
        for check in report.checks:
            style = "green" if check.passed else "red"
            out.print(f"{'PASS' if check.passed else 'FAIL'}  {check.name}", style=style)
            out.print(f"      {check.detail}")
    raise typer.Exit(0 if report.passed else 1)
