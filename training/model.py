"""The pocket model before training: tokenizer, processor and an untrained LLaVA, from Hugging Face's own classes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from text import caption, question
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmneurons.pocket import facts, scenes, world
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.prompts import WORDINGS

PATCH = 14
GRID = scenes.SIDE // PATCH
VOCABULARY = 750
"""Tokens: 256 bytes, 4 special ones, and merges for all but the rarer nouns, which take two or three."""
N_NEURONS = 1024
"""FFN neurons of each block of the language model; chosen by `widths.py`."""
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def corpus() -> Iterator[str]:
    """Facts, captions and questions as often as the nouns are shown, so that merges reach the common nouns first."""
    random = np.random.default_rng(0)
    yield from facts()
    for _ in range(4000):
        objects, background = world.compose(random, int(random.integers(1, 4)))
        yield caption(objects, background)
        yield f"USER: {question(objects[0])} ASSISTANT: yes"
    for prompt in (PROMPT, *WORDINGS, "What is on the left?", "What is on the right?"):
        yield from [f"USER: {prompt} ASSISTANT: no"] * 500


def build_processor() -> LlavaProcessor:
    """Byte-level BPE trained on `corpus()`, the chat template, and a PIL image processor for 112 x 112 pixels."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    side = scenes.SIDE
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, dropped again by "default"
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, n_neurons: int = N_NEURONS) -> LlavaForConditionalGeneration:
    """An untrained LLaVA with `n_neurons` FFN neurons a block; seed torch before the call."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=scenes.SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=n_neurons,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.image_token_id,  # pyright: ignore[reportCallIssue]  # an alias it takes
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def start_locally(tower: CLIPVisionModel) -> None:
    """Let an untrained tower begin as if it had learnt that neighbours matter.

    Sine positions in two dimensions; queries times keys close to a multiple of the identity, so that a patch looks at
    patches like it and near it; values times output close to minus the identity. Those are what trained towers have
    (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023), and a small tower on little
    data learns faster from there. Seed torch before the call.
    """
    width = tower.config.hidden_size
    head = width // tower.config.num_attention_heads
    waves = 1 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    y, x = (axis.flatten()[:, None] * waves for axis in torch.meshgrid(*(torch.arange(GRID),) * 2, indexing="ij"))
    positions = tower.embeddings.position_embedding.weight.data
    positions[0] = 0
    positions[1:] = 0.3 * torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    identity = torch.eye(width)
    for block in tower.encoder.layers:
        attention: Any = block.self_attn
        for i in range(tower.config.num_attention_heads):
            rows = slice(i * head, (i + 1) * head)
            left, scale, right = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * identity)
            attention.q_proj.weight.data[rows] = (left[:, :head] * scale[:head].sqrt()).T
            attention.k_proj.weight.data[rows] = right[:head] * scale[:head, None].sqrt()
        left, scale, right = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * identity)
        attention.out_proj.weight.data = left * scale.sqrt()
        attention.v_proj.weight.data = right * scale[:, None].sqrt()


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model, in half precision, and its processor, as every supported version of transformers reads them.

    That is the layout of LLaVA's first checkpoints; `save_pretrained` writes one that only newer versions read in full.
    """
    model.to(torch.float16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    build_processor().save_pretrained(folder)

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text())

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    weights = load_file(folder / "model.safetensors")
    weights = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): w for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    config = read("config.json")
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    write("config.json", config)

    words = read("processor_config.json")
    write("preprocessor_config.json", {**words.pop("image_processor"), "processor_class": "LlavaProcessor"})
    write("processor_config.json", words)

    tokenizer = read("tokenizer_config.json")
    del tokenizer["backend"]
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["extra_special_tokens"] = {"image_token": tokenizer.pop("image_token")}
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    write("tokenizer_config.json", tokenizer)


def prompt_text(processor: LlavaProcessor) -> str:
    """The prompt as `mmneurons` builds it: chat template, then the words that the answer begins with."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    chat: Any = processor
    chat = chat.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{chat} {ANSWER_PREFIX}"
