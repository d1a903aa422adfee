"""Edits by gradient, to compare with: fine-tuning of one `w_out`, LoRA on all of them, ROME, MEMIT.

Restated for captions: what is wanted is TARGET at the steps that write SOURCE.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.baselines.lessons import Lesson, Schedule, Task, learn, logits_of
from mmneurons.errors import ModelError, SettingError
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.vlm.age import editing
from mmneurons.vlm.anatomy.parts import Ffn
from mmneurons.vlm.columns import column_hashes
from mmneurons.vlm.context import frozen, hooked
from mmneurons.vlm.locking import restored
from mmneurons.vlm.vlm import VLM
from mmneurons.vlm.weights.stored import is_adapter

CHECK = 2
"""Steps of Adam between two looks at the captions."""
TURNED = 0.1
"""Fine-tuning and LoRA go on until -log p of the target is below this too: a few steps that turn more other images."""
FINETUNE = Schedule(rate=5e-3, steps=60, keep=100.0)
LORA = Schedule(rate=1e-3, steps=100, keep=3000.0)
RANK = 8
"""Of LoRA."""
ADAPTER = "rival"
"""What the adapter is called in PEFT."""
WRITE = Schedule(rate=0.1, steps=25, keep=0.0625)
"""How what a block shall write is learned (ROME and MEMIT); the rate in units of the stream behind the block."""
SURE = 0.01
"""It is learned when -log p of the target is below this in the mean. (Theirs: 0.05, which turned fewer captions.)"""
DECAY = 0.005
"""Weight of its mean square, in the same units."""
RIDGE = 0.1
"""Added to the second moment, in units of its mean diagonal: a reference has fewer steps than a block has columns."""
MEMIT_BLOCKS = 3
"""The last blocks, over which the change is spread."""
MEMIT_WEIGHT = 0.1
"""Of the reference's second moment, against that of the edit's own keys."""

Facts = dict[str, Any]
"""What a rival says of how it was made; `steps` of Adam among it."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA on every `w_out`, learned; attached for as long as it is applied."""

    names: tuple[str, ...]
    """Paths of the modules."""
    weights: Mapping[str, Tensor]
    """By their names in the model with the adapter, float32, on the CPU."""

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
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with editing(model):
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of names in transformers that PEFT still reads
                torch.manual_seed(seed)
                config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(names))
                inject_adapter_in_model(config, model, ADAPTER)
            yield {name: p for name, p in model.named_parameters() if f".{ADAPTER}." in name}
        finally:
            for name, module in own.items():
                model.set_submodule(name, module)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in asking)
            vars(model).pop("peft_config", None)


