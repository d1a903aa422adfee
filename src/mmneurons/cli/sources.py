"""Where the images and texts of a command come from: folders, manifests, files, and the pocket world's own sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmneurons.cli.options import err
from mmneurons.errors import ImageError, SettingError
from mmneurons.files import read_text

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM

SOURCES = "A folder, a manifest or COCO instances (docs/guide/inspect.md), image files, or pocket:SET."
NAMED = 10
"""How many of the images that cannot be used are named."""
Texts = Annotated[
    Path | None,
    typer.Option(metavar="FILE.txt", help="Texts, one a line, on which the model's predictions are to stay the same."),
]


def items_of(sources: list[str], masks: Path | None = None) -> list[Any]:
    """Collect the images of all sources; what was left out is told."""
    from mmneurons.data.dataset import read_items

    def tell(note: str) -> None:
        err.print(note, style="yellow", soft_wrap=True)

    return [item for source in sources for item in read_items(source, masks, tell=tell)]


def readable_items(sources: list[str] | None) -> list[Any] | None:
    """Collect the images of all sources that can be decoded to their end, None without a source; name the others."""
    if not sources:
        return None
    from mmneurons.data.content import unreadable

    items = items_of(sources)
    left_out = unreadable(items)
    return _without(left_out, items)


def fitting_items(vlm: VLM, items: list[Any] | None) -> list[Any] | None:
    """Keep the images that the model's processor takes: long, thin ones could be scaled up without bound."""
    if items is None:
        return None
    from mmneurons.data.content import reason
    from mmneurons.data.images import check_scaled

    processor, left_out = getattr(vlm.processor, "image_processor", None), {}
    for item in items:
        try:
            # Opened only where the processor has no bound of its own.
            check_scaled((one.image().size for one in [item]), processor)
        except ImageError as error:
            left_out[item.name] = reason(error)
    return _without(left_out, items)


def _without(left_out: Mapping[str, str], items: list[Any]) -> list[Any]:
    """Say which images are left out, and give the others; there must be one."""
    tell_left_out(left_out, len(items))
    if len(left_out) == len(items):
        raise ImageError("None of the images can be used.", seen="; ".join(list(left_out.values())[:NAMED]))
    return [item for item in items if item.name not in left_out]


def tell_left_out(left_out: Mapping[str, str], n_images: int) -> None:
    """Say which images could not be used, and why; of many, name the first few."""
    if not left_out:
        return
    err.print(f"{len(left_out)} of {n_images} images could not be used:", style="yellow")
    for name, why in list(left_out.items())[:NAMED]:
        err.print(f"  {name}: {why}", soft_wrap=True, markup=False)
    if len(left_out) > NAMED:
        err.print(f"  and {len(left_out) - NAMED} more")


def lines_of(path: Path | None) -> list[str]:
    """Read the lines of a file that are not blank."""
    return [] if path is None else [line for line in read_text(path).splitlines() if line.strip()]


def pocket_texts(vlm: VLM, which: int) -> list[str]:
    """Take every fourth sentence about the pocket world, from the first (to edit with) or the second (to judge on)."""
    if not vlm.is_pocket:
        return []
    from mmneurons import pocket

    return list(pocket.facts()[which::4])


def or_pocket(vlm: VLM, given: list[Any] | None, name: str, option: str | None) -> list[Any]:
    """Return what was given or, for the pocket model, a set of its world; without `option`, there may be no images."""
    if given is not None:
        return given
    if vlm.is_pocket:
        err.print(f"these are pocket:{name}", style="dim")
        return items_of([f"pocket:{name}"])
    if option is None:
        return []
    raise SettingError("There are no images.", fix=f"Name some: {option} FOLDER")


def tell_default_reference(vlm: VLM) -> None:
    """Say what an edit leaves as it is where nothing is named; without images, that answers about others may change."""
    own = "pocket:reference-400, facts that it knows and " if vlm.is_pocket else ""
    err.print(
        f"what is to stay as it is: {own}sentences that the package ships (worked out once, then kept in the cache)",
        style="dim",
    )
    if not vlm.is_pocket:
        err.print(
            "no images are held: answers about other pictures will change. Name some: --reference FOLDER",
            style="yellow",
        )


def tell_no_reference() -> None:
    """Say what an edit without a reference leaves as it is."""
    err.print("no --reference: only the other words of these answers are held as they are", style="yellow")
