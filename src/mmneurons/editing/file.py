"""Patches as files: safetensors with a JSON header, written whole or not at all, read with suspicion.

The form is that of docs/format.md.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from mmneurons.editing.patch import Patch, PatchPart, place_order
from mmneurons.errors import FormatError, SettingError
from mmneurons.files import write_whole

SCHEMA = 1
LARGEST = 2**31
"""Bytes: what a file of a few columns never has."""
LARGEST_HEADER = 2**24
DTYPES = {
    "indices": torch.int64,
    "hashes": torch.uint8,
    "deltas": torch.float32,
    "coefficients": torch.float32,
}


def save_patch(patch: Patch, path: str | os.PathLike[str]) -> None:
    """Write a patch; the same patch gives the same bytes."""
    path = Path(path)
    tensors: dict[str, Tensor] = {} if patch.directions is None else {"directions": patch.directions.clone()}
    for part in patch.parts:
        place = f"L{part.layer}" if part.expert is None else f"L{part.layer}.e{part.expert}"
        for name in DTYPES:
            if (tensor := getattr(part, name)) is not None:
                # Two parts may share one, which safetensors refuses.
                tensors[f"{place}.{name}"] = tensor.contiguous().clone()
    facts = {"schema": SCHEMA, "hidden": patch.hidden, "provenance": patch.provenance}
    header = {"mmneurons_patch": json.dumps(facts, ensure_ascii=False, sort_keys=True, allow_nan=False)}
    content = to_bytes(tensors, metadata=header)
    write_whole(path, content)


def load_patch(path: str | os.PathLike[str]) -> Patch:
    """Read a patch that `save_patch` wrote.

    Raises:
        FormatError: no such file, no patch, one of another schema, damaged or unsound.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise _refused(path, f"It has {size:,} bytes.")
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"Cannot read {path}.", seen=str(error)) from error
    facts = _facts(path, content)
    try:
        tensors = from_bytes(content)
    except (SafetensorError, ValueError) as error:
        raise _refused(path, str(error)) from error
    try:
        return _patch(path, facts, tensors)
    except SettingError as error:
        raise _refused(path, error.seen or error.what) from error


def _facts(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON of the header, looked at before any tensor."""
    if len(content) < 8:
        raise _refused(path, f"It has {len(content)} bytes.")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(LARGEST_HEADER, len(content) - 8):
        raise _refused(path, f"Its header says that it is {length:,} bytes long.")
    try:
        header = json.loads(content[8 : 8 + length])
        facts = json.loads(header["__metadata__"]["mmneurons_patch"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(path, "Its header is not that of a patch.") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        seen = facts.get("schema") if isinstance(facts, dict) else facts
        raise FormatError(
            f"{path} is of another schema.", seen=f"Schema {seen}; this version reads {SCHEMA}.", fix="Make it again."
        )
    if not isinstance(facts.get("hidden"), int) or not isinstance(facts.get("provenance"), dict):
        raise _refused(path, "Its header lacks hidden or provenance.")
    return facts


def _patch(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Patch:
    directions = tensors.pop("directions", None)
    places: dict[tuple[int, int | None], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".")
        layer, _, expert = place.removeprefix("L").partition(".e")
        known = place.startswith("L") and layer.isdecimal() and (expert.isdecimal() or not expert)
        if not known or kind not in DTYPES:
            raise _refused(path, f"It holds '{name[:80]}'.")
        if tensor.dtype != DTYPES[kind] or tensor.ndim != (1 if kind == "indices" else 2):
            raise _refused(path, f"'{name}' is {tensor.dtype} of {tensor.ndim} axes.")
        places.setdefault((int(layer), int(expert) if expert else None), {})[kind] = tensor
    if directions is not None and (directions.dtype != torch.float32 or directions.ndim != 2):
        raise _refused(path, f"'directions' is {directions.dtype} of {directions.ndim} axes.")
    parts = []
    for (layer, expert), mine in sorted(places.items(), key=lambda entry: place_order(entry[0])):
        if not {"indices", "hashes"} <= set(mine):
            raise _refused(path, f"Layer {layer} lacks its columns or their hashes.")
        parts.append(PatchPart(layer, expert, **mine))
    return Patch(facts["hidden"], tuple(parts), directions, facts["provenance"])


def _refused(path: Path, why: str) -> FormatError:
    return FormatError(f"{path} is no patch that can be used.", seen=why)
