"""What `find` is timed against, written as well as we can: the released algorithm, and gradient x activation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

from mmneurons.finding.scoring import name_of, texts
from mmneurons.maths.ranking import top_k
from mmneurons.neurons import Neuron
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy import Block
from mmneurons.vlm.prompts import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.vlm import VLM

TOP = 10


@dataclass(frozen=True)
class Said:
    """A noun that a rival is told: it finds none itself, so its time for that is nothing."""

    step: int
    token_id: int


@dataclass(frozen=True)
class Ranked:
    """The top neurons of one noun, with their scores and the tokens that their columns promote."""

    neurons: tuple[Neuron, ...]
    scores: tuple[float, ...]
    tokens: tuple[tuple[str, ...], ...]


def project_all(vlm: VLM) -> list[Float[Tensor, "vocab neurons"]]:
    """What the released code keeps: per block unembedding x `w_out`, float16."""
    unembed = vlm.anatomy.unembed.float()
    with torch.inference_mode():
        return [
            torch.cat([(part @ weights.dense(block.w_out).float()).half() for part in unembed.split(4096)])
            for block in vlm.anatomy.blocks
        ]


def released(
    vlm: VLM, image: Image.Image, said: Sequence[Said], projections: list[Tensor], max_new_tokens: int
) -> tuple[tuple[int, ...], list[Ranked]]:
    """The released MM_Neurons algorithm: one image, no KV cache, every position of every block at every step.

    The gate alone times the row of the noun's first sub-token in the kept projections; top k over blocks.

    Returns:
        What was generated, and for each noun its neurons.

    Source: Pan et al., Findings of ACL 2024, and its code. Generous to it: no copy to lists, nouns given, nothing read
        from disk, logits of the last position only.
    """
    inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
    gates: list[list[Tensor]] = [[] for _ in vlm.anatomy.blocks]

    def hook(block: Block, mine: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            mine.append(output)

        assert block.activation is not None
        return block.activation.register_forward_hook(keep)

    hooks = [hook(block, mine) for block, mine in zip(vlm.anatomy.blocks, gates, strict=True)]
    try:
        sequences = generate(vlm, inputs, max_new_tokens, use_cache=False).sequences
    finally:
        for handle in hooks:
            handle.remove()
    found = []
    for noun in said:
        scores = torch.cat(
            [
                mine[noun.step][0, -1].float() * projected[noun.token_id].float()
                for mine, projected in zip(gates, projections, strict=True)
            ]
        )
        order = top_k(scores, TOP)
        names = tuple(name_of(vlm.anatomy, int(flat)) for flat in order)
        columns = torch.stack([projections[name.layer][:, name.index] for name in names]).float()
        promoted = columns.topk(10, dim=1).indices.tolist()
        found.append(Ranked(names, tuple(scores[order].tolist()), tuple(texts(vlm, row) for row in promoted)))
    return tuple(sequences[0, inputs["input_ids"].shape[1] :].tolist()), found


def gradient_whole(
    vlm: VLM, image: Image.Image, said: Sequence[Said], max_new_tokens: int
) -> list[Float[Tensor, "neurons"]]:
    """Gradient x activation as it is mostly written: per noun, forward and backward over prompt and caption so far."""
    inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
    sequences = generate(vlm, inputs, max_new_tokens).sequences
    found = []
    for noun in said:
        ids = sequences[:, : inputs["input_ids"].shape[1] + noun.step]
        batch = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        found.append(_gradient_times_activation(vlm, batch, noun.token_id))
    return found


def gradient_cached(
    vlm: VLM, image: Image.Image, said: Sequence[Said], max_new_tokens: int
) -> list[Float[Tensor, "neurons"]]:
    """Gradient x activation as cheap as it gets: per noun, forward and backward of the predicting position alone.

    No other position can see it, and what it sees is in the KV cache that generation left.
    """
    inputs = vlm.encode([image], PROMPT, ANSWER_PREFIX)
    generated = generate(vlm, inputs, max_new_tokens)
    found = []
    for noun in said:
        position = inputs["input_ids"].shape[1] + noun.step - 1
        cache = copy.deepcopy(generated.past_key_values)
        cache.crop(position - cache.get_seq_length())
        batch = {
            "input_ids": generated.sequences[:, position : position + 1],
            "attention_mask": torch.ones_like(generated.sequences[:, : position + 1]),
            "past_key_values": cache,
        }
        found.append(_gradient_times_activation(vlm, batch, noun.token_id))
    return found


def generate(vlm: VLM, inputs: BatchFeature, max_new_tokens: int, use_cache: bool = True) -> Any:
    """A raw `model.generate`, greedy: `.sequences` and, with a cache, `.past_key_values`."""
    model = cast(Any, vlm.model)
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=use_cache, return_dict_in_generate=True
    )


def _gradient_times_activation(vlm: VLM, batch: dict[str, Any], token_id: int) -> Float[Tensor, "neurons"]:
    """Activation times d log p / d activation, at the last position; blocks end to end; weights frozen."""
    blocks, held = vlm.anatomy.blocks, []

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    hooks = [blocks[0].module.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [block.w_out.register_forward_pre_hook(lambda module, args: held.append(args[0])) for block in blocks]
    try:
        with torch.enable_grad():
            logits = vlm.model(**batch, logits_to_keep=1).logits
            ahead = logits[0, -1].float() - logits[0, -1, token_id].float()
            others = torch.cat([ahead[:token_id], ahead[token_id + 1 :]])
            # Not log_softmax: where p is close to 1 its gradient in float32 is off by 1e-7 / (1 - p).
            log_p = -torch.nn.functional.softplus(others.logsumexp(0))
            gradients = torch.autograd.grad(log_p, held)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([(a * g)[0, -1].detach().float() for a, g in zip(held, gradients, strict=True)])
