"""Train the pocket model from scratch, in the order of LLaVA: tower, language model, then projector and all.

    python training/train.py                      # continues from training/work/checkpoint.pt if there is one
    python training/train.py --steps 8000 3000 8000 --device cuda

1. tower: the CLIP tower alone learns to say what each patch of a collage shows (an auxiliary linear head, not kept).
2. language: the Llama alone learns captions and facts about the nouns as text.
3. joint: everything learns to caption scenes and to answer questions about them; the tower with smaller steps, patch
   labels fading out, and text beside so that the facts stay. What the language model would say at an image position is
   lightly trained to be the word for what the patch shows: large models come to do so by themselves, and it is what
   makes a map of activations over the image mean something.

What a step sees is a function of the step's number, so that a run that was stopped continues as if it had not been.
The rate is constant and falls to zero over the last third of a stage: a checkpoint from before the fall, kept as
`training/work/before-STAGE-fall.pt`, can be continued with more steps. Every 250 steps a checkpoint; every 50 a line
in `training/work/log.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import IGNORE, STAGES, Steps
from collage import Collages
from model import GRID, IMAGE_MEAN, IMAGE_STD, N_NEURONS, build_model, build_processor, save, start_locally
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmneurons.pocket import scenes, world

HERE = Path(__file__).parent
WORK = HERE / "work"
RATE = {"tower": 3e-3, "language": 3e-3, "joint": 2e-3}
"""The highest learning rate of each stage, for matrices (Muon); half of it for everything else (AdamW)."""
TOWER_SHARE = 0.4
"""Share of the rate that the tower takes in the joint stage."""
FALL = 1 / 3
"""Share of a stage's steps over which the rate falls to zero."""
PATCHES_KEPT = 0.6
"""Share of the patches that the patch loss is taken over."""
EVERY = {"log": 50, "checkpoint": 250}


