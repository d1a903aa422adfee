"""The abstractor: learned queries look at all patches, layer by layer, and become the picture's vectors in the text."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmneurons.vlm.mplug_owl2.config import AbstractorShape


class AbstractorAttention(nn.Module):
    """Attention of the queries to themselves and to the patches; places are added to queries and keys alone."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.n_heads, self.shape = shape.num_attention_heads, shape
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        # Fixed, but part of the published weights.
        queries, patches = self.places()
        self.register_buffer("q_pos_embed", queries)
        self.register_buffer("k_pos_embed", patches)

    def places(self) -> tuple[Float[Tensor, "queries hidden"], Float[Tensor, "patches hidden"]]:
        """Compute the places of the queries in their row, and of class token and patches in the picture."""
        hidden, side = self.shape.hidden_size, self.shape.grid_size
        queries = waves(torch.arange(self.shape.num_learnable_queries), hidden)
        # The first half says the column, the second the row; the class token is nowhere.
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        patches = torch.cat([waves(columns.flatten(), hidden // 2), waves(rows.flatten(), hidden // 2)], dim=1)
        return queries, torch.cat([torch.zeros(1, hidden, dtype=torch.float32), patches])

    def forward(
        self, queries: Float[Tensor, "pictures queries hidden"], patches: Float[Tensor, "pictures patches hidden"]
    ) -> Float[Tensor, "pictures queries hidden"]:
        """Attend."""
        seen = torch.cat([queries, patches], dim=1)
        places = torch.cat([self.q_pos_embed, self.k_pos_embed]).to(seen.dtype)
        projected = self.query(queries + places[: queries.shape[1]]), self.key(seen + places), self.value(seen)
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in projected)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class AbstractorMLP(nn.Module):
    """A gated FFN with a norm before its output projection."""

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.w2 = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.w3 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.ffn_ln = nn.LayerNorm(shape.intermediate_size, shape.layer_norm_eps)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Compute the FFN."""
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorOutput(nn.Module):
    """What is done with what the queries saw."""

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        self.out_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.norm2 = nn.LayerNorm(shape.hidden_size)
        self.mlp = AbstractorMLP(shape)

    def forward(
        self, seen: Float[Tensor, "pictures queries hidden"], queries: Float[Tensor, "pictures queries hidden"]
    ) -> Float[Tensor, "pictures queries hidden"]:
        """Add to the queries what they saw, and what the FFN makes of it."""
        x = queries + self.out_proj(seen)
        return x + self.mlp(self.norm2(x))


class AbstractorCrossAttention(nn.Module):
    """Norms, attention and FFN of one layer."""

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        self.attention = AbstractorAttention(shape)
        self.output = AbstractorOutput(shape)
        self.norm1 = nn.LayerNorm(shape.hidden_size)
        self.normk = nn.LayerNorm(shape.hidden_size)

    def forward(
        self, queries: Float[Tensor, "pictures queries hidden"], patches: Float[Tensor, "pictures patches hidden"]
    ) -> Float[Tensor, "pictures queries hidden"]:
        """Compute the layer: what is added to are the queries behind their norm, not before it."""
        queries = self.norm1(queries)
        return self.output(self.attention(queries, self.normk(patches)), queries)


class AbstractorLayer(nn.Module):
    """One layer of the abstractor, by the name that its weights have."""

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        self.crossattention = AbstractorCrossAttention(shape)

    def forward(
        self, queries: Float[Tensor, "pictures queries hidden"], patches: Float[Tensor, "pictures patches hidden"]
    ) -> Float[Tensor, "pictures queries hidden"]:
        """Compute the layer."""
        return self.crossattention(queries, patches)


class AbstractorEncoder(nn.Module):
    """The layers of the abstractor."""

    def __init__(self, shape: AbstractorShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AbstractorLayer(shape) for _ in range(shape.num_hidden_layers))

    def forward(
        self, queries: Float[Tensor, "pictures queries hidden"], patches: Float[Tensor, "pictures patches hidden"]
    ) -> Float[Tensor, "pictures queries hidden"]:
        """Compute the layers, all of which see the same patches."""
        for layer in self.layers:
            queries = layer(queries, patches)
        return queries


class Abstractor(nn.Module):
    """The whole abstractor."""

    def __init__(self, shape: AbstractorShape, language_hidden: int) -> None:
        super().__init__()
        self.encoder = AbstractorEncoder(shape)
        self.visual_fc = nn.Linear(shape.hidden_size, language_hidden)
        self.query_embeds = nn.Parameter(
            torch.empty(1, shape.num_learnable_queries, shape.hidden_size, dtype=torch.get_default_dtype())
        )
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_hidden, dtype=torch.get_default_dtype()))

    def forward(self, patches: Float[Tensor, "pictures patches seen"]) -> Float[Tensor, "pictures tokens hidden"]:
        """Make the vectors of pictures: one for each query, and one that ends the picture."""
        queries = self.encoder(self.query_embeds.expand(len(patches), -1, -1), patches)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(patches), -1, -1)], dim=1)


def waves(places: Tensor, width: int) -> Float[Tensor, "places width"]:
    """Write numbers as sines, then cosines, of waves from 1 to almost 10,000 times 2 pi long."""
    exponents = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = places.to(torch.float64)[:, None] / 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(torch.float32)
