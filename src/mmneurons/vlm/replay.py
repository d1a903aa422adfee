"""What would the model have said next, had some neurons been silent? Many such questions in few short passes.

One answer is generated; at the steps asked for, what enters every block is kept, and the key-value cache of everything
before. A question about neurons then runs the blocks from theirs upwards, for one position only, a row for each set of
neurons: the prompt, and the blocks below, are never run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from mmneurons.errors import ModelError
from mmneurons.vlm import experts, weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.recording import record
from mmneurons.vlm.vlm import VLM, Answers, Inputs

AGREE = 0.02
"""A replay of nothing changed may miss the model's own logits by this share of the largest, in 16 bits."""


@dataclass(eq=False)
class Replay:
    """One step of an answer, ready to be run again from any block upwards.

    Neurons are counted in slots, FFN after FFN, as `Moments` counts them: of experts, those asked at this position.
    """

    anatomy: Anatomy
    token_id: int
    """What the model said here."""
    logits: Float[Tensor, "vocab"]
    """As the model's blocks gave them, float32."""
    activations: list[Float[Tensor, "slots"]]
    """Per FFN, what enters `w_out`, float32 (before the gate of shared experts)."""
    experts: list[Int[Tensor, "k"] | None]
    """Per FFN: the experts that the slots belong to."""
    _calls: list[tuple[tuple, dict[str, Any]]]
    """What each block was called with."""

    @cached_property
    def slot_starts(self) -> Int[Tensor, "ffns"]:
        """Where each FFN's slots begin when all are laid end to end."""
        return torch.tensor([0, *(len(part) for part in self.activations)]).cumsum(0)[:-1]

    @property
    def n_slots(self) -> int:
        """Of all FFNs together."""
        return sum(len(part) for part in self.activations)

    def without(
        self,
        sets: Sequence[Int[Tensor, "_"]],
        values: Float[Tensor, "slots"] | None = None,
        *,
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "sets vocab"]:
        """Logits of the next token with each set of neurons silent at this position.

        Args:
            sets: Slots; each set is a question of its own.
            values: What activations are set to, for all slots, instead of zero: for mean ablation.
            batch_size: How many questions are run at once.
            progress: Called with the number of questions answered after each pass.

        Returns:
            float32, on the CPU.
        """
        places = [self._places(slots) for slots in sets]
        lowest = [
            min((self.anatomy.ffns[i].layer for i in place), default=len(self.anatomy.blocks)) for place in places
        ]
        found = torch.empty(len(sets), len(self.logits))
        done = 0
        for layer, group in groupby(sorted(range(len(sets)), key=lowest.__getitem__), key=lowest.__getitem__):
            for rows in torch.tensor(list(group)).split(batch_size):
                chosen = [places[row] for row in rows.tolist()]
                found[rows] = self._run(min(layer, len(self.anatomy.blocks) - 1), chosen, values).cpu()
                done += len(rows)
                if progress is not None:
                    progress(done)
        return found

    def _places(self, slots: Int[Tensor, "_"]) -> dict[int, Int[Tensor, "_"]]:
        """Slots by FFN, counted inside it."""
        slots = slots.cpu()
        ffns = torch.bucketize(slots, self.slot_starts, right=True) - 1
        return {i: slots[ffns == i] - self.slot_starts[i] for i in ffns.unique().tolist()}

    @torch.inference_mode()
    def _run(
        self, layer: int, places: list[dict[int, Int[Tensor, "_"]]], values: Float[Tensor, "slots"] | None
    ) -> Float[Tensor, "rows vocab"]:
        """The blocks from `layer` on, a row for each of `places`."""
        n_rows = len(places)
        shared: dict[int, Any] = {}
        # The norm before the head can be the last one of the last block (post-LN): then it has run already.
        entered: list[Tensor] = []
        hooks = [self.anatomy.norm_module.register_forward_pre_hook(lambda _, args: entered.append(args[0]))]
        try:
            for i in range(len(self.anatomy.ffns)):
                if any(i in place for place in places):
                    silent = torch.zeros(n_rows, len(self.activations[i]), dtype=torch.bool)
                    for row, place in enumerate(places):
                        silent[row, place.get(i, torch.tensor([], dtype=torch.long))] = True
                    start = int(self.slot_starts[i])
                    wanted = None if values is None else values[start : start + silent.shape[1]]
                    hooks.append(self._silence(i, silent, wanted))
            hidden: Any = None
            for k in range(layer, len(self.anatomy.blocks)):
                args, kwargs = self._calls[k]
                args, kwargs = _repeated(args, n_rows, shared), _repeated(kwargs, n_rows, shared)
                if hidden is not None and args:
                    args = (hidden, *args[1:])
                elif hidden is not None:
                    kwargs["hidden_states"] = hidden
                output = self.anatomy.blocks[k].module(*args, **kwargs)
                hidden = output if isinstance(output, Tensor) else output[0]
        finally:
            for hook in hooks:
                hook.remove()
        return self.anatomy.logits((entered or [hidden])[-1][:, -1])

    def _silence(self, i: int, silent: Bool[Tensor, "rows slots"], values: Tensor | None) -> Any:
        """A hook on one FFN that sets the activations of some neurons, others in each row, at the last position."""
        ffn, n_rows = self.anatomy.ffns[i], len(silent)
        if ffn.n_experts is None:

            def dense(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                given = args[0].clone()
                last = given.view(n_rows, -1, given.shape[-1])[:, -1]
                new = torch.zeros_like(last) if values is None else values.to(last).expand_as(last)
                last.copy_(torch.where(silent.to(last.device), new, last))
                return given, *args[1:]

            return ffn.module.register_forward_pre_hook(dense)
        of = self.experts[i]
        assert of is not None
        slots = torch.nonzero(silent.any(0)).squeeze(1)
        width, mine = ffn.n_neurons, silent[:, slots]
        chosen = of.cpu()[slots // width] * width + slots % width
        columns = torch.stack(
            [weights.columns(ffn.module, (n % width)[None], expert=int(n) // width)[0] for n in chosen.unbind()]
        )

        def fused(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            given = (*args, *kwargs.values())
            routed = experts.routed(module, given, n_rows)
            last = experts.Routed(*(None if part is None else part[:, -1:] for part in routed))  # pyright: ignore[reportArgumentType]
            device = output.device
            fired = experts.activations(module, last)
            fired = experts.of_neurons(fired, last.experts, chosen.to(device), width)[:, 0].float()
            asked = (last.experts[:, 0, :, None] == chosen.to(device) // width).any(1)
            new = 0.0 if values is None else values[slots].to(device) * asked
            change = ((new - fired) * mine.to(device))[..., None] * columns.to(device)  # rows, chosen, hidden
            output = output.clone()
            if len(given) == 1:  # every token for every expert, one expert after the other
                whole = output.view(int(ffn.n_experts or 1), n_rows, -1, output.shape[-1])
                for expert in (chosen // width).unique().tolist():
                    whole[expert, :, -1] += change[:, chosen // width == expert].sum(1).to(output.dtype)
            else:
                output.view(n_rows, -1, output.shape[-1])[:, -1] += change.sum(1).to(output.dtype)
            return output

        return ffn.module.register_forward_hook(fused, with_kwargs=True)


def replays(vlm: VLM, inputs: Inputs, steps: Sequence[int]) -> tuple[Answers, list[Replay]]:
    """Generate the answer to one prompt and keep what it takes to run some of its steps again.

    Args:
        vlm: The model.
        inputs: One encoded prompt (one row), from `VLM.encode`.
        steps: Which generated tokens, counted from 0.

    Returns:
        The answer up to the last of `steps`, and one Replay each.

    Raises:
        ModelError: if the answer ends before a step, or the blocks, called again, do not give what they gave.
    """
    anatomy = vlm.anatomy
    catcher = _Catcher(set(steps))
    hooks = [
        block.module.register_forward_pre_hook(catcher.hook(layer), with_kwargs=True)
        for layer, block in enumerate(anatomy.blocks)
    ]
    try:
        with record(anatomy) as recording:
            answers = vlm.generate(inputs, max(steps) + 1)
    finally:
        for hook in hooks:
            hook.remove()
    said = answers.token_ids[0]
    if len(said) <= max(steps):
        raise ModelError(f"The answer has {len(said)} tokens: there is no step {max(steps)} to run again.")
    made = []
    for step in steps:
        replay = Replay(
            anatomy,
            said[step],
            anatomy.logits(recording.residual[step][:1, -1])[0].cpu(),
            [parts[step][0, -1].float().cpu() for parts in recording.raw],
            [parts[step][0, -1].cpu() if parts else None for parts in recording.experts],
            catcher.caught[step],
        )
        _check(replay)
        made.append(replay)
    return answers, made


@dataclass(frozen=True)
class _Shared:
    """Something that blocks pass on to each other and write into, such as a cache, as it was before a block ran."""

    key: int
    """One thing, wherever it is passed."""
    content: Any


class _Catcher:
    """Keeps what the blocks are called with at some steps of `generate`."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.caught: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        self._step = -1
        self._caches: dict[int, _Shared] = {}

    def hook(self, layer: int):
        """For the block of this number."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if layer == 0:
                self._step += 1
                self._caches.clear()
            if self._step in self.steps:
                self.caught.setdefault(self._step, []).append((self._copied(args), self._copied(kwargs)))

        return hook

    def _copied(self, value: Any) -> Any:
        """Tensors copied: models write into some of theirs."""
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, tuple | list):
            return type(value)(self._copied(part) for part in value)
        if type(value) is dict:
            return {name: self._copied(part) for name, part in value.items()}
        if isinstance(value, Cache):  # large: copied once, before the first block adds to it
            if id(value) not in self._caches:
                self._caches[id(value)] = _Shared(id(value), copy.deepcopy(value))
            return self._caches[id(value)]
        if isinstance(value, MutableMapping):
            return _Shared(id(value), copy.deepcopy(value))
        return value


def _check(replay: Replay) -> None:
    """Refuse a model whose blocks do more than their arguments say."""
    again = replay._run(0, [{}], None)[0].cpu()
    known = replay.logits > torch.finfo(torch.float32).min / 2
    error = (again - replay.logits)[known].abs().max() / replay.logits[known].abs().max()
    if not error < AGREE:
        raise ModelError(
            "The blocks of this model, called again, do not give what they gave: single neurons cannot be silenced.",
            seen=f"The logits differ by {error:.1%} of the largest.",
            fix="Report it, with the type of model.",
        )


def _repeated(value: Any, n_rows: int, shared: dict[int, Any]) -> Any:
    """What belongs to one row, for `n_rows`; `shared` are the things already made for this run."""
    if isinstance(value, Tensor):
        return value.expand(n_rows, *value.shape[1:]).clone() if value.ndim > 1 and len(value) == 1 else value
    if isinstance(value, tuple | list):
        return type(value)(_repeated(part, n_rows, shared) for part in value)
    if type(value) is dict:
        return {name: _repeated(part, n_rows, shared) for name, part in value.items()}
    if isinstance(value, _Shared):
        if value.key not in shared:
            shared[value.key] = _widened(copy.deepcopy(value.content), n_rows)
        return shared[value.key]
    return value


def _widened(state: Any, n_rows: int) -> Any:
    """A cache of one row, for `n_rows`, in place: every tensor in it, of attention and of other mixers alike."""
    if isinstance(state, Tensor | tuple | dict):
        return _repeated(state, n_rows, {})
    if isinstance(state, list):
        return [_widened(part, n_rows) for part in state]
    if isinstance(state, MutableMapping):
        for name, part in state.items():
            state[name] = _widened(part, n_rows)
    elif type(state).__module__.startswith("transformers."):
        for name, part in vars(state).items():
            setattr(state, name, _widened(part, n_rows))
    return state
