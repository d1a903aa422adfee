"""The common parts of all commands: the consoles, options that several have, and loading the model that they name."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer
from rich.console import Console
from rich.text import Text

from mmneurons.cli.bars import working
from mmneurons.errors import SettingError
from mmneurons.files import check_apart, check_folder, check_writable, json_bytes, write_whole
from mmneurons.settings import FindSettings, Question, Says

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find, inspect and edit the multi-modal neurons of vision-language models.",
)


class _Console(Console):
    """A console that shows control characters instead of obeying them: names of files and answers can be anyone's."""

    def render_str(self, text: str, **options: Any) -> Text:
        if not text.isprintable():
            from mmneurons.report.text import printable  # slow to import

            text = "\n".join(map(printable, text.split("\n")))
        return super().render_str(text, **options)


out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, markup=False, emoji=False)


@cache
def descriptions(kind: type[Question]) -> dict[str, str]:
    """Read the text below each field, by the field's name, from the source of a settings class and its bases."""
    found: dict[str, str] = {}
    # Bases first, so that a class can describe an inherited field anew. Python itself drops the text below a field.
    for one in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(dedent(inspect.getsource(one))).body
        body = cast("ast.ClassDef", tree).body
        for before, after in pairwise(body):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[ast.unparse(before.target)] = " ".join(ast.literal_eval(after.value).split())
    return found


Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON; - prints JSON instead.")
]
Images = Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files. Default: a sample image.")]
Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE.json",
        help="What internal confidence means in this model, made by mmneurons calibrate; the pocket model has its own.",
    ),
]
Reading = Annotated[Says, typer.Option("--says", help=descriptions(FindSettings)["says"])]
SHOWN = "pear-elephant"
"""The sample that is shown where no image is given: the words of nearly all of its neurons can be read."""
GOES_ON = "the same command goes on from here"
"""What is said to who stops a command whose results are kept as they come."""


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        out.print(metadata.version("mmneurons"))
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


class Stopped(Exception):  # noqa: N818 - no error
    """A command was stopped by Ctrl-C or a signal; says what becomes of its work, where it has something to say."""


def _load(
    model: Annotated[
        str | None, typer.Option(help="The model: a hub id, a folder, or photo. Default: the pocket model.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ... Default: a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32, bfloat16 or float16. Default: as they are stored.")
    ] = None,
    bits: Annotated[
        Literal["8", "4"] | None, typer.Option(help="Quantise the weights to so many bits, by bitsandbytes.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over several devices, by accelerate: auto, balanced ...")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model, if you trust it.")
    ] = False,
    decoder: Annotated[
        str | None,
        typer.Option(help="Path of the language model in the model, such as model.language_model, if an error asks."),
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="Hub id or folder of the processor, if it is not with the model.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Hub id or folder of the vision tower of a LLaVA in its authors' layout.")
    ] = None,
    date: Annotated[
        str | None, typer.Option(help="The date, YYYY-MM-DD, that a chat template writes in place of today's date.")
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A patch to apply to the model first: a file, or hub:USER/NAME; repeatable."),
    ] = None,
) -> VLM:
    """Load the model that the options name, and put patches on it; its parameters are options of most commands."""
    from mmneurons.patches.patch import Patch

    loaded = [Patch.load(path) for path in patch or ()]  # before the model, which can take minutes
    from transformers.utils import logging

    from mmneurons.vlm.load import load

    # The command shows its own spinner and errors; those of transformers would be printed in between.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options: dict[str, Any] = {}
    if bits is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=bits == "8", load_in_4bit=bits == "4")
        device_map = device_map or device or "auto"  # a quantised model cannot be moved after it is loaded
    with working(err, f"loading {model or 'the pocket model'}"):
        vlm = load(
            model,
            processor=processor,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            decoder=decoder,
            date=date,
            vision_tower=vision_tower,
            **options,
        )
    # In the order given: a patch can have been made with the ones before it on the model.
    for one in loaded:
        one.apply(vlm)
    return vlm


class Load:
    """A loader of the model that a command's options name; it also puts patches on the model."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def __call__(self) -> VLM:
        """Load the model; every call loads it anew."""
        return _load(**self._options)

    def of(self, model: str | None) -> VLM:
        """Load one of several models with the same options, for a command that names its models itself."""
        return _load(**{**self._options, "model": model})

    @property
    def files(self) -> list[str]:
        """The files that are read besides the model: the patches."""
        return list(self._options.get("patch") or ())


def loads_model(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Give a command the options of `_load`; the command itself gets `load`, which loads the model that they name.

    Args:
        command: The command.
        without: Options that have no meaning for it.
    """
    # VLM is imported for type checkers alone, as it needs torch: `object` stands for it while annotations are read.
    options = inspect.signature(_load, eval_str=True, locals={"VLM": object}).parameters
    mine = [option for name, option in options.items() if name not in without]
    # The command decides when it loads: it checks its own files first, and a model can take minutes.
    with_load = _with_options(command, "load", mine, Load)

    @functools.wraps(with_load)
    def stopping(**given: Any) -> None:
        try:
            with_load(**given)
        except KeyboardInterrupt as stop:  # typer would end the program without a word
            raise Stopped(*stop.args) from None

    return stopping


