"""Tiny models whose picture is a square of pixels or a list of patches: LLaVA and its many relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig, Idefics2VisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from kits.library import hf

from .base import Family, Inputs, Perturb, Row, left_padded, pixels, words

PAD, BOS, IMAGE, START, END, BREAK = range(6)
OTHERS = list(range(6, 12))  # ids of tokens that a family has besides these
WORDS, VOCAB = 20, 150  # ids of text: from WORDS to VOCAB - 1
Build = Callable[[], PreTrainedModel]
Config = Callable[..., PretrainedConfig]
Feed = Callable[[PreTrainedModel, Sequence[Row]], Inputs]
More = Callable[[Inputs], Inputs]


def text(kind: Config, **changes: Any) -> Config:
    """Sizes of a language model of three blocks."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None, "tie_word_embeddings": False}
    return partial(kind, **{**sizes, **heads, **tokens, **changes})


def sight(kind: Config, **changes: Any) -> Config:
    """Sizes of a vision tower of two blocks: 4 x 4 patches, 10 x 10 pixels each."""
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    return partial(kind, **{**sizes, "image_size": 40, "patch_size": 10, **changes})


def built(kind: Callable[..., PreTrainedModel], config: Config, language: Config, tower: Config, **more: Any) -> Build:
    """How to build a model that never stops generating."""

    def build() -> PreTrainedModel:
        parts = deepcopy({"text_config": language, "vision_config": tower, **more})  # as configs write into lists
        parts = {name: part().to_dict() if isinstance(part, partial) else part for name, part in parts.items()}
        with torch.random.fork_rng(devices=[]):  # some vectors are drawn, and the tests add to them
            torch.manual_seed(0)
            model = kind(config(image_token_id=IMAGE, **parts)).eval()
        model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
        return model

    return build


def prompts(rows: Sequence[Row], picture: Sequence[int]) -> Inputs:
    """Ids and mask: the ids up to the end of the picture, then the words of each row."""
    ids, mask = left_padded([torch.cat([torch.tensor(picture), words(row, WORDS, VOCAB)]) for row in rows], PAD)
    return {"input_ids": ids, "attention_mask": mask}


