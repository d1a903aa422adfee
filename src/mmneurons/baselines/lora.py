"""LoRA on every `w_out`, to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmneurons.baselines.applied_only import AppliedOnly
from mmneurons.baselines.task import Facts, Schedule, Task, dense_ffn, learn
from mmneurons.errors import ModelError, SettingError
from mmneurons.vlm.age import editing
from mmneurons.vlm.locking import restored
from mmneurons.vlm.vlm import VLM
from mmneurons.vlm.weights.stored import is_adapter

LORA = Schedule(rate=1e-3, steps=100, keep=3000.0)
RANK = 8
ADAPTER = "rival"
"""What the adapter is called in PEFT."""


@dataclass(frozen=True, eq=False)
class Adapter(AppliedOnly):
    """LoRA on every `w_out`, learned; attached for as long as it is applied."""

    changes = "the model by LoRA's matrices beside its weights"

    names: tuple[str, ...]
    """Paths of the modules."""
    weights: Mapping[str, Tensor]
    """By their names in the model with the adapter, float32, on the CPU."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What made it, as plain data."""

    @restored
    def applied(self, vlm: VLM) -> Iterator[Adapter]:
        """Attach, and take away whatever happens.

        The anatomy goes on naming the base layers, through which the model still runs: what their neurons do is seen
        by `record`, what LoRA adds to their columns is not.
        """
        with attached(vlm, self.names, 0) as parameters:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self.weights[name])
            yield self


def adapted(vlm: VLM) -> tuple[str, ...]:
    """Name the modules that LoRA is put on, every `w_out`.

    Raises:
        ModelError: a block has no dense FFN.
    """
    return tuple(dense_ffn(vlm, layer)[1].name for layer in range(len(vlm.anatomy.blocks)))


@restored
def attached(vlm: VLM, names: Sequence[str], seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """New LoRA on these modules, which does nothing yet; its parameters by name. Afterwards nothing is left of it."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingError("LoRA needs PEFT.", fix='pip install "mmneurons[peft]"') from error
    model = vlm.model
    own = {name: model.get_submodule(name) for name in names}
    if any(is_adapter(module) for module in own.values()) or hasattr(model, "peft_config"):
        raise ModelError("The model has adapters already.", fix="Merge them first: model.merge_and_unload()")
    # What PEFT changes besides: modules, which parameters ask for gradients, an attribute of the model.
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with editing(model):
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of names in transformers that PEFT still reads
                torch.manual_seed(seed)
                config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(names))
                inject_adapter_in_model(config, model, ADAPTER)
            mine = {name: p for name, p in model.named_parameters() if f".{ADAPTER}." in name}
            for parameter in mine.values():
                # PEFT gives them the dtype of the model: in half precision Adam's steps are lost, or are no numbers.
                parameter.data = parameter.data.float()
            yield mine
        finally:
            for name, module in own.items():
                model.set_submodule(name, module)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in asking)
            vars(model).pop("peft_config", None)


def lora(task: Task, block: int | None) -> tuple[Adapter, Facts]:
    """LoRA on every `w_out`, learned as `finetune` learns; `block` does not count.

    Raises:
        SettingError: PEFT is missing.
        ModelError: a block has no dense FFN, or the model has adapters already.

    Source: LoRA (Hu et al., ICLR 2022), by PEFT; rank 8, alpha 16, no dropout.
    """
    vlm = task.vlm
    names = adapted(vlm)
    lessons = task.lessons(0)  # of the model without the adapter
    # Its parameters act by being in the model; afterwards they are taken out with it.
    with attached(vlm, names, task.seed) as parameters:
        steps = learn(task, lessons, list(parameters.values()), LORA, stop=task.turned)
        weights = {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}
    return Adapter(names, weights), {"rank": RANK, "steps": steps, "schedule": asdict(LORA)}
