"""Find the language model's blocks, their neurons and the head in the tree of modules: never by the model's name.

The rule: `get_decoder()` until it returns itself; in it the shallowest list of as many blocks as the config says; in
each block the projection from a wider layer back to `hidden` that has a sibling from `hidden` to that width, or the
module that holds experts as 3-D parameters; and the output head. One match, or an error that lists what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from mmneurons.errors import ModelError
from mmneurons.vlm.weights import holds_experts

_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
_DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers")
"""Names that configs give to the number of blocks; beside one of the first two, the others are an encoder's."""
_MIXERS = ("attention", "attn", "mamba", "deltanet", "shortconv")


@dataclass(frozen=True, eq=False)
class Tree:
    """The tree of a model's modules with its main parts, as known before anything is run."""

    names: dict[int, str]
    """Path of every module in the model, by the module's id."""
    owner: PreTrainedModel
    """The smallest model that holds both language model and head, whose forward pass gives the logits."""
    root: nn.Module
    """The language model."""
    layers: nn.ModuleList
    head: nn.Module
    hidden: int

    def name(self, module: nn.Module) -> str:
        """Return the path of a module in the whole model."""
        return self.names[id(module)]


@dataclass(frozen=True, eq=False)
class FoundFfn:
    """An FFN found in one block: its output projection, or the module of its fused experts."""

    module: nn.Module
    is_experts: bool
    activation: nn.Module | None


def find_tree(model: PreTrainedModel, decoder: str | None = None) -> Tree:
    """Find the language model inside a model, its blocks and its output head.

    Args:
        model: A vision-language model of Hugging Face, loaded.
        decoder: Path of the language model in it, if the rule cannot tell.

    Raises:
        ModelError: if a part has no match or more than one; the message lists what was found.
    """
    names = {id(module): name for name, module in model.named_modules()}
    root = language_model(model) if decoder is None else _named(model, decoder)
    text = model.config.get_text_config(decoder=True)
    own = getattr(root, "config", text)
    # The language model may have a config of its own beside the text part of the whole model's: either may tell the
    # number of blocks.
    layers = _shallowest(root, {depth for config in (own, text) if (depth := _depth(config))}, names)
    head = _head(model)
    hidden = linear_shape(head)[0]
    return Tree(names, _owner(model, root, head), root, layers, head, hidden)


def find_ffns(name: str, block: nn.Module, hidden: int) -> list[FoundFfn]:
    """Find the FFNs of a block: its dense output projection, its fused experts, or both, the dense one first.

    The list is empty where the FFN is as wide as the residual stream: only a forward pass shows which of its
    projections is the last (`square_ffns`).

    Raises:
        ModelError: if there is nothing like an FFN, or no telling which of several projections it is.
    """
    names = {id(module): path for path, module in block.named_modules()}
    parts = list(visible(block))
    linears = [m for m in parts if is_linear(m)]
    experts = [m for m in parts if holds_experts(m)]
    # An output projection goes from some width back to `hidden`, and a sibling goes from `hidden` to that width; to
    # twice that width where gate and up projection are fused into one.
    entries = {linear_shape(m)[1] for m in linears if linear_shape(m)[0] == hidden}
    outs = [m for m in linears if linear_shape(m)[1] == hidden and linear_shape(m)[0] != hidden]
    outs = [m for m in outs if entries & {linear_shape(m)[0], 2 * linear_shape(m)[0]}]
    # Side paths (Gemma 4's per-layer inputs) have the same form, but are narrower than the FFN.
    widest = max((linear_shape(m)[0] for m in outs), default=0)
    dense = [m for m in outs if linear_shape(m)[0] == widest]
    # Two projections of one width cannot be told apart; and a block must have something like an FFN.
    if len(dense) > 1 or not (dense or experts or square_ffns(block, hidden)):
        raise _ambiguous(dense, f"the FFN output projection of block '{name}'", names) if dense else no_ffn(name)
    found = [FoundFfn(m, False, _activation(block, m, names)) for m in dense]
    return found + [FoundFfn(m, True, None) for m in experts]


def square_ffns(block: nn.Module, hidden: int) -> list[FoundFfn]:
    """List the projections from `hidden` to `hidden` that stand beside others of that shape, outside of mixers.

    The one that writes into the residual stream is the output projection of an FFN as wide as the stream.
    """
    names = {id(module): path for path, module in block.named_modules()}
    square = [m for m in visible(block) if is_linear(m) and linear_shape(m) == (hidden, hidden)]
    parents = [names[id(m)].rpartition(".")[0] for m in square]
    return [
        FoundFfn(m, False, _activation(block, m, names))
        for m, parent in zip(square, parents, strict=True)
        if parents.count(parent) > 1
    ]


