"""Llama's blocks with two of each norm, key and value projection: one for words, one for what stands for a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from mmneurons.vlm.mplug_owl2.config import MplugOwl2Config


class Multiway(nn.Module):
    """A part that is there twice: the first for words, the second for pictures."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(
        self, x: Float[Tensor, "batch positions hidden"], pictured: Bool[Tensor, "batch positions"] | None
    ) -> Float[Tensor, "batch positions out"]:
        """Compute the part of each position.

        Args:
            x: What goes in.
            pictured: Where a picture stands; None if nowhere.
        """
        if pictured is None:
            return self.multiway[0](x)
        words, pictures = (way(x) for way in self.multiway)
        return torch.where(pictured[..., None], pictures, words)


class MplugOwl2Attention(LlamaAttention):
    """Attention with keys and values of two kinds; queries are of one."""

    def __init__(self, config: MplugOwl2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, bias = config.num_key_value_heads * self.head_dim, config.attention_bias  # pyright: ignore[reportOptionalOperand]
        self.k_proj = Multiway(lambda: nn.Linear(config.hidden_size, width, bias=bias))
        self.v_proj = Multiway(lambda: nn.Linear(config.hidden_size, width, bias=bias))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Float[Tensor, "batch positions hidden"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        modality_indicators: Bool[Tensor, "batch positions"] | None,
        **options: Any,
    ) -> tuple[Float[Tensor, "batch positions hidden"], Tensor | None]:
        """Attend; as Llama does, but for keys and values."""
        projected = (
            self.q_proj(hidden_states),
            self.k_proj(hidden_states, modality_indicators),
            self.v_proj(hidden_states, modality_indicators),
        )
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kind = self.config._attn_implementation
        attend = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        dropout = float(self.attention_dropout or 0) if self.training else 0.0
        seen, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **options
        )
        return self.o_proj(seen.flatten(2)), weights


class MplugOwl2DecoderLayer(LlamaDecoderLayer):
    """A block of Llama with norms of two kinds; the FFN is of one."""

    def __init__(self, config: MplugOwl2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = MplugOwl2Attention(config, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = (
            Multiway(lambda: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)) for _ in range(2)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Float[Tensor, "batch positions hidden"],
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        modality_indicators: Bool[Tensor, "batch positions"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch positions hidden"]:
        """Compute the block.

        Args:
            hidden_states: The residual stream.
            attention_mask: As transformers makes it for the kind of attention that is used.
            position_embeddings: Cosines and sines of the positions.
            past_key_values: The cache, which is written into.
            modality_indicators: Where a picture stands; None if nowhere.
            options: What else Llama's blocks are given.
        """
        options.pop("use_cache", None)
        normed = self.input_layernorm(hidden_states, modality_indicators)
        seen, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            modality_indicators=modality_indicators,
            **options,
        )
        hidden_states = hidden_states + seen
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, modality_indicators))
