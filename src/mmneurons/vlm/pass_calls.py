"""Run the positions that predicted some tokens again, side by side, on the key-value cache that an answer left.

While an answer is generated nothing is copied: what each block is called with besides the residual stream is kept, the
masks' last rows, and the cache by reference, which in the end holds all keys. A row then sees the keys that its step
saw, by the very mask that the model made for it, and its own.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import restored

MASK = "attention_mask"
STREAM = "hidden_states"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class NotOnCacheError(Exception):
    """The error for blocks that cannot be run on a kept cache: it holds no keys, or not those of every position."""


@dataclass(eq=False)
class PassCalls:
    """What every block was called with in each forward pass of an answer, the residual stream left out."""

    calls: list[list[Call]] = field(default_factory=list)
    """For each pass, and in it each block: arguments, in which only the last query's row of a mask is kept."""
    named: bool = False
    """Whether blocks are given the residual stream by its name, not by its place."""
    looks_ahead: bool = False
    """Whether other positions of the prompt see its last one (PaliGemma): what is written there goes through them."""

    @property
    def cache(self) -> Cache:
        """The cache that the blocks wrote into, as the answer left it."""
        found = {id(v): v for args, kwargs in self.calls[-1] for v in (*args, *kwargs.values()) if isinstance(v, Cache)}
        if len(found) != 1:
            raise NotOnCacheError
        return next(iter(found.values()))

    def enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep what block number `layer` is called with; the first one begins a new pass."""
        if layer == 0:
            self.calls.append([])
        mine = {name: value for name, value in kwargs.items() if name != STREAM}
        if isinstance(mask := mine.get(MASK), Tensor) and mask.ndim == 4:
            mine[MASK] = mask[..., -1:, :].clone()
            if mask.shape[-2] == mask.shape[-1] and len(self.calls) == 1:
                self.looks_ahead = self.looks_ahead or _is_seen(mask)
        self.named = not args
        self.calls[-1].append((args[1:], mine))


def _is_seen(mask: Tensor) -> bool:
    """Whether the last position is seen by any that it sees: what pads a row sees anything, and is seen by nobody."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((visible[..., :-1, -1] & visible[..., -1, :-1]).any())


@restored
def keeping_calls(anatomy: Anatomy):
    """Keep what blocks are called with inside the `with`."""
    kept = PassCalls()
    hooks = (
        partial(block.module.register_forward_pre_hook, partial(kept.enter, layer), with_kwargs=True)
        for layer, block in enumerate(anatomy.blocks)
    )
    with hooked(hooks):
        yield kept


def rows_of(
    kept: PassCalls, steps: Int[Tensor, "rows width"], n_prompt: int, hidden: Float[Tensor, "rows width hidden"]
) -> list[Call]:
    """Put the calls of chosen steps together, on a copy of the cache.

    Args:
        kept: From `keeping_calls`, around a generation.
        steps: For each row of the batch the steps to be run again.
        n_prompt: The number of positions of the prompt.
        hidden: The residual stream that will enter the first block; for its dtype and device.

    Returns:
        For each block its arguments, without the stream.

    Raises:
        NotOnCacheError: something other than a plain cache of all keys stands between the steps.
    """
    if int(steps.max()) >= len(kept.calls) or len({len(calls) for calls in kept.calls}) != 1 or kept.looks_ahead:
        raise NotOnCacheError
    n_keys = n_prompt + len(kept.calls) - 1
    cache = _copied(kept.cache, n_keys)
    calls: list[Call] = []
    for block in zip(*kept.calls, strict=True):
        masks = [kwargs.get(MASK) for _, kwargs in block]
        rest = [(args, {name: value for name, value in kwargs.items() if name != MASK}) for args, kwargs in block]
        args, kwargs = _at(rest, steps, cache)
        kwargs[MASK] = _mask(masks, steps, n_prompt, n_keys, hidden)
        calls.append((args, kwargs))
    return calls


def _copied(cache: Cache, n_keys: int) -> Cache:
    """Copy a cache, each layer into a plain one that only grows; not in inference mode, so that autograd takes it."""
    made = copy.copy(cache)
    made.layers = []
    for layer in cast("list[Any]", cache.layers):  # each kind of layer has other fields
        plain = DynamicLayer()
        if layer.is_initialized:
            # Linear attention keeps a state, which is that of the end; a full window has lost its first keys.
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys.shape[-2] != n_keys:
                raise NotOnCacheError
            plain.lazy_initialization(layer.keys, layer.values)
            plain.keys, plain.values = layer.keys.clone(), layer.values.clone()
        made.layers.append(plain)
    return made


def _at(values: Sequence[Any], steps: Int[Tensor, "rows width"], cache: Cache) -> Any:
    """Put an argument of one block in all passes together: of tensors with positions, the last one of each pass."""
    first = values[0]
    if isinstance(first, Tensor):
        return _positions(list(values), steps.to(first.device))
    if isinstance(first, tuple | list):
        return type(first)(_at(parts, steps, cache) for parts in zip(*values, strict=True))
    if type(first) is dict:
        return {name: _at([value[name] for value in values], steps, cache) for name in first}
    if isinstance(first, Cache):
        return cache
    if isinstance(first, MutableMapping):  # a state that blocks write into
        raise NotOnCacheError
    return first


def _positions(values: list[Tensor], steps: Int[Tensor, "rows width"]) -> Tensor:
    """The last position of each pass, at the steps of each row.

    Numbers of positions have them on their last axis, vectors on the last but one; the batch is on the axis before.
    """
    if values[0].ndim == 0:
        return values[0]
    vectors = values[0].is_floating_point() and values[0].ndim >= 3
    axis = values[0].ndim - (2 if vectors else 1)
    stacked = torch.stack([value.select(axis, -1) for value in values], dim=axis)
    if axis == 0:  # positions in the cache, the same for all rows
        return stacked[steps[0]]
    if stacked.shape[axis - 1] != len(steps):
        stacked = stacked.expand(*stacked.shape[: axis - 1], len(steps), *stacked.shape[axis:])
    rows = torch.arange(len(steps), device=steps.device)[:, None]
    return stacked[..., rows, steps, :] if vectors else stacked[..., rows, steps]


def _mask(
    masks: Sequence[Any], steps: Int[Tensor, "rows width"], n_prompt: int, n_keys: int, hidden: Tensor
) -> Float[Tensor, "rows 1 width keys"]:
    """What is added to attention: each step sees the cached keys that it saw then, and its own."""
    n_rows, width = steps.shape
    lowest = torch.finfo(hidden.dtype).min
    made = torch.full((n_rows, 1, width, n_keys + width), lowest, dtype=hidden.dtype, device=hidden.device)
    for row in range(n_rows):
        for place, step in enumerate(steps[row].tolist()):
            seen, mask = n_prompt + step, masks[step]
            made[row, 0, place, n_keys + place] = 0
            if mask is None:
                made[row, 0, place, : seen - 1] = 0
                continue
            if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or mask.shape[-1] != seen:
                raise NotOnCacheError
            mine = mask[row if len(mask) > 1 else 0, 0, 0].to(hidden.device)
            if mine.dtype == torch.bool:
                mine = torch.zeros_like(mine, dtype=hidden.dtype).masked_fill(~mine, lowest)
            made[row, 0, place, : seen - 1] = mine[:-1].to(hidden.dtype)
    return made
