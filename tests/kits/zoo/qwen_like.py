"""Tiny models whose picture comes as packed patches, and mixtures of experts: Qwen-VL and others."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from kits.library import hf

from .base import Family, Inputs, Perturb, Row, pixels, runnable
from .llava_like import (
    BOS,
    END,
    IMAGE,
    OTHERS,
    START,
    TAGGED,
    VOCAB,
    Build,
    Config,
    built,
    changed,
    each,
    facts,
    feed,
    image_tokens,
    ones,
    prompts,
    sight,
    square,
    text,
)

MARKS = {"video_token_id": OTHERS[0], "vision_start_token_id": START, "vision_end_token_id": END}
GLM_MARKS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_token_id": OTHERS[0],
    "video_start_token_id": OTHERS[1],
    "video_end_token_id": OTHERS[2],
}


def _rope(**changes: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], **changes}


def _config(family: str, name: str) -> Any:
    """A class of configs that is exported in newer versions alone."""
    return hf.of(f"models.{family}.configuration_{family}", name)


def _tower(kind: Config, **changes: object) -> Config:
    """Sizes of a vision tower whose patches are 4 x 4 pixels, 2 x 2 of them to a token."""
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "patch_size": 4}
    return partial(kind, **{**sizes, "out_hidden_size": 48, **changes})


def _feed(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Two equal frames of 6 x 10 patches, which make 3 x 5 tokens; the four patches of a token lie side by side."""
    batch = prompts(rows, [BOS, START, *[IMAGE] * 15, END])
    frames = torch.stack([pixels(row, 60, 3, 1, 4, 4) for row in rows]).expand(-1, -1, -1, 2, -1, -1)
    batch["pixel_values"] = frames.reshape(60 * len(rows), 96)
    batch["image_grid_thw"] = torch.tensor([[1, 6, 10]] * len(rows))
    takes = inspect.signature(model.forward).parameters
    return batch | image_tokens("mm_token_type_ids")(batch) if "mm_token_type_ids" in takes else batch


def _perturb(model: PreTrainedModel, inputs: Inputs, row: int, column: int) -> Inputs:
    first = 4 * (row * 5 + column)
    return changed(inputs, lambda values: values[first : first + 4])


def _packed(name: str, build: Build, facts: dict[str, str]) -> Family:
    return Family(name, build, _feed, (3, 5), _perturb, facts)


def pairs(width: int) -> Perturb:
    """Other pixels where patches come in one list, row by row, `width` in a row, and 2 x 2 of them make a token."""

    def perturb(model: PreTrainedModel, inputs: Inputs, row: int, column: int) -> Inputs:
        first = 2 * row * width + 2 * column
        return changed(inputs, *(lambda values, at=at: values[0, at : at + 2] for at in (first, first + width)))

    return perturb


