"""Change what chosen neurons write while the model runs, in one `with`; the weights stay as they are.

    with intervene(vlm, ["L0.u945", "L3.u12"], scale=0):
        print(vlm.caption("dog.png"))

Dense FFNs are changed at the input of `w_out`, so that an activation of 0 writes exactly nothing. Fused experts cannot
be reached there: the difference is added to their output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.vlm import experts, weights
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import alone, restored
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True)
class Intervention:
    """An intervention says what is done to a set of neurons: exactly one of `scale`, `values` and `noise` is given."""

    neurons: tuple[Neuron, ...]
    scale: float | None = None
    """Factor by which the activations are multiplied; 0 switches the neurons off."""
    values: tuple[float, ...] | None = None
    """Numbers that the activations are set to, one for each neuron: zero or mean ablation."""
    noise: float | None = None
    """Standard deviation of Gaussian noise on the columns, in units of each column's root mean square."""
    seed: int = 0
    """Seed of the noise."""
    positions: tuple[int, ...] | None = None
    """Positions of the sequence, counted from 0 with padding and answer; None changes all."""
    rows: tuple[int, ...] | None = None
    """Prompts of a batch, counted from 0, so that each can be changed in its own way; None changes all."""


@restored
def intervene(
    vlm: VLM | Anatomy,
    neurons: Intervention | Iterable[Neuron | str],
    *,
    scale: float | None = None,
    values: Sequence[float] | float | None = None,
    noise: float | None = None,
    seed: int = 0,
    positions: Sequence[int] | None = None,
) -> Iterator[Intervention]:
    """Run the model with some neurons changed, in captions, findings, or forward passes of one's own.

    Interventions can be nested: the inner one sees the activations that the outer one leaves. `record` inside the
    `with` records activations as they were changed. Other threads that ask the model wait for the end of the `with`.

    Args:
        vlm: The model, or its anatomy.
        neurons: Neurons or their names, or an `Intervention`, which says everything else.
        scale: Multiply their activations by this.
        values: Set their activations to these; one number for all, or one each.
        noise: Add Gaussian noise to their columns, in units of each column's root mean square.
        seed: Seed of the noise; the same neurons with the same seed get the same noise.
        positions: Where in the sequence, counted from 0 with padding and answer; everywhere if None.

    Yields:
        The intervention, as data.

    Raises:
        SettingError: not exactly one of `scale`, `values` and `noise`, values of another number than neurons, a
            neuron that the model does not have or that is named twice; `values` where they cannot be set.
    """
    if isinstance(neurons, Intervention):
        change = neurons
    else:
        named = tuple(n if isinstance(n, Neuron) else Neuron.parse(n) for n in neurons)
        # One number stands for as many as there are neurons.
        each = (float(values),) * len(named) if isinstance(values, int | float) else values
        places = None if positions is None else tuple(positions)
        change = Intervention(named, scale, None if each is None else tuple(each), noise, seed, places)
    anatomy = vlm.anatomy if isinstance(vlm, VLM) else vlm
    with alone(anatomy.owner), hooked(_Running(anatomy, change).setters()):
        yield change


@dataclass(eq=False)
class Part:
    """The chosen neurons of one FFN, or of one of its experts if it has several."""

    ffn: Ffn
    expert: int | None
    indices: Tensor
    values: Tensor | None
    noise: Float[Tensor, "n hidden"] | None

    def changed(self, fired: Float[Tensor, "*positions n"], scale: float | None) -> Float[Tensor, "*positions n"]:
        """Return the activations as the intervention sets or scales them."""
        if self.values is not None:
            return self.values.to(fired).expand_as(fired)
        return fired if scale is None else fired * scale


