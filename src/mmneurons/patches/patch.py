"""Patches: edits as data, which say which columns of `w_out` change, by how much, and what they must be before.

    patch = Patch.load("dog-to-cat.safetensors")
    with patch.applied(vlm): ...

Computing a patch never touches a model, and a patch never holds one: the ledger (`ledger.py`) writes and takes back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from textwrap import shorten
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.ledger import ledger_of
from mmneurons.vlm.columns import HASH_BYTES
from mmneurons.vlm.locking import restored
from mmneurons.vlm.vlm import VLM

HUB = "hub:"
"""What a path begins with that is no file's but a repository's on the Hugging Face Hub."""


@runtime_checkable
class Edit(Protocol):
    """Anything that edits a model for a while and takes the edit back: a `Patch`, or a baseline."""

    def applied(self, vlm: VLM) -> AbstractContextManager[Any]:
        """Edit the model inside the `with`."""
        ...


@dataclass(frozen=True, eq=False)
class PatchPart:
    """A patch part changes some columns of one FFN, or of one of its experts.

    The changes are given in full, as `deltas`, or as `coefficients` of the patch's `directions`, which take kilobytes
    at any width.
    """

    layer: int
    expert: int | None
    indices: Int[Tensor, "n"]
    """Indices of the columns, each once, in rising order; int64."""
    hashes: UInt8[Tensor, "n 16"]
    """Hashes of the columns before any edit, from `column_hashes`."""
    deltas: Float[Tensor, "n hidden"] | None = None
    """What is added to each column, float32; None where coefficients are given."""
    coefficients: Float[Tensor, "n directions"] | None = None
    """Factors of the patch's directions, one row for each column, float32; None where deltas are given."""

    @property
    def place(self) -> tuple[int, int | None]:
        """The layer and the expert, which is None for a dense FFN."""
        return self.layer, self.expert

    @property
    def neurons(self) -> list[Neuron]:
        """The neurons whose columns change, in the order of `indices`."""
        return [Neuron(self.layer, index, self.expert) for index in self.indices.tolist()]


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch is an edit as data: it holds no model, and making one changes no model.

    Raises:
        SettingError: parts that name a place twice, columns that do not rise, shapes that do not fit, NaN or infinity.
    """

    hidden: int
    """Width of the residual stream of the model that the patch is for."""
    parts: tuple[PatchPart, ...]
    directions: Float[Tensor, "directions hidden"] | None = None
    """Directions that the coefficients of parts multiply, float32; None if all parts are in full."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What made the patch, as plain data; it does not count for the hash."""

    def __post_init__(self) -> None:
        # A patch may come from a file that anybody wrote: what passes here is applied to weights without another look.
        # 1. Places, columns and shapes.
        places = [part.place for part in self.parts]
        if len(set(places)) < len(places):
            raise _unsound("It changes one FFN in two parts.")
        for part in self.parts:
            n = len(part.indices)
            if not bool((part.indices.diff() > 0).all()) or bool((part.indices < 0).any()):
                raise _unsound(f"The columns of layer {part.layer} do not rise.")
            if tuple(part.hashes.shape) != (n, HASH_BYTES):
                raise _unsound(f"Layer {part.layer} has {n} columns, but hashes {tuple(part.hashes.shape)}.")
            if (part.deltas is None) == (part.coefficients is None):
                raise _unsound(f"Layer {part.layer} needs deltas or coefficients, one of them.")
            if part.deltas is not None and tuple(part.deltas.shape) != (n, self.hidden):
                raise _unsound(f"Deltas of layer {part.layer} are {tuple(part.deltas.shape)}, not {(n, self.hidden)}.")
            if part.coefficients is not None:
                many = 0 if self.directions is None else len(self.directions)
                if tuple(part.coefficients.shape) != (n, many):
                    raise _unsound(
                        f"Coefficients of layer {part.layer} are {tuple(part.coefficients.shape)}, not {(n, many)}."
                    )
        if self.directions is not None and (self.directions.ndim != 2 or self.directions.shape[1] != self.hidden):
            raise _unsound(f"Directions are {tuple(self.directions.shape)}, of {self.hidden} numbers each.")
        # 2. Numbers: all are finite, and so are the deltas that coefficients and directions give. A bound shows it: the
        # deltas themselves can be large.
        for tensor in self._numbers():
            if not bool(tensor.isfinite().all()):
                raise _unsound("It holds NaN or infinity.")
        if self.directions is not None and self.directions.numel():
            for part in self.parts:
                if part.coefficients is not None and part.coefficients.numel():
                    bound = part.coefficients.abs().sum(1).max() * self.directions.abs().max()
                    if not bool(bound.isfinite()):
                        raise _unsound(f"Deltas of layer {part.layer} can be larger than float32 holds.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch from a file that `save` wrote, or from the Hugging Face Hub.

        Args:
            path: A file; or `hub:user/name`, or `hub:user/name@REVISION` with a branch, a tag or a commit, for what
                `push_to_hub` uploaded. Then `provenance["hub"]` says which commit was read.

        Raises:
            MissingFileError: there is no such file.
            FormatError: it is no patch, one of another schema, damaged or unsound.
            HubError: the Hub cannot be reached or refuses, or there is no patch.
        """
        if isinstance(path, str) and path.startswith(HUB):
            from mmneurons.patches import hub

            return hub.pull(path)
        from mmneurons.patches import file

        return file.read(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a file, whole or not at all; the same patch, the same bytes (docs/reference/format.md).

        Raises:
            SettingError: the file cannot be written.
        """
        from mmneurons.patches import file

        file.write(self, path)

    def push_to_hub(
        self, repository: str, *, private: bool = False, metrics: Mapping[str, object] | None = None
    ) -> str:
        """Upload the patch to the Hugging Face Hub, with a card that is written from its provenance, in one commit.

        Nothing else uploads anything. You must have logged in: `hf auth login`, or the variable `HF_TOKEN`.

        Args:
            repository: `user/name`, made if it is not there; it must hold nothing but a patch.
            private: Make it private; refused where it is there and public.
            metrics: Figures that the card states, by name, such as `{"efficacy": 0.98}`.

        Returns:
            `hub:user/name@COMMIT`, with which `load` reads exactly what was uploaded.

        Raises:
            HubError: the Hub cannot be reached or refuses, or the repository holds something else.
        """
        from mmneurons.patches import hub

        return hub.push(self, repository, private=private, metrics=metrics)

    def __repr__(self) -> str:
        blocks = sorted({part.layer for part in self.parts})
        where = f"block {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} blocks"
        n_columns = sum(len(part.indices) for part in self.parts)
        says = ", ".join(
            f"{name} {self.provenance[name]!r}" for name in ("source", "target") if name in self.provenance
        )
        return f"Patch({shorten(says, 60)}{': ' if says else ''}{n_columns} columns of {where}, hash {self.hash[:12]})"

    def _repr_html_(self) -> str:
        """Show what the patch changes, and how much, as a table for a notebook."""
        from mmneurons.report.patch import patch_html

        return patch_html(self)

    def _numbers(self) -> Iterator[Tensor]:
        """Iterate over the tensors that hold the change."""
        if self.directions is not None:
            yield self.directions
        for part in self.parts:
            yield from (tensor for tensor in (part.deltas, part.coefficients) if tensor is not None)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of what is changed and of what is expected, in hexadecimal; provenance does not count."""
        digest = hashlib.sha256(f"{self.hidden}".encode())
        parts = sorted(self.parts, key=lambda part: place_order(part.place))  # a file does not keep their order
        for tensor in (self.directions, *(t for p in parts for t in (p.indices, p.hashes, p.deltas, p.coefficients))):
            # Dtype and shape go in front of the bytes, and "-" stands for a tensor that is missing: else other patches
            # could give the same bytes.
            if tensor is None:
                digest.update(b"-")
            else:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        digest.update(json.dumps([part.place for part in parts]).encode())
        return digest.hexdigest()

    def deltas(self, part: PatchPart) -> Float[Tensor, "n hidden"]:
        """Return what is added to the columns of a part in full, (n, hidden), float32, one row for each column."""
        if part.deltas is not None:
            return part.deltas
        assert part.coefficients is not None
        assert self.directions is not None
        return part.coefficients @ self.directions

    @property
    def neurons(self) -> list[Neuron]:
        """The neurons whose columns change, sorted."""
        return sorted(neuron for part in self.parts for neuron in part.neurons)

    def __mul__(self, factor: float) -> Patch:
        """Return a patch with the same change, `factor` times as large.

        Raises:
            SettingError: the factor is not finite.
        """
        return replace(
            self,
            parts=tuple(
                replace(
                    part,
                    deltas=None if part.deltas is None else part.deltas * factor,
                    coefficients=None if part.coefficients is None else part.coefficients * factor,
                )
                for part in self.parts
            ),
        )

    __rmul__ = __mul__

    def __add__(self, other: Patch) -> Patch:
        """Return one patch that makes both changes.

        Raises:
            SettingError: they are of models of different width, or expect different columns.
        """
        if not isinstance(other, Patch):
            return NotImplemented
        return stack([self, other])

    @restored
    def applied(self, vlm: VLM) -> Iterator[Patch]:
        """Apply the patch inside the `with`, and take it back whatever happens.

        Other threads that ask or edit this model wait for the end of the `with`: do not wait for them inside. Errors
        are those of `apply`.
        """
        with vlm.alone():
            self.apply(vlm)
            try:
                yield self
            finally:
                self.revert(vlm)

    def apply(self, vlm: VLM) -> None:
        """Apply the patch: change the columns of a model.

        Raises:
            ModelError: the model has other columns than the patch expects, or they cannot be written.
            SettingError: the patch is applied already, or the dtype of the weights cannot hold what it adds.
        """
        with vlm.alone():
            ledger_of(vlm).apply(self)

    def revert(self, vlm: VLM) -> None:
        """Take the patch back; without any patch the model is what it was, bit for bit.

        Raises:
            SettingError: the patch is not applied.
        """
        with vlm.alone():
            ledger_of(vlm).revert(self)


def stack(patches: Sequence[Patch]) -> Patch:
    """Return one patch that makes the changes of all, in full where any part of an FFN is, else as coefficients.

    Raises:
        SettingError: none is given, they are of models of different width, or expect different columns.
    """
    if len({patch.hidden for patch in patches}) != 1:
        raise SettingError("These patches are not of one model.", seen=f"Widths {sorted({p.hidden for p in patches})}.")
    hidden = patches[0].hidden
    directions = [patch.directions for patch in patches if patch.directions is not None]
    # Directions of all patches are put one below the other; those of patch i begin at `starts[i]`.
    starts = torch.tensor([0, *(0 if p.directions is None else len(p.directions) for p in patches)]).cumsum(0)
    parts = []
    # Place by place: every column that any of them changes, and the sum of its changes. Coefficients are written into
    # the columns of their own patch's directions.
    for place in sorted({part.place for patch in patches for part in patch.parts}, key=place_order):
        mine = [(i, part) for i, patch in enumerate(patches) for part in patch.parts if part.place == place]
        indices = torch.cat([part.indices for _, part in mine]).unique()
        full = any(part.deltas is not None for _, part in mine)
        width = hidden if full else int(starts[-1])
        changes = torch.zeros(len(indices), width, dtype=torch.float32)
        hashes = torch.zeros(len(indices), HASH_BYTES, dtype=torch.uint8)
        known = torch.zeros(len(indices), dtype=torch.bool)
        for i, part in mine:
            rows = torch.searchsorted(indices, part.indices)
            # A column that two patches change must be the same to both before any edit.
            clash = known[rows] & (hashes[rows] != part.hashes).any(1)
            if bool(clash.any()):
                raise SettingError(
                    "These patches are not of one model.",
                    seen=f"They expect different columns of {part.neurons[int(clash.nonzero()[0])]}.",
                )
            hashes[rows], known[rows] = part.hashes, True
            if full:
                changes[rows] += patches[i].deltas(part)
            else:
                assert part.coefficients is not None
                changes[rows, int(starts[i]) : int(starts[i + 1])] += part.coefficients
        deltas, coefficients = (changes, None) if full else (None, changes)
        parts.append(PatchPart(place[0], place[1], indices, hashes, deltas, coefficients))
    made_by = {"stacked": [dict(patch.provenance) for patch in patches]}
    return Patch(hidden, tuple(parts), torch.cat(directions) if directions else None, made_by)


def place_order(place: tuple[int, int | None]) -> tuple[int, int]:
    """Return the sort key of a place: by layer and, within it, a dense FFN before the experts beside it."""
    return place[0], -1 if place[1] is None else place[1]


def _unsound(why: str) -> SettingError:
    """Return the error for a patch that contradicts itself."""
    return SettingError("This is no sound patch.", seen=why)
