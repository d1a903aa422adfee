"""The card of a patch on the Hugging Face Hub: Markdown that says what it changes, what made it, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmneurons.report.text import printable

if TYPE_CHECKING:
    from mmneurons.patches.patch import Patch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""The form of a model's id on the Hub."""
OWN = ("pocket", "photo")
"""Ids of the models that need no hub."""


def patch_card(patch: Patch, place: str, metrics: Mapping[str, object]) -> str:
    """Write the card of a patch.

    Args:
        patch: The patch; its provenance may be anybody's, and is escaped.
        place: What `Patch.load` takes to read it: `hub:user/name`.
        metrics: Figures of the patch, by name.

    Returns:
        Markdown with a header of metadata in YAML. All of the provenance stands in it: who reads the card has seen all
        that is uploaded but the numbers themselves.
    """
    from huggingface_hub import ModelCardData

    from mmneurons.patches.describe import describe_patch

    told = describe_patch(patch)
    base = _base_model(patch.provenance)
    header = ModelCardData(
        library_name="mmneurons",
        base_model=base[0] if base else None,
        base_model_relation="adapter" if base else None,
        pipeline_tag="image-text-to-text",
        tags=["mmneurons", "model-editing", "multi-modal-neurons"],
    )
    blocks = ", ".join(map(str, told.blocks)) or "none"
    rows = [
        ("columns", f"{len(told.changes)}, in blocks {blocks} of the language model"),
        ("rank", str(told.rank)),
        ("hash of the patch", patch.hash),
        *((name, text) for name, text in _model_hash(patch.provenance)),
        *told.facts,
    ]
    lines = [
        "---",
        header.to_yaml().strip(),
        "---",
        "",
        f"# {_title(patch.provenance)}",
        "",
        "A patch for a vision-language model, made with mmneurons: it moves columns of the output projections of the",
        "language model's FFNs, and can be taken off exactly. It applies to the very weights that it was made for.",
        "",
        "```python",
        *_use(patch.provenance, place),
        "```",
        "",
        f"`patch.revert(vlm)` takes it off. To pin a commit: `{place}@COMMIT`.",
        "",
        *_table("what it changes", "", rows),
        "",
    ]
    if metrics:
        lines += [*_table("figure", "value", [(str(k), str(v)) for k, v in metrics.items()]), ""]
    # A line of JSON begins with a quote, a bracket or a number: none can end the block.
    made_by = json.dumps(dict(patch.provenance), indent=1, sort_keys=True, ensure_ascii=False, default=str)
    shown = "\n".join(map(printable, made_by.split("\n")))
    return "\n".join([*lines, "All that the file says about what made it:", "", "```json", shown, "```", ""])


def _title(made_by: Mapping[str, Any]) -> str:
    """Return the heading: the words of the edit, if it says them."""
    source, target = made_by.get("source"), made_by.get("target")
    if not isinstance(source, str):
        return "A patch of mmneurons"
    return f"{_cell(source)} → {_cell(target)}" if isinstance(target, str) else f"{_cell(source)} removed"


def _use(made_by: Mapping[str, Any], place: str) -> list[str]:
    """Return the lines of Python that put the patch on its model."""
    model, base = _model(made_by), _base_model(made_by)
    if base:
        dtype = model.get("dtype")
        named = f", dtype={_quoted(dtype)}" if isinstance(dtype, str) else ""
        loaded = f"mmn.load({_quoted(base[0])}, revision={_quoted(base[1])}{named})"
    elif model.get("id") in OWN:
        loaded = f"mmn.load({_quoted(model['id'])})"
    else:
        loaded = "mmn.load(...)  # the model that it was made for, see below"
    return [
        "import mmneurons as mmn",
        "",
        f"vlm = {loaded}",
        f"patch = mmn.Patch.load({_quoted(place)})",
        "patch.apply(vlm)",
    ]


def _base_model(made_by: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return id and revision of the model on the Hub; None where it was a folder's, which has no commit, or unsaid."""
    name, revision = (_model(made_by).get(key) for key in ("id", "revision"))
    if isinstance(name, str) and isinstance(revision, str) and HUB_ID.fullmatch(name):
        return name, revision
    return None


def _model_hash(made_by: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(value := _model(made_by).get("weights_hash"), str):
        yield "hash of the model's weights", value


def _model(made_by: Mapping[str, Any]) -> Mapping[str, Any]:
    model = made_by.get("model")
    return model if isinstance(model, Mapping) else {}


def _table(left: str, right: str, rows: list[tuple[str, str]]) -> list[str]:
    body = (f"| {_cell(name)} | {_cell(text)} |" for name, text in rows)
    return [f"| {left} | {right} |", "| --- | --- |", *body]


def _cell(text: str) -> str:
    """Escape a text so that it stands in a table or a heading as it is, and is neither markup nor a link."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$@])|(?<=:)(?=//)", r"\\\1", printable(text.strip()))


def _quoted(text: str) -> str:
    """Write a text as a string of Python in double quotes, in ASCII."""
    return json.dumps(text)