def parts_of(anatomy: Anatomy, change: Intervention) -> list[Part]:
    """Check an intervention and sort its neurons by FFN and expert, with their values or noise.

    Raises:
        SettingError: see `intervene`.
    """
    # 1. An intervention that contradicts itself is refused.
    if sum(how is not None for how in (change.scale, change.values, change.noise)) != 1:
        raise SettingError(
            "An intervention does one thing to its neurons.",
            seen=f"scale={change.scale}, values={change.values}, noise={change.noise}",
            fix="Give one of scale=, values=, noise=: intervene(vlm, neurons, scale=0)",
        )
    if change.values is not None and len(change.values) != len(change.neurons):
        raise SettingError(f"{len(change.values)} values for {len(change.neurons)} neurons.", fix="Give one each.")
    if len(set(change.neurons)) != len(change.neurons):
        raise SettingError("A neuron is named twice.", fix="Name each once.")
    # 2. Each neuron is looked up and goes to its FFN or expert. `by_place` keeps its place in `change.neurons`, where
    # its value stands.
    by_place: dict[tuple[int, int | None], list[int]] = {}
    ffns: dict[tuple[int, int | None], Ffn] = {}
    for i, neuron in enumerate(change.neurons):
        ffn = anatomy.find(neuron)
        if ffn is None:
            raise SettingError(
                f"This model has no neuron {neuron}.",
                seen=f"Its blocks have {', '.join(map(str, anatomy.layer_sizes))} neurons.",
            )
        if change.values is not None and ffn.gate is not None:
            raise SettingError(
                f"The activation of {neuron} cannot be set: a gate multiplies it after its column was added.",
                fix="Use scale=, which is the same with and without a gate.",
            )
        by_place.setdefault((neuron.layer, neuron.expert), []).append(i)
        ffns[neuron.layer, neuron.expert] = ffn
    # 3. One part per FFN or expert. Places and neurons are sorted before anything is drawn, so that the noise depends
    # on the set of neurons and the seed, not on the order in which they were named.
    random = torch.Generator().manual_seed(change.seed)
    parts = []
    # A dense FFN comes before the experts of its block: counted as 0 it would tie with the first of them.
    places = sorted(by_place, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    for layer, expert in places:
        ffn = ffns[layer, expert]
        members = sorted(by_place[layer, expert], key=lambda i: change.neurons[i])
        indices = torch.tensor([change.neurons[i].index for i in members])
        values = (
            None if change.values is None else torch.tensor([change.values[i] for i in members], dtype=torch.float32)
        )
        noise = None
        if change.noise is not None:
            # Drawn on the CPU: the same seed gives the same noise on every device.
            columns = weights.columns(ffn.module, indices, expert=expert).cpu()
            size = columns.pow(2).mean(-1, keepdim=True).sqrt()
            noise = change.noise * size * torch.randn(columns.shape, generator=random, dtype=torch.float32)
        parts.append(Part(ffn, expert, indices, values, noise))
    return parts


class _Running:
    """The hooks of one `intervene`, and what they know of the forward pass that is running."""

    def __init__(self, anatomy: Anatomy, change: Intervention) -> None:
        self.anatomy, self.change = anatomy, change
        self._shape = (1, 1)
        self._here: Tensor | None = None
        """Mask (batch, positions) of the places to change in this pass; None stands for all of them."""
        self.parts = parts_of(anatomy, change)

    def setters(self) -> Iterator[Callable[[], RemovableHandle]]:
        """Iterate over the functions that set one hook each."""
        first = self.anatomy.blocks[0].module
        yield partial(first.register_forward_pre_hook, self._enter, with_kwargs=True)
        for part in self.parts:
            module = part.ffn.module
            # Noise is on the columns, so it is added behind `w_out`; values and factors replace its input.
            if part.expert is not None:
                yield partial(module.register_forward_hook, partial(self._experts, part), with_kwargs=True)
            elif part.noise is not None:
                yield partial(module.register_forward_hook, partial(self._noise, part))
            else:
                yield partial(module.register_forward_pre_hook, partial(self._dense, part))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note which places of this forward pass are to be changed."""
        stream = args[0] if args else kwargs["hidden_states"]
        self._shape = stream.shape[:2]
        self._here = None
        if self.change.positions is not None:
            # Positions are counted in the whole sequence, and a decoding step sees the new one only: those before it
            # are in the KV cache. Its argument has one of two names, by version and model.
            cache = next(
                (kwargs[name] for name in ("past_key_values", "past_key_value") if kwargs.get(name) is not None), None
            )
            before = cache.get_seq_length() if cache is not None else 0
            places = torch.arange(int(before), int(before) + stream.shape[1], device=stream.device)
            self._here = torch.isin(places, torch.tensor(self.change.positions, device=stream.device)).expand(
                self._shape
            )
        if self.change.rows is not None:
            rows = torch.arange(stream.shape[0], device=stream.device)
            mine = torch.isin(rows, torch.tensor(self.change.rows, device=stream.device))[:, None].expand(self._shape)
            self._here = mine if self._here is None else mine & self._here

    def _where(self, fired: Float[Tensor, "*positions n"]) -> Tensor | None:
        """Return the mask in the shape of activations: some FFNs see batch and positions as one axis."""
        if self._here is None:
            return None
        here = self._here.to(fired.device)
        return (here if fired.ndim == 3 else here.reshape(-1))[..., None]

    def _dense(self, part: Part, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Replace activations at the input of a dense `w_out`."""
        given = args[0]
        indices = part.indices.to(given.device)
        fired = given[..., indices]
        changed = part.changed(fired, self.change.scale)
        where = self._where(fired)
        if where is not None:
            changed = torch.where(where, changed, fired)
        return given.index_copy(-1, indices, changed.to(given.dtype)), *args[1:]

    def _noise(self, part: Part, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to a dense FFN's output what the noise on its columns writes."""
        assert part.noise is not None
        fired = args[0][..., part.indices.to(output.device)].float()
        where = self._where(fired)
        if where is not None:
            fired = fired * where
        return output + (fired @ part.noise.to(output.device)).to(output.dtype)

    def _experts(self, part: Part, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Add to the output of fused experts the difference that the intervention makes."""
        # Activations inside the kernel cannot be hooked: they are computed again from the module's input, the router's
        # weight in them. Those of the chosen neurons are zero where the router sent the position to other experts.
        assert part.expert is not None
        given = (*args, *kwargs.values())
        routed = experts.routed(module, given, self._shape[0])
        width, asked = part.ffn.n_neurons, (routed.experts == part.expert).any(-1, keepdim=True)
        chosen = part.expert * width + part.indices.to(routed.experts.device)
        fired = experts.of_neurons(experts.activations(module, routed), routed.experts, chosen, width).float()
        if part.noise is not None:
            added = fired @ part.noise.to(fired.device)
        else:
            changed = part.changed(fired, self.change.scale)
            if part.values is not None:  # an expert without this position writes nothing, whatever is set
                changed = changed * asked
            columns = weights.columns(module, part.indices, expert=part.expert).to(fired.device)
            added = (changed - fired) @ columns
        where = self._where(added)
        if where is not None:
            added = added * where
        added = added.to(output.dtype)
        # Llama 4 gives every token to every expert and sums the outputs later: the output is (experts * tokens,
        # hidden), and the difference belongs to the rows of this expert.
        if len(given) == 1:
            whole = output.clone().view(len(output) // added[..., 0].numel(), -1, output.shape[-1])
            whole[part.expert] += added.reshape(-1, added.shape[-1])
            return whole.view(output.shape)
        return output + added.reshape(output.shape)


@restored
def shuffled(vlm: VLM | Anatomy, positions: Int[Tensor, "batch n"], seed: int = 0) -> Iterator[None]:
    """Run the model with the inputs of the first block at some positions shuffled, in the same order for every pass.

    With the image tokens of a picture (`find_grids`), the picture's patches change places before the language model
    reads them (Pan et al. 2024, section 4.2). Passes too short to hold the positions are left as they are: those that
    decode one token after the other.

    Args:
        vlm: The model, or its anatomy.
        positions: Positions to shuffle in each row, counted in the sequence that enters the first block.
        seed: Seed of the order.
    """
    anatomy = vlm.anatomy if isinstance(vlm, VLM) else vlm
    order = torch.randperm(positions.shape[1], generator=torch.Generator().manual_seed(seed))

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        stream = args[0] if args else kwargs["hidden_states"]
        # A decoding step: it holds the new position only, and the shuffled ones are in the KV cache.
        if stream.shape[1] <= int(positions.max()):
            return args, kwargs
        rows, places = torch.arange(len(stream), device=stream.device)[:, None], positions.to(stream.device)
        mixed = stream.clone()
        mixed[rows, places] = stream[rows, places[:, order.to(places.device)]]
        return ((mixed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": mixed})

    setter = partial(anatomy.blocks[0].module.register_forward_pre_hook, hook, with_kwargs=True)
    with alone(anatomy.owner), hooked([setter]):
        yield
