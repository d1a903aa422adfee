"""mPLUG-Owl2 whole: what its tower and abstractor make of a picture stands among the words of a Llama."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from mmneurons.vlm.mplug_owl2.abstractor import Abstractor, AbstractorAttention
from mmneurons.vlm.mplug_owl2.config import MplugOwl2Config
from mmneurons.vlm.mplug_owl2.language import MplugOwl2DecoderLayer
from mmneurons.vlm.mplug_owl2.vision import VisionEmbeddings, VisionModel


class MplugOwl2PreTrainedModel(LlamaPreTrainedModel):
    """What transformers has to know of both classes below."""

    config_class = MplugOwl2Config
    _no_split_modules = ["MplugOwl2DecoderLayer", "VisionLayer", "AbstractorLayer"]  # noqa: RUF012 - as transformers has it
    # Frequencies of rotations, which old versions of transformers saved: they are computed from the config.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what transformers does not know to draw, as small as it draws the rest."""
        super()._init_weights(module)
        own: list[Tensor] = []
        if isinstance(module, VisionEmbeddings):
            own = [module.cls_token, module.position_embedding]
        elif isinstance(module, Abstractor):
            own = [module.query_embeds, module.vit_eos]
        elif isinstance(module, AbstractorAttention):
            for buffer, places in zip((module.q_pos_embed, module.k_pos_embed), module.places(), strict=True):
                if not getattr(buffer, "_is_hf_initialized", False):  # not read from a checkpoint
                    buffer.data.copy_(places)
        for parameter in own:
            nn.init.normal_(parameter, std=self.config.initializer_range)


class MplugOwl2Model(MplugOwl2PreTrainedModel, LlamaModel):
    """The language model, with the tower and the abstractor in it, where the published weights have them."""

    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MplugOwl2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.vision_model = VisionModel(config.vision_shape)
        self.visual_abstractor = Abstractor(config.abstractor_shape, config.hidden_size)
        self.post_init()

    def encode_pictures(
        self, pixel_values: Float[Tensor, "pictures 3 high wide"]
    ) -> Float[Tensor, "pictures tokens hidden"]:
        """Make the vectors that stand for pictures among the words."""
        return self.visual_abstractor(self.vision_model(pixel_values))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int[Tensor, "batch positions"] | None = None,
        inputs_embeds: Float[Tensor, "batch positions hidden"] | None = None,
        pixel_values: Float[Tensor, "pictures 3 high wide"] | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: Tokens; `config.image_token_id` stands for a vector of a picture, row after row and picture
                after picture.
            inputs_embeds: Vectors instead of tokens. What stands for a picture in them is told by
                `modality_indicators`, True there.
            pixel_values: The pictures; not needed where no token stands for one.
            options: As of Llama.

        Raises:
            ValueError: as many tokens for pictures as the pictures have vectors are not there.
        """
        if input_ids is not None and inputs_embeds is None:
            pictured = input_ids == self.config.image_token_id
            # The token of a picture has no row in the embedding: any other's will do, and is written over.
            words: Tensor = self.embed_tokens(input_ids.masked_fill(pictured, 0))
            inputs_embeds = words
            if pictured.any():
                vectors = self._vectors(pixel_values, int(pictured.sum())).to(words)
                inputs_embeds = words.masked_scatter(pictured[..., None].to(words.device), vectors)
                options["modality_indicators"] = pictured
        return super().forward(inputs_embeds=inputs_embeds, **options)

    def _vectors(self, pixel_values: Tensor | None, n_tokens: int) -> Float[Tensor, "pictures tokens hidden"]:
        """Make the vectors of the pictures, as many as there are tokens for them."""
        expected = 0 if pixel_values is None else len(pixel_values) * self.config.n_image_tokens
        if pixel_values is None or expected != n_tokens:
            raise ValueError(f"{n_tokens} tokens stand for pictures, which have {expected} vectors.")
        return self.encode_pictures(pixel_values)


class MplugOwl2ForConditionalGeneration(MplugOwl2PreTrainedModel, LlamaForCausalLM):
    """The model with its head, which generates."""

    def __init__(self, config: MplugOwl2Config) -> None:
        super().__init__(config)
        self.model = MplugOwl2Model(config)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Int[Tensor, "batch positions"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch positions hidden"] | None = None,
        labels: Int[Tensor, "batch positions"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Float[Tensor, "pictures 3 high wide"] | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits; see `MplugOwl2Model.forward`, and Llama for the rest."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "pixel_values": pixel_values,
        }
        return super().forward(**inputs, **options)
