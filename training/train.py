"""Train the pocket model from scratch, in the order of LLaVA: tower, language model, then projector and all.

    python training/train.py                 # continues from training/work/checkpoint.pt if there is one
    python training/train.py --steps 20000 2000 20000

1. tower: the CLIP tower alone learns to say what each patch shows (an auxiliary linear head, not kept).
2. language: the Llama alone learns captions as text.
3. joint: everything learns to caption scenes, the tower with smaller steps; patch labels fade out.

The scenes of a step are a function of the step's number, so that a run that was stopped continues as if it had not
been. Every 250 steps a checkpoint; every 50 a line in `training/log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model import ANSWER_PREFIX, GRID, PATCH, PROMPT, build_model, build_processor, prompt_text
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmneurons.pocket import scenes

HERE = Path(__file__).parent
WORK = HERE / "work"
STAGES = ("tower", "language", "joint")
BATCH = {"tower": 64, "language": 128, "joint": 32}
PEAK_RATE = 1.5e-3
RATE_SHARE = {"tower": 0.4, "language": 0.8, "rest": 1.0}
"""Share of the learning rate that each part takes in the joint stage."""
SEED_BASE = 1_000_000_000
"""Training scenes have seeds from here on; everything below is free for evaluation."""
IGNORE = -100


class Scenes(Dataset):
    """Item `step` is the batch of that step: pixels, token ids, caption labels, patch labels."""

    def __init__(self, batch: int, first_seed: int, n_steps: int) -> None:
        self.batch, self.first_seed, self.n_steps = batch, first_seed, n_steps
        self.processor = build_processor()
        tokenizer = self.processor.tokenizer
        image_token = tokenizer.image_token
        self.prompt = tokenizer(prompt_text(self.processor).replace(image_token, image_token * GRID**2)).input_ids
        self.labels = {name: i for i, name in enumerate((*scenes.nouns(), *scenes.BACKGROUNDS))}
        image_processor = self.processor.image_processor
        self.mean = np.array(image_processor.image_mean, dtype=np.float32)
        self.std = np.array(image_processor.image_std, dtype=np.float32)

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = self.first_seed + step * self.batch
        made = [scenes.scene(seed) for seed in range(first, first + self.batch)]
        pixels = np.stack([(np.asarray(s.image, dtype=np.float32) / 255 - self.mean) / self.std for s in made])
        captions = [self.processor.tokenizer(f" {s.caption}</s>", add_special_tokens=False).input_ids for s in made]
        ids, targets = pad_batch(self.prompt, captions)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), ids, targets, self.patch_labels(made)

    def patch_labels(self, made: list[scenes.Scene]) -> Tensor:
        """What each patch shows: the object that covers most of it, if more than a quarter, else the background."""
        labels = np.zeros((len(made), GRID, GRID), dtype=np.int64)
        for row, scene in zip(labels, made, strict=True):
            share = scene.masks.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4))
            best = share.argmax(0)
            names = np.array([self.labels[noun] for noun in scene.objects])
            row[:] = np.where(share.max(0) > 0.25, names[best], self.labels[scene.background])
        return torch.from_numpy(labels.reshape(len(made), -1))


class Captions(Dataset):
    """Item `step` is a batch of captions as text alone: token ids and labels."""

    def __init__(self, batch: int, n_steps: int) -> None:
        self.batch, self.n_steps = batch, n_steps
        self.tokenizer = build_processor().tokenizer
        self.prompt = self.tokenizer(f"USER: {PROMPT} ASSISTANT: {ANSWER_PREFIX}").input_ids

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([SEED_BASE, step])
        nouns, backgrounds = scenes.nouns(), tuple(scenes.BACKGROUNDS)
        captions = []
        for _ in range(self.batch):
            objects = [nouns[i] for i in random.choice(len(nouns), random.integers(1, 4), replace=False)]
            caption = scenes.say(objects, backgrounds[random.integers(len(backgrounds))])
            captions.append(self.tokenizer(f" {caption}</s>", add_special_tokens=False).input_ids)
        return pad_batch(self.prompt, captions)


def pad_batch(prompt: list[int], captions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompt and captions padded on the right with id 0; labels hold the captions, everything else is ignored."""
    length = len(prompt) + max(map(len, captions))
    ids = torch.zeros(len(captions), length, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for i, caption in enumerate(captions):
        ids[i, : len(prompt)] = torch.tensor(prompt)
        ids[i, len(prompt) : len(prompt) + len(caption)] = torch.tensor(caption)
        targets[i, len(prompt) : len(prompt) + len(caption)] = torch.tensor(caption)
    return ids, targets


@dataclass
class State:
    """Everything a checkpoint holds."""

    model: Any
    """The LLaVA; its parts are typed as tensors by nn.Module's `__getattr__`."""
    heads: nn.ModuleDict
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    optimizer: dict | None = field(default=None)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write to a temporary file, then rename: a stop in between leaves the checkpoint before."""
        content = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = WORK / "checkpoint.tmp"
        torch.save(content, temporary)
        os.replace(temporary, WORK / "checkpoint.pt")

    def load(self) -> None:
        """Continue from `checkpoint.pt`."""
        content = torch.load(WORK / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(content["model"])
        self.heads.load_state_dict(content["heads"])
        self.optimizer = content["optimizer"]
        self.stage, self.step, self.seconds = content["stage"], content["step"], content["seconds"]


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up over 150 steps, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))
    return PEAK_RATE * min(1.0, (step + 1) / 150) * (0.98 * cosine + 0.02)


def stage_loss(state: State, stage: str, batch: tuple[Tensor, ...], progress: float) -> dict[str, Tensor]:
    """The losses of one batch, unweighted sums are what is minimised."""
    parts = state.model.model
    if stage == "language":
        ids, targets = batch
        hidden = parts.language_model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        return {"caption": caption_loss(state.model.lm_head(hidden), targets)}
    pixels, ids, targets, patches = batch
    if stage == "tower":
        features = parts.vision_tower(pixels).last_hidden_state[:, 1:]
        logits = state.heads["tower"](features)
        return {"patch": F.cross_entropy(logits.float().flatten(0, 1), patches.flatten(), label_smoothing=0.05)}
    kept: list[Tensor] = []
    hook = parts.multi_modal_projector.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        hidden = parts(input_ids=ids, pixel_values=pixels, attention_mask=(ids != 0).long()).last_hidden_state
    finally:
        hook.remove()
    said = targets.shape[1] - int((targets == IGNORE).all(0).sum()) + 1
    logits = state.model.lm_head(hidden[:, -said:])
    patch_logits = state.heads["projector"](kept[0].reshape(len(pixels), GRID * GRID, -1))
    patch = F.cross_entropy(patch_logits.float().flatten(0, 1), patches.flatten())
    return {"caption": caption_loss(logits, targets[:, -said:]), "patch": 0.3 * (1 - progress) * patch}


def caption_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each caption token given those before it."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)


def parameter_groups(state: State, stage: str) -> list[dict]:
    """Which parameters a stage trains, each group with its share of the learning rate."""
    parts = state.model.model
    tower = list(parts.vision_tower.parameters())
    language = [*parts.language_model.parameters(), *state.model.lm_head.parameters()]
    if stage == "tower":
        return [{"params": [*tower, *state.heads["tower"].parameters()], "share": 1.0}]
    if stage == "language":
        return [{"params": language, "share": 1.0}]
    rest = [*parts.multi_modal_projector.parameters(), *state.heads["projector"].parameters()]
    groups = {"tower": tower, "language": language, "rest": rest}
    return [{"params": params, "share": RATE_SHARE[name]} for name, params in groups.items()]


def run_stage(state: State, n_steps: int, device: torch.device, workers: int) -> None:
    """Train one stage from `state.step` to `n_steps`."""
    stage = STAGES[state.stage]
    batch = BATCH[stage]
    # Stages draw disjoint seeds: stage k of step s takes SEED_BASE * (k + 1) + s * batch onwards.
    data = Captions(batch, n_steps) if stage == "language" else Scenes(batch, SEED_BASE * (state.stage + 1), n_steps)
    order = range(state.step, n_steps)
    loader = DataLoader(data, batch_size=None, sampler=order, num_workers=workers, prefetch_factor=4)
    optimizer = torch.optim.AdamW(
        parameter_groups(state, stage), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
        state.optimizer = None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started, before = time.monotonic(), state.seconds
    for tensors in loader:
        rate = learning_rate(state.step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        tensors = tuple(t.to(device) for t in tensors)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses = stage_loss(state, stage, tensors, state.step / n_steps)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds = before + time.monotonic() - started
        if state.step % 50 == 0 or state.step == n_steps:
            values = {name: round(value.item(), 4) for name, value in losses.items()}
            line = {
                "stage": stage,
                "step": state.step,
                **values,
                "rate": round(rate, 6),
                "seconds": round(state.seconds),
            }
            with (HERE / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            left = (n_steps - state.step) * (time.monotonic() - started) / (state.step - order.start)
            print(*(f"{k} {v}" for k, v in line.items()), f"| {left / 60:.0f} min left in this stage", flush=True)
        if state.step % 250 == 0:
            state.save(optimizer)
    state.stage, state.step = state.stage + 1, 0
    state.save(torch.optim.AdamW([torch.zeros(1)]))
    state.optimizer = None


def main() -> None:
    """Run or continue all stages, then save the model as an ordinary Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=(5500, 500, 3400), metavar=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # tiny attention gradients make a step up to ten times slower on some CPUs
    torch.manual_seed(0)
    WORK.mkdir(exist_ok=True)
    device = torch.device(arguments.device)
    processor = build_processor()
    n_labels = len(scenes.nouns()) + len(scenes.BACKGROUNDS)
    heads = nn.ModuleDict({"tower": nn.Linear(192, n_labels), "projector": nn.Linear(192, n_labels)})
    model: Any = build_model(processor)
    model.to(device)
    model.set_attn_implementation("eager")  # a third faster than sdpa on a CPU at these lengths
    state = State(model, heads.to(device))
    if (WORK / "checkpoint.pt").exists():
        state.load()
        if state.step == 0:
            state.optimizer = None
    while state.stage < len(STAGES):
        run_stage(state, arguments.steps[state.stage], device, arguments.workers)
    folder = WORK / "model"
    state.model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
