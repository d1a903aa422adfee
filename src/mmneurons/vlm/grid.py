"""Which image patch each image token stands for, and the picture as the model saw it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmneurons.vlm.anatomy.structure import language_model, mixes_positions
from mmneurons.vlm.families import family_of

_SHAPES = ("image_grid_thw", "spatial_shapes")
"""Model inputs that hold the height and width, in patches, of each picture in their last two columns."""
_PLACES = "image_position_ids"
"""Model input that holds column and row of each patch of each picture, -1 for padding (Gemma 4)."""
_MERGES = (1, 2, 3, 4)
"""How many patches a side are merged into one image token."""
_TOWERS = ("vision", "visual", "image_encoder", "vqmodel")
"""How the path of a vision tower is called."""


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Where one picture is in the language model's sequence."""

    positions: Int[Tensor, "patches"]
    """Positions of its image tokens, patches in reading order."""
    rows: int
    columns: int


Grids = list[tuple[PatchGrid, ...]]
"""For each row of a batch, its pictures."""


def find_grids(model: PreTrainedModel, inputs: Mapping[str, Any], n_images: int) -> Grids | str:
    """The patch grids of a batch with `n_images` pictures a row, or the reason why there are none.

    Only what can be told for certain. Where a picture is cut into tiles, the tokens of the whole picture, which stands
    beside its tiles, are taken.
    """
    if n_images == 0:
        return "there is no picture"
    if model.config.get_text_config(decoder=True).is_encoder_decoder or model.config.is_encoder_decoder:
        return "the picture is read by the encoder; the decoder's sequence has no image tokens"
    ids = inputs.get("input_ids")
    image_token = getattr(model.config, "image_token_id", None)
    resampler = _resampler(model)
    if resampler is not None:
        return f"image tokens are queries of {resampler}, which have no place in the picture"
    if ids is None or image_token is None:
        return _prefix(model, inputs, n_images)
    shapes = _shapes(inputs)
    made: Grids = []
    for row, marked in enumerate(ids == image_token):
        places = torch.nonzero(marked).squeeze(1)
        if len(places) <= n_images:
            return "the picture enters by cross-attention, not as image tokens"
        if shapes is None:
            grids = _from_runs(model, ids[row], places, n_images, _tile_sides(model, inputs, ids == image_token))
        else:
            grids = _from_shapes(shapes[row * n_images : (row + 1) * n_images], places)
        if isinstance(grids, str):
            return grids
        made.append(grids)
    return made


def model_view(processor: Any, inputs: Mapping[str, Any], i: int) -> Image.Image | None:
    """Picture i of a batch as the model saw it: resized, cropped, normalisation undone; None if pixels are packed."""
    pixels = inputs.get("pixel_values")
    image_processor = getattr(processor, "image_processor", None)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if pixels is None or pixels.ndim != 4 or pixels.shape[1] != 3 or i >= len(pixels) or mean is None or std is None:
        return None
    values = pixels[i].float().permute(1, 2, 0).cpu().numpy() * np.array(std) + np.array(mean)
    return Image.fromarray((values * 255).clip(0, 255).round().astype(np.uint8))


def _resampler(model: PreTrainedModel) -> str | None:
    """The path of an attention between vision tower and language model: what it gives are queries, not patches."""
    language = {id(m) for m in language_model(model).modules()}
    for name, module in model.named_modules():
        between = name and id(module) not in language and not any(tower in name.lower() for tower in _TOWERS)
        if between and (mixes_positions(module) or isinstance(module, nn.MultiheadAttention)):
            return name
    return None


def _prefix(model: PreTrainedModel, inputs: Mapping[str, Any], n_images: int) -> Grids | str:
    """GIT: the tokens of the picture stand before the text, inside the model; a class token is the first."""
    crosses = any("cross" in name.lower() for name, _ in model.named_modules())
    side = _tower_side(model)
    if crosses or side is None or "pixel_values" not in inputs or n_images > 1:
        return "the language model's input has no image tokens"
    positions = torch.arange(1, side * side + 1)
    return [(PatchGrid(positions, side, side),)] * len(inputs["pixel_values"])


