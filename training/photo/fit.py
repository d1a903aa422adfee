"""The projector before gradients: the units' strengths times the lexicon's columns."""

from __future__ import annotations

import random

import torch
from batches import Batches, jointly
from lexicon import Lexicon
from plan import Plan
from projector import Projector
from units import GAIN, Units, wanted

RIDGE, PENALTY = 60, 0.02
"""Of one layer: batches that its ridge regression sees, and its penalty."""


def started(batches: Batches, units: Units, lexicon: Lexicon, plan: Plan) -> Projector:
    """A projector that the language model has not been asked of."""
    made = Projector(units.mean, units.deviation, len(lexicon.base), plan.layers).requires_grad_(False)
    if plan.layers == 2:
        put_in(made, units, lexicon)
    else:
        regress(made, batches, lexicon)
    return made


def put_in(made: Projector, units: Units, lexicon: Lexicon) -> None:
    """The first layer is the units, the second the lexicon; units that are left over begin silent."""
    assert made.second is not None
    weight, bias = units.layer()
    columns = lexicon.columns()
    made.first.weight.mul_(0.1)
    made.first.bias.fill_(-1.0)
    made.second.weight.zero_()
    made.first.weight[: len(weight)], made.first.bias[: len(bias)] = weight, bias
    made.second.weight[:, : len(columns)] = columns.T / GAIN
    made.second.weight[:, len(columns) : len(weight)] = torch.outer(lexicon.joint, units.readout.weight[0])
    made.second.bias.copy_(lexicon.base + units.readout.bias * lexicon.joint)


def regress(made: Projector, batches: Batches, lexicon: Lexicon) -> None:
    """One layer, by ridge regression onto the lexicon's tokens."""
    index = {noun: i for i, noun in enumerate(batches.known)}
    channels, columns = made.first.in_features, lexicon.columns()
    gram, target, total = torch.zeros(channels, channels).double(), torch.zeros(channels, columns.shape[1]).double(), 0
    for i in range(RIDGE):
        batch = batches.draw(random.Random(f"{batches.plan.seed} ridge {i}"), 128, 9)
        x, aim = made.standard(batch.tokens).flatten(0, 1), wanted(batch, index) @ columns
        aim = aim + jointly(batch.second)[..., None] * lexicon.joint
        gram += (x.T @ x).double()
        target += (x.T @ aim.flatten(0, 1)).double()
        total += len(x)
    made.first.weight.copy_(torch.linalg.solve(gram + PENALTY * total * torch.eye(channels).double(), target).T.float())
    made.first.bias.copy_(lexicon.base)
