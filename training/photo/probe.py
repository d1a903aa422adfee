"""What the tower's features tell apart, and what imagined classes add: a linear classifier of nouns, no language model.

python training/photo/probe.py --pictures pictures.csv
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import Batches, Shares
from features import WORK
from pictures import read_pictures
from torch import nn

STEPS, BATCH = 400, 128


def main() -> None:
    """Train and judge, without and with imagined classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    options = parser.parse_args()
    pictures = read_pictures(options.pictures)
    for share in (0.0, 0.3):
        torch.manual_seed(0)
        batches = Batches(options.work, pictures, 3, 1, Shares(imagined=share))
        known = {noun: i for i, noun in enumerate(batches.known)}
        normed, probe = nn.BatchNorm1d(1280, affine=False), nn.Linear(1280, len(known))
        optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.5)
        for step in range(STEPS):
            batch = batches.draw(random.Random(step), BATCH, 9, alone=True)
            wanted = torch.tensor([known[nouns[0]] for nouns in batch.nouns])
            loss = F.cross_entropy(probe(normed(batch.tokens.mean(1))), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        normed.eval()
        with torch.no_grad():
            found = probe(normed(batches.means[: len(pictures)])).argmax(1).tolist()
        judged, right = Counter[str](), Counter[str]()
        for picture, i in zip(pictures, found, strict=True):
            kind = f"{picture.split}, {picture.path.name.partition('-')[0]}"
            if picture.split != "train" and picture.noun in batches.single:
                judged[kind] += 1
                right[kind] += batches.known[i] == picture.noun
        print({"imagined": share} | {kind: [round(right[kind] / n, 3), n] for kind, n in sorted(judged.items())})


if __name__ == "__main__":
    main()
