"""Find the parts of a vision-language model that the maths needs, by structure: never by the model's name.

The rule: `get_decoder()` until it returns itself; in it the one list of as many blocks as the config says; in each
block the one projection from a wider layer back to `hidden`, which has a sibling from `hidden` to that width; beside
the blocks the one norm; and the output head. Exactly one match, or an error that lists what was found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from mmneurons.errors import ModelError
from mmneurons.maths.readout import FinalNorm

_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the language model."""

    name: str
    """Path of the block in the model."""
    module: nn.Module
    w_out: nn.Module
    """The FFN's output projection: its input are the activations, its columns the neurons."""
    w_out_name: str
    """Path of `w_out` below the block."""
    mixer: nn.Module
    """Attention, or whatever else mixes positions."""
    mixer_name: str
    activation: nn.Module | None
    """The activation function's module; None where the code calls a function instead."""
    n_neurons: int


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the neurons are and how what they write becomes logits."""

    decoder_name: str
    """Path of the language model in the whole model."""
    blocks: tuple[Block, ...]
    norm_module: nn.Module
    norm_name: str
    norm: FinalNorm
    """`norm_module` as data: weight as it acts, bias, epsilon, measured on the module itself."""
    head: nn.Module
    head_name: str
    hidden: int
    vocab: int

    @property
    def unembed(self) -> Float[Tensor, "vocab hidden"]:
        """Row t is what the logit of token t reads."""
        return cast(Tensor, self.head.weight).detach()

    @property
    def head_bias(self) -> Float[Tensor, "vocab"] | None:
        """Of the head, if it has one."""
        bias = getattr(self.head, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def n_neurons(self) -> int:
        """Neurons in all blocks together."""
        return sum(block.n_neurons for block in self.blocks)

    def logits(self, x: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
        """Logits, float32, of residual streams by the model's own norm and head."""
        dtype, device = self.unembed.dtype, self.unembed.device
        with torch.inference_mode():
            return self.head(self.norm_module(x.to(device=device, dtype=dtype))).float()


def find_anatomy(model: PreTrainedModel, decoder: str | None = None) -> Anatomy:
    """Find the language model's blocks, their FFN output projections, the final norm and the unembedding.

    Args:
        model: A vision-language model of Hugging Face, loaded.
        decoder: Path of the language model in it, if the rule cannot tell.

    Raises:
        ModelError: if a part has no match or more than one; the message lists what was found.
    """
    names = {id(module): name for name, module in model.named_modules()}
    root = _decoder(model, decoder)
    config = model.config.get_text_config(decoder=True)
    n_layers = config.num_hidden_layers
    hidden = getattr(config, "hidden_size", None) or config.d_model
    layers = _one(
        [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers],
        f"the list of {n_layers} blocks of the language model",
        names,
    )
    blocks = tuple(_block(names[id(block)], block, hidden) for block in layers)
    norm_module = _one(list(_norms_beside(root, layers)), "the norm after the last block", names)
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or head.weight.shape[-1] != hidden:
        raise ModelError(
            "Cannot tell which part of the model turns the residual stream into logits.",
            seen=f"get_output_embeddings() gives {type(head).__name__}; hidden size is {hidden}",
        )
    return Anatomy(
        decoder_name=names[id(root)],
        blocks=blocks,
        norm_module=norm_module,
        norm_name=names[id(norm_module)],
        norm=measure_norm(norm_module, hidden),
        head=head,
        head_name=names[id(head)],
        hidden=hidden,
        vocab=head.weight.shape[0],
    )


