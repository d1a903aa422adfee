"""The parts of a model that the maths needs, as data: neurons, and how what is written becomes logits.

Everything here is linear once the scales of the norms on the path are held: a write reaches the final norm through a
`WritePath`, and the head reads it there. `find.py` fills it in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.maths.readout import Norm
from mmneurons.neurons import Neuron
from mmneurons.vlm import weights


@dataclass(frozen=True, eq=False)
class NormSite:
    """A norm that what is written passes on its path: after an FFN (Gemma 2), or in the stream itself (post-LN)."""

    name: str
    """Path in the model."""
    module: nn.Module
    norm: Norm
    """The module as data."""
    then: WritePath | None
    """From its output on."""


@dataclass(frozen=True, eq=False)
class WritePath:
    """How a vector reaches the input of the final norm: times `scale`, through `norm`, then on by `then`.

    None in the place of a WritePath: it is there already. Paths share their ends.
    """

    scale: float
    norm: NormSite | None
    then: WritePath | None


@dataclass(frozen=True, eq=False)
class Ffn:
    """One place where neurons are: a dense output projection, or the fused experts of a block."""

    layer: int
    name: str
    """Path in the model."""
    module: nn.Module
    """`w_out` itself, whose input are the activations; or the module that holds all experts."""
    n_neurons: int
    """Columns of `w_out`; of one expert, if there are several."""
    n_experts: int | None
    """None: dense."""
    activation: nn.Module | None
    """The activation function's module; None where the code calls a function instead, and in experts."""
    gate: nn.Module | None
    """A projection to one number, whose sigmoid multiplies all activations (shared experts of Qwen)."""
    path: WritePath | None
    """From the output of `w_out` on."""

    def neuron(self, flat: int) -> Neuron:
        """The neuron at a place counted through all experts."""
        if self.n_experts is None:
            return Neuron(self.layer, flat)
        return Neuron(self.layer, flat % self.n_neurons, flat // self.n_neurons)

    @property
    def size(self) -> int:
        """Neurons of all experts together."""
        return self.n_neurons * (self.n_experts or 1)


@dataclass(frozen=True, eq=False)
class Source:
    """Anything else that writes into the stream."""

    layer: int
    name: str
    """Path in the model."""
    module: nn.Module
    kind: Literal["attention", "other"]
    """`attention`: any token mixer. `other`: a side path, such as the per-layer inputs of Gemma 4."""
    path: WritePath | None


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the language model."""

    name: str
    """Path in the model."""
    module: nn.Module


@dataclass(frozen=True)
class LogitRule:
    """What the model does around its head: logits = cap * tanh(scale * head(before * h) / cap), or without the cap."""

    before: float = 1.0
    """The norm's output is multiplied by this before the head."""
    scale: float = 1.0
    cap: float | None = None
    barred: tuple[int, ...] = ()
    """Tokens that the model never says, whatever its head gives (Chameleon: the codes of pictures)."""

    def undo(self, logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Logits as they were before the softcap: what contributions add up to."""
        if self.cap is None:
            return logits
        limit = 1 - 1e-7  # a logit at the cap itself has no finite value before it
        return self.cap * torch.atanh((logits.float() / self.cap).clamp(-limit, limit))

    def __call__(self, head: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Logits from what the head gives."""
        scaled = self.scale * head.float()
        given = scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)
        given[..., list(self.barred)] = torch.finfo(torch.float32).min
        return given

    def slope(self, logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Derivative of the logit with respect to the logit before the softcap."""
        return torch.ones_like(logits) if self.cap is None else 1 - (logits / self.cap).clamp(-1, 1) ** 2


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the neurons are and how what they write becomes logits."""

    owner: nn.Module
    """The smallest model that holds language model and head: its forward gives the logits."""
    decoder_name: str
    """Path of the language model in the whole model."""
    blocks: tuple[Block, ...]
    ffns: tuple[Ffn, ...]
    """In order of the blocks; a block can have a dense one beside its experts."""
    sources: tuple[Source, ...]
    norms: tuple[NormSite, ...]
    """Every norm on a path, once."""
    embedding: WritePath | None
    """From the input of the first block on."""
    norm_module: nn.Module
    norm_name: str
    norm: Norm
    """`norm_module` as data: weight as it acts, bias, epsilon, measured on the module itself."""
    head: nn.Module
    head_name: str
    logit_rule: LogitRule
    hidden: int
    vocab: int
    """Rows of the unembedding, padding rows included."""
    dtype: torch.dtype
    """What the language model computes in: the vision tower, and queries that stay in float32, can differ."""
    doubts: tuple[str, ...] = ()
    """What could not be told from the model: with any, contributions are approximate."""

    @property
    def unembed(self) -> Float[Tensor, "vocab hidden"]:
        """Row t is what the logit of token t reads."""
        return weights.dense(self.head)

    @property
    def head_bias(self) -> Float[Tensor, "vocab"] | None:
        """Of the head, if it has one."""
        return weights.bias(self.head)

    @property
    def n_neurons(self) -> int:
        """Neurons in all blocks together."""
        return sum(ffn.size for ffn in self.ffns)

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Neurons of each block."""
        sizes = [0] * len(self.blocks)
        for ffn in self.ffns:
            sizes[ffn.layer] += ffn.size
        return tuple(sizes)

    def find(self, neuron: Neuron) -> Ffn | None:
        """Where a neuron lives; None if the model has no such neuron."""
        for ffn in self.ffns:
            if ffn.layer == neuron.layer and (ffn.n_experts is None) == (neuron.expert is None):
                inside = neuron.index < ffn.n_neurons and (neuron.expert or 0) < (ffn.n_experts or 1)
                return ffn if inside else None
        return None

    def logits(self, x: Float[Tensor, "n hidden"], *, grad: bool = False) -> Float[Tensor, "n vocab"]:
        """Logits, float32, of residual streams, by the model's own norm and head; differentiable if asked for."""
        with torch.enable_grad() if grad else torch.inference_mode():
            h = self.logit_rule.before * normed(self.norm_module, x)
            check_finite(h, h.dtype)
            return self.logit_rule(self.head(h))


def normed(module: nn.Module, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
    """What a norm's own module gives, where its weights are and in their dtype."""
    like = next(module.parameters(), None)
    return module(x if like is None or like.is_meta else x.to(device=like.device, dtype=like.dtype))


class NotFiniteError(ModelError):
    """Logits that are no numbers."""


def check_finite(values: Float[Tensor, "*n"], dtype: torch.dtype) -> None:
    """Refuse logits that are no numbers: whatever is chosen by them means nothing.

    Args:
        values: What the logits are made of, or the logs of their totals.
        dtype: What the model computes in.

    Raises:
        NotFiniteError: if any is NaN or infinite.
    """
    if bool(values.isfinite().all()):
        return
    if dtype == torch.float16:
        raise NotFiniteError(
            "The logits are NaN in float16, whose largest number is 65,504.",
            fix='Load it in bfloat16: load(..., dtype="bfloat16")    CLI: --dtype bfloat16',
        )
    raise NotFiniteError(
        f"The logits are NaN in {str(dtype).removeprefix('torch.')}.",
        seen="A weight of the model is no finite number, or something became too large on the way.",
        fix="Load the checkpoint again, or check it: every weight should be finite.",
    )


def hops(path: WritePath | None) -> Iterator[WritePath]:
    """A path, step by step."""
    while path is not None:
        yield path
        path = path.then
