"""Keep one ledger per model: its columns before any edit, and the patches that are active.

A weight is round(pristine + sum of deltas), summed in float32 in the order of the patches' hashes and rounded once to
the dtype in which it is stored. It is computed anew at each `apply` and `revert`, so that the order of these does not
matter and an empty ledger leaves the model bit for bit as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from mmneurons.errors import ModelError, SettingError
from mmneurons.neurons import Neuron
from mmneurons.vlm import weights
from mmneurons.vlm.age import age, editing, mark_edited, renew
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.columns import column_hashes
from mmneurons.vlm.locking import uninterrupted
from mmneurons.vlm.vlm import VLM

if TYPE_CHECKING:
    from mmneurons.patches.patch import Patch, PatchPart

Place = tuple[int, int | None]
"""Place of a `w_out`: its layer and its expert, which is None for a dense FFN."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of one place that are edited: as they were before any edit, and as the ledger wrote them."""

    indices: Int[Tensor, "n"]
    """In rising order; int64, on the CPU."""
    pristine: Shaped[Tensor, "n hidden"]
    """In the dtype and on the device of the weights."""
    written: Shaped[Tensor, "n hidden"]


@dataclass(frozen=True, eq=False)
class _Change:
    """A planned write of columns of one place."""

    place: Place
    view: Shaped[Tensor, "hidden neurons"]
    """The weights themselves."""
    columns: _Columns


