"""What a patch changes, as data: which columns, how far, what they promote before and after.

The text is made by `report/patch.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mmneurons.errors import ModelError, SettingError
from mmneurons.finding.scoring import as_read, said, texts
from mmneurons.neurons import Neuron
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch
from mmneurons.vlm.columns import Columns, column_hashes
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True)
class ColumnChange:
    """What a patch does to one neuron's column."""

    neuron: Neuron
    size: float
    """Length of what is added."""
    share: float | None
    """The same as a share of the length of the column before any edit; None without a model."""
    before: tuple[str, ...]
    """Tokens that the column promotes before any edit, most first; empty without a model."""
    after: tuple[str, ...]
    """Those with this patch alone."""


@dataclass(frozen=True)
class PatchDescription:
    """What `describe_patch` says."""

    hash: str
    changes: tuple[ColumnChange, ...]
    """One for each column, the largest change first."""
    blocks: tuple[int, ...]
    """Those in which columns change."""
    rank: int
    """In how many independent directions the columns move."""
    n_bytes: int
    """Of the file that holds the patch."""
    facts: tuple[tuple[str, str], ...]
    """What made it, as name and text; nothing for a patch that does not say."""


@torch.no_grad()
def describe_patch(patch: Patch, vlm: VLM | None = None, n_tokens: int = 10) -> PatchDescription:
    """Say what a patch changes.

    Args:
        patch: The patch, active or not.
        vlm: The model that it is for: with it, changes are told as shares of columns, and in tokens. Patches that are
            active in it do not count, and it is not changed.
        n_tokens: How many tokens of each column.

    Raises:
        ModelError: the patch is of another model.
    """
    changes = sizes_of(patch) if vlm is None else _compared(patch, vlm, n_tokens)
    return PatchDescription(
        hash=patch.hash,
        changes=tuple(sorted(changes, key=lambda change: (-change.size, change.neuron))),
        blocks=tuple(sorted({part.layer for part in patch.parts})),
        rank=_rank(patch),
        n_bytes=_n_bytes(patch),
        facts=tuple(facts_of(patch.provenance)),
    )


def sizes_of(patch: Patch) -> Iterator[ColumnChange]:
    """How far each column moves, as far as the patch alone tells."""
    for part in patch.parts:
        for neuron, delta in zip(part.neurons, patch.deltas(part), strict=True):
            yield ColumnChange(neuron, float(delta.double().norm()), None, (), ())


def _compared(patch: Patch, vlm: VLM, n_tokens: int) -> Iterator[ColumnChange]:
    for part in patch.parts:
        if not part.neurons:
            continue
        before, delta = _pristine(patch, vlm, part.neurons), patch.deltas(part)
        hashes = column_hashes(before)
        if not torch.equal(hashes, part.hashes):
            first = int((hashes != part.hashes).any(1).nonzero()[0])
            raise ModelError(
                f"The model's column {part.neurons[first]} is not the one that this patch was made for.",
                fix="Give the model that the patch names, loaded as it was then; or none.",
            )
        old, new = before.float().cpu(), before.float().cpu() + delta
        promoted, promotes = (_tokens(vlm, part.neurons, columns, n_tokens) for columns in (old, new))
        for neuron, column, change, *tokens in zip(part.neurons, old, delta, promoted, promotes, strict=True):
            size, length = float(change.double().norm()), float(column.double().norm())
            yield ColumnChange(neuron, size, size / length if length else None, *tokens)


def _pristine(patch: Patch, vlm: VLM, neurons: Sequence[Neuron]) -> Tensor:
    """Columns before any edit, (n, hidden), of neurons of one FFN or expert."""
    try:
        Columns.of(vlm.anatomy, neurons)
    except SettingError as error:
        raise ModelError("This patch is of another model.", seen=error.what) from error
    if patch.hidden != vlm.anatomy.hidden:
        raise ModelError(
            "This patch is of another model.", seen=f"Width {patch.hidden}, the model's is {vlm.anatomy.hidden}."
        )
    indices = torch.tensor([neuron.index for neuron in neurons])
    return ledger_of(vlm).pristine((neurons[0].layer, neurons[0].expert), indices)


def _tokens(vlm: VLM, neurons: Sequence[Neuron], columns: Tensor, n_tokens: int) -> list[tuple[str, ...]]:
    anatomy = vlm.anatomy
    ffn = anatomy.find(neurons[0])
    assert ffn is not None
    number = anatomy.ffns.index(ffn)
    places = [(number, (neuron.expert or 0) * ffn.n_neurons + neuron.index) for neuron in neurons]
    device = anatomy.unembed.device
    promoted, _ = said(vlm, as_read(anatomy, columns.to(device), places, "logit"), n_tokens)
    return [texts(vlm, ids) for ids in promoted]


def _rank(patch: Patch) -> int:
    parts = [part for part in patch.parts if len(part.indices)]
    if not parts:
        return 0
    if patch.directions is None or any(part.coefficients is None for part in parts):
        return int(torch.linalg.matrix_rank(_scaled(torch.cat([patch.deltas(part) for part in parts]))))
    # Of coefficients @ directions, at the size of the coefficients: directions.T = q r, and q changes no rank.
    coefficients = torch.cat([part.coefficients for part in parts if part.coefficients is not None])
    directions = torch.linalg.qr(_scaled(patch.directions).T).R.T
    return int(torch.linalg.matrix_rank(_scaled(coefficients) @ directions))


def _scaled(matrix: Tensor) -> Tensor:
    """Of the same rank, with squares that float32 can hold."""
    return matrix / matrix.abs().max().clamp_min(1e-30)


def _n_bytes(patch: Patch) -> int:
    with TemporaryDirectory() as folder:
        patch.save(path := Path(folder) / "patch.safetensors")
        return path.stat().st_size


def facts_of(made_by: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of what made a patch; it was read from a file, and may lack or hold anything."""
    stacked = made_by.get("stacked")
    if isinstance(stacked, Sequence) and not isinstance(stacked, str):
        for i, one in enumerate(stacked, start=1):
            yield from ((f"{i}: {name}", text) for name, text in facts_of(_mapping(one)))
        return
    if "source" in made_by:
        yield "source", str(made_by["source"])
        target = made_by.get("target")
        yield "target", "(anything else)" if target is None else str(target)
    model = _mapping(made_by.get("model"))
    if model:
        yield "model", " ".join(str(model[key]) for key in ("id", "revision", "dtype") if model.get(key) is not None)
    if "images" in made_by:
        yield "images", str(made_by["images"])
    reference = _mapping(made_by.get("reference"))
    if "reference" in made_by:
        said = f"{reference.get('images', '?')} images, {reference.get('texts', '?')} texts" if reference else "none"
        yield "reference", said
    search = _mapping(made_by.get("search"))
    if search:
        told = [f"{name} {value:.3g}" for name in ("strength", "turned") if _is_number(value := search.get(name))]
        if search.get("looked_at"):
            told.append(f"reference answers changed {search.get('changed')} of {search['looked_at']}")
        yield "search", ", ".join(told)
    settings = _mapping(made_by.get("settings"))
    if "method" in settings:
        yield "method", str(settings["method"])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
