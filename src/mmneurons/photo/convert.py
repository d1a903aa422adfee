"""Put the photo model together from the packages that hold its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmneurons.photo.cache import projector
from mmneurons.photo.packages import EYES, LANGUAGE, located
from mmneurons.photo.tower import EfficientNetLite, EfficientNetLiteConfig, folded

IMAGE_TOKEN = "<reponame>"
"""A token that the vocabulary has and no text uses: the table of embeddings stays as it was trained."""
CHAT = "<|im_start|>user\n{image}\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
"""How SmolLM2 is asked; its usual first message, which gives it a name, is left out."""
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""".replace("IMAGE", IMAGE_TOKEN)
"""`CHAT`, as transformers writes it."""


def write(folder: Path, trained: Path | None = None) -> None:
    """Put the model together from its packages and write it, in half precision, with its processor.

    Args:
        folder: Filled.
        trained: Another projector than the one that is shipped.

    Raises:
        ModelError: a package is missing, or holds another file.
    """
    model, tokenizer = language()
    trained = trained or projector()
    whole = assembled(model, tower(**grid(trained)), load_file(trained), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    whole.half().save_pretrained(folder)
    processor(tokenizer, whole.config.vision_config).save_pretrained(folder)


def assembled(language: Any, tower: EfficientNetLite, projector: Mapping[str, Tensor], image_token_id: int) -> Any:
    """A LLaVA of three parts, in float32.

    Args:
        language: A LlamaForCausalLM whose input embeddings are its output embeddings.
        tower: The eyes.
        projector: `linear_1.weight` (hidden, channels) and `linear_1.bias`; of two layers also `linear_2.weight` and
            `linear_2.bias`, with a GELU between. LLaVA's always has two: a single one is followed by the identity.
        image_token_id: The token that stands for a place in the picture.

    Returns:
        A LlavaForConditionalGeneration, in evaluation mode.
    """
    weights = {name: tensor.float() for name, tensor in projector.items()}
    linear = "linear_2.weight" not in weights
    if linear:
        hidden = len(weights["linear_1.bias"])
        weights |= {
            "linear_2.weight": torch.eye(hidden, dtype=torch.float32),
            "linear_2.bias": torch.zeros(hidden, dtype=torch.float32),
        }
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=image_token_id,  # pyright: ignore[reportCallIssue]  # passed on
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear" if linear else "gelu",
        image_seq_length=tower.config.side**2,
        tie_word_embeddings=True,
    )
    made: Any = transformers.LlavaForConditionalGeneration(config)
    made.model.language_model.load_state_dict(language.model.state_dict())
    made.model.vision_tower.load_state_dict(tower.state_dict())
    made.model.multi_modal_projector.load_state_dict(weights)
    made.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made.generation_config, name, getattr(language.config, name))
    return made.eval()


def processor(tokenizer: Any, vision: EfficientNetLiteConfig) -> Any:
    """What turns photographs and questions into tensors: Pillow resizes, the middle square is seen.

    Args:
        tokenizer: Of the language model.
        vision: How large pictures are, and how many image tokens they become.
    """
    tokenizer.image_token = IMAGE_TOKEN
    side = vision.image_size
    by_pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # so called since 5
    pictures = by_pillow(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=3,  # bicubic
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )


def language() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, float32, and its tokenizer; the 4-bit numbers of its file are multiplied out.

    Returns:
        A LlamaForCausalLM made anew, since transformers will not save one that it dequantised; and the tokenizer.

    Raises:
        ModelError: the package is missing, or holds another file.
    """
    file = located(LANGUAGE)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    facts = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts))
    made.load_state_dict(read.state_dict())
    made.config._name_or_path = ""
    return made.eval(), transformers.AutoTokenizer.from_pretrained(**source)


def tower(side: int = 9, window: int = 1) -> EfficientNetLite:
    """EfficientNet-Lite2 with its weights, float32.

    Args:
        side: Of the grid of features it gives.
        window: Over which each is averaged.

    Raises:
        ModelError: the package is missing, or holds another file.
    """
    net = EfficientNetLite(EfficientNetLiteConfig(side=side, window=window))
    net.load_state_dict(folded(tower_weights()))
    return net.eval().requires_grad_(False)


def tower_weights() -> dict[str, Tensor]:
    """The weights of EfficientNet-Lite2 as its package holds them, batch norm and classifier among them.

    The file is a pickle, of which tensors alone are read.

    Raises:
        ModelError: the package is missing, or holds another file.
    """
    return torch.load(located(EYES), weights_only=True)


def grid(path: Path) -> dict[str, int]:
    """The `side` and `window` of the grid that a projector was trained for, as its file says."""
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["plan"])
    return {"side": plan["side"], "window": plan["window"]}
