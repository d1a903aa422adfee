"""Describe what a patch changes, as data: which columns, how far, what they promote before and after.

The text is made from it by `report/patch.py`.
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
from mmneurons.finding.reading import Reader, reader_for
from mmneurons.neurons import Neuron
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch
from mmneurons.settings import Says
from mmneurons.vlm.columns import Columns, column_hashes
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True)
class ColumnChange:
    """A column change says what a patch does to the column of one neuron."""

    neuron: Neuron
    size: float
    """Euclidean length of what is added to the column."""
    share: float | None
    """The size as a share of the column's length before any edit; None without a model."""
    before: tuple[str, ...]
    """Tokens that the column promotes before any edit, the most promoted first; empty without a model."""
    after: tuple[str, ...]
    """Tokens that it promotes with this patch alone; empty without a model."""


@dataclass(frozen=True)
class PatchDescription:
    """A patch description says what a patch changes in a model, and what made the patch."""

    hash: str
    changes: tuple[ColumnChange, ...]
    """Changes of columns, one for each, the largest first."""
    blocks: tuple[int, ...]
    """Blocks in which columns change, in rising order."""
    rank: int
    """Number of independent directions in which columns move."""
    n_bytes: int
    """Size in bytes of the file that holds the patch."""
    facts: tuple[tuple[str, str], ...]
    """Facts about what made the patch, as (name, text); empty for a patch that does not say."""
    says: Says | None = None
    """How the tokens of the columns were read; None without a model."""


@torch.no_grad()
def describe_patch(
    patch: Patch, vlm: VLM | None = None, n_tokens: int = 10, says: Says = "standardised"
) -> PatchDescription:
    """Say what a patch changes.

    Args:
        patch: The patch, active or not.
        vlm: The model that it is for: with it, changes are told as shares of columns, and in tokens. Patches that are
            active in it do not count, and it is not changed.
        n_tokens: Number of promoted tokens to name for each column.
        says: How they are read, as in `find`: standardised, before and after by the same measure, the unedited model's.

    Returns:
        The description, columns in order of the size of their change.

    Raises:
        ModelError: the patch is of another model.
    """
    changes = sizes_of(patch) if vlm is None else _compared(patch, vlm, n_tokens, says)
    return PatchDescription(
        hash=patch.hash,
        changes=tuple(sorted(changes, key=lambda change: (-change.size, change.neuron))),
        blocks=tuple(sorted({part.layer for part in patch.parts if len(part.indices)})),
        rank=_rank(patch),
        n_bytes=_n_bytes(patch),
        facts=tuple(facts_of(patch.provenance)),
        says=None if vlm is None else says,
    )


def sizes_of(patch: Patch) -> Iterator[ColumnChange]:
    """Iterate over the changes of a patch, as far as the patch alone tells: how far each column moves."""
    for part in patch.parts:
        for neuron, delta in zip(part.neurons, patch.deltas(part), strict=True):
            yield ColumnChange(neuron, float(delta.double().norm()), None, (), ())


def _compared(patch: Patch, vlm: VLM, n_tokens: int, says: Says) -> Iterator[ColumnChange]:
    """Iterate over the changes of a patch in a model, with shares of columns and promoted tokens."""
    reader = reader_for(vlm, says)
    for part in patch.parts:
        if not part.neurons:
            continue
        # The columns as they were before any edit, whatever is active; their hashes must be those that the patch
        # expects, or the comparison would be with another model's neurons.
        before, delta = _pristine(patch, vlm, part.neurons), patch.deltas(part)
        hashes = column_hashes(before)
        if not torch.equal(hashes, part.hashes):
            first = int((hashes != part.hashes).any(1).nonzero()[0])
            raise ModelError(
                f"The model's column {part.neurons[first]} is not the one that this patch was made for.",
                fix="Give the model that the patch names, loaded as it was then; or none.",
            )
        old, new = before.float().cpu(), before.float().cpu() + delta
        promoted, promotes = (_tokens(reader, part.neurons, columns, n_tokens) for columns in (old, new))
        for neuron, column, change, *tokens in zip(part.neurons, old, delta, promoted, promotes, strict=True):
            # In float64: a sum of squares can overflow float32.
            size, length = float(change.double().norm()), float(column.double().norm())
            yield ColumnChange(neuron, size, size / length if length else None, *tokens)


