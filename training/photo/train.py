"""Teach the photo model's projector to show photographs to a language model that stays as it is.

    python training/photo/train.py --pictures pictures.csv              # or a folder of folders NOUN/*.jpg

It needs what features.py and lexicon.py made, and makes in `--out`

1. `fitted.safetensors`: the first layer's units tell nouns apart (units.py), the second writes the lexicon's image
   tokens (fit.py); the language model is not asked;
2. `projector.safetensors`: gradients through the language model, which reads image tokens and question and is to answer
   with the nouns. Its weights and those of the tower stay as they are. Most steps read some of the image tokens, at
   their true positions, and no question, which costs less; the last ones read all of both.

What a step sees is a function of its number, so that a run that was stopped continues as if it had not been. Every 20
steps a checkpoint and a line in `log.jsonl`.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from batches import Batches
from features import WORK
from fit import started
from judge import judged, noted
from language import Reader
from lexicon import Lexicon
from pictures import read_pictures
from plan import Plan
from projector import Projector, read
from rates import share_of_rate
from safetensors.torch import load_file
from torch import nn
from units import learn_units, read_units

EVERY = 20
"""Steps between checkpoints."""


def fitted(reader: Reader, batches: Batches, work: Path, out: Path) -> Projector:
    """The projector that gradients start from; made once, with the plan of `batches`."""
    path = out / "fitted.safetensors"
    if not path.exists():
        lexicon = Lexicon(reader.words(batches.known), reader.words(["and"])[0]).requires_grad_(False)
        lexicon.load_state_dict(torch.load(work / "lexicon.pt", weights_only=True)["lexicon"])
        if not (out / "units.pt").exists():
            torch.save(learn_units(batches, batches.plan.units, batches.plan.seed).state_dict(), out / "units.pt")
        projector = started(batches, read_units(batches, out / "units.pt"), lexicon, batches.plan)
        projector.save(batches.plan, path)
    return read(load_file(path)).standardised(batches.sample())


def train(reader: Reader, batches: Batches, projector: Projector, out: Path, minutes: float = math.inf) -> None:
    """Run the steps that are left of a plan; what is reached is in `out`.

    Args:
        reader: The language model.
        batches: What it is shown, and the plan.
        projector: Changed.
        out: Folder of the checkpoint, the log and the projector.
        minutes: After which it stops; the next call continues.
    """
    plan, start, kept, step = batches.plan, time.time(), out / "checkpoint.pt", 0
    groups = [{"params": projector.first.parameters(), "rate": plan.rate}]
    groups += [] if projector.second is None else [{"params": projector.second.parameters(), "rate": plan.last}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    if kept.exists():
        content = torch.load(kept, weights_only=True)
        projector.load_state_dict(content["projector"])
        optimizer.load_state_dict(content["optimizer"])
        batches.hard, step = content["hard"], content["step"]
    losses = []
    while step < plan.steps and time.time() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(step, plan.steps)
        losses.append(one_step(reader, batches, projector, optimizer, step))
        step += 1
        if step % EVERY == 0 or step == plan.steps:
            content = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content | {"hard": batches.hard, "step": step}, kept.with_suffix(".tmp"))
            os.replace(kept.with_suffix(".tmp"), kept)
            projector.save(plan, out / "projector.safetensors")
            mean = sum(losses[-EVERY:]) / len(losses[-EVERY:])
            noted(out, {"step": step, "loss": round(mean, 3), "seconds": round(time.time() - start, 1)})


def one_step(
    reader: Reader, batches: Batches, projector: Projector, optimizer: torch.optim.Optimizer, step: int
) -> float:
    """Learn from one batch, and note which nouns are hard; the loss, in nats a caption."""
    plan, rng = batches.plan, random.Random(f"{batches.plan.seed} {step}")
    whole = step >= plan.steps - plan.full
    batch = batches.draw(rng, plan.batch // 2, plan.side**2) if whole else batches.draw(rng, plan.batch, plan.kept)
    losses = reader.losses(projector(batch.tokens), batch.places, plan.side, batch.nouns, rng, whole=whole)
    optimizer.zero_grad()
    losses.mean().backward()
    nn.utils.clip_grad_norm_(projector.parameters(), 5.0)
    optimizer.step()
    for nouns, loss in zip(batch.nouns, losses.tolist(), strict=True):
        if len(nouns) == 1:
            batches.hard[nouns[0]] = min(3.0, max(0.3, 0.7 * batches.hard[nouns[0]] + 0.3 * loss / 2))
    return losses.mean().item()


def options() -> argparse.Namespace:
    """The command line: every number of the plan is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="CSV, or a folder of folders NOUN/*.jpg")
    parser.add_argument("--work", type=Path, default=WORK, help="features, lexicon and language model")
    parser.add_argument("--out", type=Path, default=WORK / "run", help="checkpoint, log, projector.safetensors")
    parser.add_argument("--minutes", type=float, default=math.inf)
    for field in fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args()


def main() -> None:
    """Fit, judge, learn by gradients, judge."""
    given = options()
    plan = Plan(**{field.name: getattr(given, field.name) for field in fields(Plan)})
    given.out.mkdir(parents=True, exist_ok=True)
    reader, batches = Reader(given.work), Batches(given.work, read_pictures(given.pictures), plan)
    projector = fitted(reader, batches, given.work, given.out)
    if not (given.out / "checkpoint.pt").exists():
        noted(given.out, {"fitted": judged(reader, projector, batches), "plan": asdict(plan)})
    train(reader, batches, projector.requires_grad_(True), given.out, given.minutes)
    noted(given.out, {"trained": judged(reader, projector.requires_grad_(False), batches)})


if __name__ == "__main__":
    main()
