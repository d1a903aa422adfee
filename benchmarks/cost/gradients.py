"""Gradients of log p of each noun at its predicting position, in the same place for all neurons: `find`'s rivals.

Gradient x activation, as it is mostly written and as cheap as it gets; integrated gradients, as cheap as it gets.

The cheap ones run the predicting position alone: no other can see it, and what it sees is in the KV cache that
generation left. Whatever has to be run several times stands side by side, as *rows* at the same position, each of
which sees the cache before it and itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.vlm import VLM

from .rivals import Said, generate

STEPS = 20
MIDPOINTS = tuple((k + 0.5) / STEPS for k in range(STEPS))
"""Where integrated gradients look; Dai et al. take the right ends of the same intervals, at the same cost."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """What one image made the model say, and the KV cache that it left."""

    sequences: Tensor
    cache: Any
    n_prompt: int

    def position(self, noun: Said) -> int:
        """Where the noun was predicted."""
        return self.n_prompt + noun.step - 1


@dataclass(frozen=True, eq=False)
class Scaled:
    """One noun, with the activations of one block after the other scaled at its predicting position."""

    whole: float
    """log p with nothing scaled."""
    log_p: Float[Tensor, "layers scales"]
    scores: Float[Tensor, "neurons"]
    """Activation times the mean over the scales of the gradient; blocks end to end."""


def gradient_whole(
    vlm: VLM, image: Image.Image, said: Sequence[Said], max_new_tokens: int
) -> list[Float[Tensor, "neurons"]]:
    """Gradient x activation as it is mostly written: per noun, forward and backward over prompt and caption so far."""
    inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
    sequences = generate(vlm, inputs, max_new_tokens).sequences
    found = []
    for noun in said:
        batch = {**prefix(inputs, sequences, noun), "logits_to_keep": 1}
        found += _gradient_times_activation(vlm, batch, [noun.token_id])
    return found


def gradient_cached(
    vlm: VLM, image: Image.Image, said: Sequence[Said], max_new_tokens: int
) -> list[Float[Tensor, "neurons"]]:
    """Gradient x activation as cheap as it gets: one forward and backward of the predicting positions of all nouns."""
    made = _say(vlm, image, max_new_tokens)
    positions = torch.tensor([made.position(noun) for noun in said], device=made.sequences.device)
    return _gradient_times_activation(vlm, _rows(vlm, made, positions), [noun.token_id for noun in said])


def integrated_cached(
    vlm: VLM, image: Image.Image, said: Sequence[Said], max_new_tokens: int, scales: Sequence[float] = MIDPOINTS
) -> list[Scaled]:
    """Integrated gradients, joint per block: one block's activations grow from 0 to their value, the others follow.

    Per noun one forward and backward. The rows in which a block is scaled branch off below it: what they share with
    the unchanged row is not computed again.

    Source: Dai et al., Knowledge Neurons in Pretrained Transformers, ACL 2022, equations 1 to 3, with 20 steps.
    """
    made = _say(vlm, image, max_new_tokens)
    return [_scaled(vlm, made, noun, scales) for noun in said]


def prefix(inputs: Any, sequences: Tensor, noun: Said) -> dict[str, Any]:
    """Model inputs that end where the noun is predicted, with nothing cached."""
    ids = sequences[:, : inputs["input_ids"].shape[1] + noun.step]
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def log_p(logits: Float[Tensor, "rows vocab"], token_ids: Sequence[int]) -> Float[Tensor, "rows"]:
    """Log p of one token in each row: not by log_softmax, whose gradient is off by 1e-7 / (1 - p) where p is near 1."""
    places = torch.tensor(token_ids, device=logits.device)[:, None]
    ahead = logits.float() - logits.gather(1, places).float()
    return -torch.nn.functional.softplus(ahead.scatter(1, places, -torch.inf).logsumexp(1))


def _say(vlm: VLM, image: Image.Image, max_new_tokens: int) -> Spoken:
    inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
    made = generate(vlm, inputs, max_new_tokens)
    return Spoken(made.sequences, made.past_key_values, inputs["input_ids"].shape[1])


def _rows(vlm: VLM, made: Spoken, positions: Tensor) -> dict[str, Any]:
    """Model inputs: one row at each position."""
    cache = copy.copy(made.cache)
    cache.layers = [copy.copy(layer) for layer in made.cache.layers]  # what a forward pass adds stays in the copies
    return {
        "input_ids": made.sequences[:, positions],
        "position_ids": positions[None],
        "attention_mask": _mask(vlm, made, positions),
        "past_key_values": cache,
    }


def _mask(vlm: VLM, made: Spoken, positions: Tensor) -> Float[Tensor, "1 1 rows keys"]:
    """Added to attention: each row sees the keys cached before it, and its own."""
    cached = torch.arange(made.cache.get_seq_length(), device=positions.device)
    itself = torch.eye(len(positions), dtype=torch.bool, device=positions.device)
    seen = torch.cat([cached < positions[:, None], itself], dim=1)
    dtype = vlm.model.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
        None, None
    ]


def _gradient_times_activation(
    vlm: VLM, batch: dict[str, Any], token_ids: Sequence[int]
) -> list[Float[Tensor, "neurons"]]:
    """Activation times d log p / d activation, at the last positions, one for each token; blocks end to end."""
    blocks, ffns, held = vlm.anatomy.blocks, vlm.anatomy.ffns, []
    hooks = [_before(blocks[0].module, lambda hidden, kwargs: hidden.detach().requires_grad_())]
    hooks += [ffn.module.register_forward_pre_hook(lambda module, args: held.append(args[0])) for ffn in ffns]
    try:
        with torch.enable_grad():
            logits = vlm.model(**batch).logits[0]
            gradients = torch.autograd.grad(log_p(logits, token_ids).sum(), held)
    finally:
        for hook in hooks:
            hook.remove()
    n = len(token_ids)
    parts = [(a * g)[0, -n:].detach().float() for a, g in zip(held, gradients, strict=True)]
    return list(torch.cat(parts, dim=1))


def _scaled(vlm: VLM, made: Spoken, noun: Said, scales: Sequence[float]) -> Scaled:
    """One forward and backward, in which the rows grow by `scales` at each block; row 0 stays as it is."""
    blocks, ffns, n = vlm.anatomy.blocks, vlm.anatomy.ffns, len(scales)
    assert [ffn.layer for ffn in ffns] == list(range(len(blocks))), "one dense FFN in each block"
    position = torch.tensor([made.position(noun)], device=made.sequences.device)
    factors = torch.tensor(scales, dtype=vlm.model.dtype, device=position.device)[:, None]
    plain: list[Tensor] = []
    leaves: list[Tensor] = []

    def branch(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        grown = torch.cat([hidden, hidden[:, :1].detach().expand(-1, n, -1)], dim=1)
        kwargs["attention_mask"] = _mask(vlm, made, position.expand(grown.shape[1]))
        return grown

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        plain.append(args[0][:, :1].detach())
        leaves.append((factors * plain[-1]).requires_grad_())
        return (torch.cat([args[0][:, :-n], leaves[-1]], dim=1),)

    hooks = [_before(block.module, branch) for block in blocks]
    hooks += [ffn.module.register_forward_pre_hook(scale) for ffn in ffns]
    try:
        with torch.enable_grad():
            logits = vlm.model(**_rows(vlm, made, position)).logits[0]
            said = log_p(logits, [noun.token_id] * len(logits))
            gradients = torch.autograd.grad(said[1:].sum(), leaves)
    finally:
        for hook in hooks:
            hook.remove()
    parts = [(a[0, 0].float() * g[0].float().mean(0)) for a, g in zip(plain, gradients, strict=True)]
    return Scaled(float(said[0].detach()), said[1:].detach().view(len(blocks), n), torch.cat(parts))


def _before(block: nn.Module, change: Callable[[Tensor, dict[str, Any]], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Change the stream that enters a block, and what else it is called with."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        if args:
            return (change(args[0], kwargs), *args[1:]), kwargs
        kwargs["hidden_states"] = change(kwargs["hidden_states"], kwargs)
        return args, kwargs

    return block.register_forward_pre_hook(hook, with_kwargs=True)
