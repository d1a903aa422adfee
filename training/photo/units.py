"""Units that tell nouns apart: a linear classifier of image features, whose outputs become strengths of nouns.

A few more units tell together whether a place shows two things: that is no linear function of its features.

    python training/photo/units.py --pictures pictures.csv --side 5 --window 5

Started alone, it prints how many pictures that it has not learned from the mean of a picture's units names: what the
tower's features tell apart, without a language model.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import Batch, Batches, jointly
from features import WORK
from jaxtyping import Float
from pictures import read_pictures
from plan import Plan
from projector import SMALLEST
from rates import share_of_rate
from torch import Tensor, nn

ROWS, RATE, DECAY = 64, 2e-3, 0.5
GAIN = 4.0
"""A unit's strength is GELU(u) / GAIN: 1 where u is GAIN, about 0 below 0, with a dip that is of no note."""
PLACES, NEAR, TWO = 0.5, 3.0, 3.0
"""Weights beside the cross-entropy of the whole picture: of each place's, of strengths' squared error, and of the
squared error of how surely a place shows two things."""
JOINT = 14
"""Units that tell whether there are two: those that 561 nouns leave of the 576 of the language model's width."""


class Units(nn.Module):
    """A linear classifier behind a standardisation of each channel.

    Args:
        sample: Features from which means and deviations are taken.
        n: Of nouns.
    """

    def __init__(self, sample: Float[Tensor, "tokens channels"], n: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(sample.mean(0)), nn.Buffer(sample.std(0).clamp_min(SMALLEST))
        self.linear = nn.Linear(sample.shape[1], n)
        self.slope, self.threshold = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(3.0))
        """From logits to what GELU is given: slope * (logit - threshold)."""
        self.joint, self.readout = nn.Linear(sample.shape[1], JOINT), nn.Linear(JOINT, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens nouns"]:
        """Logits."""
        return self.linear((x - self.mean) / self.deviation)

    def strengths(self, logits: Float[Tensor, "*tokens nouns"]) -> Float[Tensor, "*tokens nouns"]:
        """About 1 for what is there, 0 for all else."""
        return F.gelu(self.slope * (logits - self.threshold)) / GAIN

    def jointly(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
        """About 1 where two things are seen, else 0."""
        return self.readout(F.gelu(self.joint((x - self.mean) / self.deviation)))[..., 0]

    def layer(self) -> tuple[Float[Tensor, "units channels"], Float[Tensor, "units"]]:
        """Weight and bias of a layer that gives GELU its input, from standardised features: nouns, then the others."""
        weight, bias = self.slope * self.linear.weight, self.slope * (self.linear.bias - self.threshold)
        return torch.cat([weight, self.joint.weight]), torch.cat([bias, self.joint.bias])


def read_units(batches: Batches, path: Path) -> Units:
    """Units that were learned."""
    units = Units(torch.zeros(2, batches.features.shape[2]), len(batches.known)).requires_grad_(False)
    units.load_state_dict(torch.load(path, weights_only=True))
    return units


def wanted(batch: Batch, index: dict[str, int]) -> Float[Tensor, "rows tokens nouns"]:
    """How much of each noun each feature shows."""
    ends = torch.tensor([[index[nouns[0]], index[nouns[-1]]] for nouns in batch.nouns])
    shares = torch.stack([1 - batch.second, batch.second], 2)
    made = torch.zeros(*batch.second.shape, len(index))
    return made.scatter_add_(2, ends[:, None].expand(shares.shape), shares)


def learn_units(batches: Batches, steps: int, seed: int) -> Units:
    """Teach the units, without the language model.

    Args:
        batches: What they see.
        steps: Of 64 pictures.
        seed: Of what each step sees.
    """
    index = {noun: i for i, noun in enumerate(batches.known)}
    units = Units(batches.sample(), len(index))
    scale = [units.slope, units.threshold]
    layers = [*units.linear.parameters(), *units.joint.parameters(), *units.readout.parameters()]
    groups = [
        {"params": layers, "rate": RATE},
        {"params": scale, "rate": 5 * RATE, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(step, steps)
        batch = batches.draw(random.Random(f"{seed} units {step}"), ROWS, 9)
        logits, aim = units(batch.tokens), wanted(batch, index)
        losses = (
            F.cross_entropy(logits.mean(1), aim.mean(1)),
            F.cross_entropy(logits.flatten(0, 1), aim.flatten(0, 1)),
            (units.strengths(logits) - aim).square().sum(2).mean(),
            (units.jointly(batch.tokens) - jointly(batch.second)).square().mean(),
        )
        optimizer.zero_grad()
        (losses[0] + PLACES * losses[1] + NEAR * losses[2] + TWO * losses[3]).backward()
        optimizer.step()
        if step % 100 == 99:
            shown = [round(value.item(), 3) for value in losses]
            shown += [round(value.item(), 3) for value in scale]
            print(
                {"units": step + 1, "losses, slope, threshold": shown, "s": round(time.time() - start, 1)}, flush=True
            )
    return units.requires_grad_(False)


def told(units: Units, batches: Batches) -> dict[str, list[float]]:
    """Of each kind of picture that is judged: the share that the mean of its units names, and how many there are.

    Of collages, the two strongest are to be the two nouns.
    """
    judged, right = Counter[str](), Counter[str]()
    for i, view in enumerate(batches.views):
        picture, nouns = batches.pictures[view.pictures[0]], batches.nouns_of(i)
        if view.kind not in ("centre", "collage") or picture.split == "train" or not {*nouns} <= {*batches.known}:
            continue
        taught = "photographed" if {*nouns} <= {*batches.nouns} else "imagined"
        source = "collage" if len(nouns) == 2 else picture.path.name.partition("-")[0]
        kind = f"{picture.split}, {source}, {taught}"
        strengths = units.strengths(units(torch.from_numpy(batches.features[i].astype("float32")))).mean(0)
        judged[kind] += 1
        right[kind] += {batches.known[k] for k in strengths.topk(len(nouns)).indices.tolist()} == {*nouns}
    return {kind: [round(right[kind] / n, 3), n] for kind, n in sorted(judged.items())}


def main() -> None:
    """Teach and judge, with imagined classes and, where there are none, without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, help="folder of a run of train.py, which then begins with these units")
    for name in ("side", "window", "units", "imagined"):
        parser.add_argument(f"--{name}", type=type(getattr(Plan, name)), default=getattr(Plan, name))
    options = parser.parse_args()
    plan = Plan(side=options.side, window=options.window, units=options.units, imagined=options.imagined)
    batches = Batches(options.work, read_pictures(options.pictures), plan)
    units = learn_units(batches, plan.units, plan.seed)
    print(told(units, batches))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(units.state_dict(), options.out / "units.pt")


if __name__ == "__main__":
    main()
