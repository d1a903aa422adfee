"""EfficientNet-Lite2 as a vision tower of transformers: photographs in, a square grid of features out.

The network is the one of Google's EfficientNet-Lite (Apache-2.0): inverted bottlenecks without squeeze-and-excitation,
ReLU6 throughout. It is written here without batch norm, which `folded` multiplies into the convolutions before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

STEM = 32
"""Channels behind the first convolution, which halves the picture."""
BLOCKS = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)
"""Stages of Lite2: repeats, kernel, stride of the first, factor of expansion, channels out."""
BATCH_NORM_EPSILON = 1e-3


class EfficientNetLiteConfig(PretrainedConfig):
    """What `EfficientNetLite` is built from.

    Args:
        hidden_size: Channels of a feature.
        image_size: Side of the square pictures it is given, in pixels.
        side: Side of the grid of features it gives: 9 is the network's own, smaller ones are averages.
        window: Odd; above 1, each feature is the average of so many by so many around it.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self, hidden_size: int = 1280, image_size: int = 260, side: int = 9, window: int = 1, **options: Any
    ) -> None:
        super().__init__(**options)
        self.hidden_size, self.image_size, self.side, self.window = hidden_size, image_size, side, window
        self.patch_size = image_size // side
        """What transformers counts image tokens by: as many patches a side as the grid has features."""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: the output is the input's side over the stride, rounded up."""

    def forward(self, input: Float[Tensor, "batch before high wide"]) -> Float[Tensor, "batch after higher wider"]:
        """Pad by what is missing, an odd pixel at the right and the bottom."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in input.shape[-2:])
        if high % 2 or wide % 2:  # a padded copy costs as much as the convolution itself
            input = F.pad(input, (0, wide % 2, 0, high % 2))
        return F.conv2d(input, self.weight, self.bias, stride, (high // 2, wide // 2), 1, self.groups)


class Bottleneck(nn.Module):
    """Widen, look around in each channel, narrow; added to the input where the shapes agree."""

    def __init__(self, before: int, kernel: int, stride: int, factor: int, after: int) -> None:
        super().__init__()
        inner = before * factor
        self.expand = SameConv(before, inner, 1) if factor != 1 else nn.Identity()
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, after, 1)
        self.adds = stride == 1 and before == after

    def forward(self, x: Float[Tensor, "batch before high wide"]) -> Float[Tensor, "batch after higher wider"]:
        """One block."""
        inner = x if isinstance(self.expand, nn.Identity) else F.relu6(self.expand(x), inplace=True)
        made = self.project(F.relu6(self.depthwise(inner), inplace=True))
        return made + x if self.adds else made


class EfficientNetLite(PreTrainedModel):
    """EfficientNet-Lite2 without its classifier and without batch norm."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet_lite"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(3, STEM, 3, 2)
        blocks, before = [], STEM
        for repeats, kernel, stride, factor, after in BLOCKS:
            for i in range(repeats):
                blocks.append(Bottleneck(before, kernel, stride if i == 0 else 1, factor, after))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(before, config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as torch draws them."""

    def forward(self, pixel_values: Float[Tensor, "batch 3 high wide"], **options: Any) -> BaseModelOutputWithPooling:
        """Read pictures.

        Args:
            pixel_values: Channels red, green, blue, each (value - 127) / 128 of 0 to 255.
            options: What callers ask of towers in general; of no use here.

        Returns:
            `last_hidden_state`: (batch, side * side, hidden_size), row by row; `hidden_states` holds it alone.
        """
        x = F.relu6(self.stem(pixel_values), inplace=True)
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.head(x), inplace=True)
        features = pooled(x, self.config.side, self.config.window).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,  # pyright: ignore[reportArgumentType]  # declared for one class of tensors
            pooler_output=features.mean(1),  # pyright: ignore[reportArgumentType]
            hidden_states=(features,),  # pyright: ignore[reportArgumentType]
        )


def pooled(
    x: Float[Tensor, "batch channels high wide"], side: int, window: int
) -> Float[Tensor, "batch channels side side"]:
    """A grid averaged around each place, then to a smaller one.

    Args:
        x: The grid.
        side: What is left of it.
        window: Over how many places each is averaged, in both directions; 1 for itself alone. At the edges fewer.
    """
    if window > 1:
        x = F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
    return x if x.shape[-1] == side else F.adaptive_avg_pool2d(x, side)


def folded(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `EfficientNetLite` from those of the package, batch norm multiplied into the convolutions.

    Args:
        stored: By the names of efficientnet_lite_pytorch: `_conv_stem.weight`, `_bn0.running_mean` ...

    Returns:
        By the names of `EfficientNetLite`. The classifier (`_fc`) is left out.

    Raises:
        KeyError: if a weight is missing.
    """
    made: dict[str, Tensor] = {}

    def take(name: str, convolution: str, norm: str) -> None:
        scale = stored[f"{norm}.weight"] / torch.sqrt(stored[f"{norm}.running_var"] + BATCH_NORM_EPSILON)
        made[f"{name}.weight"] = stored[f"{convolution}.weight"] * scale[:, None, None, None]
        made[f"{name}.bias"] = stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale

    take("stem", "_conv_stem", "_bn0")
    for i in range(sum(repeats for repeats, *_ in BLOCKS)):
        if f"_blocks.{i}._expand_conv.weight" in stored:  # the first block does not widen
            take(f"blocks.{i}.expand", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        take(f"blocks.{i}.depthwise", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        take(f"blocks.{i}.project", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    take("head", "_conv_head", "_bn1")
    return made


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)
