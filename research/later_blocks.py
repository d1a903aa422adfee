"""Scores that follow the later blocks of a Llama-like model without autograd; what they are worth: `following.py`.

What a neuron writes at the predicting position reaches the logits there through that position's own stream only: so
the read-out direction is carried down from the top block, through each block's FFN, attention and norms at that
position, by products with their weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.cost.rivals import Said
from mmneurons.finding.scoring import read_out, unembed_rows
from mmneurons.maths.readout import Norm, frozen_direction, jacobian_direction
from mmneurons.settings import FindSettings, Score
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.norms import measure_norm
from mmneurons.vlm.hooks.recording import Recording
from mmneurons.vlm.traces import Trace, pick_trace
from mmneurons.vlm.vlm import VLM

STEP = 1e-4
"""For the slope of the activation function, by a symmetric difference in float64."""


@dataclass(frozen=True)
class Parts:
    """What of the later blocks is followed."""

    ffn: bool = False
    own: bool = False
    """Attention of the position to itself, its pattern held."""
    query: bool = False
    """What the position's query changes in the pattern."""
    key: bool = False
    """What its key changes there."""
    jacobian: bool = True
    """The norms before FFN and attention to first order; their scale held otherwise."""


class Watched:
    """What one Llama-like block is made of, and what it saw at the last position of each forward pass."""

    def __init__(self, block: Any, hidden: int) -> None:
        self.attention, self.ffn = block.self_attn, block.mlp
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        self.norms: tuple[Norm, Norm] = (measure_norm(self.before, hidden), measure_norm(self.between, hidden))
        self.head: int = self.attention.head_dim
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.cache: Any = None
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Set the hooks that see it."""

        def entered(name: str) -> Callable:
            return lambda module, args: self.seen[name].append(args[0][0, -1].clone())

        def left(name: str) -> Callable:
            return lambda module, args, output: self.seen[name].append(output[0, -1].clone())

        def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.cache = kwargs["past_key_values"]
            for name, part in zip(("cos", "sin"), kwargs["position_embeddings"], strict=True):
                self.seen[name].append(part[0, -1])

        return [
            self.before.register_forward_pre_hook(entered("stream")),
            self.between.register_forward_pre_hook(entered("middle")),
            self.attention.q_proj.register_forward_hook(left("query")),
            self.attention.register_forward_pre_hook(called, with_kwargs=True),
            self.ffn.gate_proj.register_forward_hook(left("gate")),
            self.ffn.up_proj.register_forward_hook(left("up")),
        ]

    def at(self, name: str, steps: Int[Tensor, "n"]) -> Float[Tensor, "n _"]:
        """What was seen where each of these tokens was predicted."""
        return torch.stack([self.seen[name][step] for step in steps.tolist()]).float()

    def through_ffn(
        self, read: Float[Tensor, "n neurons"], steps: Int[Tensor, "n"], jacobian: bool
    ) -> Float[Tensor, "n hidden"]:
        """The FFN's answer: `read` is what each column says along the directions above it."""
        gate, up = self.at("gate", steps).double(), self.at("up", steps)
        act = self.ffn.act_fn
        slope = ((act(gate + STEP) - act(gate - STEP)) / (2 * STEP)).float()
        back = (read * up * slope) @ self.ffn.gate_proj.weight.float()
        back = back + (read * act(gate).float()) @ self.ffn.up_proj.weight.float()
        return _through_norm(back, self.at("middle", steps), self.norms[1], jacobian)

    def looked(
        self, steps: Int[Tensor, "n"], n_prompt: int
    ) -> tuple[Float[Tensor, "n groups heads width"], Float[Tensor, "n groups heads keys"], Int[Tensor, "n 1 1 1"]]:
        """The rotated queries, the pattern, and which key is the position's own."""
        n, keys = len(steps), self.cache.layers[self.attention.layer_idx].keys[0].float()
        query = self.at("query", steps).view(n, -1, self.head)
        query = query * self.at("cos", steps)[:, None] + _turned(query) * self.at("sin", steps)[:, None]
        query = query.view(n, len(keys), -1, self.head)
        places = (n_prompt - 1 + steps)[:, None, None, None]
        scores = self.attention.scaling * torch.einsum("ngmd,gpd->ngmp", query, keys)
        alpha = scores.masked_fill(torch.arange(keys.shape[1]) > places, -torch.inf).softmax(-1)
        return query, alpha, places

    def through_attention(
        self, directions: Float[Tensor, "n hidden"], steps: Int[Tensor, "n"], n_prompt: int, parts: Parts
    ) -> Float[Tensor, "n hidden"]:
        """The attention's answer."""
        layer = self.cache.layers[self.attention.layer_idx]
        keys, values = layer.keys[0].float(), layer.values[0].float()  # groups, positions, head
        cos, sin = self.at("cos", steps)[:, None], self.at("sin", steps)[:, None]
        query, alpha, places = self.looked(steps, n_prompt)
        itself = places.expand(*alpha.shape[:3], 1)
        read = (directions @ self.attention.o_proj.weight.float()).view_as(query)
        back = torch.zeros(len(steps), self.norms[0].weight.shape[0])
        if parts.own:
            value = (alpha.gather(-1, itself) * read).sum(2)
            back = back + value.flatten(1) @ self.attention.v_proj.weight.float()
        if parts.query or parts.key:
            said = torch.einsum("ngmd,gpd->ngmp", read, values)
            moved = self.attention.scaling * alpha * (said - (alpha * said).sum(-1, keepdim=True))
            asked = torch.einsum("ngmp,gpd->ngmd", moved, keys).flatten(1, 2)
            offered = (moved.gather(-1, itself) * query).sum(2)
            for followed, turned, module in (
                (parts.query, asked, self.attention.q_proj),
                (parts.key, offered, self.attention.k_proj),
            ):
                if followed:
                    straight = turned * cos - _turned(turned * sin)  # the rotation's transpose
                    back = back + straight.flatten(1) @ module.weight.float()
        return _through_norm(back, self.at("stream", steps), self.norms[0], parts.jacobian)


