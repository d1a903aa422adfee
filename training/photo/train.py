"""Teach the photo model's projector to show photographs to a language model that stays as it is.

    python training/photo/train.py --pictures pictures.csv              # or a folder of folders NOUN/*.jpg

1. features: what EfficientNet-Lite2 sees in every picture is computed once (features.py).
2. ridge: the projector is started by ridge regression onto the nouns' own words.
3. lexicon: without pictures, it is learned from which image tokens the language model reads each noun. The word's own
   embedding is not enough: of it the model tells stories, and of nouns of several tokens it says something else.
4. fit: without the language model, pictures are put near the lexicon's token of their noun.
5. gradients: the language model reads image tokens and question and is to answer with the nouns. Its weights and those
   of the tower stay as they are, only the projector learns. Most steps read some of the image tokens, at their true
   positions, which costs less; the last ones read all of them.

What a step sees is a function of its number, so that a run that was stopped continues as if it had not been. The rate
falls to zero over the last third of a stage. Every 20 steps a checkpoint and a line in `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import Batches, Shares
from captions import ASKED, caption
from features import WORK
from jaxtyping import Float, Int
from pictures import Picture, read_pictures
from safetensors.torch import save_file
from torch import Tensor, nn

from mmneurons.photo.convert import CHAT, language
from mmneurons.settings import PROMPT

RIDGE = 60
"""Batches that the ridge regression sees."""
TURN_RATE, OWN_RATE = 3e-4, 2e-3
"""Learning rates of the lexicon: of what all nouns share, and of each noun's own."""
SECOND = ([False, True] * 3, [False] * 3 + [True] * 3, [False] * 4 + [True] * 2)
"""Which of six tokens show the second of two nouns: the right side, the lower half or third."""
FIT_RATE, SHARPNESS = 5e-4, 16.0
"""Of the steps that put pictures near the lexicon: learning rate, and what the cosines are multiplied by."""
SHORT = 0.9
"""Share of the batches that read no question, among those with the usual one."""


@dataclass
class Plan:
    """One run."""

    layers: int = 1
    """Of the projector: 1 is linear, 2 has a GELU between."""
    side: int = 9
    """Of the grid of image tokens: 3, 5 or 9."""
    window: int = 1
    """Over how many features, in both directions, each image token is averaged."""
    kept: int = 9
    """Image tokens that most steps read, drawn anew for each picture."""
    steps: int = 3000
    full: int = 300
    """Of the steps, the last ones that read all image tokens."""
    batch: int = 16
    rate: float = 4e-4
    lexicon: int = 200
    """Steps that learn how nouns look to the language model, without pictures."""
    fit: int = 1500
    """Steps that make pictures look so, without the language model."""
    imagined: float = 0.4
    """Share of the pictures that are moved to a class of the tower's own classifier; 0 for pictures alone."""
    collages: float = 0.15
    joined: float = 0.15
    """Shares of collages and of grids that are cut and joined."""
    seed: int = 0


class Projector(nn.Module):
    """LLaVA's projector behind a standardisation of each channel, which is folded away when it is saved.

    Args:
        mean: Of each channel.
        deviation: Of each channel.
        hidden: Width of the language model.
        layers: 1 or 2.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, hidden: int, layers: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(mean), nn.Buffer(deviation)
        self.first = nn.Linear(len(mean), hidden)
        self.second = nn.Linear(hidden, hidden) if layers == 2 else None

    def standard(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens channels"]:
        """Mean 0 and deviation 1 in each channel."""
        return (x - self.mean) / self.deviation

    def forward(self, x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens hidden"]:
        """Image tokens from features."""
        x = self.first(self.standard(x))
        return x if self.second is None else self.second(F.gelu(x))

    def tensors(self) -> dict[str, Tensor]:
        """As LLaVA's projector is stored."""
        weight = self.first.weight / self.deviation
        made = {"linear_1.weight": weight, "linear_1.bias": self.first.bias - weight @ self.mean}
        if self.second is not None:
            made |= {"linear_2.weight": self.second.weight, "linear_2.bias": self.second.bias}
        return {name: tensor.detach().half().contiguous() for name, tensor in made.items()}


