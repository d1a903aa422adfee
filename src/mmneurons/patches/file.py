"""Write and read patches as files: safetensors with a JSON header, written whole or not at all, read with suspicion.

`Patch.save` and `Patch.load` call these functions; the format is that of docs/reference/format.md.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from mmneurons.errors import FormatError, SettingError
from mmneurons.files import check_facts, decode_json, read_file, write_whole
from mmneurons.patches.patch import Patch, PatchPart, place_order

SCHEMA = 2
"""Version of the format."""
LARGEST = 2**31
"""Largest size of a file in bytes, which a patch of some columns never reaches."""
LARGEST_HEADER = 2**24
"""Largest size of a header in bytes."""
DTYPES = {
    "indices": torch.int64,
    "hashes": torch.uint8,
    "deltas": torch.float32,
    "coefficients": torch.float32,
}
"""Dtype of each tensor of a part, by its name in `PatchPart`."""
_NUMBER = "(0|[1-9][0-9]{0,5})"
_NAME = re.compile(rf"L{_NUMBER}(?:\.e{_NUMBER})?\.({'|'.join(DTYPES)})")
"""Pattern for the name of a tensor; each place has one spelling only."""


def write(patch: Patch, path: str | os.PathLike[str]) -> None:
    """Write a patch to a file; the same patch gives the same bytes."""
    write_whole(path, content_of(patch))


def content_of(patch: Patch) -> bytes:
    """Return what a patch's file holds; the same patch gives the same bytes."""
    tensors: dict[str, Tensor] = {} if patch.directions is None else {"directions": patch.directions.clone()}
    for part in patch.parts:
        place = f"L{part.layer}" if part.expert is None else f"L{part.layer}.e{part.expert}"
        for name in DTYPES:
            if (tensor := getattr(part, name)) is not None:
                # Two parts may share a tensor, or hold a view of one, which safetensors refuses.
                tensors[f"{place}.{name}"] = tensor.contiguous().clone()
    # The header is JSON in JSON, since safetensors' metadata are strings; sorted, so that equal patches give equal
    # bytes.
    facts = {"schema": SCHEMA, "hidden": patch.hidden, "hash": patch.hash, "provenance": patch.provenance}
    header = {"mmneurons_patch": json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)}
    return to_bytes(tensors, metadata=header)


def read(path: str | os.PathLike[str]) -> Patch:
    """Read a patch from a file that `write` wrote.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is no patch, one of another schema, damaged or unsound.
    """
    path = Path(path)
    content = read_file(path, limit=LARGEST)
    # A file can come from anywhere: header first, then names and dtypes of tensors, then what `Patch` itself refuses
    # (shapes, order, NaN), and finally the hash over all numbers.
    facts = _facts(path, content)
    try:
        tensors = from_bytes(content)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _refused(path, str(error)) from error
    try:
        patch = _patch(path, facts, tensors)
    except SettingError as error:
        raise _refused(path, error.seen or error.what) from error
    if patch.hash != facts.hash:
        raise _refused(path, "Its numbers are not those that were saved.")
    return patch


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """Facts in the metadata of a file; a key that is not listed here is refused."""

    schema: Literal[2]
    hidden: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    hash: str
    """Hash of the patch, to be compared with that of the tensors."""
    provenance: dict[str, Any]


class _Schema(msgspec.Struct):
    """The version in the metadata, read first, so that a file of another version is not called damaged."""

    schema: Any = None


class _Metadata(msgspec.Struct):
    """The metadata of a file, of which one entry is ours."""

    mmneurons_patch: str


class _Header(msgspec.Struct):
    """The header of a safetensors file, as far as it is read here."""

    metadata: _Metadata = msgspec.field(name="__metadata__")


def _facts(path: Path, content: bytes) -> _Facts:
    """Read the facts from a file's header, before any tensor is looked at."""
    if len(content) < 8:
        raise _refused(path, f"It has {len(content)} bytes.")
    # safetensors: eight bytes for the length of the header, the header, the tensors. The length is checked before
    # anything is cut out by it.
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(LARGEST_HEADER, len(content) - 8):
        raise _refused(
            path, f"Its header says that it is {length:,} bytes long: it is cut short, or no safetensors file."
        )
    try:
        text = decode_json(content[8 : 8 + length], _Header, str(path)).metadata.mmneurons_patch
        schema = decode_json(text, _Schema, str(path)).schema
    except FormatError as error:
        raise _refused(path, f"Its header is not that of a patch: {error.seen}") from error
    if schema != SCHEMA:
        seen = f"Schema {str(schema)[:40]}; this version reads {SCHEMA}."
        raise FormatError(f"{path} is of another schema.", seen=seen, fix="Make it again.")
    facts = decode_json(text, _Facts, str(path))
    check_facts(facts.provenance, str(path))
    return facts


def _patch(path: Path, facts: _Facts, tensors: dict[str, Tensor]) -> Patch:
    """Make the patch of its tensors, sorted into parts by their names."""
    # 1. Every name must be known, every tensor of the one dtype and number of axes that belong to its name.
    directions = tensors.pop("directions", None)
    places: dict[tuple[int, int | None], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        known = _NAME.fullmatch(name)
        if known is None:
            raise _refused(path, f"It holds {name[:80]!r}.")
        layer, expert, kind = known.groups()
        if tensor.dtype != DTYPES[kind] or tensor.ndim != (1 if kind == "indices" else 2):
            raise _refused(path, f"'{name}' is {tensor.dtype} of {tensor.ndim} axes.")
        places.setdefault((int(layer), int(expert) if expert else None), {})[kind] = tensor
    if directions is not None and (directions.dtype != torch.float32 or directions.ndim != 2):
        raise _refused(path, f"'directions' is {directions.dtype} of {directions.ndim} axes.")
    # 2. The order of tensors in a file means nothing: parts are sorted as the hash sorts them.
    parts = []
    for (layer, expert), mine in sorted(places.items(), key=lambda entry: place_order(entry[0])):
        if not {"indices", "hashes"} <= set(mine):
            raise _refused(path, f"Layer {layer} lacks its columns or their hashes.")
        parts.append(PatchPart(layer, expert, **mine))
    return Patch(facts.hidden, tuple(parts), directions, facts.provenance)


def _refused(path: Path, why: str) -> FormatError:
    """Return the error for a file that holds no sound patch."""
    return FormatError(f"{path} is no patch that can be used.", seen=why)