def visible(block: nn.Module, *, mixers: bool = False) -> Iterator[nn.Module]:
    """Iterate over the modules below a block, but not inside projections (LoRA), experts or, by default, mixers."""
    for child in block.children():
        if mixes_positions(child) and not mixers:
            continue
        yield child
        if not is_linear(child) and not holds_experts(child):
            yield from visible(child, mixers=mixers)


def mixes_positions(module: nn.Module) -> bool:
    """Whether a module is a mixer (attention, Mamba, short convolution ...), by the name of its class."""
    name = type(module).__name__.lower()
    return any(part in name for part in _MIXERS) and "norm" not in name


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a projection in any form: plain, Conv1D, quantised, wrapped."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a projection, from its attributes and not from its weight, which can be packed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(module.in_features), int(module.out_features)  # pyright: ignore[reportArgumentType]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class: no attribute is common to all norms."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def language_model(model: PreTrainedModel) -> nn.Module:
    """Return the language model inside a model: `get_decoder()`, until it returns itself."""
    root: nn.Module = model
    while isinstance(root, PreTrainedModel):
        inner = root.get_decoder()
        if inner is None or inner is root:
            break
        root = inner
    return root


def _named(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the part of the model with the path that the user gave."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(n for n, m in model.named_modules() if n and n.count(".") < 2 and list(m.children()))
        raise ModelError(f"The model has no part named '{name}'.", seen=f"It has: {children}") from error


def _depth(config: Any) -> int | None:
    """Return the number of blocks that a config gives, or None if it gives none."""
    return next((depth for name in _DEPTHS if (depth := getattr(config, name, None))), None)


def _shallowest(root: nn.Module, counts: set[int], names: dict[int, str]) -> nn.ModuleList:
    """Return the one list of as many blocks as the config says that lies least deep below the language model."""
    # Deeper lists can have that length by chance: the experts of a block, the layers of an encoder.
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) in counts]
    depths = [names[id(m)].count(".") for m in lists]
    found = [m for m, depth in zip(lists, depths, strict=True) if depth == min(depths)]
    if len(found) != 1:
        wanted = " or ".join(str(count) for count in sorted(counts))
        raise _ambiguous(found, f"the list of {wanted} blocks of the language model", names)
    return found[0]


def _head(model: PreTrainedModel) -> nn.Module:
    """Return the output head, asked of the whole model first and then of the models inside it."""
    # Not every wrapper hands on the head of the language model inside it.
    for module in [model, *(m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)]:
        head = module.get_output_embeddings()
        if head is not None and is_linear(head):
            return head
    raise ModelError(
        "Cannot tell which part of the model turns the residual stream into logits.",
        seen="get_output_embeddings() gives nothing that is a projection, in the model and in each of its parts",
    )


def _owner(model: PreTrainedModel, root: nn.Module, head: nn.Module) -> PreTrainedModel:
    """Return the smallest model that holds both the language model and the head."""

    def holds(module: nn.Module) -> bool:
        ids = {id(m) for m in module.modules()}
        return id(root) in ids and id(head) in ids

    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and holds(m)]
    return min(owners, key=lambda m: sum(1 for _ in m.modules()))


def _activation(block: nn.Module, w_out: nn.Module, names: dict[int, str]) -> nn.Module | None:
    """Return the one activation function beside `w_out` or, where a sibling holds it (BERT), the one of the block."""
    parent = block.get_submodule(names[id(w_out)].rpartition(".")[0])
    for place in (parent, block):
        found = [m for m in visible(place) if isinstance(m, _ACTIVATIONS)]
        if len(found) == 1:
            return found[0]
    return None


def no_ffn(name: str) -> ModelError:
    """Return the error for a block in which nothing looks like an FFN."""
    return _ambiguous([], f"the FFN output projection of block '{name}'", {})


def _ambiguous(found: list, what: str, names: dict[int, str]) -> ModelError:
    """Return the error for a part that has no match or several, with what was found."""
    listed = "\n".join(f"  {names.get(id(m), '?')}: {type(m).__name__}" for m in found) or "  nothing"
    return ModelError(
        f"Cannot tell {what}.",
        seen=f"Looked for exactly one, found {len(found)}:\n{listed}",
        fix='Name the language model if that is what is unclear: load(..., decoder="model.language_model")'
        "     CLI: --decoder model.language_model",
    )