def _gemma4_feed(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """6 x 10 patches of 5 x 5 pixels, pooled to 3 x 5 tokens, in a tensor with room for 72 patches."""
    batch = prompts(rows, [BOS, START, *[IMAGE] * 15, END])
    places = torch.stack(torch.meshgrid(torch.arange(10), torch.arange(6), indexing="xy"), -1).reshape(60, 2)
    places = torch.cat([places, torch.full((12, 2), -1)])  # (x, y) of each patch
    patches = torch.stack([torch.sigmoid(pixels(row, 60, 75)) for row in rows])
    batch["pixel_values"] = torch.cat([patches, torch.zeros(len(rows), 12, 75)], 1)
    batch["image_position_ids"] = places.repeat(len(rows), 1, 1)
    return batch | image_tokens("mm_token_type_ids")(batch)


def _lfm2_feed(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """6 x 10 patches of 5 x 5 pixels, joined to 3 x 5 tokens, in a tensor with room for 64 patches."""
    batch = prompts(rows, [BOS, START, *[IMAGE] * 15, END])
    patches = torch.stack([pixels(row, 60, 75) for row in rows])
    batch["pixel_values"] = torch.cat([patches, torch.zeros(len(rows), 4, 75)], 1)
    batch["pixel_attention_mask"] = (torch.arange(64) < 60).long().repeat(len(rows), 1)
    return batch | each(spatial_shapes=[6, 10])(batch)


FAMILIES: tuple[Family, ...] = (
    _packed(
        "qwen2_vl",
        built(
            hf.Qwen2VLForConditionalGeneration,
            hf.Qwen2VLConfig,
            text(hf.Qwen2VLTextConfig, rope_scaling=_rope()),
            partial(
                _config("qwen2_vl", "Qwen2VLVisionConfig"),
                depth=2,
                embed_dim=32,
                hidden_size=48,
                num_heads=4,
                mlp_ratio=2,
                patch_size=4,
            ),
            **MARKS,
        ),
        facts(),
    ),
    _packed(
        "qwen2_5_vl",
        built(
            hf.Qwen2_5_VLForConditionalGeneration,
            hf.Qwen2_5_VLConfig,
            text(hf.Qwen2_5_VLTextConfig, rope_scaling=_rope()),
            _tower(
                _config("qwen2_5_vl", "Qwen2_5_VLVisionConfig"),
                window_size=16,
                fullatt_block_indexes=[1],
            ),  # windows of 2 x 2 tokens
            **MARKS,
        ),
        facts(),
    ),
    _packed(
        "qwen3_vl",
        built(
            hf.Qwen3VLForConditionalGeneration,
            hf.Qwen3VLConfig,
            text(hf.Qwen3VLTextConfig, rope_scaling=_rope()),
            _tower(
                _config("qwen3_vl", "Qwen3VLVisionConfig"),
                num_position_embeddings=36,
                deepstack_visual_indexes=[0, 1],
            ),
            **MARKS,
        ),
        facts(),
    ),
    _packed(
        "qwen3_vl_moe",
        built(
            hf.Qwen3VLMoeForConditionalGeneration,
            hf.Qwen3VLMoeConfig,
            text(
                hf.Qwen3VLMoeTextConfig,
                rope_scaling=_rope(),
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=40,
                mlp_only_layers=[1],
            ),
            _tower(
                _config("qwen3_vl_moe", "Qwen3VLMoeVisionConfig"),
                num_position_embeddings=36,
                deepstack_visual_indexes=[0, 1],
            ),
            **MARKS,
        ),
        facts("mlp.experts.down_proj,mlp.down_proj"),
    ),
    _packed(
        "qwen3_5",
        built(
            hf.Qwen3_5ForConditionalGeneration,
            hf.Qwen3_5Config,
            text(
                hf.Qwen3_5TextConfig,
                layer_types=["linear_attention", "full_attention", "linear_attention"],
                head_dim=16,
                rope_scaling=_rope(partial_rotary_factor=0.75),
                linear_key_head_dim=8,
                linear_value_head_dim=10,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
            ),
            _tower(_config("qwen3_5", "Qwen3_5VisionConfig"), num_position_embeddings=36),
            **MARKS,
        ),
        facts(final_norm="RMS 1+w"),
    ),
    _packed(
        "glm4v",
        built(
            hf.Glm4vForConditionalGeneration,
            hf.Glm4vConfig,
            text(hf.Glm4vTextConfig, partial_rotary_factor=0.5, rope_scaling=_rope(mrope_section=[1, 1, 1])),
            _tower(_config("glm4v", "Glm4vVisionConfig"), image_size=24),
            **GLM_MARKS,
        ),
        facts(kind="norm"),
    ),
    Family(
        "aria",
        built(
            hf.AriaForConditionalGeneration,
            hf.AriaConfig,
            text(hf.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=3),
            sight(Idefics3VisionConfig),
            projector_patch_to_query_dict={16: 6, 64: 10},
        ),
        feed([BOS, *[IMAGE] * 6], 3, 40, 40, more=ones("pixel_mask", 40, 40)),
        facts=facts("mlp.experts.down_proj,mlp.shared_experts.down_proj"),
    ),
    Family(
        "llama4",
        runnable(
            built(
                hf.Llama4ForConditionalGeneration,
                hf.Llama4Config,
                text(
                    hf.Llama4TextConfig,
                    intermediate_size=40,
                    intermediate_size_mlp=88,
                    moe_layers=[1],
                    num_local_experts=4,
                    num_experts_per_tok=1,
                    no_rope_layers=[1, 0, 1],
                    attention_chunk_size=64,
                ),
                sight(
                    hf.Llama4VisionConfig,
                    patch_size=5,
                    intermediate_size=128,  # 2 x 2 patches of 32: pixel shuffle feeds a matrix of this width
                    vision_output_dim=36,
                    projector_input_dim=36,
                    projector_output_dim=36,
                ),
                boi_token_id=START,
                eoi_token_id=END,
            )
        ),
        feed(TAGGED, 3, 40, 40),
        (4, 4),
        square(10),
        facts(
            "feed_forward.down_proj,feed_forward.experts.down_proj,feed_forward.shared_expert.down_proj",
            decoder="language_model.model",
            head="language_model.lm_head",
        ),
    ),
    Family(
        "gemma4",
        built(
            hf.Gemma4ForConditionalGeneration,
            hf.Gemma4Config,
            text(
                hf.Gemma4TextConfig,
                num_hidden_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 2,
                sliding_window=8,
                global_head_dim=24,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=6,
                num_kv_shared_layers=2,
                use_double_wide_mlp=True,  # the last two blocks, which share keys and values, are twice as wide
                final_logit_softcapping=3.0,
                tie_word_embeddings=True,
            ),
            sight(
                hf.Gemma4VisionConfig,
                num_key_value_heads=4,
                head_dim=8,
                patch_size=5,
                pooling_kernel_size=2,
                position_embedding_size=20,
            ),
            boi_token_id=START,
            eoi_token_id=END,
            video_token_id=OTHERS[0],
            boa_token_id=OTHERS[1],
            eoa_token_index=OTHERS[2],
            audio_token_id=OTHERS[3],
        ),
        _gemma4_feed,
        (3, 5),
        pairs(10),
        facts(kind="other", logits="softcap"),
    ),
    Family(
        "lfm2_vl",
        built(
            hf.Lfm2VlForConditionalGeneration,
            hf.Lfm2VlConfig,
            text(
                hf.Lfm2Config,
                layer_types=["conv", "full_attention", "conv"],
                block_auto_adjust_ff_dim=False,
                tie_word_embeddings=True,
            ),
            sight(hf.Siglip2VisionConfig, patch_size=5, num_patches=36, vision_use_head=False),
            projector_hidden_size=72,
            downsample_factor=2,
        ),
        _lfm2_feed,
        (3, 5),
        pairs(10),
        facts("feed_forward.w2", norm="embedding_norm"),
    ),
)