def _shapes(inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Height and width of each picture in patches, where the inputs say them."""
    for name in _SHAPES:
        if name in inputs:
            return [(h, w) for *_, h, w in inputs[name].tolist()]
    if _PLACES in inputs:
        ends = inputs[_PLACES].amax(1) + 1
        return [(h, w) for w, h in ends.tolist()]
    return None


def _from_shapes(shapes: list[tuple[int, int]], places: Tensor) -> tuple[PatchGrid, ...] | str:
    for merge in _MERGES:
        grids = [(h // merge, w // merge) for h, w in shapes]
        if sum(h * w for h, w in grids) == len(places):
            parts = places.split([h * w for h, w in grids])
            return tuple(PatchGrid(part, h, w) for part, (h, w) in zip(parts, grids, strict=True))
    return f"{len(places)} image tokens are not the merged patches of pictures of {shapes} patches"


def _from_runs(
    model: PreTrainedModel,
    ids: Int[Tensor, "positions"],
    places: Int[Tensor, "tokens"],
    n_images: int,
    sides: list[int],
) -> tuple[PatchGrid, ...] | str:
    """Tell pictures, tiles and rows by the runs of image tokens and what stands between them."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(places.tolist())) if b != a + 1]
    runs = list(places.tensor_split(cuts))
    if len(runs) == 1 and n_images > 1 and len(places) % n_images == 0:
        runs = list(places.chunk(n_images))
    if len(runs) % n_images:
        return f"{len(runs)} runs of image tokens cannot be told apart as {n_images} pictures"
    each = len(runs) // n_images
    grids = [_one_picture(model, ids, runs[i * each : (i + 1) * each], sides) for i in range(n_images)]
    reasons = [grid for grid in grids if isinstance(grid, str)]
    return reasons[0] if reasons else tuple(grid for grid in grids if isinstance(grid, PatchGrid))


def _one_picture(
    model: PreTrainedModel, ids: Int[Tensor, "positions"], runs: list[Tensor], sides: list[int]
) -> PatchGrid | str:
    """The grid of one picture; `sides` are the sides that the tokens of one tile can have, none if that is open."""
    lengths = {len(run) for run in runs}
    if len(runs) > 1:
        if len(lengths) == 1 and lengths <= {side * side for side in sides}:
            return _whole(model, runs)
        between = {int(ids[int(run[-1]) + 1]) for run in runs[:-1]}
        single = all(int(b[0]) - int(a[-1]) == 2 for a, b in pairwise(runs))
        if single and len(lengths) == 1 and len(between) == 1:  # rows, the same token after each
            return PatchGrid(torch.cat(runs), len(runs), len(runs[0]))
        return f"{len(runs)} runs of image tokens are neither tiles nor rows of one picture"
    run = runs[0]
    root = math.isqrt(len(run))
    if root * root == len(run) and (not sides or root in sides):
        return _square(run)
    if any(len(run) == side * side + 1 for side in sides):  # a class token first
        return _square(run[1:])
    tile = next((side * side for side in sides if len(run) > side * side), 0)
    if tile and family_of(model.config).whole == "first":  # what follows may have line ends
        return _square(run[:tile])
    tile = next((side * side for side in sides if len(run) % (side * side) == 0), 0)
    if tile:
        return _whole(model, list(run.split(tile)))
    known = f"{sides[0]} x {sides[0]} patches of the vision tower, merged or not" if sides else "patches of a square"
    return f"{len(run)} image tokens are not the {known}"


def _whole(model: PreTrainedModel, tiles: list[Tensor]) -> PatchGrid | str:
    """Of a picture cut into tiles, the grid of the whole picture that stands beside them."""
    place = family_of(model.config).whole
    if place is None:
        return f"the picture is cut into {len(tiles)} tiles, and which is the whole of it is not known for this model"
    return _square(tiles[0 if place == "first" else -1])


def _square(run: Tensor) -> PatchGrid:
    side = math.isqrt(len(run))
    return PatchGrid(run, side, side)


def _tile_sides(model: PreTrainedModel, inputs: Mapping[str, Any], marked: Tensor) -> list[int]:
    """Sides that the tokens of one tile can have: the tower's patches, merged; one, where the tiles can be counted."""
    side, pixels = _tower_side(model), inputs.get("pixel_values")
    sides = [side // merge for merge in _MERGES if side % merge == 0 and side > merge] if side else []
    if isinstance(pixels, Tensor) and pixels.ndim == 4:
        tile = math.isqrt(int(marked.sum()) // len(pixels))
        if tile * tile * len(pixels) == int(marked.sum()) and (not sides or tile in sides):
            return [tile]
    return sides


def _tower_side(model: PreTrainedModel) -> int | None:
    """Patches along one side of what the vision tower sees; None where it takes any size."""
    vision = getattr(model.config, "vision_config", None)
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    image_size, patch_size = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        return None
    return image_size // patch_size
