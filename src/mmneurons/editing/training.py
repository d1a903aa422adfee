"""A change learned in rounds, and kept on disk after each, so that a run that was stopped goes on.

training = Training.resumed(path, key, vlm) or Training.begun(LowRank.none(vlm, columns, rank))
training.step(rate); training.keep(path, key)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from mmneurons.editing.columns import Columns
from mmneurons.editing.low_rank import LowRank
from mmneurons.errors import SettingError
from mmneurons.files import write_whole
from mmneurons.vlm.vlm import VLM

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""Of Adam, by their names in PyTorch."""


@dataclass(eq=False)
class Training:
    """A change on its way, and Adam's moments."""

    change: LowRank
    adam: torch.optim.Adam
    rounds: int = 0
    """Done."""

    @staticmethod
    def begun(change: LowRank) -> Training:
        """At the change as it is."""
        for parameter in change.parameters:
            parameter.requires_grad_()
        return Training(change, torch.optim.Adam(change.parameters))

    def step(self, rate: float) -> None:
        """Follow the gradients that the parameters have, and forget them."""
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()

    def keep(self, path: Path, key: str) -> None:
        """Write all of it to a file."""
        held = {f"parameters.{k}": p.detach() for k, p in enumerate(self.change.parameters)}
        held |= {f"columns.{i}": mine for i, mine in self.change.columns.indices.items()}
        for k, parameter in enumerate(self.change.parameters):
            held |= {f"{name}.{k}": self.adam.state[parameter][name] for name in MOMENTS}
        facts = {"training": json.dumps({"key": key, "rounds": self.rounds})}
        write_whole(path, to_bytes({name: value.cpu().contiguous() for name, value in held.items()}, metadata=facts))

    @staticmethod
    def resumed(path: Path, key: str, vlm: VLM) -> Training | None:
        """What was kept, where there is something.

        Raises:
            SettingError: it is of another run, or damaged.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["training"])
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{path} is damaged.", seen=str(error), fix="Delete it and run again.") from error
        if facts["key"] != key:
            raise SettingError(
                f"{path} is of another run: other images, settings or model.",
                fix="Delete it, or name another patch with --out.",
            )
        indices = {int(name.split(".")[1]): mine for name, mine in held.items() if name.startswith("columns.")}
        columns = Columns(vlm.anatomy, dict(sorted(indices.items())))
        training = Training.begun(LowRank.none(vlm, columns, held["parameters.0"].shape[1]))
        parameters = training.change.parameters
        with torch.no_grad():
            for k, parameter in enumerate(parameters):
                parameter.copy_(held[f"parameters.{k}"])
                moments = {name: held[f"{name}.{k}"] for name in MOMENTS}
                training.adam.state[parameter] = {n: v if n == "step" else v.to(parameter) for n, v in moments.items()}
        training.rounds = facts["rounds"]
        return training
