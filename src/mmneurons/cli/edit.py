"""The commands `edit`, `evaluate-edit`, `patch show`, `patch push` and `export`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmneurons.cli.bars import bar, bars, stages, working
from mmneurons.cli.options import (
    Load,
    Reading,
    app,
    check_outputs,
    check_results_folder,
    descriptions,
    err,
    given_files,
    goes_on,
    loads_model,
    out,
    with_settings,
)
from mmneurons.cli.sources import (
    SOURCES,
    Texts,
    fitting_items,
    lines_of,
    or_pocket,
    pocket_texts,
    readable_items,
    tell_default_reference,
    tell_no_reference,
)
from mmneurons.errors import FormatError, SettingError
from mmneurons.settings import EditSettings, Question
from mmneurons.words import singular

if TYPE_CHECKING:
    from mmneurons.editing.evaluate_edits import Case
    from mmneurons.patches.patch import Patch
    from mmneurons.vlm.vlm import VLM

OR_HUB = "or hub:USER/NAME for one on the Hub, hub:USER/NAME@REVISION for a certain one"
Patches = Annotated[list[str], typer.Argument(metavar="PATCH...", help=f"Files that mmneurons edit wrote, {OR_HUB}.")]

patches = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show what patches change, and share them.")
app.add_typer(patches, name="patch")

HeldOut = Annotated[list[str] | None, typer.Option("--held-out", help="Other images that show SOURCE, to judge on.")]
Unrelated = Annotated[list[str] | None, typer.Option(help="Images whose answers are not to change, to judge on.")]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Judge on at most this many unrelated images, of which the model "
        "does not say SOURCE. Default: all of these.",
    ),
]


@app.command()
@loads_model
@with_settings(EditSettings)
def edit(
    load: Load,
    settings: EditSettings,
    source: Annotated[str, typer.Option("--from", metavar="SOURCE", help="The word to replace.")] = "",
    target: Annotated[str | None, typer.Option("--to", metavar="TARGET", help="The word to say instead.")] = None,
    remove: Annotated[str | None, typer.Option(metavar="WORD", help="A word to remove, with none instead.")] = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.safetensors", help="The patch. Default: SOURCE-to-TARGET.safetensors."),
    ] = None,
    images: Annotated[list[str] | None, typer.Option(help=f"Images that show SOURCE. {SOURCES}")] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE...", help="Further images that show SOURCE.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="Images whose answers are to stay as they are. Default, without --texts: sentences that the package "
            "ships, for the pocket model its own images and texts as well; own: only the other words of the edit's "
            "answers."
        ),
    ] = None,
    texts: Texts = None,
    evaluate: Annotated[Path | None, typer.Option(metavar="DIR", help="Also judge the patch; results go here.")] = None,
    held_out: HeldOut = None,
    unrelated: Unrelated = None,
    limit: Limit = None,
) -> None:
    """Make a patch that replaces or removes a word.

    With the patch the model says TARGET where it said SOURCE, or no longer says SOURCE. Only the patch is written: the
    model's files stay as they are.
    """
    # 1. What is asked for, and whether its files can be read and written, before the model loads.
    source, target = _words(source, target, remove)
    path = _patch_path(out_path, source, target)
    check_outputs([path], given_files(images, more, reference, texts, held_out, unrelated, load.files))
    if evaluate is not None:
        check_results_folder(evaluate, images, reference, held_out, unrelated)
    elif held_out or unrelated or limit:
        raise SettingError(
            "--held-out, --unrelated and --limit are for judging the patch.",
            fix="Add --evaluate DIR, or leave them out.",
        )
    from mmneurons.editing.evaluate_edits import cases
    from mmneurons.editing.reference import make_reference
    from mmneurons.methods import edit as make_patch

    # Damaged images are found now; those that the model's processor refuses, once the model is there.
    shown = readable_items([*(images or []), *(more or [])])
    own = reference == ["own"]
    kept = None if own else readable_items(reference)
    beyond, others = readable_items(held_out), readable_items(unrelated)
    lines = lines_of(texts)
    vlm = load()
    # 2. The model, its own sets where nothing is given, and what is to stay.
    shown, kept, beyond, others = (fitting_items(vlm, items) for items in (shown, kept, beyond, others))
    shown = or_pocket(vlm, shown, f"edit/{singular(source)}", "--images")
    held_back = "own" if own and not lines else None
    if kept or lines:
        kept = kept or ([] if own else or_pocket(vlm, None, "reference-400", None))
        with bar(err, len(kept)) as progress:
            pictures = [item.image() for item in kept]
            held_back = make_reference(vlm, pictures, lines, question=settings.question, progress=progress)
    elif own or vlm.is_encoder_decoder:
        tell_no_reference()
    else:
        tell_default_reference(vlm)
    # 3. The edit, saved at once; then what it did, and how it stands on other images.
    with stages(err, "editing") as progress:
        patch = make_patch(
            vlm, [item.image() for item in shown], source=source, target=target, reference=held_back,
            settings=settings, progress=progress,
        )  # fmt: skip
    save(patch, path)
    tell_patched(vlm)
    _tell_made(patch, n_shown=len(shown))
    out.print(f"wrote {path} ({path.stat().st_size / 1000:.1f} kB)", soft_wrap=True)
    if evaluate is not None:
        _judge(vlm, cases({str(path): patch}), evaluate, shown, beyond, others, [], limit, settings.batch_size)


@app.command("evaluate-edit")
@loads_model
def evaluate_edit(
    load: Load,
    files: Patches,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder in which results are kept.")],
    images: Annotated[list[str] | None, typer.Option(help="The images that the edits were made with.")] = None,
    held_out: HeldOut = None,
    unrelated: Unrelated = None,
    texts: Texts = None,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help=descriptions(Question)["batch_size"])] = Question.batch_size,
) -> None:
    """Judge patches by what the model then says.

    Each patch is judged by itself, and a page shows the figures of all. A run that was stopped goes on when the same
    command is given again.
    """
    check_results_folder(folder, images, held_out, unrelated)
    from mmneurons.editing.evaluate_edits import cases
    from mmneurons.patches.patch import Patch

    asked = cases({path: Patch.load(path) for path in files})
    shown, beyond, others = map(readable_items, (images, held_out, unrelated))
    lines = lines_of(texts)
    vlm = load()
    shown, beyond, others = (fitting_items(vlm, items) for items in (shown, beyond, others))
    _judge(vlm, asked, folder, shown, beyond, others, lines, limit, batch_size)


@patches.command("show")
@loads_model
def show(
    load: Load,
    path: Annotated[str, typer.Argument(metavar="PATCH", help=f"A file that mmneurons edit wrote, {OR_HUB}.")],
    words: Annotated[
        bool, typer.Option(help="Load the model, and show what each column says before and after.")
    ] = True,
    n: Annotated[
        int, typer.Option("--top", min=1, help="How many neurons are listed, the ones that change most first.")
    ] = 10,
    every: Annotated[bool, typer.Option("--all", help="List all neurons.")] = False,
    says: Reading = "standardised",
) -> None:
    """Show what a patch changes.

    Lists the neurons whose columns move, how far they move, and what they say before and after.
    """
    from mmneurons.patches.describe import describe_patch
    from mmneurons.patches.patch import Patch
    from mmneurons.report.patch import patch_text

    patch = Patch.load(path)
    described = describe_patch(patch, load() if words else None, says=says)
    out.print(patch_text(described, None if every else n), soft_wrap=True)


@patches.command("push")
def push(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A file that mmneurons edit wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="A repository of yours on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload a patch to the Hugging Face Hub.

    Shows all that will be uploaded, the file and a card that is written from it, and asks first. Log in before, with
    hf auth login.
    """
    from huggingface_hub import constants

    from mmneurons.patches.hub import files_of
    from mmneurons.patches.patch import Patch

    patch = Patch.load(path)
    files = files_of(patch, repository)
    # All of it is shown before anything is sent, and the same function makes what is sent.
    where = f"{constants.ENDPOINT}/{repository}"
    out.print(f"{where}{', private' if private else ''}; files of these names there are replaced:", soft_wrap=True)
    for name, content in files.items():
        out.print(f"  {name}  {len(content):,} bytes")
    out.print("\n" + files["README.md"].decode(), soft_wrap=True)
    if not yes and not typer.confirm("Upload this?"):
        err.print("nothing was uploaded")
        raise typer.Exit(1)
    with working(err, "uploading"):
        place = patch.push_to_hub(repository, private=private)
    out.print(f"uploaded: {place}", soft_wrap=True)


