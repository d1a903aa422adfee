"""What an mPLUG-Owl2 is built from, as its config.json says it: Llama's entries, and `visual_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import LlamaConfig


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    use_cls_token: bool = True
    use_post_layernorm: bool = True


@dataclass(frozen=True)
class AbstractorShape:
    """Sizes of the abstractor, which makes a few vectors of all patches."""

    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_learnable_queries: int = 64
    grid_size: int = 32
    layer_norm_eps: float = 1e-6
    use_cls_token: bool = True
    add_v2t_pos_emb: bool = False


class MplugOwl2Config(LlamaConfig):
    """The config of an mPLUG-Owl2.

    Args:
        visual_config: Entries of `visual_model` and `visual_abstractor`.
        options: Entries of Llama's config.

    Raises:
        ValueError: parts of the mPLUG-Owl family that the published mPLUG-Owl2 does not have.
    """

    model_type = "mplug_owl2"

    def __init__(self, visual_config: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.visual_config = visual_config or {}
        vision, abstractor = self.vision_shape, self.abstractor_shape
        if not (vision.use_cls_token and vision.use_post_layernorm and abstractor.use_cls_token):
            raise ValueError("visual_config: a tower without class token or last norm is not mPLUG-Owl2's.")
        if abstractor.add_v2t_pos_emb or abstractor.hidden_size != abstractor.encoder_hidden_size:
            raise ValueError("visual_config: an abstractor of another width or with more places is not mPLUG-Owl2's.")

    @property
    def image_token_id(self) -> int:
        """The token that stands for a vector of a picture in `input_ids`: the first behind the vocabulary.

        It has no row in the embedding and none in the head, so that no answer can hold it.
        """
        return self.vocab_size

    @property
    def vision_shape(self) -> VisionShape:
        """Sizes of the vision tower."""
        return VisionShape(**_known(VisionShape, self.visual_config.get("visual_model", {})))

    @property
    def abstractor_shape(self) -> AbstractorShape:
        """Sizes of the abstractor."""
        return AbstractorShape(**_known(AbstractorShape, self.visual_config.get("visual_abstractor", {})))

    @property
    def n_image_tokens(self) -> int:
        """Number of vectors that stand for one picture: the queries, and the one that ends it."""
        return self.abstractor_shape.num_learnable_queries + 1


def _known(kind: type, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Take what a shape knows out of a part of `visual_config`; what it lacks is as published."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in entries.items() if name in names and value is not None}
