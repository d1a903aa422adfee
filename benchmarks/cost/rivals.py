"""The released algorithm that `find` is timed against, written as well as we can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mmneurons.finding.reading import texts
from mmneurons.maths.ranking import top_k
from mmneurons.neurons import Neuron
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm import weights
from mmneurons.vlm.vlm import VLM, Inputs

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


def project_all(vlm: VLM, n_blocks: int | None = None) -> list[Float[Tensor, "vocab neurons"]]:
    """What the released code keeps: per block unembedding x `w_out`, float16; of the first `n_blocks` if given."""
    found = []
    with torch.inference_mode():
        for ffn in vlm.anatomy.ffns[:n_blocks]:
            matrix = weights.dense(ffn.module).float()
            kept = torch.empty(vlm.anatomy.vocab, ffn.n_neurons, dtype=torch.float16, device=matrix.device)
            for rows, part in zip(kept.split(4096), vlm.anatomy.unembed.split(4096), strict=True):
                rows.copy_(part.float() @ matrix)
            found.append(kept)
    return found


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
    ffns = vlm.anatomy.ffns
    gates: list[list[Tensor]] = [[] for _ in ffns]
    ends = list(accumulate(ffn.size for ffn in ffns))

    def keeper(mine: list[Tensor]):
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            mine.append(output)

        return keep

    hooks = [
        cast(nn.Module, ffn.activation).register_forward_hook(keeper(mine))
        for ffn, mine in zip(ffns, gates, strict=True)
    ]
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
        ranked = order.tolist()
        layers = [next(i for i, end in enumerate(ends) if flat < end) for flat in ranked]
        inside = [flat - ends[i] + ffns[i].size for i, flat in zip(layers, ranked, strict=True)]
        columns = torch.stack([projections[i][:, place] for i, place in zip(layers, inside, strict=True)]).float()
        promoted = columns.topk(10, dim=1).indices.tolist()
        names = tuple(ffns[i].neuron(place) for i, place in zip(layers, inside, strict=True))
        found.append(Ranked(names, tuple(scores[order].tolist()), tuple(texts(vlm, row) for row in promoted)))
    return tuple(sequences[0, inputs["input_ids"].shape[1] :].tolist()), found


def generate(vlm: VLM, inputs: Inputs, max_new_tokens: int, use_cache: bool = True) -> Any:
    """A raw `model.generate`, greedy: `.sequences` and, with a cache, `.past_key_values`."""
    model = cast(Any, vlm.model)
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=use_cache, return_dict_in_generate=True
    )