class Ledger:
    """A ledger keeps what is edited in one model; it is made by `ledger_of`."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.age = age(model)
        self._model = ref(model)  # the table of ledgers must not keep it alive
        self._ffns: dict[Place, Ffn] = {}
        for ffn in anatomy.ffns:
            for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
                self._ffns[ffn.layer, expert] = ffn
        self._hidden = anatomy.hidden
        self._columns: dict[Place, _Columns] = {}
        self._active: dict[str, Patch] = {}

    @property
    def active(self) -> tuple[Patch, ...]:
        """The patches that are applied, in the order in which they are summed."""
        return tuple(self._active[key] for key in sorted(self._active))

    def apply(self, patch: Patch) -> None:
        """Add a patch to those that are active; see `Patch.apply`."""
        if patch.hash in self._active:
            raise SettingError("This patch is applied already.", fix="Scale it to change more: 2 * patch")
        if patch.hidden != self._hidden:
            raise ModelError(
                "This patch is of another model.", seen=f"Width {patch.hidden}, the model's is {self._hidden}."
            )
        # Everything is checked before a single column is written.
        for part in patch.parts:
            self._check(part)
        active = {**self._active, patch.hash: patch}
        self._check_finite(active)
        self._write(active)

    def revert(self, patch: Patch) -> None:
        """Remove a patch from those that are active; see `Patch.revert`."""
        if patch.hash not in self._active:
            raise SettingError("This patch is not applied to this model.")
        self._write({key: other for key, other in self._active.items() if key != patch.hash})

    def pristine(self, place: Place, indices: Tensor | None = None) -> Tensor:
        """Return columns as they were before any edit, (n, hidden), in the dtype in which they are stored; or all.

        Raises:
            ModelError: the columns could not be written to.
        """
        view = weights.writable(self._ffns[place].module, place[1])
        indices = torch.arange(view.shape[1]) if indices is None else indices
        current = view[:, indices.to(view.device)].T
        # A column that is edited now is taken from the ledger, any other from the model.
        known = self._columns.get(place)
        if known is None:
            return current
        rows, among = _found(indices, known.indices)
        current[rows] = known.pristine[among].to(current.device)
        return current

    def _check(self, part: PatchPart) -> None:
        """Refuse a model whose columns, before any edit, are not those that the patch expects."""
        ffn = self._ffns.get(part.place)
        name = f"layer {part.layer}" + ("" if part.expert is None else f", expert {part.expert}")
        if ffn is None:
            raise ModelError("This patch is of another model.", seen=f"There is no {name}.")
        largest = int(part.indices[-1]) if len(part.indices) else 0
        if largest >= ffn.n_neurons:
            raise ModelError(
                "This patch is of another model.", seen=f"No neuron {largest} in {name}: it has {ffn.n_neurons}."
            )
        # By their hashes and not by the model's name: the same model in another dtype has other columns.
        differ = (column_hashes(self.pristine(part.place, part.indices)) != part.hashes).any(1)
        if bool(differ.any()):
            first = int(differ.nonzero()[0])
            raise ModelError(
                f"The model's column {part.neurons[first]} is not the one that this patch was made for.",
                seen=f"{int(differ.sum())} of {len(differ)} columns of {name} differ: another model, other weights, or "
                "another dtype than the patch was made with.",
                fix="Load the model that `patch.provenance` names, as it was loaded then.",
            )

    def _check_finite(self, active: Mapping[str, Patch]) -> None:
        """Refuse patches whose sum the dtype of the weights cannot hold, whichever of them are active at once."""
        # How far each column can move: the sum of absolute deltas bounds that of any subset of the patches, so that
        # taking back one of two opposite patches cannot overflow.
        for place in {part.place for patch in active.values() for part in patch.parts}:
            parts = [(patch, part) for patch in active.values() for part in patch.parts if part.place == place]
            indices = torch.cat([part.indices for _, part in parts]).unique()
            pristine = self.pristine(place, indices)
            largest = pristine.float().abs().cpu()
            for patch, part in parts:
                largest[torch.searchsorted(indices, part.indices)] += patch.deltas(part).abs()
            # Overflow shows as infinity in the stored dtype. Numbers that were not finite before any edit do not count.
            over = (pristine.isfinite().cpu() & ~largest.to(pristine.dtype).isfinite()).any(1)
            if bool(over.any()):
                neuron = Neuron(place[0], int(indices[over][0]), place[1])
                raise SettingError(
                    f"This patch is too large for the model's column {neuron}.",
                    seen=f"Its numbers would overflow {str(pristine.dtype).removeprefix('torch.')}.",
                    fix="Scale it to change less: 0.1 * patch",
                )

    def _write(self, active: Mapping[str, Patch]) -> None:
        """Write the columns that `active` asks for; whatever happens on the way, the model has all of them or none."""
        plan, model = self._plan(active), self._model()
        assert model is not None
        # No signal comes between two places, or between the weights and the ledger's record of them.
        with uninterrupted(), torch.no_grad(), editing(model):
            done: list[tuple[_Change, Tensor]] = []
            try:
                for change in plan:
                    where = change.columns.indices.to(change.view.device)
                    done.append((change, change.view[:, where]))
                    change.view[:, where] = change.columns.written.T
            # A write can fail (a device error): what was written is taken back, last first, from exact copies.
            except BaseException:
                for change, old in reversed(done):
                    change.view[:, change.columns.indices.to(change.view.device)] = old
                raise
            # All is written: now the record of it. With no patch left, nothing is kept: the model is as it was loaded.
            self._active = dict(active)
            self._columns.clear()
            self._columns.update({change.place: change.columns for change in plan} if active else {})
            mark_edited(model, active, partial(_undoing, self._columns))

    def _plan(self, active: Mapping[str, Patch]) -> list[_Change]:
        """Plan the write of every column that is or was edited, place by place; nothing is changed."""
        parts: dict[Place, list[tuple[Patch, PatchPart]]] = {place: [] for place in self._columns}
        for key in sorted(active):
            for part in active[key].parts:
                parts.setdefault(part.place, []).append((active[key], part))
        plan = []
        for place, mine in parts.items():
            view, known = weights.writable(self._ffns[place].module, place[1]), self._columns.get(place)
            # 1. What is added to each column, summed in the order of the hashes, since float32 sums depend on their
            # order. Columns that are edited now count, so that one which no patch names any more is restored.
            named = [part.indices for _, part in mine] + ([] if known is None else [known.indices])
            indices = torch.cat(named).unique()
            added = torch.zeros(len(indices), self._hidden, dtype=torch.float32)
            for patch, part in mine:
                added[torch.searchsorted(indices, part.indices)] += patch.deltas(part)
            # 2. Each column as it was before any edit, unless something else has changed it, and as it is to be.
            current = view[:, indices.to(view.device)].T.contiguous()
            pristine = current.clone()
            if known is not None:
                rows, among = _found(indices, known.indices)
                # An edited column must be what the ledger wrote or, if something else put it back, what it was before.
                was, wrote = known.pristine[among].to(view.device), known.written[among].to(view.device)
                foreign = ~(_same_bits(current[rows], wrote) | _same_bits(current[rows], was))
                if bool(foreign.any()):
                    neuron = Neuron(place[0], int(indices[rows][foreign.cpu()][0]), place[1])
                    raise ModelError(
                        f"The model's column {neuron} was changed by something else.",
                        seen="It is neither what the ledger wrote when it was edited, nor what it was before.",
                        fix="Load the model again. If its weights are as you want them: mmneurons.forget(vlm)",
                    )
                pristine[rows] = was
            # Without any change the pristine bits themselves are written: adding zero would make -0.0 into 0.0.
            new = (pristine.float() + added.to(pristine.device)).to(pristine.dtype)
            new = torch.where(added.any(1).to(pristine.device)[:, None], new, pristine)
            plan.append(_Change(place, view, _Columns(indices, pristine, new)))
        return plan


def _undoing(edited: Mapping[Place, _Columns], layer: int, expert: int | None) -> Mapping[int, Tensor]:
    """Work out what added to each edited column of a place gives it as it was, by index of the neuron."""
    columns = edited.get((layer, expert))
    if columns is None:
        return {}
    changes = columns.pristine.float() - columns.written.float()
    return dict(zip(columns.indices.tolist(), changes, strict=True))


def _found(indices: Int[Tensor, "n"], among: Int[Tensor, "m"]) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
    """Return where indices stand that are among rising others too: in the first, and in the others."""
    places = torch.searchsorted(among, indices.cpu()).clamp_max(len(among) - 1)
    rows = (among[places] == indices.cpu()).nonzero()[:, 0] if len(among) else torch.empty(0, dtype=torch.long)
    return rows, places[rows]


def _same_bits(some: Shaped[Tensor, "n hidden"], others: Shaped[Tensor, "n hidden"]) -> Bool[Tensor, "n"]:
    """Return which rows are the same to the bit, NaN and the sign of zero included."""
    if some.dtype != others.dtype or some.shape != others.shape:
        return torch.zeros(len(some), dtype=torch.bool, device=some.device)
    return (some.contiguous().view(torch.uint8) == others.contiguous().view(torch.uint8)).all(1)


_LEDGERS: WeakKeyDictionary[nn.Module, Ledger] = WeakKeyDictionary()
"""The ledger of each model that is still alive; VLMs that share a model share its ledger."""


def ledger_of(vlm: VLM) -> Ledger:
    """Return the one ledger of a model, made at first use, and anew if something else has changed the weights."""
    with vlm.alone():
        owner = vlm.analysed.owner
        known = _LEDGERS.get(owner)
        # A ledger with active patches is never replaced: it alone knows the pristine columns.
        if known is None or (not known.active and known.age != age(vlm.model)):
            _ = vlm.facts  # reads the weights hash now, before any edit
            _LEDGERS[owner] = Ledger(vlm.model, vlm.anatomy)
        return _LEDGERS[owner]


def forget(vlm: VLM) -> None:
    """Take a model's weights as they are now for unedited: no patch counts as active, and no weight is changed.

    It is for a model whose weights something else has replaced, such as `load_state_dict` or `.to(dtype)`. Patches made
    for the weights before are refused where the columns differ.
    """
    with vlm.alone():
        renew(vlm.model)  # the weights hash is forgotten as well
        _LEDGERS.pop(vlm.anatomy.owner, None)
