"""What commands share: the consoles, options that several have, and loading the model that they name."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from mmneurons.errors import SettingError
from mmneurons.files import check_apart, check_writable, json_bytes
from mmneurons.progress import working

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
    """What a terminal would obey is shown instead: names of files and answers of models can be anyone's."""

    def render_str(self, text: str, **options: Any) -> Text:
        if not text.isprintable():
            from mmneurons.report.text import printable  # slow to import

            text = "\n".join(map(printable, text.split("\n")))
        return super().render_str(text, **options)


out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, markup=False, emoji=False)

Images = Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help="Image files.")]
Prompt = Annotated[str, typer.Option(help="What the model is asked.")]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--answer-prefix",
        help="Words the answer begins with. Default: 'An image of' with the default prompt, none with another.",
    ),
]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop an answer after this many tokens.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="How many images are asked about at once.")]

GOES_ON = "the same command goes on from here"


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
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: the pocket model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as stored.")] = None,
    bits: Annotated[Literal["8", "4"] | None, typer.Option(help="Quantise while loading (bitsandbytes).")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread over devices: auto, balanced ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
    decoder: Annotated[str | None, typer.Option(help="Path of the language model, if it cannot be told.")] = None,
    processor: Annotated[
        str | None, typer.Option(help="Hub id or folder of its processor, if that lies apart.")
    ] = None,
    patch: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A patch that is put on the model; repeatable.")
    ] = None,
) -> VLM:
    from mmneurons.patches.patch import Patch

    loaded = [Patch.load(path) for path in patch or ()]  # before the model, which can take minutes
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
        vlm = load(
            model,
            processor=processor,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            decoder=decoder,
            **options,
        )
    for one in loaded:
        one.apply(vlm)
    return vlm


class Load:
    """Loads the model that a command's options name, and puts patches on it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def __call__(self) -> VLM:
        """The model, loaded anew."""
        return _load(**self._options)

    @property
    def files(self) -> list[Path]:
        """What is read besides the model."""
        return list(self._options.get("patch") or ())


def loads_model(command: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Give a command the options of `_load`; the command itself gets `load`, which loads the model that they name.

    Args:
        command: The command.
        without: Options that have no meaning for it.
    """
    own, options = (
        inspect.signature(function, eval_str=True, locals={"VLM": object}).parameters for function in (command, _load)
    )
    options = {name: option for name, option in options.items() if name not in without}

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        load = Load({name: given.pop(name) for name in options})
        try:
            command(load=load, **given)
        except KeyboardInterrupt as stop:  # typer would end the program without a word
            raise Stopped(*stop.args) from None

    parameters = [parameter for name, parameter in own.items() if name != "load"] + list(options.values())
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    setattr(with_options, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have no such field
    return with_options


def images_or_sample(images: list[str] | None) -> list[str]:
    """The images given, or a sample, saying so."""
    if images:
        return list(images)
    from mmneurons import pocket

    sample = pocket.samples()[0]
    err.print(f"no image given: this is the sample {sample.name}, see mmneurons samples", style="dim")
    return [str(sample.path)]


def check_outputs(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path] = ()) -> None:
    """Refuse files that could not be written, or that would overwrite what is read, before anything is loaded."""
    files = [path for path in outputs if path is not None and path != "-"]
    check_apart(files, inputs)
    for path in files:
        check_writable(path)


def check_suffix(path: str | Path | None, option: str, suffix: str) -> None:
    """Refuse a file that is called as something else: a shell that expands *.png would have a photograph replaced."""
    if path is None or str(path) == "-" or Path(path).suffix.lower() == suffix:
        return
    if Path(path).exists() and not Path(path).is_file():  # a device or a pipe
        return
    raise SettingError(
        f"{option} writes a file that ends in {suffix}.",
        seen=str(path),
        fix=f"{option} {Path(path).stem or 'out'}{suffix}",
    )


def given_files(*sources: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    """The files among what a command reads."""
    named = [[one] if isinstance(one, str | Path) else one or [] for one in sources]
    return [path for group in named for path in group if Path(path).is_file()]


def print_json(document: Any) -> None:
    """JSON on stdout, in UTF-8 whatever the terminal's encoding is."""
    write_stdout(json_bytes(document))


def write_stdout(content: bytes) -> None:
    """Bytes on stdout, as they are."""
    out.file.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a stand-in without bytes, as in a notebook
        sys.stdout.write(content.decode("utf-8"))
    else:
        buffer.write(content)
        buffer.flush()


@contextmanager
def goes_on() -> Iterator[None]:
    """Inside, results are kept as they come: who stops it is told that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(GOES_ON) from None
