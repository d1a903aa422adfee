"""The command line: thin. Each command loads, calls one function and prints; torch is imported when a command runs."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from mmneurons.errors import MmneuronsError, SettingError
from mmneurons.progress import bar, bars, working

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find and inspect the multi-modal neurons of vision-language models.",
)
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

Images = Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files.")]
Load = Callable[[], "VLM"]
Prompt = Annotated[str, typer.Option(help="What the model is asked.")]
Prefix = Annotated[str, typer.Option("--answer-prefix", help="Words the answer is made to begin with.")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Where to stop if the model does not.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images in one batch.")]

# The same words as in vlm/prompts.py, which would import torch through its package; a test compares them.
PROMPT = "Describe the image in few words."
ANSWER_PREFIX = "An image of"
MAX_NEW_TOKENS = 32


def _load(
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: the pocket model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
    bits: Annotated[Literal["8", "4"] | None, typer.Option(help="Quantise while loading (bitsandbytes).")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread over devices: auto, balanced ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    decoder: Annotated[str | None, typer.Option(help="Path of the language model, if it cannot be told.")] = None,
) -> VLM:
    from transformers.utils import logging

    from mmneurons.vlm.load import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options: dict[str, Any] = {}
    if bits is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=bits == "8", load_in_4bit=bits == "4")
        device_map = device_map or device or "auto"
    with working(err, f"loading {model or 'the pocket model'}"):
        return load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            decoder=decoder,
            **options,
        )


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_load`; the command itself gets `load`, which loads the model that they name."""
    own, options = (
        inspect.signature(function, eval_str=True, locals={"VLM": object}).parameters for function in (command, _load)
    )

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(load=functools.partial(_load, **{name: given.pop(name) for name in options}), **given)

    parameters = [parameter for name, parameter in own.items() if name != "load"] + list(options.values())
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    setattr(with_options, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have no such field
    return with_options


@app.command()
@loads_model
def caption(
    load: Load,
    images: Images = None,
    prompt: Prompt = PROMPT,
    answer_prefix: Prefix = ANSWER_PREFIX,
    max_new_tokens: Length = MAX_NEW_TOKENS,
    batch_size: Batch = 8,
) -> None:
    """Say what is in each image, or answer a question about it."""
    paths = _images_or_sample(images)
    from mmneurons.vlm.images import open_image

    opened = [open_image(path) for path in paths]
    vlm = load()
    with working(err, f"captioning {len(paths)} images"):
        pictures = [o.image for o in opened]
        texts = vlm.caption(pictures, prompt, answer_prefix, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for o, text in zip(opened, texts, strict=True):
        out.print(f"{o.name}: {answer_prefix} {text}".strip(), soft_wrap=True)
        for note in vlm.notes(o):
            err.print(f"  note: {note}", style="yellow")


@app.command()
@loads_model
def find(
    load: Load,
    images: Images = None,
    prompt: Prompt = PROMPT,
    answer_prefix: Prefix = ANSWER_PREFIX,
    top: Annotated[int, typer.Option(min=1, help="Neurons listed for each noun.")] = 10,
    score: Annotated[Literal["logit", "logprob", "paper"], typer.Option(help="See docs/method.md.")] = "logit",
    word: Annotated[list[str] | None, typer.Option(help="A word of the caption to explain; repeatable.")] = None,
    against: Annotated[str | None, typer.Option(help="Score why the noun rather than this word.")] = None,
    together: Annotated[bool, typer.Option("--together", help="All images in one prompt, not a prompt each.")] = False,
    no_image: Annotated[bool, typer.Option("--no-image", help="A prompt of words alone.")] = False,
    json_path: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page to look at.")] = None,
    maps: Annotated[bool, typer.Option(help="Also show where in the image the neurons look.")] = True,
    max_new_tokens: Length = MAX_NEW_TOKENS,
    batch_size: Batch = 8,
) -> None:
    """Caption images, or ask about them, and show the neurons that wrote each noun of the answer."""
    if no_image and images:
        raise SettingError("--no-image goes without image files.", seen=f"Got {', '.join(images)}.")
    paths = [] if no_image else _images_or_sample(images)
    prompts: list[Any] = [paths] if together else [None] if no_image else paths
    _check_outputs(json_path, report)
    from mmneurons.finding import result
    from mmneurons.finding.finder import find as find_neurons
    from mmneurons.report.terminal import show
    from mmneurons.vlm.images import open_image

    for path in paths:  # a missing file is told before a model is loaded
        open_image(path)
    vlm = load()
    with bar(err, len(prompts), "prompts") as progress:
        findings = find_neurons(
            vlm,
            prompts,
            prompt=prompt,
            answer_prefix=answer_prefix,
            top=top,
            score=score,
            words=word,
            against=against,
            maps=maps and not no_image,
            blank=report is not None and not no_image,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    if json_path == "-":
        sys.stdout.write(result.to_json(findings))
    else:
        for finding in findings:
            show(finding, out)
    if json_path not in (None, "-"):
        result.save(findings, json_path)
        err.print(f"wrote {json_path}", soft_wrap=True)
    if report is not None:
        from mmneurons.report import write_report

        write_report(findings, report)
        err.print(f"wrote {report}", soft_wrap=True)


@app.command("inspect")
@loads_model
def inspect_(
    load: Load,
    images: Annotated[str, typer.Option(help="A folder, a manifest (docs/format.md), or pocket:find-500.")],
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results are kept.")],
    what: Annotated[
        Literal["sensitivity", "specificity", "causal", "finders", "all"], typer.Argument(help="Which experiment.")
    ] = "all",
    masks: Annotated[Path | None, typer.Option(metavar="DIR", help="For a folder: masks STEM.NOUN.png.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images. Default: all; 50 for causal, finders.")] = None,
    prompt: Prompt = PROMPT,
    answer_prefix: Prefix = ANSWER_PREFIX,
    top: Annotated[int, typer.Option(min=1, help="Top neurons of a noun (sensitivity).")] = 10,
    score: Annotated[Literal["logit", "logprob", "paper"], typer.Option(help="See docs/method.md.")] = "logit",
    seed: Annotated[int, typer.Option(help="Of noise, random neurons and shuffled patches.")] = 0,
    text_model: Annotated[str | None, typer.Option(help="For BERTScore: roberta-large ... Default: MiniLM.")] = None,
    clip_model: Annotated[str | None, typer.Option(help="For CLIPScore: openai/clip-vit-base-patch16 ...")] = None,
    max_new_tokens: Length = MAX_NEW_TOKENS,
    batch_size: Batch = 8,
) -> None:
    """Test whether neurons are sensitive, specific and causal, and their ranking true. Stopped, it goes on."""
    from mmneurons.inspection.items import read_items
    from mmneurons.inspection.meaning import PACKAGED, meaning
    from mmneurons.inspection.run import EXPERIMENTS, Settings, examples, inspect
    from mmneurons.inspection.tables import shown, tables
    from mmneurons.report.inspection import write_inspection

    items = read_items(images, masks)
    vlm = load()
    settings = Settings(score, top, prompt, answer_prefix, max_new_tokens, seed)
    experiments = EXPERIMENTS if what == "all" else (what,)
    with bars(err) as progress:
        found = inspect(
            vlm,
            items,
            out_folder,
            experiments,
            settings,
            limit=limit,
            batch_size=batch_size,
            progress=progress,
        )
    with working(err, "drawing"):
        made = tables(found, meaning(text_model or PACKAGED, clip_model), items)
        drawn = examples(vlm, items, settings) if found.sensitivity is not None else []
        page = write_inspection(found, made, out_folder, drawn, n_images=len(items[:limit]))
    for table in made:
        if len(table.rows) <= 12:
            out.print(f"{table.title}. {table.note}".strip(), soft_wrap=True)
            for labels, value in table.rows:
                mean, interval, _ = shown(value)
                out.print(f"  {'  '.join(labels):60s} {mean}  {interval}".rstrip(), soft_wrap=True)
    err.print(f"wrote {page}", soft_wrap=True)


@app.command()
@loads_model
def neuron(
    load: Load,
    name: Annotated[str, typer.Argument(metavar="NEURON", help="L23.u6012, or L23.e5.u6012 for expert 5.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens listed each way.")] = 10,
    neighbours: Annotated[int, typer.Option(min=0, help="Neurons like it.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a neuron says whenever it fires: no image needed."""
    from mmneurons.neurons import Neuron

    asked = Neuron.parse(name)  # what is no neuron is told before a model is loaded
    from mmneurons.finding.lookup import explain_neuron
    from mmneurons.report.cards import show_neuron

    vlm = load()
    card = explain_neuron(vlm, asked, n_tokens=tokens, n_neighbours=neighbours)
    if as_json:
        out.print_json(json.dumps(card.to_dict()))
    else:
        show_neuron(card, out)


@app.command()
@loads_model
def word(
    load: Load,
    text: Annotated[str, typer.Argument(metavar="WORD", help="A word; of several tokens, its first counts.")],
    top: Annotated[int, typer.Option(min=1, help="Neurons listed.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the neurons of the whole model that point to a word: no image needed."""
    from mmneurons.finding.lookup import neurons_for
    from mmneurons.report.cards import show_word

    vlm = load()
    found = neurons_for(vlm, text, top=top)
    if as_json:
        out.print_json(json.dumps(found.to_dict()))
    else:
        show_word(found, out)


@app.command()
def samples() -> None:
    """List the sample images that come with the package."""
    from mmneurons import pocket

    for sample in pocket.samples():
        out.print(f"{sample.path}  {sample.caption}", soft_wrap=True)


@app.command()
@loads_model
def doctor(
    load: Load,
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="Default: a sample image.")] = None,
    prompt: Prompt = PROMPT,
    answer_prefix: Prefix = ANSWER_PREFIX,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what was found in a model and check that its numbers add up; exit code 1 if a check fails."""
    path = _images_or_sample([image] if image else None)[0]
    from mmneurons.vlm.doctor import doctor as examine
    from mmneurons.vlm.images import open_image

    open_image(path)  # what is no image is told before a model is loaded
    vlm = load()
    report = examine(vlm, path, prompt, answer_prefix)
    if as_json:
        out.print_json(json.dumps(report.to_dict()))
    else:
        for group in (report.model, report.structure, report.packages):
            for name, value in group.items():
                out.print(f"  {name:16s} {value}", soft_wrap=True)
        for check in report.checks:
            style = "green" if check.passed else "red"
            out.print(f"{'PASS' if check.passed else 'FAIL'}  {check.name}", style=style)
            out.print(f"      {check.detail}")
    raise typer.Exit(0 if report.passed else 1)


def _images_or_sample(images: list[str] | None) -> list[str]:
    """The images given, or a sample, saying so."""
    if images:
        return list(images)
    from mmneurons import pocket

    sample = pocket.samples()[0]
    err.print(f"no image given: this is the sample {sample.name}, see mmneurons samples", style="dim")
    return [str(sample.path)]


def _check_outputs(json_path: str | None, report: Path | None) -> None:
    for path in (None if json_path == "-" else json_path, report):
        if path is None:
            continue
        if not (folder := Path(path).parent).is_dir():
            raise SettingError(
                f"Cannot write {path}.", seen=f"There is no folder {folder}.", fix=f"Make it first: mkdir -p {folder}"
            )
        if Path(path).is_dir():
            raise SettingError(
                f"Cannot write {path}.", seen="It is a folder.", fix=f"Name a file in it: {path}/find.out"
            )


def main() -> None:
    """Run the command line: errors that a user can cause end with one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except MmneuronsError as error:
        err.print(str(error), style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
