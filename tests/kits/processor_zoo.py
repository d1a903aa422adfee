"""Processors of many families, built from nothing: a tokenizer of a few hundred words, pictures of a few patches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from kits.library import hf, lacking
from mmneurons.errors import ModelError
from mmneurons.vlm.families import check_version
from mmneurons.vlm.processors import load_processor

try:
    from transformers.models.smolvlm import processing_smolvlm
except ImportError:  # in some versions it needs torchvision
    processing_smolvlm = None
else:  # a package that only videos need
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # pyright: ignore[reportPrivateImportUsage]

SENTENCES = [
    "Describe the image in few words.",
    "An image of a dog and a cat on the grass.",
    "a red circle next to a blue square, the dog of the house",
    "USER: what is in the picture? ASSISTANT: a small dog",
] * 5

PLAIN = "PreTrainedTokenizerFast"


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """An RGB picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def template(image: str, bos: str = "") -> str:
    """A chat template that writes `image` for each picture."""
    return (
        bos
        + "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        + "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
        + "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def byte_level(
    special: Mapping[str, str], *, begin: bool = True, pad: bool = True, sentences: Sequence[str] = SENTENCES
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3 and Qwen; `special` are tokens by name ("image_token": "<image>")."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    first = ["<pad>", "<s>", "</s>", *special.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False, initial_alphabet=alphabet)
    model.train_from_iterator(sentences, trainer)
    if begin:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return _wrapped(model, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if pad else None)


def unigram(special: Mapping[str, str] | None = None, *, end: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model, as of T5."""
    special = special or {}
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    first = ["<pad>", "</s>", "<unk>", *special.values()]
    model.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=first, unk_token="<unk>", show_progress=False),
    )
    if end:
        model.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    return _wrapped(model, special, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def metaspace_bpe(*, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE, as of Llama 2: a space belongs to the word behind it; unknown characters in bytes."""
    model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    if byte_fallback:
        joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        model.decoder = decoders.Sequence(joined)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256) if byte_fallback)]
    model.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=200 + len(first), special_tokens=first, show_progress=False)
    )
    return _wrapped(model, {}, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece, as of BERT, GIT and BLIP: lower case, closed by [SEP]."""
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    model.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=first, show_progress=False)
    )
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _wrapped(model, {}, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def _wrapped(model: Tokenizer, special: Mapping[str, str], **named: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        extra_special_tokens=dict(special),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )


@dataclass(frozen=True)
class Family:
    """A processor as its checkpoint on the hub has it."""

    model_type: str
    processor: str
    """Name of the class."""
    image_processor: Callable[[], Any]
    n_tokens: int
    """Image tokens that a picture of 60 x 40 gets."""
    special: Mapping[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    chat: str | None = None
    """What the chat template writes for a picture; None if there is no template."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[Mapping[str, str]], Any] = byte_level
    max_images: int = 2
    min_images: int = 0

    def lack(self) -> str | None:
        """What keeps this version of transformers from loading the family's processor without torchvision."""
        if self.model_type not in CONFIG_MAPPING_NAMES:
            return f"no model {self.model_type}"
        try:
            check_version(SimpleNamespace(model_type=self.model_type))
        except ModelError as error:
            return str(error)
        try:
            kind = getattr(transformers, self.processor)
        except ModuleNotFoundError:
            return f"{self.processor} needs torchvision"
        own = vars(kind).get("tokenizer_class", "AutoTokenizer")  # of transformers 4, with the parts on the class
        if "video_processor" in vars(kind).get("attributes", ()) and not {"AutoTokenizer", PLAIN} & {own, *own}:
            return f"{self.processor} takes no tokenizer but {own}"
        return None

    def save(self, folder: Path) -> Path:
        """Write the files of a checkpoint, weights apart; skips the test where transformers lacks the family."""
        if lack := self.lack():
            lacking(lack)
        tokenizer = self.tokenizer(self.special)
        tokenizer.save_pretrained(folder)
        self.image_processor().save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": self.processor, **self.arguments}))
        (folder / "config.json").write_text(json.dumps({"model_type": self.model_type}))
        if self.chat:
            (folder / "chat_template.jinja").write_text(template(self.chat))
        return folder


def _pil(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, name)(**options)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SIZE = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
FAMILIES = (
    Family(
        "llava",
        "LlavaProcessor",
        _pil("CLIPImageProcessorPil", size={"shortest_edge": 28}, crop_size=_square(28)),
        16,
        chat="<image>",
        arguments={
            "patch_size": 7,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    Family(
        "llava_next",
        "LlavaNextProcessor",
        _pil(
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": 28},
            crop_size=_square(28),
            image_grid_pinpoints=[[28, 56], [56, 28]],
        ),
        16 + 28,  # the whole picture, and two tiles without their padding
        chat="<image>",
        arguments={
            "patch_size": 7,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    Family(
        "paligemma",
        "PaliGemmaProcessor",
        _pil("SiglipImageProcessorPil", size=_square(28), image_seq_length=4),
        4,
        min_images=1,
    ),
    Family(
        "gemma3",
        "Gemma3Processor",
        _pil("Gemma3ImageProcessorPil", size=_square(28)),
        4,
        special={"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        chat="<boi>",
        arguments={"image_seq_length": 4},
    ),
    Family(
        "idefics3",
        "Idefics3Processor",
        _pil("Idefics3ImageProcessorPil", size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        4,
        special={"image_token": "<image>", "fake": "<fake_token_around_image>", "global": "<global-img>"},
        chat="<image>",
        arguments={"image_seq_len": 4},
    ),
    Family(
        "mllama",
        "MllamaProcessor",
        _pil("MllamaImageProcessorPil", size=_square(28), max_image_tiles=2),
        1,
        special={"image_token": "<|image|>", "python": "<|python_tag|>"},
        chat="<|image|>",
    ),
    Family(
        "git",
        "GitProcessor",
        _pil("CLIPImageProcessorPil", size={"shortest_edge": 28}, crop_size=_square(28)),
        0,
        special={},
        tokenizer=lambda special: word_piece(),
        max_images=1,
    ),
    Family(
        "blip-2",
        "Blip2Processor",
        _pil("BlipImageProcessorPil", size=_square(28)),
        4,
        special={},
        arguments={"num_query_tokens": 4},
        max_images=1,
    ),
    Family("qwen2_vl", "Qwen2VLProcessor", _pil("Qwen2VLImageProcessorPil", **QWEN_SIZE), 12, QWEN, QWEN_IMAGE),
    Family("qwen2_5_vl", "Qwen2_5_VLProcessor", _pil("Qwen2VLImageProcessorPil", **QWEN_SIZE), 12, QWEN, QWEN_IMAGE),
    Family("qwen3_vl", "Qwen3VLProcessor", _pil("Qwen2VLImageProcessorPil", **QWEN_SIZE), 12, QWEN, QWEN_IMAGE),
    Family("qwen3_5", "Qwen3VLProcessor", _pil("Qwen2VLImageProcessorPil", **QWEN_SIZE), 12, QWEN, QWEN_IMAGE),
    Family(
        "internvl",
        "InternVLProcessor",
        _pil("GotOcr2ImageProcessorPil", size=_square(28), max_patches=1),
        4,
        special={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        chat="<IMG_CONTEXT>",
        arguments={"image_seq_length": 4},
    ),
    Family(
        "glm4v",
        "Glm4vProcessor",
        _pil("Glm4vImageProcessorPil", **(QWEN_SIZE | {"size": {"shortest_edge": 512, "longest_edge": 2048}})),
        12,
        special={"image_token": "<|image|>", "video_token": "<|video|>"},
        chat="<|begin_of_image|><|image|><|end_of_image|>",
    ),
    Family(
        "llava_onevision",
        "LlavaOnevisionProcessor",
        _pil("LlavaOnevisionImageProcessorPil", size=_square(28), image_grid_pinpoints=[[28, 28], [28, 56]]),
        16 + 28,
        special={"image_token": "<image>", "video_token": "<video>"},
        chat="<image>",
        arguments={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    Family(
        "smolvlm",
        "SmolVLMProcessor",
        _pil("SmolVLMImageProcessorPil", size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        4,
        special={"image_token": "<image>", "fake": "<fake_token_around_image>", "global": "<global-img>"},
        chat="<image>",
        arguments={"image_seq_len": 4},
    ),
    Family(
        "gemma4",
        "Gemma4Processor",
        _pil("Gemma4ImageProcessorPil", patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
        60,
        special={
            "image_token": "<soft>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "audio_token": "<audio>",
            "boa_token": "<boa>",
            "eoa_token": "<eoa>",
        },
        chat="<soft>",
    ),
    Family(
        "mistral3",
        "PixtralProcessor",
        _pil("PixtralImageProcessorPil", size={"longest_edge": 32}, patch_size=_square(4)),
        12,
        special={"image_token": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"},
        chat="[IMG]",
        arguments={"patch_size": 4, "spatial_merge_size": 2},
    ),
)


@cache
def processor(model_type: str) -> Any:
    """The processor of a family, saved and loaded once for all tests."""
    with TemporaryDirectory() as folder:
        found = next(family for family in FAMILIES if family.model_type == model_type)
        return load_processor(str(found.save(Path(folder))), model_type=model_type)
