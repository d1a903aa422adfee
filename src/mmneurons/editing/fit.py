"""Adam fits everything that is learned here: a change of columns, an adapter, what a block is to write.

adam = torch.optim.Adam(change.parameters, lr=0.1)
with change.added():
    fit(adam, lambda step: [loss_of(batch) for batch in batches], range(100), stop=lambda step: is_good())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.errors import ModelError

Losses = Iterable[Float[Tensor, ""]]
"""Parts of one loss, worked out one after the other: of each the graph is gone before the next is made."""


def fit(
    adam: torch.optim.Adam,
    losses: Callable[[int], Losses],
    steps: range,
    *,
    rate: Callable[[int], float] | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Minimise a loss by Adam; the caller has set the hooks that make the parameters act in the model.

    Args:
        adam: What is learned: leaves that require gradients, float32. With its moments, from an earlier run or new.
        losses: The parts of the loss at a step, penalties among them; each is summed.
        steps: From the first to be taken; of a run that goes on, the first that is left.
        rate: The learning rate of a step; None: those that `adam` has.
        stop: Asked before each step and after the last, with the number of steps taken, whether they are enough.
        after: Told after each step how many are taken, and the loss before it.

    Returns:
        The number of steps taken.

    Raises:
        ModelError: the loss is no number.
    """
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    for step in steps:
        # Before the step: a look at the parameters costs no gradient.
        if stop(step):
            return step
        # Gradients of all parts add up before the parameters move.
        loss = descend(losses(step), parameters)
        if not math.isfinite(loss):  # it would be learned in silence
            raise ModelError(
                "What is to be learned has a loss that is no number.",
                seen=f"{loss} at step {step + 1}",
                fix="Load the model in float32: --dtype float32",
            )
        if rate is not None:
            for group in adam.param_groups:
                group["lr"] = rate(step)
        adam.step()
        adam.zero_grad()  # they are as large as what is learned
        after(step + 1, loss)
    stop(steps.stop)
    return steps.stop


def descend(losses: Losses, parameters: Sequence[Tensor]) -> float:
    """Add the gradients of some losses to those of the parameters, and of nothing else.

    Returns:
        The sum of the losses.
    """
    total = 0.0
    with torch.enable_grad():
        for loss in losses:
            # Of nothing else: a model that is not frozen would be left with gradients.
            loss.backward(inputs=parameters)
            total += loss.item()
    return total
