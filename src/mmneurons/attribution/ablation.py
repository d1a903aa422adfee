"""Ablation: the model's next token with some neurons silenced (zero-ablated), for many sets of neurons in few passes.

One answer is generated. At the steps asked for, what enters every block is kept, with the key-value cache of all that
came before. Each set of neurons is then one row of a batch that runs the blocks from theirs upwards, for one position
only: the prompt, and the blocks below, are never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmneurons.errors import ModelError
from mmneurons.neurons import Neuron
from mmneurons.vlm import experts, weights
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.asking import Recorder
from mmneurons.vlm.block_calls import Catcher, repeated
from mmneurons.vlm.context import hooked
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.hooks.recording import Recording, last_position, record
from mmneurons.vlm.locking import alone
from mmneurons.vlm.vlm import VLM, Answers, Inputs


@dataclass(frozen=True, eq=False)
class Effects:
    """The effect of ablating each set of neurons: how far the token falls; float32, on the CPU, positive for a fall."""

    logit: Float[Tensor, "sets"]
    """The fall of the token's logit."""
    logprob: Float[Tensor, "sets"]
    """The fall of its log probability, in nats."""


@dataclass(eq=False)
class Replay:
    """One step of an answer, ready to be run again from any block upwards.

    Neurons are counted in slots, FFN after FFN, as `Trace` counts them: of a mixture of experts, only the neurons of
    the experts that were asked at this position have slots.
    """

    anatomy: Anatomy
    token_id: int
    """The token that the model generated at this step."""
    logits: Float[Tensor, "vocab"]
    """The logits of this step, from the residual stream as the model's blocks left it, float32."""
    activations: list[Float[Tensor, "_"]]
    """For each FFN the activations, the input of `w_out`, float32 (before the gate of shared experts)."""
    experts: list[Int[Tensor, "_"] | None]
    """For each FFN the experts that the slots belong to; None where it is dense."""
    _calls: list[tuple[tuple, dict[str, Any]]]
    """For each block the arguments that it was called with."""

    @cached_property
    def slot_starts(self) -> Int[Tensor, "ffns"]:
        """The first slot of each FFN, when the slots of all FFNs are laid end to end."""
        return torch.tensor([0, *(len(part) for part in self.activations)]).cumsum(0)[:-1]

    @property
    def n_slots(self) -> int:
        """The number of slots of all FFNs together."""
        return sum(len(part) for part in self.activations)

    def place(self, slot: int) -> tuple[int, int]:
        """The FFN that a slot belongs to, and the neuron's number there, counted through all experts."""
        i = int(torch.bucketize(torch.tensor(slot), self.slot_starts, right=True)) - 1
        # Slots count only the experts asked, one after the other; the neuron's number counts all experts of the FFN.
        of, inside, width = self.experts[i], slot - int(self.slot_starts[i]), self.anatomy.ffns[i].n_neurons
        return i, inside if of is None else int(of[inside // width]) * width + inside % width

    def neuron(self, slot: int) -> Neuron:
        """The neuron that a slot stands for."""
        i, neuron = self.place(slot)
        return self.anatomy.ffns[i].neuron(neuron)

    def without(
        self,
        sets: Sequence[Int[Tensor, "_"]],
        values: Float[Tensor, "slots"] | None = None,
        *,
        batch_size: int = 256,
    ) -> Float[Tensor, "sets vocab"]:
        """Compute the logits of the next token with each set of neurons ablated at this position.

        Args:
            sets: Sets of slots; each set is ablated by itself.
            values: What activations are set to, for all slots, instead of zero: for mean ablation.
            batch_size: How many sets are run at once.

        Returns:
            float32, on the CPU.
        """
        found = torch.empty(len(sets), len(self.logits), dtype=torch.float32)
        for rows, streams in self.streams(sets, values, batch_size=batch_size):
            found[rows] = self.anatomy.logits(streams).cpu()
        return found

    def effects(
        self,
        sets: Sequence[Int[Tensor, "_"]],
        values: Float[Tensor, "slots"] | None = None,
        *,
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> Effects:
        """Compute how far the token's logit and log probability fall with each set of neurons ablated.

        Args:
            sets: Sets of slots; each set is ablated by itself.
            values: What activations are set to, for all slots, instead of zero: for mean ablation.
            batch_size: How many sets are run at once.
            progress: Called after each pass with the number of sets that are done.

        Returns:
            One number for each set; 0 for an empty set.
        """
        logit, logprob = torch.empty(len(sets), dtype=torch.float32), torch.empty(len(sets), dtype=torch.float64)
        done = 0
        for rows, streams in self.streams(sets, values, batch_size=batch_size):
            logits = self.anatomy.logits(streams)
            logit[rows] = logits[:, self.token_id].cpu()
            logprob[rows] = log_p(logits, self.token_id).cpu()
            done += len(rows)
            if progress is not None:
                progress(done)
        # Compared with the same blocks run again, not with the logits of generation, which differ by rounding.
        return Effects(self.base[self.token_id] - logit, (log_p(self.base, self.token_id) - logprob).float())

    @cached_property
    def base(self) -> Float[Tensor, "vocab"]:
        """The logits of the blocks run again with nothing ablated: what effects are compared with."""
        return self.without([torch.tensor([], dtype=torch.long)])[0]

    def streams(
        self,
        sets: Sequence[Int[Tensor, "_"]],
        values: Float[Tensor, "*sets slots"] | None = None,
        *,
        batch_size: int = 256,
    ) -> Iterator[tuple[Int[Tensor, "rows"], Float[Tensor, "rows hidden"]]]:
        """Yield the numbers and the last residual stream of some sets at a time, those that share their lowest block.

        No block below that one is run. An empty set runs the last block alone. Arguments are those of `without`, but
        that each set may have values of its own.
        """
        places = [self._places(slots) for slots in sets]
        last = len(self.anatomy.blocks) - 1
        lowest = [min((self.anatomy.ffns[i].layer for i in place), default=last) for place in places]
        # groupby joins neighbours only: sets are sorted by their lowest block first, and come back out of order.
        for layer, group in groupby(sorted(range(len(sets)), key=lowest.__getitem__), key=lowest.__getitem__):
            for rows in torch.tensor(list(group)).split(batch_size):
                own = values if values is None or values.ndim == 1 else values[rows]
                yield rows, self._silent(layer, [places[row] for row in rows.tolist()], own)

    def _places(self, slots: Int[Tensor, "_"]) -> dict[int, Int[Tensor, "_"]]:
        """The slots of one set by the number of their FFN, counted from the FFN's own first slot."""
        slots = slots.cpu()
        ffns = torch.bucketize(slots, self.slot_starts, right=True) - 1
        return {i: slots[ffns == i] - self.slot_starts[i] for i in ffns.unique().tolist()}

    def gradients(self, layer: int | None = None, scales: Float[Tensor, "n"] | None = None) -> Float[Tensor, "slots"]:
        """Compute the derivatives of the token's log probability by the activations at this position.

        Args:
            layer: All activations of this block are multiplied by each of `scales`, and its derivatives averaged over
                them (integrated gradients); those of other blocks are zero. None: all blocks, as they are.
            scales: Numbers from 0 to 1, a row of the batch for each; None: 1 alone.

        Returns:
            float32, on the CPU.
        """
        scales = torch.ones(1, dtype=torch.float32) if scales is None else scales
        # Zeros are added to the activations: the derivative by what is added is the derivative by the activation.
        asked = [i for i, ffn in enumerate(self.anatomy.ffns) if layer is None or ffn.layer == layer]
        added = {
            i: torch.zeros(len(scales), len(self.activations[i]), requires_grad=True, dtype=torch.float32)
            for i in asked
        }
        # Linear attention (Qwen 3.5) writes into its state, which autograd would refuse to have saved.
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            changes = [partial(self._raise, i, values, scales) for i, values in added.items()]
            logits = self.anatomy.logits(self._run(layer or 0, len(scales), changes), grad=True)
            # Rows do not read one another, so that the gradient of the sum holds the gradient of each row.
            total = log_p(logits, self.token_id).sum()
            found = dict(zip(added, torch.autograd.grad(total, list(added.values())), strict=True))
        zeros = (torch.zeros(len(part), dtype=torch.float32) for part in self.activations)
        return torch.cat([found[i].mean(0) if i in found else zero for i, zero in enumerate(zeros)])

    def _silent(
        self, layer: int, places: list[dict[int, Int[Tensor, "_"]]], values: Float[Tensor, "*rows slots"] | None
    ) -> Float[Tensor, "rows hidden"]:
        """Compute a residual stream for each of `places`, whose neurons are ablated; none lies below block `layer`."""
        # One hook for each FFN in question, with a mask of its slots for each row: rows ablate different neurons.
        changes = []
        for i in sorted({i for place in places for i in place}):
            silent = torch.zeros(len(places), len(self.activations[i]), dtype=torch.bool)
            for row, place in enumerate(places):
                if i in place:
                    silent[row, place[i]] = True
            start = int(self.slot_starts[i])
            new = None if values is None else values[..., start : start + silent.shape[1]]
            changes.append(partial(self._silence, i, silent, new))
        with torch.inference_mode():
            return self._run(layer, len(places), changes)

    def _run(
        self, layer: int, n_rows: int, changes: Sequence[Callable[[], RemovableHandle]]
    ) -> Float[Tensor, "rows hidden"]:
        """Run the blocks from `layer` on, up to what the final norm reads; each of `changes` sets a hook on an FFN.

        The blocks are called with what was kept, repeated for `n_rows`; each is given the output of the one before.
        """
        # One memory of what blocks share, such as the cache: it is widened once, and every block writes into that one.
        shared: dict[int, Any] = {}
        # The norm before the head can be the last one of the last block (post-LN): then it has run already.
        entered: list[Tensor] = []
        watch = partial(self.anatomy.norm_module.register_forward_pre_hook, lambda _, args: entered.append(args[0]))
        hidden: Any = None
        with alone(self.anatomy.owner), hooked([watch, *changes]):
            for k in range(layer, len(self.anatomy.blocks)):
                args, kwargs = self._calls[k]
                args, kwargs = repeated(args, n_rows, shared), repeated(kwargs, n_rows, shared)
                # The first block that runs keeps its own input; the others get the residual stream, by place or name.
                if hidden is not None and args:
                    args = (hidden, *args[1:])
                elif hidden is not None:
                    kwargs["hidden_states"] = hidden
                output = self.anatomy.blocks[k].module(*args, **kwargs)
                hidden = output if isinstance(output, Tensor) else output[0]
        return (entered or [hidden])[-1][:, -1]

    def _silence(self, i: int, silent: Bool[Tensor, "rows slots"], values: Tensor | None) -> RemovableHandle:
        """Set a hook on one FFN that sets the activations of some neurons, others in each row, at the last position."""
        ffn, n_rows = self.anatomy.ffns[i], len(silent)
        # A dense FFN: the activations are the input of w_out itself, and are changed before it reads them.
        if ffn.n_experts is None:

            def dense(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                given = args[0].clone()
                # Some models flatten rows and positions into one axis here. A view: what `last` is given, `given` has.
                last = given.view(n_rows, -1, given.shape[-1])[:, -1]
                new = torch.zeros_like(last) if values is None else values.to(last).expand_as(last)
                last.copy_(torch.where(silent.to(last.device), new, last))
                return given, *args[1:]

            return ffn.module.register_forward_pre_hook(dense)
        # Fused experts: no module takes their activations as its input. What the neurons write is worked out here, and
        # the difference is added to the module's output: (new - old activation) times the column, for each neuron.
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
            # Ablation below can change whom the router asks: of an expert that a row does not ask, no neuron writes.
            asked = (last.experts[:, 0, :, None] == chosen.to(device) // width).any(1)
            new = 0.0 if values is None else values[..., slots].to(device) * asked
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

    def _raise(self, i: int, added: Float[Tensor, "rows slots"], scales: Float[Tensor, "rows"]) -> RemovableHandle:
        """Set a hook on one FFN that multiplies its activations by `scales` and adds `added`, at the last position.

        Nothing is written in place, so that autograd can follow.
        """
        ffn, n_rows, of = self.anatomy.ffns[i], len(scales), self.experts[i]
        if of is None:

            def dense(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                given = args[0].reshape(n_rows, -1, args[0].shape[-1])
                last = given[:, -1] * scales[:, None].to(given) + added.to(given)
                return torch.cat([given[:, :-1], last[:, None]], dim=1).view(args[0].shape), *args[1:]

            return ffn.module.register_forward_pre_hook(dense)
        # Fused experts, as in `_silence`: the output is changed, by the columns of the experts asked (hidden, slots).
        columns = torch.cat([weights.dense(ffn.module, int(expert)).float() for expert in of], dim=1)
        fired = self.activations[i]

        def fused(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            change = (fired * (scales - 1)[:, None] + added).to(output.device) @ columns.T.to(output.device)
            # Where the module returns every expert's output for every token, they are added up later: the first
            # expert's output carries the whole change.
            copies = int(ffn.n_experts or 1) if len(args) + len(kwargs) == 1 else 1
            rows = output.reshape(copies, n_rows, -1, output.shape[-1])
            # Padded with zeros to (copies, rows, positions, hidden): only the first copy's last position changes.
            before = (0, 0, rows.shape[2] - 1, 0, 0, 0, 0, copies - 1)
            return (rows + torch.nn.functional.pad(change[None, :, None], before).to(rows.dtype)).view(output.shape)

        return ffn.module.register_forward_hook(fused, with_kwargs=True)


def log_p(logits: Float[Tensor, "*n vocab"], token_id: int) -> Float[Tensor, "*n"]:
    """Compute the log probability of one token, float64, as exact where p is close to 1 as elsewhere.

    A softmax in float32 cannot tell 0.9999999 from 1. Here log p = -log(1 + odds against the token), by `log1p`.
    """
    others = logits.to(torch.float64, copy=True)
    own = others[..., token_id].clone()
    others[..., token_id] = -torch.inf
    return -(others.logsumexp(-1) - own).exp().log1p()


class Kept(NamedTuple):
    """One answer, what was recorded while it was generated, and some of its steps to be run again."""

    answers: Answers
    """The answer, up to the last of the steps."""
    recording: Recording
    """What was recorded at every step up to there."""
    replays: list[Replay]
    """One for each of the steps, in the order asked for."""


def replays(vlm: VLM, inputs: Inputs, steps: Sequence[int], *, recorder: Recorder = record) -> Kept:
    """Generate the answer to one prompt and keep what it takes to run some of its steps again.

    Args:
        vlm: The model.
        inputs: One encoded prompt (one row), from `VLM.encode`.
        steps: The generated tokens that are to be run again, counted from 0.
        recorder: Starts the recording, which may hold more than activations.

    Raises:
        ModelError: if the answer ends before a step, or the blocks, called again, do not give what they gave.
    """
    anatomy = vlm.anatomy
    # What blocks are called with is caught while the answer is generated, in the same pass that records activations.
    catcher = Catcher(set(steps))
    catching = (
        partial(block.module.register_forward_pre_hook, catcher.hook(layer), with_kwargs=True)
        for layer, block in enumerate(anatomy.blocks)
    )
    with vlm.alone(), hooked(catching), recorder(anatomy, last_position) as recording:
        answers = vlm.generate(inputs, max(steps) + 1)
    said = answers.token_ids[0]
    if len(said) <= max(steps):
        raise ModelError(f"The answer has {len(said)} tokens: there is no step {max(steps)} to run again.")
    made = []
    for step in steps:
        replay = Replay(
            anatomy,
            said[step],
            _own(anatomy.logits(recording.residual[step][:1, -1])[None]),
            [_own(parts[step]).float() for parts in recording.raw],
            [_own(parts[step]) if parts else None for parts in recording.experts],
            catcher.caught[step],
        )
        # A block that reads more than its arguments (a state of its own, a global) would give wrong effects unnoticed.
        _check(replay, tolerance(vlm))
        made.append(replay)
    return Kept(answers, recording, made)


def _own(recorded: Tensor) -> Tensor:
    """Copy the last position of the one row to the CPU: autograd refuses tensors of inference mode, a copy it takes."""
    return recorded[0, -1].cpu().clone()


def _check(replay: Replay, limit: float) -> None:
    """Refuse a model whose blocks, called again with the same arguments, do not give the same logits."""
    again = replay.anatomy.logits(replay._silent(0, [{}], None))[0].cpu()
    # Tokens that are never said have a logit near the smallest float32: next to those any error would look small.
    known = replay.logits > torch.finfo(torch.float32).min / 2
    error = (again - replay.logits)[known].abs().max() / replay.logits[known].abs().max()
    if not error < limit:
        raise ModelError(
            "The blocks of this model, called again, do not give what they gave: single neurons cannot be silenced.",
            seen=f"The logits differ by {error:.1%} of the largest.",
            fix="Report it, with the type of model.",
        )
