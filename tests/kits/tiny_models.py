"""Random models of a few families that see pictures, for the processors of `processor_zoo`."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from kits.processor_zoo import processor

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT |= {"image_size": 28, "patch_size": 7}
QWEN_SIGHT = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
QWEN_SIGHT |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
TINY = {
    "llava": ("Llava", "llama", "clip_vision_model", SIGHT, {"vision_feature_layer": -2}),
    "gemma3": ("Gemma3", "gemma3_text", "siglip_vision_model", SIGHT, {"mm_tokens_per_image": 4}),
    "paligemma": ("PaliGemma", "gemma", "siglip_vision_model", SIGHT | {"patch_size": 14}, {"projection_dim": 32}),
    "mistral3": ("Mistral3", "mistral", "pixtral", SIGHT | {"patch_size": 4, "image_size": 32}, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", "qwen2_5_vl_text", "qwen2_5_vl_vision", QWEN_SIGHT, {}),
}


def tiny_model(model_type: str) -> Any:
    """A random model for the processor of a family."""
    family, text, tower, sight, more = TINY[model_type]
    tokenizer = processor(model_type).tokenizer
    language = TEXT | {"model_type": text, "vocab_size": len(tokenizer)}
    if model_type == "qwen2_5_vl":
        language["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        more = {"vision_start_token_id": tokenizer.vision_bos_token_id, "video_token_id": tokenizer.video_token_id}
    config = getattr(transformers, f"{family}Config")(
        text_config=language,
        vision_config=sight | {"model_type": tower},
        image_token_id=tokenizer.image_token_id,
        **more,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
