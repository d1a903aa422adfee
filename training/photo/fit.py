"""The projector before gradients: the units' strengths times the lexicon's columns, and its fit to the lexicon."""

from __future__ import annotations

import random
import time

import torch
import torch.nn.functional as F
from batches import Batches
from jaxtyping import Float
from lexicon import Lexicon
from plan import Plan
from projector import Projector
from rates import share_of_rate
from torch import Tensor
from units import GAIN, Units, wanted

ROWS, RATE, SHARPNESS = 96, 2e-4, 16.0
"""Of the fit: pictures of a step, learning rate, and what the cosines are multiplied by."""
RIDGE, PENALTY = 60, 0.02
"""Of one layer: batches that its ridge regression sees, and its penalty."""


def started(batches: Batches, units: Units, lexicon: Lexicon, plan: Plan) -> Projector:
    """A projector that the language model has not been asked of."""
    columns = lexicon.columns()
    made = Projector(units.mean, units.deviation, columns.shape[1], plan.layers).requires_grad_(False)
    if plan.layers == 2:
        put_in(made, units, columns, lexicon.base)
    else:
        regress(made, batches, columns, lexicon.base)
    return made


def put_in(
    made: Projector, units: Units, columns: Float[Tensor, "nouns hidden"], base: Float[Tensor, "hidden"]
) -> None:
    """The first layer is the units, the second the lexicon; units that no noun has begin silent."""
    assert made.second is not None
    n = len(columns)
    made.first.weight.mul_(0.1)
    made.first.bias.fill_(-1.0)
    made.second.weight.zero_()
    made.first.weight[:n], made.first.bias[:n] = units.layer()
    made.second.weight[:, :n] = columns.T / GAIN
    made.second.bias.copy_(base)


def regress(
    made: Projector, batches: Batches, columns: Float[Tensor, "nouns hidden"], base: Float[Tensor, "hidden"]
) -> None:
    """One layer, by ridge regression onto the lexicon's tokens."""
    index = {noun: i for i, noun in enumerate(batches.known)}
    channels = made.first.in_features
    gram, target, total = torch.zeros(channels, channels).double(), torch.zeros(channels, len(base)).double(), 0
    for i in range(RIDGE):
        batch = batches.draw(random.Random(f"{batches.plan.seed} ridge {i}"), 128, 9)
        x = made.standard(batch.tokens).flatten(0, 1)
        gram += (x.T @ x).double()
        target += (x.T @ (wanted(batch, index).flatten(0, 1) @ columns)).double()
        total += len(x)
    made.first.weight.copy_(torch.linalg.solve(gram + PENALTY * total * torch.eye(channels).double(), target).T.float())
    made.first.bias.copy_(base)


def fit(projector: Projector, batches: Batches, lexicon: Lexicon, steps: int) -> None:
    """Put the image tokens near what their nouns are to look like: the language model is not asked.

    Args:
        projector: Changed.
        batches: What it sees.
        lexicon: What it is to be near to.
        steps: Of 96 pictures.
    """
    index = {noun: i for i, noun in enumerate(batches.known)}
    columns, base = lexicon.columns(), lexicon.base
    directions, size = F.normalize(columns), columns.square().mean()
    projector.requires_grad_(True)
    optimizer, start = torch.optim.AdamW(projector.parameters(), lr=RATE, betas=(0.9, 0.98)), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * share_of_rate(step, steps)
        batch = batches.draw(random.Random(f"{batches.plan.seed} fit {step}"), ROWS, 6)
        aim = wanted(batch, index)
        tokens = projector(batch.tokens) - base
        away = (tokens - aim @ columns).square().mean() / size
        near = F.cross_entropy(SHARPNESS * F.normalize(tokens.mean(1)) @ directions.T, aim.mean(1))
        optimizer.zero_grad()
        (away + near).backward()
        optimizer.step()
        if step % 100 == 99:
            shown = [round(value.item(), 3) for value in (away, near)]
            print({"fit": step + 1, "losses": shown, "s": round(time.time() - start, 1)}, flush=True)