@app.command()
@functools.partial(loads_model, without={"patch"})  # the patches that are named are those that are written
def export(
    load: Load,
    files: Patches,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the checkpoint.")],
) -> None:
    """Write a model with patches in it.

    The result is an ordinary checkpoint that transformers loads by itself.
    """
    from mmneurons.patches.export import export as write
    from mmneurons.patches.patch import Patch

    loaded = [Patch.load(path) for path in files]
    vlm = load()
    with working(err, "writing"):
        write(vlm, loaded, folder)
    out.print(f"wrote {folder}", soft_wrap=True)


def _tell_made(patch: Patch, n_shown: int) -> None:
    """Print what a patch does to the images that it was made with, and to what was to stay."""
    made_by = patch.provenance
    source, target, search = made_by["source"], made_by["target"], made_by.get("search", {})
    strength = f", strength {search['strength']:.3g}" if "strength" in search else ""
    out.print(f"{source} -> {target or 'anything else'}: {len(patch.neurons)} columns{strength}")
    # What learns by gradients until all answers turn, or solves for a key, searches for no strength.
    if "turned" in search:
        out.print(
            f"  turned {search['turned']:.0%} of the answers that said {source}, by which the strength was chosen"
        )
    silent = n_shown - max(made_by["said_source"])  # a count for each prompt: the best of them
    if silent:
        out.print(f"  {silent} of the {n_shown} images are not used: the model does not say {source} of them")
    if search.get("looked_at") and "strength" in search:
        n_kept = made_by["reference"]["images"]
        out.print(
            f"  of the {n_kept} answers that are to stay, the {search['looked_at']} likeliest to change were tried: "
            f"{search['changed']} changed",
            soft_wrap=True,
        )
    elif search.get("looked_at"):
        out.print(f"  of the {search['looked_at']} steps that were to stay, {search['changed']} changed")
    if search.get("flipped"):
        out.print(f"  at {search['flipped']:.2%} of the positions of texts another token is likeliest")


