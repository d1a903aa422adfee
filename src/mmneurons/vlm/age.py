"""Tell whether a model's weights are still those that were looked at.

Users train, cast, move, resize and reload models between two calls, and what was measured on the old weights (norms,
scales, the hash in a provenance) would be wrong in silence. A tensor is as it was while its storage, type, shape and
version counter are; torch counts the version up at each write, but for writes through `.data`, which cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from mmneurons.errors import ModelError
from mmneurons.vlm import provenance

Undoing = Callable[[int, int | None], Mapping[int, Tensor]]
"""Gives, for a layer and an expert, the changes of columns by index of the neuron, each (hidden,), float32."""


def _nothing(layer: int, expert: int | None) -> Mapping[int, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class _Place:
    """One entry of a module (a submodule, parameter or buffer), as it was when it was looked at."""

    held: dict[str, Any]
    """Dictionary of the module that holds the entry: its submodules, parameters or buffers."""
    key: str
    name: str
    """Path of the entry in the model."""
    identity: int
    version: int = 0
    dtype: torch.dtype | None = None
    storage: StorageWeakRef | None = None
    """Weak reference to a tensor's storage: it keeps the address from being given to another one, but no memory."""

    @property
    def is_as_it_was(self) -> bool:
        """Whether the entry is the same object and, if a tensor, has the same dtype, storage and version."""
        now = self.held.get(self.key)
        if self.storage is None or now is None:
            return id(now) == self.identity
        return (
            now.dtype == self.dtype
            and now.untyped_storage()._cdata == self.storage.cdata
            and _version(now) == self.version
            and id(now) == self.identity
        )


@dataclass(eq=False)
class _Watch:
    """What is known of one model: what it looked like, how old it is, and which edits of ours it has."""

    places: list[_Place]
    weights_hash: str | None = None
    age: int = 0
    changed: list[str] = field(default_factory=list)
    """Entries that something else was found to have changed, until the model counts as older."""
    patches: tuple[str, ...] = ()
    """Hashes of the patches that are applied, sorted."""
    undoing: Undoing = _nothing
    """Changes of the columns that these patches edit, which added to them would undo the patches."""
    depth: int = 0
    """Number of edits of ours that are being made now, one inside the other."""
    edits: int = 0
    """Number of edits of ours begun so far."""
    trusted: int = 0
    """Number of `unchanged` that are entered and not left yet."""


_WATCHES: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()
"""What is known of each model that is still alive."""


def age(model: nn.Module) -> int:
    """Look at a model, and return how often it was found changed by something else than edits of ours.

    Raises:
        ModelError: if it was changed while patches were applied, so that nobody knows its weights without them.
    """
    watch = _watch(model)
    if watch.trusted:
        return watch.age
    edits, found = watch.edits, _changed(watch)
    # If another thread began an edit while this one looked, what was found may be that edit: it does not count. The
    # next look, after the edit, tells.
    if watch.depth == 0 and watch.edits == edits:
        watch.changed = watch.changed or found
        if watch.changed and watch.patches:
            names = [*watch.changed[:3], *(["..."] if len(watch.changed) > 3 else [])]
            raise ModelError(
                "The model's weights were changed by something else while patches were applied.",
                seen=f"Changed: {' '.join(names)}",
                fix="Load the model again. If its weights are as you want them: mmneurons.forget(vlm)",
            )
        if watch.changed:
            renew(model)
    return watch.age


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside the `with` only code of ours runs, which changes the model by edits alone: it is looked at once, before.

    A look takes as long as a small forward pass, and results ask for it again and again.
    """
    age(model)
    watch = _watch(model)
    watch.trusted += 1
    try:
        yield
    finally:
        watch.trusted -= 1


def renew(model: nn.Module) -> None:
    """Take a model's weights as they are now for unedited, and all that was known of the model for outdated."""
    watch = _watch(model)
    watch.age, watch.places, watch.changed = watch.age + 1, _look(model), []
    watch.weights_hash, watch.patches, watch.undoing = None, (), _nothing


def weights_hash(model: PreTrainedModel) -> str:
    """Return the hash of the weights as they were before any edit, read once at each age of the model."""
    age(model)
    watch = _watch(model)
    if watch.weights_hash is None:
        watch.weights_hash = provenance.weights_hash(model)
    return watch.weights_hash


@contextmanager
def editing(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, what is changed counts as an edit of ours: the model stays as old as it was."""
    watch = _watch(model)
    # A change by something else that was not noticed yet is kept: the next call of `age` tells it. Here it would keep a
    # patch from being taken back.
    watch.changed = watch.changed or _changed(watch)
    watch.depth += 1
    watch.edits += 1  # before anything is written: see `age`
    try:
        yield
    finally:
        if watch.depth == 1:
            watch.places = _look(model)  # before depth is 0 and another thread may look again
        watch.depth -= 1


def mark_edited(model: nn.Module, patches: Iterable[str], undoing: Undoing) -> None:
    """Note the hashes of the patches that are applied, and what would undo them: the weights alone do not tell."""
    watch = _watch(model)
    watch.patches, watch.undoing = tuple(sorted(patches)), undoing


def undoing(model: nn.Module, layer: int, expert: int | None) -> Mapping[int, Tensor]:
    """Return what added to columns of one `w_out` gives them as they are without patches, by index of the neuron."""
    return _watch(model).undoing(layer, expert)


def patches(model: nn.Module) -> tuple[str, ...]:
    """Return the hashes of the patches that are applied to a model."""
    return _watch(model).patches


def _watch(model: nn.Module) -> _Watch:
    """Return what is known of a model, looked at now if it never was."""
    if model not in _WATCHES:
        _WATCHES[model] = _Watch(_look(model))
    return _WATCHES[model]


def _changed(watch: _Watch) -> list[str]:
    """List the paths of the entries that are not as they were; none while an edit of ours is being made."""
    return [place.name for place in watch.places if not place.is_as_it_was] if watch.depth == 0 else []


def _look(model: nn.Module) -> list[_Place]:
    """Look at every module, parameter and saved buffer of a model.

    Tensors that change their form as the model runs (packed, or off-loaded by accelerate) are left out.
    """
    places = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        places += [_Place(module._modules, key, prefix + key, id(part)) for key, part in module._modules.items()]
        if hasattr(module, "_hf_hook"):
            continue
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if key not in module._non_persistent_buffers_set and not _is_packed(tensor):
                    places.append(_place(held, key, prefix + key, tensor))
    return places


def _place(held: dict[str, Any], key: str, name: str, tensor: Tensor | None) -> _Place:
    """Note what a parameter or buffer is now."""
    if tensor is None:
        return _Place(held, key, name, id(None))
    storage = StorageWeakRef(tensor.untyped_storage())
    return _Place(held, key, name, id(tensor), _version(tensor), tensor.dtype, storage)


def _is_packed(tensor: Tensor | None) -> bool:
    """Whether a tensor is on the meta device or of a class of its own."""
    return tensor is not None and (tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer))


def _version(tensor: Tensor) -> int:
    """Return torch's count of writes to a tensor; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version
