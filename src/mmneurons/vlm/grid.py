"""Which image patch each image token stands for, and the picture as the model saw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Where the image is in the sequence."""

    positions: Int[Tensor, "batch patches"]
    """Positions of the image tokens, patches in reading order."""
    rows: int
    columns: int


def find_grid(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> PatchGrid | str:
    """The patch grid of a batch with one image a row, or the reason why there is none.

    Only what can be told for certain: as many image tokens as the vision tower has patches, which keep its order.
    """
    image_token = getattr(model.config, "image_token_id", None)
    if image_token is None:
        return "this model has no image tokens in its language model's input"
    marked = inputs["input_ids"] == image_token
    counts = marked.sum(1)
    n_tokens = int(counts[0])
    if n_tokens == 0 or bool((counts != n_tokens).any()):
        return f"the images take different numbers of tokens ({', '.join(map(str, counts.tolist()))})"
    vision = getattr(model.config, "vision_config", None)
    image_size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        return "the vision tower does not say its image and patch size"
    side = image_size // patch_size
    if side * side != n_tokens:
        return f"{n_tokens} image tokens are not the {side} x {side} patches of the vision tower"
    return PatchGrid(torch.nonzero(marked)[:, 1].view(len(marked), n_tokens), side, side)


def model_view(processor: Any, inputs: Mapping[str, Tensor], row: int) -> Image.Image | None:
    """The picture as the model saw it: resized and cropped, normalisation undone; None where pixels are packed."""
    pixels = inputs.get("pixel_values")
    image_processor = getattr(processor, "image_processor", None)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3 or mean is None or std is None:
        return None
    values = pixels[row].float().permute(1, 2, 0).cpu().numpy() * np.array(std) + np.array(mean)
    return Image.fromarray((values * 255).clip(0, 255).round().astype(np.uint8))