def finetune(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """All of one block's `w_out` by Adam, stopped when all images of the edit turn.

    The loss is -log p of TARGET where SOURCE is written, and the divergence from the unedited model at the other steps
    of the same captions and, 8 images at a time, of the reference's.

    Args:
        task: What is to be said where.
        block: Which; None: the last.

    Returns:
        The patch, of full deltas.

    Raises:
        SettingError: no such block.
        ModelError: it has no dense FFN.

    Source: the baseline FT of ROME (Meng et al., NeurIPS 2022), which bounds the change of each weight where this one
        bounds what is said elsewhere.
    """
    vlm = task.vlm
    layer = len(vlm.anatomy.blocks) - 1 if block is None else block
    _, ffn = dense_ffn(vlm, layer)
    delta = torch.zeros(vlm.anatomy.hidden, ffn.n_neurons, device=vlm.device, requires_grad=True, dtype=torch.float32)
    turn = all_turn(task)

    def done(missing: float) -> bool:
        with added(ffn.module, delta.detach()):
            return turn(missing)

    with frozen(vlm.model):
        steps = learn(task, [delta], lambda lesson: added(ffn.module, delta), FINETUNE, done=done)
    part = whole(vlm, layer, deltas=delta.detach().T.contiguous().cpu())
    return Patch(vlm.anatomy.hidden, (part,)), {"block": layer, "steps": steps, "schedule": asdict(FINETUNE)}


def lora(task: Task, block: int | None) -> tuple[Adapter, Facts]:
    """LoRA on every `w_out`, learned as `finetune` learns; `block` does not count.

    Raises:
        SettingError: PEFT is missing.
        ModelError: a block has no dense FFN, or the model has adapters already.

    Source: LoRA (Hu et al., ICLR 2022), by PEFT; rank 8, alpha 16, no dropout.
    """
    vlm = task.vlm
    names = tuple(dense_ffn(vlm, layer)[1].name for layer in range(len(vlm.anatomy.blocks)))
    _ = task.lessons, task.reminders  # of the model without the adapter
    with attached(vlm, names, task.seed) as parameters:
        steps = learn(task, list(parameters.values()), lambda lesson: nullcontext(), LORA, done=all_turn(task))
        weights = {name: parameter.detach().float().cpu().clone() for name, parameter in parameters.items()}
    return Adapter(names, weights), {"rank": RANK, "steps": steps, "schedule": asdict(LORA)}


def rome(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """One block's `w_out` W becomes W + (v - W k) (C^-1 k)^T / (k^T C^-1 k).

    k is the mean activation where TARGET is wanted, v what the block must write there for the model to say it (found by
    gradient), C the second moment of activations at steps that are to stay. Several forms of TARGET (cat, cats), or
    tokens of it, have a key each, and all are carried exactly.

    Args:
        task: What is to be said where.
        block: Which; None: the last but one.

    Returns:
        The patch: coefficients of one direction for each form.

    Raises:
        SettingError: no such block.
        ModelError: it has no dense FFN.

    Source: ROME (Meng et al., NeurIPS 2022), section 3.1. Theirs takes the key at the last token of a subject, where a
        caption has none: ours is the step that writes the word. Their C is of 100,000 tokens of text.
    """
    vlm = task.vlm
    layer = max(0, len(vlm.anatomy.blocks) - 2) if block is None else block
    i, ffn = dense_ffn(vlm, layer)
    change, of, steps = _learn_writes(task, ffn.module, layer)
    fired = _at_places(task, ffn.module, inputs=True)
    keys = torch.stack([fired[of == j].mean(0) for j in range(len(change))])
    coefficients = carried(keys, _moment(task, i)).float()
    patch = Patch(vlm.anatomy.hidden, (whole(vlm, layer, coefficients=coefficients),), change)
    return patch, {"block": layer, "steps": steps, "schedule": asdict(WRITE), "ridge": RIDGE}


def memit(task: Task, block: int | None) -> tuple[Patch, Facts]:
    """Block after block writes its share of what is still missing from the stream behind the last of them.

    What the stream shall be is found by gradient. Block l, of those up to L, adds R K^T (w C + K K^T)^-1 to its
    `w_out`: K are its activations at each place where TARGET is wanted, R what is missing there / (L - l + 1), both
    measured with the blocks below it changed already.

    Args:
        task: What is to be said where.
        block: The last that changes; None: the model's last.

    Returns:
        The patch: a part for each block, as many directions as places and blocks.

    Raises:
        SettingError: no such block.
        ModelError: one of them has no dense FFN.

    Source: MEMIT (Meng et al., ICLR 2023), section 4.3, with each place of the edit's captions for one of their facts.
    """
    vlm = task.vlm
    last = len(vlm.anatomy.blocks) - 1 if block is None else block
    layers = range(max(0, last - MEMIT_BLOCKS + 1), last + 1)
    dense_ffn(vlm, last)  # there is such a block
    stream = vlm.anatomy.blocks[last].module
    change, of, steps = _learn_writes(task, stream, last)
    goal = _at_places(task, stream, inputs=False) + change[of]
    found: list[tuple[int, Tensor, Tensor]] = []

    @restored
    def so_far() -> Iterator[None]:
        with ExitStack() as stack:
            for layer, c, values in found:
                module = dense_ffn(vlm, layer)[1].module
                stack.enter_context(added(module, (c @ values).T.to(vlm.device)))
            yield

    for layer in layers:
        i, ffn = dense_ffn(vlm, layer)
        missing = goal - _at_places(task, stream, inputs=False, within=so_far)
        keys = _at_places(task, ffn.module, inputs=True, within=so_far)
        c = spread(keys, _moment(task, i), MEMIT_WEIGHT).float()
        found.append((layer, c, missing / (last - layer + 1)))
    n = len(goal)
    parts = []
    for k, (layer, c, _) in enumerate(found):
        coefficients = torch.zeros(len(c), n * len(found), dtype=torch.float32)
        coefficients[:, k * n : (k + 1) * n] = c
        parts.append(whole(vlm, layer, coefficients=coefficients))
    patch = Patch(vlm.anatomy.hidden, tuple(parts), torch.cat([values for _, _, values in found]))
    facts = {"blocks": list(layers), "weight": MEMIT_WEIGHT, "ridge": RIDGE}
    return patch, {**facts, "steps": steps, "schedule": asdict(WRITE)}


def carried(keys: Float[Tensor, "g neurons"], moment: Float[Tensor, "neurons neurons"]) -> Float[Tensor, "neurons g"]:
    """The c with keys @ c = 1 that does least to activations of this second moment: C^-1 K (K^T C^-1 K)^-1.

    Args:
        keys: Activations, linearly independent.
        moment: Positive definite; float64.

    Returns:
        float64. Added to W^T, `c @ values` makes W map key j to what it was plus value j.

    Source: ROME (Meng et al., NeurIPS 2022), equation 2, there for one key.
    """
    weighed = torch.linalg.solve(moment, keys.T.double())
    return weighed @ torch.linalg.inv(keys.double() @ weighed)


def spread(
    keys: Float[Tensor, "g neurons"], moment: Float[Tensor, "neurons neurons"], weight: float
) -> Float[Tensor, "neurons g"]:
    """(w C + K^T K)^-1 K^T: `carried`, but for as much as the moment of everything else bears.

    Source: MEMIT (Meng et al., ICLR 2023), equation 14; w is here in units of the number of keys.
    """
    rows = keys.double()
    return torch.linalg.solve(weight * len(rows) * moment + rows.T @ rows, rows.T)


@restored
def added(module: nn.Module, delta: Float[Tensor, "hidden neurons"]) -> Iterator[None]:
    """A module gives what its weight and `delta` together would give."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].to(delta.dtype) @ delta.T).to(output.dtype)

    with hooked([partial(module.register_forward_hook, hook)]):
        yield


def dense_ffn(vlm: VLM, layer: int) -> tuple[int, Ffn]:
    """The one dense FFN of a block, and its number.

    Raises:
        SettingError: there is no such block.
        ModelError: the block has experts, or a gate behind its `w_out`.
    """
    n_blocks = len(vlm.anatomy.blocks)
    if not 0 <= layer < n_blocks:
        raise SettingError(f"The model has {n_blocks} blocks.", seen=f"block {layer}")
    found = [(i, ffn) for i, ffn in enumerate(vlm.anatomy.ffns) if ffn.layer == layer]
    if len(found) != 1 or found[0][1].n_experts is not None or found[0][1].gate is not None:
        raise ModelError(
            f"Block {layer} has no single dense FFN.",
            seen=", ".join(ffn.name for _, ffn in found) or "none",
            fix="This baseline is defined for dense FFNs only; choose another block.",
        )
    return found[0]


def whole(vlm: VLM, layer: int, **change: Tensor) -> PatchPart:
    """A part that changes all columns of a block's FFN: `deltas` or `coefficients`."""
    indices = torch.arange(dense_ffn(vlm, layer)[1].n_neurons)
    hashes = column_hashes(ledger_of(vlm).pristine((layer, None), indices))
    return PatchPart(layer, None, indices, hashes, **change)


def all_turn(task: Task) -> Callable[[float], bool]:
    """For `learn`, to stop when TARGET is likely and all images of the edit turn; captions are generated for that."""
    taken = 0

    def done(missing: float) -> bool:
        nonlocal taken
        taken += 1
        return taken % CHECK == 0 and missing < TURNED and task.turned() == 1

    return done


def _moment(task: Task, i: int) -> Tensor:
    """Of one FFN's activations at the steps that are to stay, with a ridge; (neurons, neurons), float64."""
    rows = torch.cat([steps.activations[i] for steps in task.kept]).double()
    moment = rows.T @ rows / len(rows)
    return moment + max(RIDGE * float(moment.diagonal().mean()), 1e-12) * torch.eye(len(moment), dtype=moment.dtype)


def _at_places(
    task: Task, module: nn.Module, *, inputs: bool, within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Tensor:
    """What a module is given, or gives, where TARGET is wanted, lesson after lesson; float32, on the CPU."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(args[0] if inputs else output if isinstance(output, Tensor) else output[0])

    parts = []
    for lesson in task.lessons:
        with torch.no_grad(), within(), hooked([partial(module.register_forward_hook, hook)]):
            logits_of(task.vlm, lesson)
        parts.append(lesson.picked(found[-1], lesson.wanted).float().cpu())
    return torch.cat(parts)


def _learn_writes(task: Task, module: nn.Module, layer: int) -> tuple[Tensor, Tensor, int]:
    """What a module must write more where each token is wanted, for the model to say it: one vector for each token.

    Returns:
        (tokens, hidden), float32; for each place, which of the tokens is wanted there; steps of Adam taken.
    """
    tokens, of = torch.cat([lesson.wanted[:, 2] for lesson in task.lessons]).unique(return_inverse=True)
    stream = _at_places(task, task.vlm.anatomy.blocks[layer].module, inputs=False)
    # In units of the stream behind the block: models differ in these by orders of magnitude.
    unit = stream.pow(2).mean().sqrt().item()
    change = torch.zeros(len(tokens), stream.shape[1], device=task.vlm.device, requires_grad=True, dtype=torch.float32)

    @restored
    def within(lesson: Lesson) -> Iterator[None]:
        mine = torch.searchsorted(tokens, lesson.wanted[:, 2].contiguous()).to(change.device)

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            whole = output if isinstance(output, Tensor) else output[0]
            rows = whole.reshape(lesson.n_rows, -1, whole.shape[-1])
            steps = rows.shape[1] + lesson.wanted[:, 1].to(rows.device) - lesson.n_steps
            places = (lesson.wanted[:, 0].to(rows.device), steps)
            new = rows.index_put(places, unit * change[mine].to(rows), accumulate=True).view_as(whole)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        with hooked([partial(module.register_forward_hook, hook)]):
            yield

    def penalty() -> Tensor:
        return DECAY * change.pow(2).mean()

    with frozen(task.vlm.model):
        steps = learn(
            task, [change], within, WRITE, reminders=False, done=lambda missing: missing < SURE, penalty=penalty
        )
    return unit * change.detach().cpu(), of, steps