def feed(picture: Sequence[int], *shape: int, more: More | None = None) -> Feed:
    """Inputs of a family whose picture is a tensor of this shape; `more` is what else its processor returns."""

    def inputs(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
        batch = prompts(rows, picture) | {"pixel_values": torch.stack([pixels(row, *shape) for row in rows])}
        return batch | (more(batch) if more else {})

    return inputs


def image_tokens(name: str) -> More:
    """One where a token is an image token."""
    return lambda batch: {name: (batch["input_ids"] == IMAGE).long()}


def each(**values: Any) -> More:
    """The same tensor for each row."""
    return lambda batch: {name: torch.stack([torch.tensor(v)] * len(batch["input_ids"])) for name, v in values.items()}


def ones(name: str, *shape: int) -> More:
    """A mask that hides nothing."""
    return lambda batch: {name: torch.ones(len(batch["input_ids"]), *shape, dtype=torch.bool)}


def changed(inputs: Inputs, *places: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs with other pixels at these places."""
    values = inputs["pixel_values"].clone()
    for place in places:
        view = place(values)
        view += torch.randn(view.shape, generator=torch.Generator().manual_seed(99))
    return {**inputs, "pixel_values": values}


def square(cell: int, size: int | None = None) -> Perturb:
    """Other pixels in one cell, or the first `size` rows and columns of it, of the first picture of the batch."""

    def perturb(model: PreTrainedModel, inputs: Inputs, row: int, column: int) -> Inputs:
        rows, columns = (slice(at * cell, at * cell + (size or cell)) for at in (row, column))
        return changed(inputs, lambda values: values.view(-1, *values.shape[-3:])[0, :, rows, columns])

    return perturb


def facts(
    w_out: str = "mlp.down_proj",
    kind: str = "identity",
    logits: str = "raw",
    final_norm: str = "RMS w",
    decoder: str = "model.language_model",
    norm: str = "norm",
    head: str = "lm_head",
) -> dict[str, str]:
    """What the code of the family says of its language model."""
    places = {"w_out": w_out, "norm": f"{decoder}.{norm}", "head": head, "blocks": f"{decoder}.layers"}
    return places | {"kind": kind, "logits": logits, "final_norm": final_norm}


def _anyres(inputs: Inputs) -> Inputs:
    """A picture of 20 x 70 pixels: in the 40 x 80 of its two tiles, one row of patches at top and bottom is padding."""
    return each(image_sizes=[20, 70])(inputs)


def _tile(name: str, build: Build, facts: dict[str, str], feed: Feed) -> Family:
    """A family that sees the whole picture as one tile of 40 x 40 pixels, 4 x 4 tokens."""
    return Family(name, build, feed, (4, 4), square(10), facts)


SQUARE = [BOS, *[IMAGE] * 16]
MARKED = [BOS, START, *[IMAGE] * 16, END]
TAGGED = [BOS, START, OTHERS[0], *[IMAGE] * 16, END]
ANYRES = [BOS, *[IMAGE] * (16 + 2 * (8 + 1))]  # the whole picture, then two rows of eight patches and a newline
BROKEN = [BOS, *([IMAGE] * 5 + [BREAK]) * 3]
BROKEN[-1] = END
PINPOINTS = [[40, 80], [80, 40], [80, 80]]
LLAMA, QWEN2 = text(hf.LlamaConfig), text(hf.Qwen2Config)
COHERE = text(
    hf.Cohere2Config,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    sliding_window=8,
    logit_scale=0.25,
    tie_word_embeddings=True,
)
CLIP = sight(hf.CLIPVisionConfig)
SIGLIP = sight(hf.SiglipVisionConfig, vision_use_head=False)
SIGLIP8 = sight(hf.SiglipVisionConfig, patch_size=5, vision_use_head=False)  # 8 x 8 patches, 2 x 2 to a token
LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: tuple[Family, ...] = (
    _tile(
        "llava",
        built(hf.LlavaForConditionalGeneration, hf.LlavaConfig, LLAMA, CLIP, image_seq_length=16),
        facts(),
        feed(SQUARE, 3, 40, 40),
    ),
    _tile(
        "llava_next",
        built(hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig, LLAMA, CLIP, image_grid_pinpoints=PINPOINTS),
        facts(),
        feed(ANYRES, 3, 3, 40, 40, more=_anyres),
    ),
    _tile(
        "llava_onevision",
        built(
            hf.LlavaOnevisionForConditionalGeneration,
            hf.LlavaOnevisionConfig,
            QWEN2,
            SIGLIP,
            image_grid_pinpoints=PINPOINTS,
            video_token_id=OTHERS[0],
        ),
        facts(),
        feed(ANYRES, 3, 3, 40, 40, more=lambda batch: _anyres(batch) | each(batch_num_images=1)(batch)),
    ),
    _tile(
        "vipllava",
        built(hf.VipLlavaForConditionalGeneration, hf.VipLlavaConfig, LLAMA, CLIP, vision_feature_layers=(-2, -1, 0)),
        facts(),
        feed(SQUARE, 3, 40, 40),
    ),
    Family(
        "mistral3",
        built(
            hf.Mistral3ForConditionalGeneration,
            hf.Mistral3Config,
            text(hf.MistralConfig, sliding_window=None),
            sight(hf.PixtralVisionConfig, patch_size=4),
            tie_word_embeddings=False,
        ),
        feed(BROKEN, 3, 24, 40, more=each(image_sizes=[24, 40])),
        (3, 5),
        square(8),
        facts(),
    ),
    _tile(
        "aya_vision",
        built(hf.AyaVisionForConditionalGeneration, hf.AyaVisionConfig, COHERE, SIGLIP8),
        facts(final_norm="LayerNorm"),
        feed(TAGGED, 3, 40, 40),
    ),
    _tile(
        "cohere2_vision",
        built(
            hf.Cohere2VisionForConditionalGeneration,
            hf.Cohere2VisionConfig,
            COHERE,
            SIGLIP8,
            alignment_intermediate_size=72,
        ),
        facts(final_norm="LayerNorm"),
        feed([*MARKED[:-1], BREAK, END], 3, 40, 40),
    ),
    _tile(
        "internvl",
        built(
            hf.InternVLForConditionalGeneration,
            hf.InternVLConfig,
            text(hf.Qwen2Config, tie_word_embeddings=True),
            sight(hf.InternVLVisionConfig, patch_size=5),
            image_seq_length=16,
        ),
        facts(),
        feed(MARKED, 3, 40, 40),
    ),
    _tile(
        "ovis2",
        built(
            hf.Ovis2ForConditionalGeneration,
            hf.Ovis2Config,
            text(hf.Qwen2Config, tie_word_embeddings=True),
            sight(Ovis2VisionConfig, patch_size=5, hidden_stride=2, vocab_size=72),
            visual_indicator_token_ids=[START, *OTHERS[:3], END],
            vocab_size=VOCAB,
            hidden_size=48,
        ),
        facts(),
        feed([*MARKED[:-1], OTHERS[0], END], 3, 40, 40),
    ),
    Family(
        "got_ocr2",
        built(
            hf.GotOcr2ForConditionalGeneration,
            hf.GotOcr2Config,
            text(hf.Qwen2Config, tie_word_embeddings=True),
            sight(
                hf.GotOcr2VisionConfig,
                image_size=64,
                patch_size=4,
                mlp_dim=56,
                output_channels=20,
                window_size=6,
                global_attn_indexes=[1],
            ),
            image_seq_length=16,
        ),
        feed(MARKED, 3, 64, 64),
        (4, 4),
        square(16, 4),  # its convolutions overlap: a token looks around the first patch of its cell
        facts(),
    ),
    _tile(
        "deepseek_vl",
        built(hf.DeepseekVLForConditionalGeneration, hf.DeepseekVLConfig, LLAMA, SIGLIP, tie_word_embeddings=False),
        facts(),
        feed(SQUARE, 3, 40, 40),
    ),
    _tile(
        "janus",
        built(
            hf.JanusForConditionalGeneration,
            hf.JanusConfig,
            LLAMA,
            sight(hf.JanusVisionConfig, mlp_ratio=1.75, projection_dim=48, num_image_tokens=16),
            vq_config=partial(
                hf.JanusVQVAEConfig,
                embed_dim=8,
                num_embeddings=24,
                latent_channels=32,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                projection_dim=48,
                image_token_embed_dim=48,
            ),
            tie_word_embeddings=False,
        ),
        facts(),
        feed(MARKED, 3, 40, 40),
    ),
    _tile(
        "gemma3",
        built(
            hf.Gemma3ForConditionalGeneration,
            hf.Gemma3Config,
            text(
                hf.Gemma3TextConfig,
                layer_types=LOCAL,
                sliding_window=8,
                query_pre_attn_scalar=12,
                final_logit_softcapping=3.0,  # which Gemma3ForConditionalGeneration ignores
                tie_word_embeddings=True,
            ),
            SIGLIP8,
            mm_tokens_per_image=16,
            boi_token_id=START,
            eoi_token_id=END,
        ),
        facts(kind="norm", final_norm="RMS 1+w"),
        feed(MARKED, 3, 40, 40, more=image_tokens("token_type_ids")),
    ),
    *(
        Family(
            name,
            built(
                hf.PaliGemmaForConditionalGeneration,
                hf.PaliGemmaConfig,
                gemma,
                SIGLIP,
                vocab_size=VOCAB,
                hidden_size=48,
                projection_dim=48,
            ),
            feed([*[IMAGE] * 16, BOS], 3, 40, 40, more=lambda batch: {"token_type_ids": 0 * batch["input_ids"]}),
            (4, 4),
            square(10),
            facts(kind=kind, logits=logits, final_norm="RMS 1+w"),
        )
        for name, gemma, kind, logits in (
            ("paligemma", text(hf.GemmaConfig, tie_word_embeddings=True), "identity", "raw"),
            (
                "paligemma (2)",
                text(
                    hf.Gemma2Config,
                    layer_types=LOCAL,
                    query_pre_attn_scalar=12,
                    final_logit_softcapping=3.0,
                    attn_logit_softcapping=5.0,
                    tie_word_embeddings=True,
                ),
                "norm",
                "softcap",
            ),
        )
    ),
    Family(
        "idefics2",
        built(
            hf.Idefics2ForConditionalGeneration,
            hf.Idefics2Config,
            text(hf.MistralConfig, sliding_window=None),
            sight(Idefics2VisionConfig),
            perceiver_config=partial(
                Idefics2PerceiverConfig,
                hidden_size=48,
                resampler_n_latents=6,
                resampler_depth=1,
                resampler_n_heads=4,
                resampler_head_dim=12,
                num_key_value_heads=2,
            ),
        ),
        feed([BOS, START, *[IMAGE] * 6, START], 1, 3, 30, 40, more=ones("pixel_attention_mask", 1, 30, 40)),
        facts=facts(decoder="model.text_model"),
    ),
    *(
        Family(
            name,
            built(kind, config, LLAMA, sight(tower, patch_size=5), scale_factor=2, pad_token_id=PAD),
            feed([*TAGGED[:-1], START], 1, 3, 40, 40, more=ones("pixel_attention_mask", 1, 40, 40)),
            (4, 4),
            square(10),
            facts(decoder="model.text_model"),
        )
        for name, kind, config, tower in (
            ("idefics3", hf.Idefics3ForConditionalGeneration, hf.Idefics3Config, Idefics3VisionConfig),
            ("smolvlm", hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig, SmolVLMVisionConfig),
        )
    ),
)
