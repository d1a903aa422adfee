"""Tiny models whose language model looks at the picture through cross-attention, and GIT and Florence-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GenerationMixin,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
from transformers.models.git.configuration_git import GitVisionConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from .base import Family, Inputs, Perturb, Row, left_padded, pixels, words

HIDDEN, FFN, VOCAB, BLOCKS, HEADS = 48, 88, 136, 3, 4
PAD, START, IMAGE, FIRST_WORD, END_WORDS = 0, 2, 130, 10, 120
PATCH, SIDE = 4, 3  # pixels of a patch, patches of a picture
IMAGE_SIZE = PATCH * SIDE
VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}
TOKENS: dict[str, Any] = {"bos_token_id": START, "eos_token_id": None, "pad_token_id": PAD}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 96,
    **TOKENS,
}


def settled(model: PreTrainedModel, **generation: int) -> Any:
    """The model in eval mode, and generation that never stops early, in each part of it that can generate."""
    for part in model.modules():
        if isinstance(part, GenerationMixin):
            part.generation_config.update(eos_token_id=None, pad_token_id=PAD, **generation)  # pyright: ignore
    return model.eval()


def facts(blocks: str, w_out: str, norm: str, final_norm: str, head: str = "lm_head", **other: str) -> dict[str, str]:
    """What a reader of the code sees; unless said otherwise, a block adds the FFN's output as it is, logits are raw."""
    paths = {"blocks": blocks, "w_out": w_out, "norm": norm, "head": head}
    return {**paths, "final_norm": final_norm, "kind": "identity", "logits": "raw", **other}


def text_of(row: Row) -> Tensor:
    """The words of a row, of the range of ids that all families here keep for words."""
    return words(row, FIRST_WORD, END_WORDS)


def pictures(rows: Sequence[Row], side: int = IMAGE_SIZE) -> Tensor:
    """One square picture per row: (batch, 3, side, side)."""
    return torch.stack([pixels(row, 3, side, side) for row in rows])


def prompts(ids: Sequence[Tensor], pad: int = PAD, side: str = "left", name: str = "input_ids") -> Inputs:
    """Token ids and attention mask of prompts, padded on the side named."""
    if side == "left":
        batch, mask = left_padded(ids, pad)
    else:
        batch, mask = (part.flip(1) for part in left_padded([row.flip(0) for row in ids], pad))
    return {name: batch, name.replace("input_ids", "attention_mask"): mask}


def nudge(side: int) -> Perturb:
    """How to change the pixels of one square of the first picture."""

    def nudged(model: PreTrainedModel, inputs: Inputs, row: int, column: int) -> Inputs:
        changed = inputs["pixel_values"].clone()
        changed[0, ..., row * side : (row + 1) * side, column * side : (column + 1) * side] += 1.0
        return {**inputs, "pixel_values": changed}

    return nudged


def vit_gpt2() -> PreTrainedModel:
    """A ViT read by GPT-2 with cross-attention."""
    encoder = ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **VISION)
    decoder = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_inner=FFN,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=96,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        add_cross_attention=True,
        **TOKENS,
    )
    config = VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict(), **TOKENS)
    return settled(VisionEncoderDecoderModel(config), decoder_start_token_id=START)


