"""The models that are timed: the pocket model, and a LLaVA of random weights built on the spot."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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
)

import mmneurons as mmn
from mmneurons.finding import finder
from mmneurons.vlm.prompts import ANSWER_PREFIX
from mmneurons.words import HantaTagger, Noun, find_nouns

SEED = 0
PATCH = 14
NOUNS_PER_CAPTION = 3
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a random LLaVA: CLIP tower, projector, Llama."""

    hidden: int
    neurons: int
    layers: int
    vocab: int
    tower_hidden: int
    tower_layers: int
    side: int
    """Pixels of the image's side; patches have 14."""

    def __str__(self) -> str:
        return (
            f"Llama {self.layers} x {self.hidden}, FFN {self.neurons}, vocabulary {self.vocab}; CLIP tower "
            f"{self.tower_layers} x {self.tower_hidden}, {self.side} pixels, {(self.side // PATCH) ** 2} image tokens"
        )


LARGE = Geometry(hidden=1024, neurons=2816, layers=24, vocab=32000, tower_hidden=768, tower_layers=12, side=140)
TINY = Geometry(hidden=64, neurons=160, layers=2, vocab=2000, tower_hidden=64, tower_layers=2, side=56)


def build(name: str, geometry: Geometry) -> mmn.VLM:
    """The model of that name, float32, weights frozen: "pocket" is the one shipped, "random" the other."""
    if name == "pocket":
        vlm = mmn.load(device="cpu")
    else:
        tokenizer, first_word = _tokenizer(geometry.vocab)
        processor = _processor(tokenizer, geometry)
        torch.manual_seed(SEED)
        model = LlavaForConditionalGeneration(_config(geometry)).eval()
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        with torch.no_grad():  # never the highest logit: only words are said, and the text does not end
            model.get_submodule("lm_head").get_parameter("weight")[:first_word] = 0
        vlm = mmn.load(model, processor=processor)
    vlm.model.requires_grad_(False)
    return vlm


def pictures(n: int, side: int) -> list[Image.Image]:
    """The first n sample images at that size."""
    return [Image.open(sample.path).convert("RGB").resize((side, side)) for sample in mmn.pocket.samples()[:n]]


class FirstWords(HantaTagger):
    """HanTa does its work; then the first words are called nouns: what random weights say has none."""

    def nouns(self, text: str) -> list[Noun]:
        """The first words after the answer prefix."""
        super().nouns(text)
        words = list(re.finditer(r"\w+", text))[len(ANSWER_PREFIX.split()) :]
        return [Noun(*word.span(), word[0]) for word in words[:NOUNS_PER_CAPTION]]


@contextmanager
def nouns_of(vlm: mmn.VLM) -> Iterator[None]:
    """Inside, `find` takes the first words of a random model's captions for nouns; the pocket model's are real."""
    if vlm.is_pocket:
        yield
        return
    with mock.patch.object(finder, "find_nouns", functools.partial(find_nouns, tagger=FirstWords())):
        yield


def _config(geometry: Geometry) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=geometry.tower_hidden,
        intermediate_size=4 * geometry.tower_hidden,
        num_hidden_layers=geometry.tower_layers,
        num_attention_heads=geometry.tower_hidden // 32,
        image_size=geometry.side,
        patch_size=PATCH,
        projection_dim=geometry.tower_hidden,
    )
    text = LlamaConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.neurons,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.hidden // 32,
        num_key_value_heads=geometry.hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=_SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(geometry.side // PATCH) ** 2,
    )


def _processor(tokenizer: PreTrainedTokenizerFast, geometry: Geometry) -> LlavaProcessor:
    side = geometry.side
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=AutoProcessor.from_pretrained(mmn.pocket.folder()).chat_template,
    )


def _tokenizer(n_tokens: int) -> tuple[PreTrainedTokenizerFast, int]:
    """Byte-level BPE of made-up words (space, then three letters or four) and the id of the first of them."""
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    merges = [(a, b) for a, b in pairs] + [("Ġ", pair) for pair in pairs]
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    first_word = len(tokens)
    endings = [(f"Ġ{pair}", end) for ends in (letters, pairs) for pair in pairs for end in ends]
    merges += endings[: n_tokens - first_word]
    tokens += [a + b for a, b in endings[: n_tokens - first_word]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(_SPECIAL))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, first_word
