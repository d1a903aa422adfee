"""The models that are timed: the pocket model, and random weights in the shape of known families, built on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

import mmneurons as mmn
from mmneurons.vlm.processors import load_processor

from .vocabulary import BEGIN, END, PAD, made_up

SEED = 0
PATCH = 14
QWEN_MERGE = 2
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SPECIAL = {
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    },
}
TITLES = {"pocket": "pocket", "llava": "random LLaVA", "qwen2_5_vl": "random Qwen2.5-VL"}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a random model: vision tower, projector, language model."""

    model_type: str
    hidden: int
    neurons: int
    layers: int
    vocab: int
    head: int
    """Width of one attention head of the language model."""
    tower_hidden: int
    tower_layers: int
    tower_head: int
    side: int
    """Pixels of the side of the image that the tower sees; patches have 14."""

    @property
    def n_image_tokens(self) -> int:
        """Of one image."""
        return (self.side // PATCH // (1 if self.model_type == "llava" else QWEN_MERGE)) ** 2

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.hidden}, FFN {self.neurons}, vocabulary {self.vocab}; vision tower "
            f"{self.tower_layers} x {self.tower_hidden}, {self.side} pixels, {self.n_image_tokens} image tokens"
        )


LARGE = {
    "llava": Geometry(
        "llava", 1024, 2816, 24, 32000, head=32, tower_hidden=768, tower_layers=12, tower_head=32, side=140
    ),
    "qwen2_5_vl": Geometry(
        "qwen2_5_vl", 1024, 2816, 24, 32000, head=64, tower_hidden=512, tower_layers=6, tower_head=64, side=280
    ),
}
TINY = {
    "llava": Geometry("llava", 64, 160, 2, 2000, head=32, tower_hidden=64, tower_layers=2, tower_head=32, side=56),
    "qwen2_5_vl": Geometry(
        "qwen2_5_vl", 64, 160, 2, 2000, head=32, tower_hidden=64, tower_layers=2, tower_head=32, side=112
    ),
}


def build(name: str, *, toy: bool = False) -> mmn.VLM:
    """The model of that name, float32, on the CPU: "pocket" is the one shipped, the others are random."""
    if name != "pocket":
        return random_vlm((TINY if toy else LARGE)[name])
    vlm = mmn.load(device="cpu")
    vlm.model.requires_grad_(False)
    return vlm


def random_vlm(geometry: Geometry, dtype: torch.dtype = torch.float32, device: str = "cpu") -> mmn.VLM:
    """A model of random weights, made where it is to run; no two norm weights are alike; all weights are frozen."""
    tokenizer, first_word = made_up(geometry.vocab, SPECIAL[geometry.model_type])
    torch.manual_seed(SEED)
    with torch.device(device):
        model: Any
        if geometry.model_type == "llava":
            model = LlavaForConditionalGeneration._from_config(_llava(geometry), dtype=dtype)
        else:
            model = Qwen2_5_VLForConditionalGeneration._from_config(_qwen(geometry), dtype=dtype)
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.weight.add_(0.1 * torch.randn_like(module.weight))
    # Never the highest logit: only words are said, and the text does not end.
    model.get_submodule("lm_head").get_parameter("weight")[:first_word] = 0
    processor = (_llava_processor if geometry.model_type == "llava" else _qwen_processor)(tokenizer, geometry)
    return mmn.load(model, processor=processor)


def pictures(n: int, side: int) -> list[Image.Image]:
    """The first n sample images at that size."""
    return [Image.open(sample.path).convert("RGB").resize((side, side)) for sample in mmn.pocket.samples()[:n]]


def scenes(n: int, side: int) -> list[Image.Image]:
    """Scenes of the pocket world at that size."""
    return [mmn.pocket.scene(seed, natural=True).image.resize((side, side)) for seed in range(n)]


def side_of(name: str, geometries: Mapping[str, Geometry]) -> int:
    """Pixels of the images given: a random model's processor shrinks them, as photographs are."""
    return mmn.pocket.SIDE if name == "pocket" else 3 * geometries[name].side


def _text(geometry: Geometry) -> dict[str, Any]:
    return {
        "vocab_size": geometry.vocab,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.neurons,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.hidden // geometry.head,
        "num_key_value_heads": geometry.hidden // geometry.head,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }


def _llava(geometry: Geometry) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=geometry.tower_hidden,
        intermediate_size=4 * geometry.tower_hidden,
        num_hidden_layers=geometry.tower_layers,
        num_attention_heads=geometry.tower_hidden // geometry.tower_head,
        image_size=geometry.side,
        patch_size=PATCH,
        projection_dim=geometry.tower_hidden,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(**_text(geometry)).to_dict(),
        image_token_index=END + 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=geometry.n_image_tokens,
    )


def _qwen(geometry: Geometry) -> Qwen2_5_VLConfig:
    sixth = geometry.head // 16
    sections = [2 * sixth, 3 * sixth, 3 * sixth]  # of time, height and width, in the proportions of Qwen2.5-VL
    image, video, start, end = range(END + 1, END + 1 + len(SPECIAL["qwen2_5_vl"]))
    return Qwen2_5_VLConfig(
        text_config=_text(geometry)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}},
        vision_config={
            "hidden_size": geometry.tower_hidden,
            "intermediate_size": 4 * geometry.tower_hidden,
            "depth": geometry.tower_layers,
            "num_heads": geometry.tower_hidden // geometry.tower_head,
            "patch_size": PATCH,
            "spatial_merge_size": QWEN_MERGE,
            "window_size": 8 * PATCH,
            "fullatt_block_indexes": [geometry.tower_layers - 1],
            "out_hidden_size": geometry.hidden,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )


def _llava_processor(tokenizer: PreTrainedTokenizerFast, geometry: Geometry) -> LlavaProcessor:
    side = geometry.side
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )


def _qwen_processor(tokenizer: PreTrainedTokenizerFast, geometry: Geometry) -> Any:
    """As it is loaded from a checkpoint, by Pillow where torchvision is missing."""
    pixels = geometry.side**2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=QWEN_MERGE, size=size).save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
        (folder / "config.json").write_text(json.dumps({"model_type": geometry.model_type}))
        (folder / "chat_template.jinja").write_text(_template(QWEN_IMAGE))
        return load_processor(name, model_type=geometry.model_type)


def _template(image: str) -> str:
    """The pocket model's, with another family's mark for a picture."""
    return AutoProcessor.from_pretrained(mmn.pocket.folder()).chat_template.replace("<image>", image)
