"""The pocket model before training: tokenizer, processor and an untrained LLaVA, from Hugging Face's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmneurons.pocket import scenes

PROMPT = "Describe the image in few words."
ANSWER_PREFIX = "An image of"
PATCH = 14
GRID = scenes.SIDE // PATCH
VOCABULARY = 700
"""Tokens: 256 bytes, 4 special ones, and merges for all but the rarer nouns, which take two or three."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def corpus() -> Iterator[str]:
    """Captions with the noun of rank r in proportion to 1 / r, so that merges reach the common nouns first."""
    random = np.random.default_rng(0)
    nouns = list(scenes.nouns())
    random.shuffle(nouns)
    for rank, noun in enumerate(nouns, start=1):
        for _ in range(max(1, 400 // rank)):
            background = tuple(scenes.BACKGROUNDS)[random.integers(len(scenes.BACKGROUNDS))]
            yield f"USER: {PROMPT} ASSISTANT: {ANSWER_PREFIX} {scenes.say([noun], background)}"
            yield f"{ANSWER_PREFIX} {scenes.say(['cat', noun, 'dog'], background)}"


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
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, dropped again by "default"
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """An untrained LLaVA; seed torch before the call."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=scenes.SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=1024,
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


def prompt_text(processor: LlavaProcessor) -> str:
    """The prompt as `mmneurons` builds it: chat template, then the words that the answer begins with."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    chat: Any = processor
    chat = chat.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{chat} {ANSWER_PREFIX}"