def _pristine(patch: Patch, vlm: VLM, neurons: Sequence[Neuron]) -> Tensor:
    """Return the columns of neurons of one FFN or expert before any edit, (n, hidden), in their stored dtype."""
    # Asked only to refuse: neurons that the model does not have, and then columns of another width.
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


def _tokens(reader: Reader, neurons: Sequence[Neuron], columns: Tensor, n_tokens: int) -> list[tuple[str, ...]]:
    """Return the tokens that each column promotes most, read as the final norm and the head read it."""
    anatomy = reader.vlm.anatomy
    ffn = anatomy.find(neurons[0])
    assert ffn is not None
    number = anatomy.ffns.index(ffn)
    # A place is (FFN, neuron counted through all its experts).
    places = [(number, (neuron.expert or 0) * ffn.n_neurons + neuron.index) for neuron in neurons]
    read = reader.read(columns.to(anatomy.unembed.device), places, torch.ones(len(places), dtype=torch.float32))
    return reader.tokens(read, n_tokens)[0]


def _rank(patch: Patch) -> int:
    """Return the number of independent directions in which the columns of a patch move."""
    parts = [part for part in patch.parts if len(part.indices)]
    if not parts:
        return 0
    # In full: the rank of all deltas, one row for each column.
    if patch.directions is None or any(part.coefficients is None for part in parts):
        return int(torch.linalg.matrix_rank(_scaled(torch.cat([patch.deltas(part) for part in parts]))))
    # By coefficients: the rank of coefficients @ directions, without making that product, which is as wide as the
    # residual stream. directions.T = q r with orthonormal q, and so the rank is that of coefficients @ r.T.
    coefficients = torch.cat([part.coefficients for part in parts if part.coefficients is not None])
    directions = torch.linalg.qr(_scaled(patch.directions).T).R.T
    return int(torch.linalg.matrix_rank(_scaled(coefficients) @ directions))


def _scaled(matrix: Tensor) -> Tensor:
    """Scale a matrix so that float32 can hold its squares; the rank stays."""
    return matrix / matrix.abs().max().clamp_min(1e-30)


def _n_bytes(patch: Patch) -> int:
    """Return the size in bytes of a patch's file, by writing it."""
    with TemporaryDirectory() as folder:
        patch.save(path := Path(folder) / "patch.safetensors")
        return path.stat().st_size


def facts_of(made_by: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Iterate over what is known of what made a patch: it was read from a file, and may lack or hold anything."""
    # A sum of patches: the facts of each, numbered from 1.
    stacked = made_by.get("stacked")
    if isinstance(stacked, Sequence) and not isinstance(stacked, str):
        for i, one in enumerate(stacked, start=1):
            yield from ((f"{i}: {name}", text) for name, text in facts_of(_mapping(one)))
        return
    # One patch: the words and the model it was made for, the images it was made with, and how its strength was chosen.
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
    # The search for a strength, which not every method makes.
    search = _mapping(made_by.get("search"))
    if search:
        told = [f"{name} {value:.3g}" for name in ("strength", "turned") if _is_number(value := search.get(name))]
        if search.get("looked_at"):
            told.append(f"reference answers changed {search.get('changed')} of {search['looked_at']}")
        yield "search", ", ".join(told)
    settings = _mapping(made_by.get("settings"))
    if "method" in settings:
        yield "method", str(settings["method"])
    hub = _mapping(made_by.get("hub"))
    if hub:
        yield "read from", f"hub:{hub.get('id')}@{hub.get('revision')}"


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    """Whether a value is a number; True and False are integers to Python, but none here."""
    return isinstance(value, int | float) and not isinstance(value, bool)
