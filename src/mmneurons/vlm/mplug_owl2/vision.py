"""The vision tower: CLIP's transformer with queries, keys and values from one projection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from mmneurons.vlm.mplug_owl2.config import VisionShape


class VisionEmbeddings(nn.Module):
    """Patches, a class token before them, and the positions of both."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        hidden, patch = shape.hidden_size, shape.patch_size
        n_patches = (shape.image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, hidden, dtype=torch.get_default_dtype()))
        self.position_embedding = nn.Parameter(torch.empty(1, n_patches + 1, hidden, dtype=torch.get_default_dtype()))
        self.patch_embed = nn.Conv2d(3, hidden, patch, patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(hidden, shape.layer_norm_eps)

    def forward(self, pixels: Float[Tensor, "pictures 3 high wide"]) -> Float[Tensor, "pictures patches hidden"]:
        """Embed pictures of the size of the tower."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        seen = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        return self.pre_layernorm(seen + self.position_embedding)


class VisionAttention(nn.Module):
    """Attention of all patches to all."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.n_heads = shape.num_attention_heads
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.dense = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: Float[Tensor, "pictures patches hidden"]) -> Float[Tensor, "pictures patches hidden"]:
        """Attend."""
        # One head after the other, and of each head its query, its key and its value.
        query, key, value = self.query_key_value(x).unflatten(-1, (self.n_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.dense(seen.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """A plain FFN."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[shape.hidden_act]
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Compute the FFN."""
        return self.fc2(self.activation_fn(self.fc1(x)))


class VisionLayer(nn.Module):
    """One block of the tower."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.self_attn = VisionAttention(shape)
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.mlp = VisionMLP(shape)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)

    def forward(self, x: Float[Tensor, "pictures patches hidden"]) -> Float[Tensor, "pictures patches hidden"]:
        """Compute the block."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    """The blocks of the tower."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, x: Float[Tensor, "pictures patches hidden"]) -> Float[Tensor, "pictures patches hidden"]:
        """Compute the blocks, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    """The whole tower."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(shape)
        self.encoder = VisionEncoder(shape)
        self.post_layernorm = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)

    def forward(self, pixels: Float[Tensor, "pictures 3 high wide"]) -> Float[Tensor, "pictures patches hidden"]:
        """Read pictures.

        Returns:
            A vector for the class token, then one for each patch, row after row.
        """
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))
