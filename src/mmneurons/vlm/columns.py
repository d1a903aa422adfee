"""Columns of `w_out`: which neurons they belong to, which of them score highest, and hashes that tell them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.maths.ranking import top_k
from mmneurons.neurons import Neuron
from mmneurons.settings import Blocks
from mmneurons.vlm.anatomy.parts import Anatomy

HASH_BYTES = 16
"""Number of bytes that are kept of the SHA-256 of each column."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A set of columns of `w_out`, in order, FFN after FFN."""

    anatomy: Anatomy
    indices: dict[int, Int[Tensor, "n"]]
    """Indices of the columns by the FFN's place in the anatomy, counted through all its experts, in rising order."""

    @property
    def neurons(self) -> list[Neuron]:
        """The neurons that the columns belong to, in the order of the columns."""
        return [self.anatomy.ffns[i].neuron(index) for i, mine in self.indices.items() for index in mine.tolist()]

    @staticmethod
    def of(anatomy: Anatomy, neurons: Sequence[Neuron]) -> Columns:
        """Return the columns of these neurons, each once.

        Raises:
            SettingError: the model has no such neuron, or none is given.
        """
        if not neurons:
            raise SettingError("No neuron is given whose column could move.")
        found: dict[int, list[int]] = {}
        # Experts of one FFN share one index: its columns are counted through expert 0, then expert 1, and so on.
        for neuron in set(neurons):
            ffn = anatomy.find(neuron)
            if ffn is None:
                raise SettingError(f"The model has no neuron {neuron}.")
            found.setdefault(anatomy.ffns.index(ffn), []).append((neuron.expert or 0) * ffn.n_neurons + neuron.index)
        return Columns(anatomy, {i: torch.tensor(sorted(mine)) for i, mine in sorted(found.items())})

    @staticmethod
    def best(
        anatomy: Anatomy, scores: Mapping[int, Float[Tensor, "neurons"]], top: int, *, above: float = 0.0
    ) -> Columns:
        """Return the columns with the `top` largest scores, if above a bound, of all these FFNs together."""
        # All FFNs compete in one vector, which is cut up again afterwards; FFNs with no column among the best are left
        # out.
        whole = torch.cat(list(scores.values()))
        chosen = torch.zeros(len(whole), dtype=torch.bool)
        chosen[top_k(whole, min(top, int((whole > above).sum())))] = True
        parts = zip(scores, chosen.split([len(part) for part in scores.values()]), strict=True)
        return Columns(anatomy, {i: part.nonzero()[:, 0] for i, part in parts if bool(part.any())})


def lowest_block(anatomy: Anatomy, blocks: Blocks) -> int:
    """Return the number of the first block that columns are taken from, if they come from the last `blocks`.

    Raises:
        SettingError: the model does not have as many blocks.
    """
    n_blocks = len(anatomy.blocks)
    if blocks != "all" and not 1 <= blocks <= n_blocks:
        raise SettingError(f"The model has {n_blocks} blocks.", seen=f"blocks={blocks}", fix="blocks=1 ... or 'all'")
    return 0 if blocks == "all" else n_blocks - blocks


def column_hashes(columns: Float[Tensor, "n hidden"]) -> UInt8[Tensor, "n 16"]:
    """Return the hash of each column: the first 16 bytes of the SHA-256 of its numbers as float32.

    The same numbers in another dtype have the same hash; numbers that another dtype rounds have not.
    """
    rows = columns.detach().float().cpu().contiguous().numpy()
    # Little-endian on every machine, so that a patch made on one fits on another.
    made = b"".join(hashlib.sha256(row.astype("<f4").tobytes()).digest()[:HASH_BYTES] for row in rows)
    return torch.frombuffer(bytearray(made), dtype=torch.uint8).view(-1, HASH_BYTES)
