"""How wide the FFN of the language model should be: train a few widths on the same tower and compare their neurons.

    python training/widths.py --tower training/work/after-tower.pt --out training/widths.json

Every width gets the same finished tower, which stays as it is, the same batches and the same number of steps of the
language and the joint stage; fewer than the shipped model, so what counts is the order. Measured over the scenes of
`find-500`, at the positions that predict the nouns of the true caption where the model says them: `decoded hit@10` (the
noun is among the ten tokens that sign(activation) * column promotes most, mean over the top 10 by `logit`) and `own
share` (mean over a noun's top 10 of their mean contribution to it, over the sum of their positive mean contributions
to all nouns).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import BATCH, STAGES
from model import GRID, build_processor
from text import caption
from torch import Tensor
from train import WORK, State, normalised, run_stage, untrained

from mmneurons import pocket
from mmneurons.pocket import world
from mmneurons.settings import PROMPT

TOP = 10
CPU = torch.device("cpu")


def trained(width: int, tower: Path, steps: tuple[int, int]) -> State:
    """A model of one width on a finished tower that is not trained on."""
    folder = WORK / f"width-{width}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = untrained(width, folder)
    content = torch.load(tower, weights_only=True)
    parts = {name: value for name, value in content["model"].items() if "vision_tower" in name}
    state.model.load_state_dict(parts, strict=False)
    state.model.model.vision_tower.requires_grad_(False)
    state.stage = STAGES.index("language")
    if (folder / "checkpoint.pt").exists():
        state.load(folder / "checkpoint.pt")
    while state.stage < len(STAGES):
        run_stage(state, steps[state.stage - 1], CPU)
    return state


@torch.inference_mode()
def purity(state: State) -> dict[str, Any]:
    """Decoded hit@10 and own share, and how often the model says the noun, over `find-500`."""
    model = state.model.eval()
    language = model.model.language_model
    processor_tokens = build_processor().tokenizer
    nouns = world.FREQUENCY
    token_of = [processor_tokens(f" {noun}", add_special_tokens=False).input_ids[0] for noun in nouns]
    columns = [block.mlp.down_proj.weight for block in language.layers]
    n_neurons = sum(w.shape[1] for w in columns)
    promoted = _promoted(torch.cat(columns, dim=1), language.norm.weight[:, None], model.lm_head.weight)
    total, said = torch.zeros(len(nouns), n_neurons), torch.zeros(len(nouns))
    hits: list[float] = []
    shown = right = 0
    for scene in pocket.evaluation_set("find-500"):
        ids, places = _tokens(processor_tokens, scene)
        activations, residual, logits = _pass(model, scene, ids)
        for noun, place in zip(scene.objects, places, strict=True):
            c = nouns.index(noun)
            shown += 1
            if logits[place].argmax() != token_of[c]:
                continue
            right += 1
            x = residual[place]
            scale = (x.pow(2).mean() + language.norm.variance_epsilon).rsqrt()
            direction = language.norm.weight * model.lm_head.weight[token_of[c]] * scale
            a = activations[place]
            contribution = a * torch.cat([direction @ w for w in columns])
            total[c] += contribution
            said[c] += 1
            best = contribution.topk(TOP).indices
            hits.append((promoted[(a[best] < 0).long(), best] == token_of[c]).any(-1).float().mean().item())
    mean = total / said.clamp(min=1)[:, None]
    shares = [
        (mean[c, best] / mean[:, best].clamp(min=0).sum(0)).mean().item()
        for c in range(len(nouns))
        if said[c] and len(best := mean[c].topk(TOP).indices)
    ]
    return {
        "nouns said": round(right / shown, 4),
        f"decoded hit@{TOP}": round(float(np.mean(hits)), 4),
        "own share": round(float(np.mean(shares)), 4),
        "neurons": n_neurons,
        "megabytes": round(sum(p.numel() for p in model.parameters()) * 2 / 1e6, 2),
    }


def _promoted(columns: Tensor, gamma: Tensor, unembed: Tensor) -> Tensor:
    """The ten tokens that each column and its opposite promote most: (2, neurons, 10)."""
    logits = unembed @ (gamma * columns)
    return torch.stack([logits.topk(TOP, dim=0).indices.T, (-logits).topk(TOP, dim=0).indices.T])


def _tokens(tokenizer: Any, scene: pocket.Scene) -> tuple[Tensor, list[int]]:
    """Prompt and true caption, and the position that predicts each noun."""
    start = f"USER: {tokenizer.image_token * GRID**2}\n{PROMPT} ASSISTANT: "
    text = caption(scene.objects, scene.background)
    ids, places = tokenizer(start + text).input_ids, []
    for noun in scene.objects:
        found = re.search(rf" {noun}\b", text)
        assert found is not None
        before = text[: found.start()]
        places.append(len(tokenizer(start + before).input_ids) - 1)
    return torch.tensor([ids]), places


def _pass(model: Any, scene: pocket.Scene, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (length, neurons), final residual stream (length, hidden), logits (length, vocabulary)."""
    language = model.model.language_model
    kept: list[Tensor] = []
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
        for block in language.layers
    ]
    stream: list[Tensor] = []
    hooks.append(language.norm.register_forward_pre_hook(lambda _, args: stream.append(args[0][0])))
    try:
        pixels = normalised(torch.from_numpy(np.array(scene.image))[None])
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(kept, dim=-1), stream[0], logits


def main() -> None:
    """Train and measure every width; write the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, default=WORK / "after-tower.pt")
    parser.add_argument("--widths", type=int, nargs="+", default=(512, 1024, 2048))
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 500), metavar=("LANGUAGE", "JOINT"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    results = {}
    for width in arguments.widths:
        started = time.monotonic()
        state = trained(width, arguments.tower, tuple(arguments.steps))
        results[width] = purity(state) | {"minutes": round((time.monotonic() - started) / 60, 1)}
        print(width, results[width], flush=True)
        arguments.out.write_text(
            json.dumps({"steps": arguments.steps, "batch": BATCH, "widths": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