def _turned(values: Float[Tensor, "*n head"]) -> Float[Tensor, "*n head"]:
    """Half of the rotation that marks positions; its transpose is its negative."""
    first, second = values.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _through_norm(
    rows: Float[Tensor, "n hidden"], x: Float[Tensor, "n hidden"], norm: Norm, jacobian: bool
) -> Float[Tensor, "n hidden"]:
    return (jacobian_direction if jacobian else frozen_direction)(rows, x, norm)


def watched_blocks(vlm: VLM) -> list[Watched]:
    """The blocks of a model that this file knows how to follow."""
    anatomy = vlm.anatomy
    if any(ffn.path is not None or ffn.n_experts is not None for ffn in anatomy.ffns) or not all(
        hasattr(block.module, name)
        for block in anatomy.blocks
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    ):
        raise SystemExit("Only Llama-like blocks are followed.")
    return [Watched(block.module, anatomy.hidden) for block in anatomy.blocks]


@contextmanager
def watch(blocks: Sequence[Watched]) -> Iterator[None]:
    """See what every block sees at the last position, while the `with` lasts."""
    hooks = []
    try:
        for block in blocks:
            block.clear()
            hooks += block.hooks()
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, eq=False)
class Traced:
    """One answer as it was generated once, and the nouns in it."""

    blocks: Sequence[Watched]
    trace: Trace
    token_ids: list[int]
    steps: Int[Tensor, "n"]
    n_prompt: int


def trace(blocks: Sequence[Watched], recording: Recording, said: Sequence[Said], n_prompt: int) -> Traced:
    """What was recorded, at the places of these nouns of one image."""
    steps = torch.tensor([noun.step for noun in said])
    trace = pick_trace(recording, torch.stack([torch.zeros_like(steps), steps], dim=1))
    return Traced(blocks, trace, [noun.token_id for noun in said], steps, n_prompt)


def final_direction(vlm: VLM, traced: Traced, score: Score) -> Float[Tensor, "n hidden"]:
    """At the input of the final norm, as `find` has it."""
    rows = unembed_rows(vlm.anatomy, traced.token_ids, traced.trace.residual)
    return read_out(vlm, traced.trace, traced.token_ids, rows, choices(score)).at(None)


def choices(score: Score) -> FindSettings:
    """What `find` is asked for."""
    return FindSettings(top=1, score=score)


@torch.inference_mode()
def follow(traced: Traced, final: Float[Tensor, "n hidden"], parts: Parts) -> Float[Tensor, "n slots"]:
    """Scores of all neurons: the direction carried down from the top block."""
    found: list[Tensor] = []
    direction, anatomy = final, traced.trace.anatomy
    for i in reversed(range(len(traced.blocks))):
        block = traced.blocks[i]
        read = weights.project(direction, anatomy.ffns[i].module)
        found.append(traced.trace.activations[i] * read)
        if i and parts.ffn:
            direction = direction + block.through_ffn(read, traced.steps, parts.jacobian)
        if i and (parts.own or parts.query or parts.key):
            direction = direction + block.through_attention(direction, traced.steps, traced.n_prompt, parts)
    return torch.cat(found[::-1], dim=1)
