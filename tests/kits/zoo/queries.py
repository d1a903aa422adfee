"""Tiny models that read the picture as queries, raw patches or codes: BLIP-2 and its kin, Kosmos-2, Fuyu, Chameleon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAEConfig,
    FuyuConfig,
    FuyuForCausalLM,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    PersimmonConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig, Kosmos2VisionConfig

from kits.library import lacking
from mmneurons.vlm.mplug_owl2 import MplugOwl2Config, MplugOwl2ForConditionalGeneration

from .base import Family, Inputs, Row, pixels, runnable, words
from .cross import (
    BLOCKS,
    FFN,
    HEADS,
    HIDDEN,
    IMAGE,
    PAD,
    SIDE,
    START,
    TEXT,
    TOKENS,
    VISION,
    VOCAB,
    facts,
    pictures,
    prompts,
    settled,
    text_of,
)

QUERIES = 6
Q_FORMER = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def opt() -> PretrainedConfig:
    """OPT as in blip2-opt-2.7b: norm before, biases, plain ReLU, head tied to the embedding."""
    shape = {name: value for name, value in TEXT.items() if name != "intermediate_size"}
    return OPTConfig(ffn_dim=FFN, dropout=0.0, **shape)


def flan_t5() -> PretrainedConfig:
    """T5 v1.1, of which Flan-T5 is a tuned copy: gated GELU, and no scale before the head."""
    tokens = {**TOKENS, "decoder_start_token_id": PAD}
    tie = {"tie_word_embeddings": False}  # T5Config reads it as "no scale before the head", and ties nonetheless
    return T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=FFN,
        num_layers=BLOCKS + 1,  # of the encoder
        num_decoder_layers=BLOCKS,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        **tie,
        **tokens,
    )


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A head of its own for T5, as loading a checkpoint that holds both gives it, against what its config says."""
    head = cast(nn.Linear, model.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone())
    return settled(model, decoder_start_token_id=PAD)


def blip2(text: PretrainedConfig) -> PreTrainedModel:
    """BLIP-2: a vision tower, a Q-Former that sees the picture alone, and the language model given."""
    return settled(
        Blip2ForConditionalGeneration(
            Blip2Config(
                vision_config=Blip2VisionConfig(**VISION).to_dict(),
                qformer_config=Blip2QFormerConfig(**Q_FORMER).to_dict(),
                text_config=text.to_dict(),
                num_query_tokens=QUERIES,
                image_text_hidden_size=24,
                image_token_index=IMAGE,
            )
        )
    )


def instructblip(text: PretrainedConfig) -> PreTrainedModel:
    """InstructBLIP: as BLIP-2, and the Q-Former reads the words too."""
    return settled(
        InstructBlipForConditionalGeneration(
            InstructBlipConfig(
                vision_config=InstructBlipVisionConfig(**VISION).to_dict(),
                qformer_config=InstructBlipQFormerConfig(**Q_FORMER).to_dict(),
                text_config=text.to_dict(),
                num_query_tokens=QUERIES,
                image_token_index=IMAGE,
            )
        )
    )


