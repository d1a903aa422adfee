"""The processor: pictures squeezed into a square as the authors advise, and the words around them tokenised apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from PIL import Image
from transformers import BatchFeature, PretrainedConfig, ProcessorMixin

from mmneurons.vlm.mplug_owl2.config import MplugOwl2Config

IMAGE_TOKEN = "<|image|>"
TEMPLATE = (
    "USER: {% for part in messages[0]['content'] if part['type'] == 'image' %}<|image|>{% endfor %}"
    "{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} ASSISTANT:"
)
"""How a question is written, without a system prompt."""


class MplugOwl2Processor(ProcessorMixin):
    """Makes the inputs of an mPLUG-Owl2.

    Args:
        image_processor: CLIP's.
        tokenizer: Llama's.
        chat_template: How a question is written; None for the authors' way.
        image_token_id: Token that stands for a vector of a picture; None for the tokenizer's own `<|image|>`.
        n_image_tokens: Number of vectors of a picture.
        options: Passed to transformers.
    """

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token_id: int | None = None,
        n_image_tokens: int = 65,
        **options: Any,
    ) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE, **options)
        self.image_token = IMAGE_TOKEN
        own = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_token_id = own if image_token_id is None else image_token_id
        self.n_image_tokens = n_image_tokens

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> MplugOwl2Processor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what lies beside the weights: the authors' files say nothing of a processor, the config has its numbers.

        Pictures are read by Pillow, also where torchvision is installed, which rounds otherwise.
        """
        source = pretrained_model_name_or_path
        config = MplugOwl2Config.from_dict(PretrainedConfig.get_config_dict(source, **options)[0])
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
        pillow: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        return cls(
            pillow.from_pretrained(source, **options),
            tokenizer,
            chat_template=tokenizer.chat_template,
            image_token_id=config.image_token_id,
            n_image_tokens=config.n_image_tokens,
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] = "",
        *,
        add_special_tokens: bool = True,
        padding: bool = True,
        padding_side: str | None = None,
        return_tensors: str = "pt",
        **options: Any,
    ) -> BatchFeature:
        """Encode texts and the pictures in them.

        Args:
            images: A picture, a list of them, or a list for each text, in the order of `<|image|>` in the texts.
            text: One text or several.
            add_special_tokens: Whether a text begins with the token for that.
            padding: Whether short texts are filled up.
            padding_side: Where; None for the tokenizer's side.
            return_tensors: As of transformers.
            options: What other processors take; of no use here.

        Raises:
            ValueError: there are not as many pictures as their tokens in the texts.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        n_asked = sum(one.count(IMAGE_TOKEN) for one in texts)
        if n_asked != len(pictures):
            raise ValueError(f"{len(pictures)} pictures for {n_asked} times {IMAGE_TOKEN}.")
        rows = {"input_ids": [self._ids(one, special=add_special_tokens) for one in texts]}
        side = {} if padding_side is None else {"padding_side": padding_side}
        made = self.tokenizer.pad(rows, padding=padding, return_tensors=return_tensors, **side)
        if pictures:
            squares = [square(picture) for picture in pictures]
            made["pixel_values"] = self.image_processor(squares, return_tensors=return_tensors)["pixel_values"]
        return BatchFeature({**made})

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Tokenise what stands before, between and behind the pictures, each by itself."""
        first, *others = text.split(IMAGE_TOKEN)
        ids = list(self.tokenizer(first, add_special_tokens=special).input_ids)
        for part in others:
            ids += [self.image_token_id] * self.n_image_tokens
            ids += self.tokenizer(part, add_special_tokens=False).input_ids
        return ids


def square(picture: Image.Image) -> Image.Image:
    """Stretch a picture to a square as long as its longer side."""
    side = max(picture.size)
    return picture.convert("RGB").resize((side, side))


def _flat(images: Any) -> list[Image.Image]:
    """List the pictures of all texts."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [picture for one in images for picture in _flat(one)]