def measure_norm(module: nn.Module, hidden: int) -> FinalNorm:
    """Read weight, bias and epsilon off what a norm does, so that w and 1 + w, RMS and LayerNorm need no table.

    A LayerNorm sends a constant vector to its bias; an RMSNorm to its weight. Epsilon shows on a small input.
    """
    norm = copy.deepcopy(module).float()
    device = next(norm.parameters()).device
    ones = torch.ones(hidden, device=device)
    with torch.inference_mode():
        bias = norm(torch.zeros(hidden, device=device))
        centred = bool(torch.allclose(norm(ones), bias, atol=1e-5))
        probe = ones.clone()
        if centred:
            probe[1::2] = -1
            if hidden % 2:
                probe[-1] = 0
        small = 1e-3
        size = probe.pow(2).mean()
        large, little = (norm(c * probe) - bias for c in (1.0, small))
        # little / large = small * sqrt(size + eps) / sqrt(small^2 * size + eps), solved for eps.
        ratio = float((little.abs().sum() / large.abs().sum()).double()) ** 2
        eps = float(size) * small**2 * (1 - ratio) / (ratio - small**2)
        weight = (large / torch.where(probe == 0, ones, probe)) * (size + eps).sqrt()
        if centred and hidden % 2:  # the entry that the probe left out
            probe = torch.roll(probe, 1)
            weight[-1] = ((norm(probe) - bias)[-1] / probe[-1]) * (size + eps).sqrt()
    return FinalNorm(weight=weight.clone(), bias=bias.clone(), eps=max(eps, 0.0), centred=centred)


def _decoder(model: PreTrainedModel, name: str | None) -> nn.Module:
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            children = ", ".join(n for n, m in model.named_modules() if n and n.count(".") < 2 and list(m.children()))
            raise ModelError(f"The model has no part named '{name}'.", seen=f"It has: {children}") from error
    root: nn.Module = model
    while isinstance(root, PreTrainedModel):
        inner = root.get_decoder()
        if inner is None or inner is root:
            break
        root = inner
    return root


def _block(name: str, block: nn.Module, hidden: int) -> Block:
    names = {id(module): path for path, module in block.named_modules()}
    mixers = [child for child in block.children() if _mixes_positions(child)]
    below_mixers = {id(module) for mixer in mixers for module in mixer.modules()}
    linears = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in below_mixers]
    widths = {_shape(m)[0] for m in linears if _shape(m)[1] == hidden and _shape(m)[0] != hidden}
    entries = {_shape(m)[1] for m in linears if _shape(m)[0] == hidden}
    outs = [m for m in linears if _shape(m)[1] == hidden and _shape(m)[0] in widths]
    outs = [m for m in outs if entries & {_shape(m)[0], 2 * _shape(m)[0]}]
    w_out = _one(outs, f"the FFN output projection of block '{name}'", names)
    mixer = _one(mixers, f"the attention of block '{name}'", names)
    activations = [m for m in block.modules() if isinstance(m, _ACTIVATIONS) and id(m) not in below_mixers]
    return Block(
        name=name,
        module=block,
        w_out=w_out,
        w_out_name=names[id(w_out)],
        mixer=mixer,
        mixer_name=names[id(mixer)],
        activation=activations[0] if len(activations) == 1 else None,
        n_neurons=_shape(w_out)[0],
    )


def _mixes_positions(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(part in name for part in ("attention", "mamba", "deltanet", "shortconv")) and "norm" not in name


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or Conv1D."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def _norms_beside(root: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Norms in the module that holds the list of blocks, outside the blocks."""
    holder = next(m for m in root.modules() if any(child is layers for child in m.children()))
    inside = {id(m) for m in layers.modules()}
    for module in holder.children():
        if "norm" in type(module).__name__.lower() and id(module) not in inside:
            yield module


def _one(found: list, what: str, names: dict[int, str]):
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {names.get(id(m), '?')}: {type(m).__name__}" for m in found) or "  nothing"
    raise ModelError(
        f"Cannot tell {what}.",
        seen=f"Looked for exactly one, found {len(found)}:\n{listed}",
        fix='Name the language model if that is what is unclear: load(..., decoder="model.language_model")'
        "     CLI: --decoder model.language_model",
    )