@dataclass
class State:
    """Everything a checkpoint holds."""

    model: Any
    """The LLaVA; its parts are typed as tensors by nn.Module's `__getattr__`."""
    heads: nn.ModuleDict
    folder: Path = WORK
    """Where checkpoints and the log are written."""
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    optimizers: list[dict] = field(default_factory=list)

    def save(self, optimizers: list[torch.optim.Optimizer], name: str = "checkpoint.pt") -> None:
        """Write to a temporary file, then rename: a stop in between leaves the checkpoint before."""
        content = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(content, temporary)
        os.replace(temporary, self.folder / name)

    def to(self, device: torch.device) -> State:
        """The same on a device."""
        self.model.to(device)
        self.heads.to(device)
        return self

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        content = torch.load(path, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.heads.load_state_dict(content["heads"])
        self.optimizers = content["optimizers"]
        self.stage, self.step, self.seconds = content["stage"], content["step"], content["seconds"]


def untrained(n_neurons: int = N_NEURONS, folder: Path = WORK) -> State:
    """A model and auxiliary heads before the first step; seed torch before the call."""
    model: Any = build_model(build_processor(), n_neurons)
    start_locally(model.model.vision_tower)
    model.set_attn_implementation("eager")  # a third faster than sdpa on a CPU at these lengths
    tower, language = (part.hidden_size for part in (model.config.vision_config, model.config.text_config))
    n_labels = Collages.n_labels()
    return State(
        model, nn.ModuleDict({"tower": nn.Linear(tower, n_labels), "projector": nn.Linear(language, n_labels)}), folder
    )


def share_of_rate(step: int, n_steps: int) -> float:
    """Linear warm-up over 150 steps, constant, linear fall to zero over the last `FALL` of the steps."""
    return min(1.0, (step + 1) / 150, (n_steps - step) / (FALL * n_steps))


def normalised(pictures: Tensor) -> Tensor:
    """Pixels as the image processor gives them: (batch, 3, SIDE, SIDE) from (batch, SIDE, SIDE, 3) uint8."""
    mean, std = (torch.tensor(values, device=pictures.device) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((pictures / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def stage_loss(state: State, stage: str, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
    """The losses of one batch; their sum is what is minimised."""
    parts = state.model.model
    if stage == "tower":
        features = parts.vision_tower(normalised(batch["pictures"])).last_hidden_state[:, 1:]
        return {"patch": patch_loss(state.heads["tower"], features, batch["patches"], smoothing=0.05)}
    if stage == "language":
        return {"text": text_loss(state, hidden_states(state, batch), batch["labels"])}
    features = parts.get_image_features(normalised(batch["pictures"])).pooler_output
    features = torch.cat(list(features)).view(len(batch["ids"]), GRID**2, -1)
    embedded = parts.get_input_embeddings()(batch["ids"])
    place = batch["ids"] == state.model.config.image_token_id
    embedded = embedded.masked_scatter(place[..., None], features.to(embedded.dtype))
    text = {name.removeprefix("text_"): tensor for name, tensor in batch.items() if name.startswith("text_")}
    hidden = hidden_states(state, batch, embedded)
    return {
        "answer": text_loss(state, hidden, batch["labels"], GRID**2),  # no answer begins before the image has ended
        "place": 0.2 * place_loss(state, hidden[place].view(len(batch["ids"]), GRID**2, -1), batch["patches"]),
        "patch": 0.3 * (1 - progress) * patch_loss(state.heads["projector"], features, batch["patches"]),
        "text": 0.3 * text_loss(state, hidden_states(state, text), text["labels"]),
    }


def hidden_states(state: State, batch: dict[str, Tensor], embedded: Tensor | None = None) -> Tensor:
    """The language model's last hidden states of a batch from `pad`: (batch, length, hidden)."""
    language = state.model.model.language_model
    inputs = {"input_ids": batch["ids"]} if embedded is None else {"inputs_embeds": embedded}
    # An additive mask; the model takes a 4-D one as it is.
    mask = torch.zeros(batch["mask"].shape, device=batch["mask"].device).masked_fill(~batch["mask"], -1e9)
    return language(**inputs, attention_mask=mask, position_ids=batch["positions"]).last_hidden_state


def text_loss(state: State, hidden: Tensor, labels: Tensor, first: int = 0) -> Tensor:
    """Cross-entropy of each token of the answers given those before it; none is before `first`."""
    logits, labels = state.model.lm_head(hidden[:, first:-1]), labels[:, first + 1 :]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def place_loss(state: State, hidden: Tensor, patches: Tensor) -> Tensor:
    """Cross-entropy of the word for what each patch shows, where there is one: a noun, or the noun of the place."""
    words = words_of_labels().to(patches.device)
    return F.cross_entropy(
        state.model.lm_head(hidden).float().flatten(0, 1), words[patches.flatten()], ignore_index=IGNORE
    )


@functools.cache
def words_of_labels() -> Tensor:
    """The first token of the word for each label of a patch."""
    tokenizer = build_processor().tokenizer
    words = [*scenes.nouns(), *(place.split()[-1] for place in scenes.BACKGROUNDS)]
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
    return torch.tensor(ids + [IGNORE] * (Collages.n_labels() - len(ids)))


def patch_loss(head: nn.Module, features: Tensor, patches: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of what the patches show: those of objects first, and of the background's as many as fill up.

    The same number for every batch: a CPU prepares its kernels for each shape, and keeps them.
    """
    n_nouns = len(world.FREQUENCY)
    shown = patches.flatten()
    background = (shown >= n_nouns) & (shown < n_nouns + len(scenes.BACKGROUNDS))
    spread = torch.arange(len(shown), device=shown.device) * 7919 % len(shown)  # 7919 is prime: no two alike
    order = background + spread / len(shown)
    kept = order.topk(round(PATCHES_KEPT * len(shown)), largest=False).indices
    return F.cross_entropy(head(features.flatten(0, 1)[kept]).float(), shown[kept], label_smoothing=smoothing)


def optimizers_of(state: State, stage: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden units, AdamW for all else that the stage trains.

    Each group remembers its full rate as `rate`.
    """
    parts = state.model.model
    trained: list[tuple[nn.Module, float]] = []
    if stage in ("tower", "joint"):
        trained.append((parts.vision_tower, 1.0 if stage == "tower" else TOWER_SHARE))
    if stage in ("language", "joint"):
        trained += [(parts.language_model, 1.0), (state.model.lm_head, 1.0)]
    if stage == "joint":
        trained.append((parts.multi_modal_projector, 1.0))
    matrices, others = [], []
    for module, share in trained:
        ends = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        ends |= {id(p) for p in state.model.lm_head.parameters()}
        inner = [p for p in module.parameters() if p.ndim == 2 and id(p) not in ends]
        outer = [p for p in module.parameters() if p.ndim != 2 or id(p) in ends]
        matrices.append({"params": inner, "rate": RATE[stage] * share})
        others.append({"params": outer, "rate": RATE[stage] * share / 2})
    if stage != "language":
        head = state.heads["tower" if stage == "tower" else "projector"]
        others.append({"params": list(head.parameters()), "rate": RATE[stage] / 2})
    return [
        torch.optim.Muon([g for g in matrices if g["params"]], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in others if g["params"]], betas=(0.9, 0.98), weight_decay=0.05, fused=True),
    ]


def run_stage(state: State, n_steps: int, device: torch.device) -> None:
    """Train one stage from `state.step` to `n_steps`."""
    stage = STAGES[state.stage]
    optimizers = optimizers_of(state, stage)
    for optimizer, content in zip(optimizers, state.optimizers, strict=False):
        optimizer.load_state_dict(content)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    # One worker makes the batches in order, on the CPU's spare time.
    loader = DataLoader(Steps(stage, state.step, n_steps), batch_size=None, num_workers=1, prefetch_factor=6)
    first, started, before = state.step, time.monotonic(), state.seconds
    fall = round((1 - FALL) * n_steps)
    sums: dict[str, float] = {}
    for batch in loader:
        share = share_of_rate(state.step, n_steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["rate"] * share
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses = stage_loss(state, stage, batch, state.step / n_steps)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds = before + time.monotonic() - started
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if state.step % EVERY["log"] == 0:
            means = {name: round(value / EVERY["log"], 4) for name, value in sums.items()}
            sums.clear()
            line = {"stage": stage, "step": state.step, **means, "share of rate": round(share, 4)}
            line["seconds"] = round(state.seconds)
            with (state.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            left = (n_steps - state.step) * (time.monotonic() - started) / (state.step - first)
            print(*(f"{k} {v}" for k, v in line.items()), f"| {left / 60:.0f} min left in this stage", flush=True)
        if state.step == fall:
            state.save(optimizers, f"before-{stage}-fall.pt")
        if state.step % EVERY["checkpoint"] == 0:
            state.save(optimizers)
    state.stage, state.step, state.optimizers = state.stage + 1, 0, []
    state.save([])
    state.save([], f"after-{stage}.pt")


def main() -> None:
    """Run or continue all stages, then save the model as an ordinary Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=(7000, 1200, 5000), metavar=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--from", dest="start", type=Path, help="a kept checkpoint to go on from")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # tiny attention gradients make a step up to ten times slower on some CPUs
    torch.manual_seed(0)
    WORK.mkdir(exist_ok=True)
    device = torch.device(arguments.device)
    state = untrained().to(device)
    start = arguments.start or WORK / "checkpoint.pt"
    if start.exists():
        state.load(start)
    while state.stage <= STAGES.index(arguments.until):
        run_stage(state, arguments.steps[state.stage], device)
    folder = WORK / "model"
    save(state.model, folder)
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
