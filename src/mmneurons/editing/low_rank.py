"""A change of columns that is learned: every column moves along a few directions that all of them share.

change = LowRank.none(vlm, columns, rank=32)
with change.hooked(): ...       # as if the patch were applied, differentiable
change.patch()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmneurons.errors import ModelError
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.vlm.columns import Columns, column_hashes
from mmneurons.vlm.context import hooked
from mmneurons.vlm.locking import restored
from mmneurons.vlm.vlm import VLM


@dataclass(frozen=True, eq=False)
class LowRank:
    """delta = unit * shares @ directions. Both are of the order of 1, so that one learning rate fits both."""

    columns: Columns
    pristine: Mapping[int, Float[Tensor, "n hidden"]]
    """Per FFN the columns before any edit."""
    shares: Mapping[int, Float[Tensor, "n rank"]]
    """Per FFN; float32, on its device."""
    directions: Float[Tensor, "rank hidden"]
    """float32."""

    @staticmethod
    def none(vlm: VLM, columns: Columns, rank: int) -> LowRank:
        """The change that changes nothing: no shares of random directions, always the same ones.

        Raises:
            ModelError: a column is one of an expert, or cannot be written.
        """
        anatomy, ledger = vlm.anatomy, ledger_of(vlm)
        if any(anatomy.ffns[i].n_experts is not None for i in columns.indices):
            raise ModelError("Changes are learned of dense FFNs only; some of these columns are an expert's.")
        pristine = {i: ledger.pristine((anatomy.ffns[i].layer, None), mine) for i, mine in columns.indices.items()}
        shares = {
            i: torch.zeros(len(held), rank, device=held.device, dtype=torch.float32) for i, held in pristine.items()
        }
        directions = torch.randn(rank, anatomy.hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return LowRank(columns, pristine, shares, directions.to(next(iter(shares.values())).device))

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned."""
        return [*self.shares.values(), self.directions]

    def units(self) -> dict[int, float]:
        """Per FFN: shares and directions of 1 make a change about as long as its columns are."""
        length = self.directions.numel() ** 0.5
        return {i: float(held.float().norm(dim=1).mean()) / length for i, held in self.pristine.items()}

    @restored
    def hooked(self) -> Iterator[None]:
        """What the change writes is added to what each `w_out` gives."""
        units = self.units()

        def hook(i: int) -> RemovableHandle:
            def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                fired = args[0][..., self.columns.indices[i].to(args[0].device)].float()
                written = fired @ (units[i] * self.shares[i]) @ self.directions.to(fired.device)
                return output + written.to(output.dtype)

            return self.columns.anatomy.ffns[i].module.register_forward_hook(add)

        with hooked(partial(hook, i) for i in self.shares):
            yield

    def patch(self) -> Patch:
        """The change as it is: coefficients and directions."""
        units, ffns = self.units(), self.columns.anatomy.ffns
        parts = [
            PatchPart(
                ffns[i].layer,
                None,
                mine,
                column_hashes(self.pristine[i]),
                coefficients=(units[i] * self.shares[i]).detach().cpu(),
            )
            for i, mine in self.columns.indices.items()
        ]
        return Patch(self.columns.anatomy.hidden, tuple(parts), self.directions.detach().cpu().clone())


def slopes(vlm: VLM, layers: Sequence[int], descend: Iterable[object]) -> dict[int, Float[Tensor, "neurons"]]:
    """For each FFN how steeply a loss falls as each column changes by a share of its length, whichever way.

    Args:
        vlm: The model.
        layers: The blocks whose dense FFNs count.
        descend: Goes backward through parts of the loss, one at each item.

    Raises:
        ModelError: these blocks have no dense FFN, or one that cannot be written.
    """
    ffns = {i: ffn for i, ffn in enumerate(vlm.anatomy.ffns) if ffn.layer in layers and ffn.n_experts is None}
    if not ffns:
        raise ModelError("Changes are learned of dense FFNs only; these blocks have none.", seen=f"layers {layers}")
    whole = Columns(vlm.anatomy, {i: torch.arange(ffn.size) for i, ffn in ffns.items()})
    held = {i: ledger_of(vlm).pristine((ffn.layer, None), whole.indices[i]).float() for i, ffn in ffns.items()}
    changes = {i: torch.zeros_like(columns).requires_grad_() for i, columns in held.items()}

    def hook(i: int) -> RemovableHandle:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (args[0].float() @ changes[i]).to(output.dtype)

        return ffns[i].module.register_forward_hook(add)

    with hooked(partial(hook, i) for i in ffns):
        for _ in descend:
            pass
    return {
        i: (torch.zeros(len(change), dtype=torch.float32) if change.grad is None else change.grad.norm(dim=1).cpu())
        * held[i].norm(dim=1).cpu()
        for i, change in changes.items()
    }
