"""Keep the arguments with which blocks were called at one step, to call the blocks again with several rows."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class Shared:
    """An object that blocks pass on to each other and write into, such as a cache, as it was before a block ran."""

    key: int
    """Identity of the object, the same wherever it is passed."""
    content: Any


class Catcher:
    """A catcher keeps the arguments with which the blocks are called at some steps of `generate`."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.caught: dict[int, list[tuple[tuple, dict[str, Any]]]] = {}
        self._step = -1
        self._caches: dict[int, Shared] = {}

    def hook(self, layer: int):
        """Make the forward pre-hook of the block with this number."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # The first block begins a new step: what was copied of the cache at the last one is outdated.
            if layer == 0:
                self._step += 1
                self._caches.clear()
            if self._step in self.steps:
                self.caught.setdefault(self._step, []).append((self._copied(args), self._copied(kwargs)))

        return hook

    def _copied(self, value: Any) -> Any:
        """Return a copy of an argument, its tensors copied too: models write into some of theirs."""
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, tuple | list):
            return type(value)(self._copied(part) for part in value)
        if type(value) is dict:
            return {name: self._copied(part) for name, part in value.items()}
        if isinstance(value, Cache):  # large: copied once a step, before the first block adds to it
            if id(value) not in self._caches:
                self._caches[id(value)] = Shared(id(value), copy.deepcopy(value))
            return self._caches[id(value)]
        if isinstance(value, MutableMapping):
            return Shared(id(value), copy.deepcopy(value))
        return value


def repeated(value: Any, n_rows: int, shared: dict[int, Any]) -> Any:
    """Repeat an argument that was caught for one row; `shared` holds, by key, the shared objects already made."""
    if isinstance(value, Tensor):
        return value.expand(n_rows, *value.shape[1:]).clone() if value.ndim > 1 and len(value) == 1 else value
    if isinstance(value, tuple | list):
        return type(value)(repeated(part, n_rows, shared) for part in value)
    if type(value) is dict:
        return {name: repeated(part, n_rows, shared) for name, part in value.items()}
    if isinstance(value, Shared):
        if value.key not in shared:
            shared[value.key] = _widened(copy.deepcopy(value.content), n_rows)
        return shared[value.key]
    return value


def _widened(state: Any, n_rows: int) -> Any:
    """Repeat every tensor in a cache of one row, in place, be it of attention or of another mixer."""
    # By what a cache is made of and not by its class: caches of transformers hold layers, which hold tensors, in
    # attributes whose names differ.
    if isinstance(state, Tensor | tuple | dict):
        return repeated(state, n_rows, {})
    if isinstance(state, list):
        return [_widened(part, n_rows) for part in state]
    if isinstance(state, MutableMapping):
        for name, part in state.items():
            state[name] = _widened(part, n_rows)
    elif type(state).__module__.startswith("transformers."):
        for name, part in vars(state).items():
            setattr(state, name, _widened(part, n_rows))
    return state