def _judge(
    vlm: VLM,
    asked: Mapping[str, Case],
    folder: Path,
    shown: list[Any] | None,
    beyond: list[Any] | None,
    others: list[Any] | None,
    texts: list[str],
    limit: int | None,
    batch_size: int,
) -> None:
    """Judge patches, print their figures, and write the page."""
    from mmneurons.editing.evaluate_edits import evaluate_edits
    from mmneurons.report.edit import figures, write_edits

    others = or_pocket(vlm, others, "locality-500", "--unrelated")

    # Patches can have different sources: without images of the user's, each source has its own set of the pocket world.
    def of_edit(source: str) -> list[Any]:
        return or_pocket(vlm, shown, f"edit/{singular(source)}", "--images")

    @functools.cache
    def of_held_out(source: str) -> list[Any]:
        return or_pocket(vlm, beyond, f"held-out/{singular(source)}", "--held-out")

    texts = texts or pocket_texts(vlm, 1)
    if not texts:
        err.print("no texts to judge on, so no T-locality: mmneurons evaluate-edit --texts FILE", style="yellow")
    with bars(err, "edits") as progress, goes_on():
        judged = evaluate_edits(
            vlm,
            asked,
            folder,
            edit=of_edit,
            held_out=of_held_out,
            unrelated=others,
            texts=texts,
            limit=limit,
            batch_size=batch_size,
            progress=progress,
        )
    for name, one in judged.items():
        out.print(f"{name}: {one.source} -> {one.target or 'anything else'}", soft_wrap=True)
        for label, value in figures(one):
            out.print(f"  {label:34s} {value}", soft_wrap=True)
    err.print(f"wrote {write_edits(judged, folder, of_held_out, others)}", soft_wrap=True)


def _words(source: str, target: str | None, remove: str | None) -> tuple[str, str | None]:
    """Return source and target, the latter None for a removal; refuse any other combination of the options."""
    source, given, gone = (source.strip(), (target or "").strip(), (remove or "").strip())
    if gone and not source and target is None:
        return gone, None
    if source and given and not gone:
        return source, given
    raise SettingError(
        "Say which word is to become which, or which is to be removed.",
        seen=f"--from {source or '?'} --to {target or '?'} --remove {remove or '?'}",
        fix="mmneurons edit --from dog --to cat, or mmneurons edit --remove dog",
    )


def _patch_path(given: Path | None, source: str, target: str | None) -> Path:
    return checked_patch_path(
        given or Path(f"{source}-to-{target}.safetensors" if target else f"remove-{source}.safetensors")
    )


def checked_patch_path(path: Path) -> Path:
    """Refuse a file whose name is not that of a patch, or that exists and is no patch, such as a model's weights."""
    if path.suffix != ".safetensors":
        raise SettingError(
            f"A patch is a .safetensors file, not {path}.", fix=f"--out {path.with_suffix('.safetensors')}"
        )
    if path.is_file():
        from mmneurons.patches.patch import Patch

        try:
            Patch.load(path)
        except FormatError as error:
            raise SettingError(
                f"{path} is there already, and is no patch.", seen=str(error), fix="Name another file with --out."
            ) from error
    return path


def save(patch: Patch, path: Path) -> None:
    """Save a patch; if its place cannot be written after all the work, save it in a temporary folder and say so."""
    try:
        patch.save(path)
    except SettingError as error:
        spare = Path(tempfile.mkdtemp(prefix="mmneurons-")) / path.name
        patch.save(spare)
        raise SettingError(error.what, seen=error.seen, fix=f"The patch is kept: mv {spare} FOLDER") from error


def tell_patched(vlm: VLM) -> None:
    """Say that an edit was made with other patches on the model, without which it means little."""
    if on := vlm.facts.get("patches"):
        err.print(f"made with {len(on)} other patches on the model (--patch): put them on with it", style="yellow")