class Teacher:
    """The frozen language model, and what it is shown.

    Args:
        work: Where the cache of features is.
        pictures: What the cache was made of.
        plan: The run.
    """

    def __init__(self, work: Path, pictures: list[Picture], plan: Plan) -> None:
        self.plan = plan
        self.model, self.tokenizer = language_model(work)
        self.embedding: Tensor = self.model.get_input_embeddings().weight
        shares = Shares(imagined=plan.imagined, collages=plan.collages, joined=plan.joined)
        self.batches = Batches(work, pictures, plan.side, plan.window, shares)
        self.index = {noun: i for i, noun in enumerate(self.batches.known)}
        self.losses = torch.ones(len(self.index))
        """Running loss of each noun: hard ones come more often."""

    def loss(self, projector: Projector, step: int) -> Tensor:
        """Cross-entropy of the answers of one batch; notes which nouns are hard."""
        plan, rng = self.plan, random.Random(f"{self.plan.seed} {step}")
        # 1. Image tokens, some or all. They keep their places in the sequence.
        n_all = plan.side**2
        n_kept = n_all if step >= plan.steps - plan.full else min(plan.kept, n_all)
        self.batches.hard = dict(zip(self.index, self.losses.clamp(0.3, 3).tolist(), strict=True))
        batch = self.batches.draw(rng, plan.batch, n_kept)
        return self.said(projector(batch.tokens), batch.places, batch.nouns, rng)

    def said(
        self,
        image: Float[Tensor, "rows tokens hidden"],
        places: Int[Tensor, "rows tokens"],
        named: list[list[str]],
        rng: random.Random,
    ) -> Tensor:
        """Cross-entropy of captions by the language model; notes which nouns are hard.

        Args:
            image: Image tokens.
            places: Where in the grid each is.
            named: What is to be said of each picture.
            rng: Draws the question.
        """
        n_all, n_kept = self.plan.side**2, image.shape[1]
        # 1. The same question for all, and for each its answer. Mostly none: half as many tokens, and no worse.
        prompt, prefix, begin = ASKED[0] if rng.random() < 0.85 else rng.choice(ASKED[1:])
        before, after = CHAT.split("{image}")
        after = after.format(prompt=prompt) + prefix
        if prompt == PROMPT and rng.random() < SHORT:
            before, after = before.partition("user")[0], f"\n{prefix}"
        before, after = self.ids(before), self.ids(after)
        ends = [self.tokenizer.eos_token_id]
        answers = [self.ids(f"{begin} {caption(nouns)}" if begin else f" {caption(nouns)}") + ends for nouns in named]
        length = max(map(len, answers))
        ids = torch.tensor([answer + ends * (length - len(answer)) for answer in answers])
        wanted = torch.tensor([answer + [-100] * (length - len(answer)) for answer in answers])
        # 2. The language model, from embeddings on.
        rows = len(named)
        shared = [self.embedding[part].expand(rows, -1, -1) for part in (before, after)]
        embedded = torch.cat([shared[0], image, shared[1], self.embedding[ids[:, :-1]]], 1)
        behind = torch.arange(embedded.shape[1] - len(before) - n_kept) + len(before) + n_all
        positions = torch.cat(
            [torch.arange(len(before)).expand(rows, -1), places + len(before), behind.expand(rows, -1)], 1
        )
        hidden = self.hidden(embedded, positions)[:, -length:]
        logits = self.model.lm_head(hidden)
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none").view(
            rows, length
        )
        for nouns, value in zip(named, each.detach().sum(1).tolist(), strict=True):
            if len(nouns) == 1:
                i = self.index[nouns[0]]
                self.losses[i] = 0.7 * self.losses[i] + 0.3 * min(value, 6.0) / 2
        return each.sum() / (wanted != -100).sum()

    def hidden(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states. The mask is given, since positions with gaps look like several packed texts."""
        n = embedded.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None].expand(len(embedded), 1, n, n)
        return self.model.model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, special ones by their names."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def started(self) -> Projector:
        """A projector by ridge regression onto the words of the nouns."""
        sample = self.batches.draw(random.Random(f"{self.plan.seed} scale"), 512, 9, alone=True).tokens.flatten(0, 1)
        mean, deviation = sample.mean(0), sample.std(0).clamp_min(0.05)
        projector = Projector(mean, deviation, self.embedding.shape[1], self.plan.layers).requires_grad_(False)
        last = projector.first
        if projector.second is not None:  # the first layer stays as it is drawn until gradients come
            torch.manual_seed(self.plan.seed)
            nn.init.orthogonal_(projector.first.weight)
            projector.first.bias.zero_()
            last = projector.second
        # 1. The normal equations: pictures as batches show them, each noun about as often.
        words, middle = self.words
        gram = torch.zeros(last.in_features, last.in_features, dtype=torch.float64)
        target = torch.zeros(last.in_features, last.out_features, dtype=torch.float64)
        total, made, meant = 0, [], []
        for i in range(RIDGE):
            batch = self.batches.draw(random.Random(f"{self.plan.seed} ridge {i}"), 128, 9, alone=True)
            x = projector.standard(batch.tokens).flatten(0, 1)
            if projector.second is not None:
                x = F.gelu(projector.first(x))
            wanted = torch.tensor([self.index[nouns[0]] for nouns in batch.nouns])
            y = (words[wanted] - middle).repeat_interleave(batch.tokens.shape[1], 0)
            gram += (x.T @ x).double()
            target += (x.T @ y).double()
            total += len(x)
            made.append(x[::9])
            meant.append(y[::9])
        eye = torch.eye(last.in_features, dtype=torch.float64)
        solved = torch.linalg.solve(gram + 0.02 * total * eye, target).float()
        # 2. Regression shrinks; words have a length that the language model knows.
        lengths = [torch.cat(part).norm(dim=1).mean() for part in ([x @ solved for x in made], meant)]
        last.weight.copy_(solved.T * min(2.5, float(lengths[1] / lengths[0])))
        last.bias.copy_(middle)
        return projector.requires_grad_(True)

    @cached_property
    def words(self) -> tuple[Float[Tensor, "nouns hidden"], Float[Tensor, "hidden"]]:
        """The input embedding of each noun, a mean over its tokens, and the mean of these."""
        words = torch.stack([self.embedding[self.ids(f" {noun}")].mean(0) for noun in self.index])
        return words, words.mean(0)

    def fitted(self, projector: Projector, targets: Float[Tensor, "nouns hidden"], steps: int) -> None:
        """Put the image tokens of each picture near what its noun is to look like: the language model is not asked.

        Args:
            projector: Changed.
            targets: For each noun, the image token that it should be.
            steps: Of 96 pictures.
        """
        optimizer = torch.optim.AdamW(projector.parameters(), lr=FIT_RATE, betas=(0.9, 0.98))
        middle = targets.mean(0)
        directions, size = F.normalize(targets - middle), (targets - middle).square().mean()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = FIT_RATE * share_of_rate(step, steps)
            batch = self.batches.draw(random.Random(f"{self.plan.seed} fit {step}"), 96, 6, alone=True)
            wanted = torch.tensor([self.index[nouns[0]] for nouns in batch.nouns])
            tokens = projector(batch.tokens)
            away = (
                (tokens - targets[wanted][:, None]).square().mean(),
                (tokens.mean(1) - targets[wanted]).square().mean(),
            )
            near = F.cross_entropy(SHARPNESS * F.normalize(tokens.mean(1) - middle) @ directions.T, wanted)
            optimizer.zero_grad()
            (sum(away) / size + near).backward()
            optimizer.step()
            if step % 100 == 99:
                shown = [round(value.item(), 3) for value in (away[0] / size, away[1] / size, near)]
                print(f"fit {step + 1}: {shown}", flush=True)


class Lexicon(nn.Module):
    """What an image token should be for each noun: its word's embedding, turned into what the language model reads.

    Args:
        words: The embedding of each noun, a mean over its tokens.
    """

    def __init__(self, words: Float[Tensor, "nouns hidden"]) -> None:
        super().__init__()
        self.words = nn.Buffer(words)
        self.turn = nn.Linear(words.shape[1], words.shape[1])
        self.own = nn.Parameter(torch.zeros_like(words))
        with torch.no_grad():
            self.turn.weight.copy_(torch.eye(words.shape[1]))
            self.turn.bias.zero_()

    def forward(self) -> Float[Tensor, "nouns hidden"]:
        """The image token of every noun."""
        return self.turn(self.words) + self.own


def learn_lexicon(teacher: Teacher, steps: int, out: Path) -> Tensor:
    """Learn, without pictures, from which image tokens the language model reads each noun.

    Tokens are blurred as those of pictures will be: mixed with another noun's, and with noise.

    Returns:
        Image tokens (nouns, hidden).
    """
    path = out / "lexicon.pt"
    lexicon = Lexicon(teacher.words[0])
    groups = [
        {"params": [*lexicon.turn.parameters()], "rate": TURN_RATE},
        {"params": [lexicon.own], "rate": OWN_RATE},
    ]
    optimizer, begun = torch.optim.Adam(groups, betas=(0.9, 0.98)), 0
    if path.exists():
        content = torch.load(path, weights_only=True)
        lexicon.load_state_dict(content["lexicon"])
        if content["optimizer"]:
            optimizer.load_state_dict(content["optimizer"])
        teacher.losses, begun = content["losses"], content["step"]
    nouns, start = list(teacher.index), time.time()
    photographed = [teacher.index[noun] for noun in teacher.batches.nouns]
    for step in range(begun, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(step, steps)
        rng, generator = random.Random(f"{teacher.plan.seed} lexicon {step}"), torch.Generator().manual_seed(step)
        weights = teacher.losses.clamp(0.3, 3)
        weights[photographed] *= 2
        rows = teacher.plan.batch
        picked = torch.multinomial(weights, 2 * rows, generator=generator).view(rows, 2)
        two = [rng.random() < 0.3 for _ in range(rows)]
        table = lexicon()
        # 1. Six tokens in three rows of two: of the first noun, or on one side or in one half the second.
        places = torch.tensor([0, 2, 3, 5, 6, 8]) if teacher.plan.side == 3 else torch.arange(6)
        other = torch.stack(
            [torch.tensor(rng.choice(SECOND)) if both else torch.zeros(6, dtype=torch.bool) for both in two]
        )
        owner = torch.where(other, picked[:, 1:], picked[:, :1])
        blur = torch.randint(len(nouns), owner.shape, generator=generator)
        share = 0.45 * torch.rand(*owner.shape, 1, generator=generator)
        tokens = (1 - share) * table[owner] + share * table[blur]
        noise = torch.randn(tokens.shape, generator=generator) * tokens.detach().std() * 0.4
        named = [
            [nouns[a], nouns[b]] if both else [nouns[a]] for (a, b), both in zip(picked.tolist(), two, strict=True)
        ]
        loss = teacher.said(tokens + noise, places.expand(rows, -1), named, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19 or step == steps - 1:
            print({"lexicon": step + 1, "loss": round(loss.item(), 3), "s": round(time.time() - start, 1)}, flush=True)
            content = {
                "lexicon": lexicon.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": teacher.losses,
                "step": step + 1,
            }
            torch.save(content, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
    return lexicon().detach()


def language_model(work: Path) -> tuple[Any, Any]:
    """The language model, read from its package once and kept as safetensors."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = work / "language"
    if not (folder / "tokenizer.json").exists():
        model, tokenizer = language()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over 20 steps, constant, then half a cosine over the last third."""
    left = (steps - step) / (steps / 3)
    return min(1.0, (step + 1) / 20) * (1.0 if left >= 1 else 0.5 - 0.5 * math.cos(math.pi * left))


def train(teacher: Teacher, out: Path, minutes: float = math.inf) -> Projector:
    """Run the steps that are left of a plan; what is reached is in `out`.

    Args:
        teacher: The language model with its pictures.
        out: Folder of the checkpoint, the log and the projector.
        minutes: After which it stops; the next call continues.
    """
    plan, start = teacher.plan, time.time()
    out.mkdir(parents=True, exist_ok=True)
    kept, step = out / "checkpoint.pt", 0
    content = torch.load(kept, weights_only=True) if kept.exists() else None
    if content is None:
        projector = teacher.started()
        save(projector, plan, out / "ridge.safetensors")
        teacher.fitted(projector, learn_lexicon(teacher, plan.lexicon, out), plan.fit)
        save(projector, plan, out / "fitted.safetensors")
    else:
        projector = Projector(torch.zeros(1280), torch.ones(1280), teacher.embedding.shape[1], plan.layers)
        projector.load_state_dict(content["projector"])
        step = content["step"]
        if content["losses"].shape == teacher.losses.shape:  # else other nouns are learned from here on
            teacher.losses = content["losses"]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    if content is not None and content["optimizer"]:
        optimizer.load_state_dict(content["optimizer"])
    if content is None:
        keep(kept, projector, optimizer, teacher, 0)
    running, began = None, step
    while step < plan.steps and time.time() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * share_of_rate(step, plan.steps)
        loss = teacher.loss(projector, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        step += 1
        if step % 20 == 0 or step == began + 1:
            line = {"step": step, "loss": round(running, 4), "seconds": round(time.time() - start, 1)}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if step % 20 == 0 or step == plan.steps:
            keep(kept, projector, optimizer, teacher, step)
            save(projector, plan, out / "projector.safetensors")
    return projector


def keep(path: Path, projector: Projector, optimizer: torch.optim.Optimizer, teacher: Teacher, step: int) -> None:
    """Write a checkpoint beside the old one, then rename: a stop in between leaves the old one."""
    content = {
        "projector": projector.state_dict(),
        "optimizer": optimizer.state_dict() if step else None,
        "losses": teacher.losses,
        "step": step,
    }
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save(projector: Projector, plan: Plan, path: Path) -> None:
    """The projector as LLaVA stores it, with the plan beside it."""
    save_file(projector.tensors(), path, {"plan": json.dumps(asdict(plan))})


def main() -> None:
    """Compute the features, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="CSV, or a folder of folders NOUN/*.jpg")
    parser.add_argument("--work", type=Path, default=WORK, help="cache of features and of the language model")
    parser.add_argument("--out", type=Path, default=WORK / "run", help="checkpoint, log, projector.safetensors")
    parser.add_argument("--minutes", type=float, default=math.inf)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    plan = Plan(**{name: getattr(options, name) for name in asdict(Plan())})
    pictures = read_pictures(options.pictures)
    teacher = Teacher(options.work, pictures, plan)
    train(teacher, options.out, options.minutes)


if __name__ == "__main__":
    main()
