"""The anatomy of a model as data: where its neurons are, and how what they write becomes logits.

Everything here is linear once the scales of the norms on the path are held fixed: a write reaches the final norm
through a `WritePath`, and the head reads it there. `find.py` fills it in.
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
    """A norm that writes pass on their path: behind an FFN (Gemma 2), or in the residual stream itself (post-LN)."""

    name: str
    """Path of the norm's module in the model."""
    module: nn.Module
    norm: Norm
    """The norm as data: weight as it acts, bias, epsilon."""
    then: WritePath | None
    """Path from the norm's output on."""


@dataclass(frozen=True, eq=False)
class WritePath:
    """The path of a vector to the input of the final norm: times `scale`, through `norm`, then on by `then`.

    None in place of a WritePath means that the vector is there already. Paths share their ends: the same object stands
    at the end of many, so that what is computed for it can be kept by its id.
    """

    scale: float
    norm: NormSite | None
    then: WritePath | None


@dataclass(frozen=True, eq=False)
class Ffn:
    """One FFN: a dense output projection whose columns are neurons, or the fused experts of a block."""

    layer: int
    name: str
    """Path of the FFN's module in the model."""
    module: nn.Module
    """The module of `w_out`, whose input is the activations; or the module that holds all experts."""
    n_neurons: int
    """Number of columns of `w_out`, in one expert if there are several."""
    n_experts: int | None
    """Number of fused experts; None for a dense FFN."""
    activation: nn.Module | None
    """The activation function's module; None where the code calls a function instead, and in experts."""
    gate: nn.Module | None
    """A projection to one number, whose sigmoid multiplies all activations (shared experts of Qwen)."""
    path: WritePath | None
    """Path from the output of `w_out` on."""

    def neuron(self, flat: int) -> Neuron:
        """Return the neuron with this number, counted through all experts: expert 0 first, then expert 1, and so on."""
        if self.n_experts is None:
            return Neuron(self.layer, flat)
        return Neuron(self.layer, flat % self.n_neurons, flat // self.n_neurons)

    @property
    def size(self) -> int:
        """Number of neurons, of all experts together."""
        return self.n_neurons * (self.n_experts or 1)


@dataclass(frozen=True, eq=False)
class Source:
    """A module other than an FFN that writes into the residual stream."""

    layer: int
    name: str
    """Path of the module in the model."""
    module: nn.Module
    kind: Literal["attention", "other"]
    """What it is: `attention` for any mixer, `other` for a side path such as the per-layer inputs of Gemma 4."""
    path: WritePath | None


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the language model."""

    name: str
    """Path of the block in the model."""
    module: nn.Module


@dataclass(frozen=True)
class LogitRule:
    """The rule from final norm to logits: cap * tanh(scale * head(before * h) / cap), or without the cap."""

    before: float = 1.0
    """Factor by which the final norm's output is multiplied before the head."""
    scale: float = 1.0
    cap: float | None = None
    barred: tuple[int, ...] = ()
    """Token ids that the model never writes, whatever its head gives (Chameleon: the codes of pictures)."""

    def undo(self, logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the logits as they were before the softcap, which are what contributions add up to."""
        if self.cap is None:
            return logits
        limit = 1 - 1e-7  # a logit at the cap itself would be infinite before it
        return self.cap * torch.atanh((logits.float() / self.cap).clamp(-limit, limit))

    def __call__(self, head: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the model's logits, float32, from the output of its head."""
        scaled = self.scale * head.float()
        given = scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)
        # The lowest finite float32, as the model's own code has it, and not minus infinity.
        given[..., list(self.barred)] = torch.finfo(torch.float32).min
        return given

    def slope(self, logits: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the derivative of each logit with respect to the same logit before the softcap."""
        return torch.ones_like(logits) if self.cap is None else 1 - (logits / self.cap).clamp(-1, 1) ** 2


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The anatomy of one model: where its neurons are, and how what they write becomes logits."""

    owner: nn.Module
    """The smallest model that holds both language model and head, whose forward pass gives the logits."""
    decoder_name: str
    """Path of the language model in the whole model."""
    blocks: tuple[Block, ...]
    ffns: tuple[Ffn, ...]
    """The FFNs in order of their blocks; a block can have a dense one beside its experts."""
    sources: tuple[Source, ...]
    norms: tuple[NormSite, ...]
    """Every norm that stands on some path, each once."""
    embedding: WritePath | None
    """Path from the input of the first block on."""
    norm_module: nn.Module
    norm_name: str
    norm: Norm
    """The final norm as data: weight as it acts, bias, epsilon, measured on `norm_module` itself."""
    head: nn.Module
    head_name: str
    logit_rule: LogitRule
    hidden: int
    vocab: int
    """Number of rows of the unembedding, padding rows included."""
    dtype: torch.dtype
    """The dtype that the language model computes in; that of the vision tower, or of query tokens, can differ."""
    doubts: tuple[str, ...] = ()
    """Sentences on what could not be told from the model; where there is any, contributions are approximate."""

    @property
    def unembed(self) -> Float[Tensor, "vocab hidden"]:
        """The unembedding, (vocab, hidden): row t is what the logit of token t reads."""
        return weights.dense(self.head)

    @property
    def head_bias(self) -> Float[Tensor, "vocab"] | None:
        """The bias of the output head, (vocab,), float32; None if the head has none."""
        return weights.bias(self.head)

    @property
    def n_neurons(self) -> int:
        """Number of neurons in all blocks together."""
        return sum(ffn.size for ffn in self.ffns)

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Number of neurons in each block."""
        sizes = [0] * len(self.blocks)
        for ffn in self.ffns:
            sizes[ffn.layer] += ffn.size
        return tuple(sizes)

    def find(self, neuron: Neuron) -> Ffn | None:
        """Return the FFN that a neuron belongs to, or None if the model has no such neuron."""
        # A block can have a dense FFN beside its experts: a name with an expert means the one, a name without it the
        # other.
        for ffn in self.ffns:
            if ffn.layer == neuron.layer and (ffn.n_experts is None) == (neuron.expert is None):
                inside = neuron.index < ffn.n_neurons and (neuron.expert or 0) < (ffn.n_experts or 1)
                return ffn if inside else None
        return None

    def logits(self, x: Float[Tensor, "n hidden"], *, grad: bool = False) -> Float[Tensor, "n vocab"]:
        """Return the logits, float32, of residual streams, by the model's own norm and head; `grad` keeps a graph."""
        with torch.enable_grad() if grad else torch.inference_mode():
            h = self.logit_rule.before * normed(self.norm_module, x)
            check_finite(h, h.dtype)
            return self.logit_rule(self.head(h))


def normed(module: nn.Module, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
    """Return the output of a norm's own module, on the device and in the dtype of its weights."""
    # Off-loaded weights are on the meta device until the module runs: accelerate's hook then moves the input as well.
    like = next(module.parameters(), None)
    return module(x if like is None or like.is_meta else x.to(device=like.device, dtype=like.dtype))


class NotFiniteError(ModelError):
    """The error for logits that are NaN or infinite."""


def check_finite(values: Float[Tensor, "*n"], dtype: torch.dtype) -> None:
    """Refuse logits that are NaN or infinite, since a token that is chosen by them means nothing.

    Args:
        values: What the logits are made of, or the logs of the sums of their exponentials.
        dtype: The dtype that the model computes in, for the message.

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
    """Iterate over the steps of a path, from its start to the final norm."""
    while path is not None:
        yield path
        path = path.then