def with_settings(
    kind: type[Question], *, without: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a settings class; the command itself gets `settings`.

    Args:
        kind: The settings class.
        without: The fields that are no options of this command.
        defaults: Defaults of this command, where they differ from those of the class.
    """
    hints, told = get_type_hints(kind, localns={"Tagger": object}), descriptions(kind)
    options = []
    for one in fields(kind):
        if one.name in without:
            continue
        default = defaults.get(one.name, one.default)
        annotation = _option(hints[one.name], told[one.name], **one.metadata)
        options.append(
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    def made(given: Mapping[str, Any]) -> Question:
        # An option that is repeated comes as a list, and settings do not change.
        chosen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return kind(**chosen)

    return lambda command: _with_options(command, "settings", options, made)


def _option(
    hint: Any, told: str, at_least: float | None = None, besides: Sequence[str | None] = (), option: str | None = None
) -> Any:
    """Make the annotation of an option from the type and help of the field behind it, and what `setting` says of it."""
    # `--blocks` takes a number or a word; a field with a singular option of its own is repeatable; all else is plain.
    for word in filter(None, besides):
        return Annotated[str, typer.Option(parser=_number_or(word), metavar=f"N|{word}", help=told)]
    if option is not None:
        return Annotated[list[str] | None, typer.Option(option, help=told)]
    return Annotated[hint, typer.Option(min=at_least if hint in (int, float) else None, help=told)]


def _number_or(word: str) -> Callable[[Any], int | str]:
    """Make what parses the value of an option: a number, or a word."""

    def parsed(text: Any) -> int | str:
        if text == word or isinstance(text, int):
            return text
        if not text.isdecimal() or int(text) < 1:
            raise typer.BadParameter(f"{text!r} is neither a number, 1 or more, nor '{word}'.")
        return int(text)

    return parsed


def _with_options(
    command: Callable[..., None],
    name: str,
    options: Sequence[inspect.Parameter],
    make: Callable[[Mapping[str, Any]], Any],
) -> Callable[..., None]:
    """Replace one parameter of a command by options; the command gets what `make` makes of their values.

    Args:
        command: The command.
        name: The parameter that is replaced.
        options: The options that take its place.
        make: Makes the value of the parameter from the values of the options.
    """

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(**{name: make({one.name: given.pop(one.name) for one in options})}, **given)

    # typer reads the signature and the annotations: both must show the options instead of the parameter.
    own = inspect.signature(command, eval_str=True, locals={"VLM": object}).parameters
    parameters = [*(one for one in own.values() if one.name != name), *options]  # what is its own comes first
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    setattr(with_options, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have no such field
    return with_options


def images_or_sample(images: list[str] | None) -> list[str]:
    """Return the images given or, with a word to the user, a sample."""
    if images:
        return list(images)
    from mmneurons import pocket

    sample = next(one for one in pocket.samples() if one.name == SHOWN)
    err.print(f"no image given: this is the sample {sample.name}, see mmneurons samples", style="dim")
    return [str(sample.path)]


def check_outputs(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path] = ()) -> None:
    """Refuse files that could not be written, or that would overwrite what is read, before anything is loaded."""
    files = [path for path in outputs if path is not None and path != "-"]
    check_apart(files, inputs)
    for path in files:
        check_writable(path)


def check_suffix(path: str | Path | None, option: str, suffix: str) -> None:
    """Refuse a file that has another ending: a shell that expands *.png would have a photograph replaced."""
    if path is None or str(path) == "-" or Path(path).suffix.lower() == suffix:
        return
    if Path(path).exists() and not Path(path).is_file():  # a device or a pipe
        return
    raise SettingError(
        f"{option} writes a file that ends in {suffix}.",
        seen=str(path),
        fix=f"{option} {Path(path).stem or 'out'}{suffix}",
    )


def check_results_folder(folder: Path, *sources: str | Path | Sequence[str | Path] | None) -> None:
    """Refuse a folder for results that cannot be made, or that holds the images: pages would lie among them."""
    check_folder(folder)
    named = [[one] if isinstance(one, str | Path) else one or [] for one in sources]
    places = [Path(path) for group in named for path in group]
    if folder.is_dir() and any(place.is_dir() and place.samefile(folder) for place in places):
        raise SettingError(f"{folder} holds the images: pages would lie among them.", fix="Name another folder.")


def given_files(*sources: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    """List the files, not the folders and sets, among what a command reads."""
    named = [[one] if isinstance(one, str | Path) else one or [] for one in sources]
    return [path for group in named for path in group if Path(path).is_file()]


def check_json(path: str | None, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a file for `write_json` that could not be written, before anything is loaded."""
    check_suffix(path, "--json", ".json")
    check_outputs([path], inputs)


def write_json(document: Any, path: str | None) -> bool:
    """Write what a command found where `--json` says; return whether it is still to be shown on the terminal."""
    if path == "-":  # in UTF-8, whatever the terminal's encoding is
        write_stdout(json_bytes(document))
        return False
    if path is not None:
        write_whole(path, json_bytes(document))
        err.print(f"wrote {path}", soft_wrap=True)
    return True


def write_stdout(content: bytes) -> None:
    """Write bytes to standard output as they are, whatever the terminal's encoding."""
    out.file.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a stand-in without bytes, as in a notebook
        sys.stdout.write(content.decode("utf-8"))
    else:
        buffer.write(content)
        buffer.flush()


@contextmanager
def goes_on() -> Iterator[None]:
    """Tell whoever stops the work inside, whose results are kept as they come, that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(GOES_ON) from None