def picture_alone(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """A model of captions has no prompt."""
    return {"pixel_values": pictures(rows)}


def git() -> PreTrainedModel:
    """GIT: the picture's features before the words, full attention among them, blocks in the manner of BERT."""
    config = GitConfig(
        vision_config=GitVisionConfig(**VISION).to_dict(),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **TEXT,
    )
    return settled(GitForCausalLM(config))


def words_and_picture(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Words without tokens for the picture."""
    return {**prompts([text_of(row) for row in rows]), "pixel_values": pictures(rows)}


TILES, RATIOS = 3, [[1, 1], [1, 2], [2, 1], [1, 3], [3, 1]]


def mllama() -> PreTrainedModel:
    """Mllama: blocks of self-attention, and blocks of cross-attention whose FFN is gated."""
    vision = MllamaVisionConfig(
        **{name: value for name, value in VISION.items() if name != "num_attention_heads"},
        attention_heads=VISION["num_attention_heads"],
        num_global_layers=1,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=3 * VISION["hidden_size"],
        max_num_tiles=TILES,
        supported_aspect_ratios=RATIOS,
    )
    text = MllamaTextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        rope_scaling={"rope_type": "default"},  # pyright: ignore[reportCallIssue]  # an alias it takes
    )
    return settled(
        MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB))
    )


def tiled(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """A token that stands for the picture, words, and a picture of one or two tiles that all of them may look at."""
    texts = prompts([torch.cat([torch.tensor([VOCAB]), text_of(row)]) for row in rows])
    sees = torch.zeros(*texts["input_ids"].shape, 1, TILES, dtype=torch.long)
    tiles = torch.zeros(len(rows), 1, TILES, 3, IMAGE_SIZE, IMAGE_SIZE)
    real = torch.zeros(len(rows), 1, TILES, dtype=torch.long)
    for i, row in enumerate(rows):
        n_tiles = 1 + row.seed % 2
        tiles[i, 0, :n_tiles] = pixels(row, n_tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
        real[i, 0, :n_tiles] = 1
        sees[i, texts["attention_mask"][i].bool(), 0, :n_tiles] = 1
    ratios = torch.tensor([[1 + row.seed % 2] for row in rows])
    return {
        **texts,
        "pixel_values": tiles,
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": real,
        "cross_attention_mask": sees,
    }


FLORENCE_SIZE, FLORENCE_TOKENS = 24, 10  # two stages, which divide by 4 and 2; a mean, then 3 x 3


def florence2() -> PreTrainedModel:
    """Florence-2: the picture's features stand before the words in BART's encoder; post-LN; head tied."""
    vision = Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(16, VISION["hidden_size"]),
        num_heads=(2, 4),
        num_groups=(2, 4),
        window_size=3,
        drop_path_rate=0.0,
        projection_dim=HIDDEN,
    )
    text = BartConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=BLOCKS - 1,
        decoder_layers=BLOCKS,
        encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        max_position_embeddings=96,
        dropout=0.0,
        forced_eos_token_id=None,
        decoder_start_token_id=START,
        **TOKENS,
    )
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return settled(Florence2ForConditionalGeneration(config), decoder_start_token_id=START)


def encoded(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Tokens for the picture, words, padding: BART counts positions from the left, padding included."""
    before = torch.full((FLORENCE_TOKENS,), IMAGE)
    texts = prompts([torch.cat([before, text_of(row)]) for row in rows], side="right")
    return {**texts, "pixel_values": pictures(rows, FLORENCE_SIZE)}


VIT_GPT2_FACTS = facts(
    "decoder.transformer.h", "mlp.c_proj", "decoder.transformer.ln_f", "LayerNorm", head="decoder.lm_head"
)
MLLAMA_FACTS = facts(
    "model.language_model.layers",
    "mlp.down_proj",
    "model.language_model.norm",
    "RMS w",
    kind="scalar",
    kinds="identity scalar identity scalar",  # block by block: only blocks of cross-attention have a gate
)
GIT_FACTS = facts(
    "git.encoder.layer",
    "output.dense",
    "git.encoder.layer.2.output.LayerNorm",
    "LayerNorm",
    head="output",
    kind="post-LN",
)
FLORENCE_FACTS = facts(
    "model.language_model.decoder.layers",
    "fc2",
    "model.language_model.decoder.layers.2.final_layer_norm",
    "LayerNorm",
    kind="post-LN",
)

FAMILIES: tuple[Family, ...] = (
    Family("mllama", mllama, tiled, facts=MLLAMA_FACTS),
    Family("git", git, words_and_picture, grid=(SIDE, SIDE), perturb=nudge(PATCH), facts=GIT_FACTS),
    Family("florence2", florence2, encoded, facts=FLORENCE_FACTS),
    Family("vision-encoder-decoder", vit_gpt2, picture_alone, facts=VIT_GPT2_FACTS),
)
