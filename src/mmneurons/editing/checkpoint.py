"""A change that is learned in rounds is kept on disk after each, so that a run that was stopped can go on.

training = Training.resumed(path, key, vlm) or Training.begun(low_rank(vlm, columns, rank))
fit(training.adam, losses, steps); training.keep(path, key)
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from mmneurons.editing.low_rank import low_rank
from mmneurons.errors import FormatError, SettingError
from mmneurons.files import read_file, write_whole
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.vlm import VLM

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Of Adam, by their names in PyTorch."""
LARGEST = 2**33
"""Bytes of what is kept."""


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """These facts are the first line of the file; tensors follow, as safetensors."""

    key: str
    rounds: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str
    """Of the number of rounds and of all that follows."""


@dataclass(eq=False)
class Training:
    """A Training is a change that is being learned, with Adam's moments."""

    change: Deltas
    adam: torch.optim.Adam
    rounds: int = 0
    """Done."""

    @staticmethod
    def begun(change: Deltas) -> Training:
        """Begin a training at the change as it is."""
        for parameter in change.parameters:
            parameter.requires_grad_()
        return Training(change, torch.optim.Adam(change.parameters))

    def keep(self, path: Path, key: str) -> None:
        """Write the training to a file."""
        # Columns as well: to choose them anew would take as long as many rounds.
        held = {f"parameters.{k}": p.detach() for k, p in enumerate(self.change.parameters)}
        held |= {f"columns.{i}": mine for i, mine in self.change.columns.indices.items()}
        for k, parameter in enumerate(self.change.parameters):
            held |= {f"{name}.{k}": self.adam.state[parameter][name] for name in MOMENTS}
        tensors = to_bytes({name: value.cpu().contiguous() for name, value in held.items()})
        facts = _Facts(key, self.rounds, _digest(self.rounds, tensors))
        write_whole(path, msgspec.json.encode(facts) + b"\n" + tensors)

    @staticmethod
    def resumed(path: Path, key: str, vlm: VLM) -> Training | None:
        """Read the training that was kept; None where nothing was.

        Raises:
            SettingError: it is of another run.
            FormatError: it is damaged.
        """
        if not os.path.lexists(path):
            return None
        # The first line says what the rest is, and by a digest that it is whole.
        line, _, content = read_file(path, limit=LARGEST).partition(b"\n")
        try:
            facts = msgspec.json.decode(line, type=_Facts)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "Its first line does not say what made it.") from error
        # A key is made of all that a run is made of: going on with another run's numbers would make neither.
        if facts.key != key:
            raise SettingError(
                f"{path} is of another run: other images, settings or model.",
                fix="Delete it, or name another patch with --out.",
            )
        if _digest(facts.rounds, content) != facts.sha256:
            raise _damaged(path, "Its numbers are not as they were written.")
        # The digest may be right and the content none of ours: someone may have made the file.
        try:
            training = _rebuilt(from_bytes(content), vlm)
        except (SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
            raise _damaged(path, str(error)) from error
        training.rounds = facts.rounds
        return training


def _digest(rounds: int, tensors: bytes) -> str:
    return hashlib.sha256(f"{rounds}\n".encode() + tensors).hexdigest()


def _rebuilt(held: dict[str, Tensor], vlm: VLM) -> Training:
    """Rebuild the training from its tensors.

    Raises:
        ValueError: they are not those of a training of this model, or hold what is no number.
    """
    # Columns first: they say which shapes all else must have.
    indices = {int(name.removeprefix("columns.")): mine for name, mine in held.items() if name.startswith("columns.")}
    for i, mine in indices.items():
        rising = mine.dtype == torch.int64 and mine.ndim == 1 and len(mine) > 0 and bool((mine.diff() > 0).all())
        if not rising or mine[0] < 0 or mine[-1] >= vlm.anatomy.ffns[i].size:
            raise ValueError(f"columns.{i} are no columns of the model.")
    directions = held[f"parameters.{len(indices)}"]
    training = Training.begun(low_rank(vlm, Columns(vlm.anatomy, dict(sorted(indices.items()))), len(directions)))
    parameters = training.change.parameters
    # Adam's state is put in as if it had taken the steps itself.
    with torch.no_grad():
        for k, parameter in enumerate(parameters):
            moments = {name: _like(held, f"{name}.{k}", parameter) for name in MOMENTS}
            parameter.copy_(_like(held, f"parameters.{k}", parameter))
            training.adam.state[parameter] = {n: v if n == "step" else v.to(parameter) for n, v in moments.items()}
    return training


def _like(held: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """Return a tensor of the file, if it is finite and has the shape of a parameter, or is a count."""
    tensor, shape = held[name], torch.Size() if name.startswith("step") else parameter.shape
    if tensor.shape != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, or holds what is no number.")
    return tensor


def _damaged(path: Path, seen: str) -> FormatError:
    return FormatError(f"{path} is damaged.", seen=seen, fix="Delete it and run again.")