def queried(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Tokens for the queries, then the padding, then the words; T5's tokenizer pads after the words instead."""
    side = "right" if model.config.text_config.is_encoder_decoder else "left"
    texts = prompts([text_of(row) for row in rows], side=side)
    images = torch.full((len(rows), QUERIES), IMAGE)
    return {
        "input_ids": torch.cat([images, texts["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(images), texts["attention_mask"]], 1),
        "pixel_values": pictures(rows),
    }


def instructed(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """As for BLIP-2, and the words once more in the ids of the Q-Former's own tokenizer."""
    again = [words(row, 10, 90) for row in rows]
    return {**queried(model, rows), **prompts(again, side="right", name="qformer_input_ids")}


def kosmos2() -> PreTrainedModel:
    """Kosmos-2: latent queries for the picture, sinusoidal positions, and a norm between activation and `fc2`."""
    text = Kosmos2TextConfig(
        vocab_size=VOCAB,
        embed_dim=HIDDEN,
        layers=BLOCKS,
        ffn_dim=FFN,
        attention_heads=HEADS,
        max_position_embeddings=96,
        dropout=0.0,
        attention_dropout=0.0,
        **TOKENS,
    )
    config = Kosmos2Config(
        text_config=text.to_dict(), vision_config=Kosmos2VisionConfig(**VISION).to_dict(), latent_query_num=QUERIES
    )
    model = settled(Kosmos2ForConditionalGeneration(config))
    if model.get_decoder() is model:
        lacking("Kosmos-2 does not say which of its parts writes the text")
    return model


def latent(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Start, <image>, ids 4 to 9 where the queries go, </image>, words."""
    before = torch.tensor([START, 121, *range(4, 4 + QUERIES), 122])
    texts = prompts([torch.cat([before, text_of(row)]) for row in rows])
    place = prompts([torch.tensor([0, 0, *[1] * QUERIES, 0, *[0] * row.n_text]) for row in rows], pad=0)["input_ids"]
    return {"pixel_values": pictures(rows), **texts, "image_embeds_position_mask": place}


def mplug_owl2() -> PreTrainedModel:
    """mPLUG-Owl2: queries and an end behind a tower with fused projections; two of each norm, key and value."""
    visual = {
        "visual_model": VISION,
        "visual_abstractor": {
            "hidden_size": VISION["hidden_size"],
            "encoder_hidden_size": VISION["hidden_size"],
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_learnable_queries": QUERIES,
            "grid_size": SIDE,
        },
    }
    return settled(MplugOwl2ForConditionalGeneration(MplugOwl2Config(visual_config=visual, **TEXT)))


def among_words(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Start, a token for each vector of the picture, words."""
    before = torch.tensor([START, *[VOCAB] * (QUERIES + 1)])
    return {**prompts([torch.cat([before, text_of(row)]) for row in rows]), "pixel_values": pictures(rows)}


FUYU_GRID, FUYU_PATCH = (2, 4), 12


def fuyu() -> PreTrainedModel:
    """Fuyu: no vision tower, each raw patch is a token through one linear map."""
    text = PersimmonConfig(**TEXT)
    return settled(
        FuyuForCausalLM(FuyuConfig(text_config=text.to_dict(), patch_size=2, image_token_id=IMAGE, image_size=8))
    )


def patches(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Rows of patch tokens, each with a newline token after it, the start token, words. All patches in one matrix."""
    n_rows, n_columns = FUYU_GRID
    before = torch.tensor([*[*[IMAGE] * n_columns, 121] * n_rows, START])
    raw = torch.cat([pixels(row, n_rows * n_columns, FUYU_PATCH) for row in rows])
    return {**prompts([torch.cat([before, text_of(row)]) for row in rows]), "pixel_values": raw}


def fuyu_nudged(model: PreTrainedModel, inputs: Inputs, row: int, column: int) -> Inputs:
    """Inputs with one patch of the first picture changed."""
    changed = inputs["pixel_values"].clone()
    changed[row * FUYU_GRID[1] + column] += 1.0
    return {**inputs, "pixel_values": changed}


FIRST_CODE, N_CODES, CHAMELEON_IMAGE = 120, 14, 8


def chameleon() -> PreTrainedModel:
    """Chameleon: the picture is turned into codes, which are words of the vocabulary that it never says."""
    codes = {"IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(i)) + "Z": FIRST_CODE + i for i in range(N_CODES)}
    config = ChameleonConfig(
        **TEXT,
        num_key_value_heads=2,
        vq_config=ChameleonVQVAEConfig(
            embed_dim=16,
            num_embeddings=N_CODES,
            latent_channels=16,
            resolution=6,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
        ).to_dict(),
        vocabulary_map={"<image>": CHAMELEON_IMAGE, **codes},
    )
    return settled(ChameleonForConditionalGeneration(config))


def coded(model: PreTrainedModel, rows: Sequence[Row]) -> Inputs:
    """Start, begin of picture, one token per code, end of picture, words."""
    before = torch.tensor([START, 6, *[CHAMELEON_IMAGE] * 9, 7])
    return {
        **prompts([torch.cat([before, text_of(row)]) for row in rows]),
        "pixel_values": torch.stack([pixels(row, 3, 6, 6) for row in rows]),
    }


IN_LANGUAGE_MODEL = "language_model.lm_head"
LLAMA_FACTS = facts(
    "language_model.model.layers", "mlp.down_proj", "language_model.model.norm", "RMS w", IN_LANGUAGE_MODEL
)
T5_FACTS = facts(
    "language_model.decoder.block",
    "layer.2.DenseReluDense.wo",
    "language_model.decoder.final_layer_norm",
    "RMS w",
    IN_LANGUAGE_MODEL,
)
OPT_FACTS = facts(
    "language_model.model.decoder.layers",
    "fc2",
    "language_model.model.decoder.final_layer_norm",
    "LayerNorm",
    IN_LANGUAGE_MODEL,
)
KOSMOS_FACTS = facts(
    "text_model.model.layers", "ffn.fc2", "text_model.model.layer_norm", "LayerNorm", "text_model.lm_head"
)
FUYU_FACTS = facts(
    "model.language_model.layers", "mlp.dense_4h_to_h", "model.language_model.final_layernorm", "LayerNorm"
)
OWL_FACTS = facts("model.layers", "mlp.down_proj", "model.norm", "RMS w")
CHAMELEON_FACTS = facts("model.layers", "mlp.down_proj", "model.norm", "RMS w")

FAMILIES: tuple[Family, ...] = (
    Family("instructblip (llama)", lambda: instructblip(LlamaConfig(**TEXT)), instructed, facts=LLAMA_FACTS),
    Family("instructblip (flan-t5)", lambda: untied(instructblip(flan_t5())), instructed, facts=T5_FACTS),
    Family("blip-2 (opt)", lambda: blip2(opt()), queried, facts=OPT_FACTS),
    Family("blip-2 (flan-t5)", lambda: untied(blip2(flan_t5())), queried, facts=T5_FACTS),
    Family("kosmos-2", kosmos2, latent, facts=KOSMOS_FACTS),
    Family("mplug_owl2", mplug_owl2, among_words, facts=OWL_FACTS),
    Family("fuyu", runnable(fuyu), patches, grid=FUYU_GRID, perturb=fuyu_nudged, facts=FUYU_FACTS),
    Family("chameleon", chameleon, coded, grid=(3, 3), facts=CHAMELEON_FACTS),
)
