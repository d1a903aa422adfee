"""Follow the paths of an anatomy: directions backwards from the head, columns forwards to it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.maths.readout import frozen_direction
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy, WritePath, hops


class Directions:
    """Read-out directions: what a write at the start of a path is multiplied by to give its share of a score.

    They are made of the directions at the input of the final norm, by going each path back with the scales of its norms
    held at the values that they had. Paths that share an end share its computation.
    """

    def __init__(
        self, anatomy: Anatomy, final: Float[Tensor, "n hidden"], norm_inputs: list[Float[Tensor, "n hidden"]]
    ) -> None:
        """Start with the directions at the final norm.

        Args:
            anatomy: Where the paths are.
            final: Directions at the input of the final norm, float32.
            norm_inputs: For each of the anatomy's norms, what entered it at the position of each direction.
        """
        self._final = final
        self._inputs = {id(site): values for site, values in zip(anatomy.norms, norm_inputs, strict=True)}
        self._known: dict[int, Tensor] = {}

    def at(self, path: WritePath | None) -> Float[Tensor, "n hidden"]:
        """Return the directions at the start of a path, float32, one per position."""
        if path is None:
            return self._final
        # Kept by id: the path of a block's output is the same object for all that is written into that block, so that
        # each norm of the stream is gone back through once.
        if id(path) not in self._known:
            direction = self.at(path.then)
            if path.norm is not None:
                # One step of backpropagation through the norm, with its scale held at the value that it had in the
                # model.
                norm, entered = path.norm.norm, self._inputs[id(path.norm)].float().to(direction.device)
                direction = frozen_direction(direction, entered, norm.to(direction.device))
            self._known[id(path)] = path.scale * direction
        return self._known[id(path)]


def bias_total(anatomy: Anatomy, directions: Directions) -> Float[Tensor, "n"]:
    """Return what the biases of the FFN output projections and of the norms on the paths add to the score.

    The biases of the final norm and of the head are not in it.
    """
    like = directions.at(None)
    total = torch.zeros(len(like), device=like.device, dtype=torch.float32)
    # Biases of fused experts are left out: how much of each is written depends on the router (see the anatomy's
    # doubts).
    for ffn in anatomy.ffns:
        bias = None if ffn.n_experts is not None else weights.bias(ffn.module)
        if bias is not None:
            total = total + directions.at(ffn.path) @ bias.float().to(total.device)
    # A norm adds its bias to its output, so it goes on by the path behind the norm.
    for site in anatomy.norms:
        if site.norm.bias.any():
            total = total + directions.at(site.then) @ site.norm.bias.to(total.device)
    return total


def in_stream(columns: Float[Tensor, "n hidden"], path: WritePath | None) -> Float[Tensor, "n hidden"]:
    """Return columns as they reach the final norm, up to a positive factor that depends on the position.

    They go through the weights of all norms on their path; the scales by which norms divide are left out.
    """
    for step in hops(path):
        columns = step.scale * columns
        if step.norm is not None:
            columns = step.norm.norm.unscaled(columns)
    return columns


def frozen_rows(
    anatomy: Anatomy, rows: Float[Tensor, "n hidden"], residual: Float[Tensor, "n hidden"]
) -> Float[Tensor, "n hidden"]:
    """Return the directions of `score="logit"` at the input of the final norm, the model's own factors included."""
    rule = anatomy.logit_rule
    return rule.scale * rule.before * frozen_direction(rows, residual, anatomy.norm.to(rows.device))
