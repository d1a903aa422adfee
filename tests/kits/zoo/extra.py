"""Tiny models with a trait of their own: scaled residuals and logits, a gated expert, a head in two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, PreTrainedModel
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig, IdeficsVisionConfig

from kits.library import hf

from . import qwen_like
from .base import Family, Inputs, Row
from .cross import (
    HIDDEN,
    IMAGE,
    PAD,
    PATCH,
    SIDE,
    START,
    TEXT,
    VISION,
    VOCAB,
    facts,
    nudge,
    pictures,
    prompts,
    settled,
    text_of,
)

TILE = 2 * PATCH * SIDE


def granite_docling(residual_multiplier: float = 0.5, **text_changes: Any) -> PreTrainedModel:
    """Granite for Docling: scaled embedding, attention, residuals and logits; features of the tower in block 0 too."""
    vision = hf.of("models.granite_docling.configuration_granite_docling", "GraniteDoclingVisionConfig")(
        **{**VISION, "image_size": TILE},
        out_hidden_size=HIDDEN,
        scale_factor=2,
        deepstack_visual_indexes=[0],
        use_fine_route=False,
    )
    text = hf.of("models.granite_docling.configuration_granite_docling", "GraniteDoclingTextConfig")(
        **{**TEXT, **text_changes},
        num_key_value_heads=2,
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=residual_multiplier,
    )
    config = hf.GraniteDoclingConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, pad_token_id=PAD)
    return settled(hf.GraniteDoclingForConditionalGeneration(config))


def one_tile(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Start, mark of a tile, its row and column, one token per 2 x 2 patches, newline, words; one tile per picture."""
    before = torch.tensor([START, 121, 122, *[IMAGE] * SIDE**2, 123])
    return {
        **prompts([torch.cat([before, text_of(row)]) for row in rows]),
        "pixel_values": pictures(rows, TILE)[:, None],
        "pixel_attention_mask": torch.ones(len(rows), 1, dtype=torch.bool),
    }


DENSE = next(family for family in qwen_like.FAMILIES if family.name == "qwen3_5")


def qwen3_5_moe() -> PreTrainedModel:
    """Qwen 3.5 with the sizes of the dense one: routed experts, and a shared one times the sigmoid of a gate."""
    dense = DENSE.build().config
    text = {**dense.text_config.to_dict(), "model_type": "qwen3_5_moe_text", "num_experts": 4, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 72}
    config = hf.Qwen3_5MoeConfig(
        text_config={**text, **sizes},
        vision_config={**dense.vision_config.to_dict(), "model_type": "qwen3_5_moe_vision"},
        **{name: value for name, value in dense.to_dict().items() if name.endswith("_token_id")},
    )
    return settled(hf.Qwen3_5MoeForConditionalGeneration(config))


LATENTS, FAKE = 6, VOCAB + 1  # the embedding's and the head's second part: <image>, then the mark around it


def idefics() -> PreTrainedModel:
    """Idefics 1: gated blocks of cross-attention in a list of their own, and two more ids in a second matrix."""
    config = IdeficsConfig(
        **{**TEXT, "num_hidden_layers": 4},
        additional_vocab_size=2,
        cross_layer_interval=2,
        use_resampler=True,
        qk_layer_norms=True,
        vision_config=IdeficsVisionConfig(
            **{name: value for name, value in VISION.items() if name != "hidden_size"}, embed_dim=VISION["hidden_size"]
        ),
        perceiver_config=IdeficsPerceiverConfig(
            use_resampler=True,
            resampler_n_latents=LATENTS,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=10,
            qk_layer_norms_perceiver=True,
        ),
    )
    return settled(IdeficsForVisionText2Text(config))


def around(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Start, <image> between two marks, words; from <image> on, each token may look at the picture."""
    before = torch.tensor([START, FAKE, VOCAB, FAKE])
    texts = prompts([torch.cat([before, text_of(row)]) for row in rows])
    sees = (texts["input_ids"] == VOCAB).cumsum(1)[..., None]
    return {**texts, "pixel_values": pictures(rows)[:, None], "image_attention_mask": sees}


GRANITE_FACTS = facts(
    "model.text_model.layers", "mlp.down_proj", "model.text_model.norm", "RMS w", kind="scalar", logits="scale"
)
MOE_FACTS = facts(
    "model.language_model.layers",
    "mlp.experts.down_proj,mlp.shared_expert.down_proj",
    "model.language_model.norm",
    "RMS 1+w",
    kinds="identity,scalar",  # of the two projections; the scalar is the gate's, another one at each position
)
IDEFICS_FACTS = facts("model.layers", "mlp.down_proj", "model.norm", "RMS w")

FAMILIES: tuple[Family, ...] = (
    Family(
        "granite_docling",
        granite_docling,
        one_tile,
        grid=(SIDE, SIDE),
        perturb=nudge(2 * PATCH),
        facts=GRANITE_FACTS,
    ),
    replace(DENSE, name="qwen3_5_moe", build=qwen3_5_moe, facts=MOE_FACTS),
    Family("idefics", idefics, around, facts=IDEFICS_FACTS),
)
