"""Find which patch of the picture each image token stands for, and show the picture as the model saw it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmneurons.vlm.age import age
from mmneurons.vlm.anatomy.structure import language_model, mixes_positions
from mmneurons.vlm.families import family_of

_SHAPES = ("image_grid_thw", "spatial_shapes")
"""Names of model inputs that hold the height and width of each picture, in patches, in their last two columns."""
_PLACES = "image_position_ids"
"""Name of the model input that holds column and row of each patch of each picture, -1 for padding (Gemma 4)."""
_MERGES = (1, 2, 3, 4)
"""Numbers of patches a side that models merge into one image token."""
_TOWERS = ("vision", "visual", "image_encoder", "vqmodel")
"""Words that occur in the path of a vision tower."""


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """A patch grid says where one picture lies in the language model's sequence, patch by patch."""

    positions: Int[Tensor, "patches"]
    """Positions of the picture's image tokens, row after row of patches."""
    rows: int
    columns: int


Grids = list[tuple[PatchGrid, ...]]
"""The grids of the pictures in each row of a batch."""


Views = list[tuple[Image.Image | None, ...]]
"""The pictures of each row of a batch as the model saw them; None where that cannot be told."""


def find_grids(model: PreTrainedModel, inputs: Mapping[str, Any], n_images: int) -> Grids | str:
    """Find the patch grids of a batch with `n_images` pictures a row, or say why there are none.

    A grid is given only where it is certain. Where a picture is cut into tiles, the tokens of the whole picture, which
    stands beside its tiles, are taken.

    Returns:
        For each row of the batch its grids, one per picture, or the reason why no map can be drawn.
    """
    if n_images == 0:
        return "there is no picture"
    # 1. Models in which nothing has to be searched: no position of the sequence is a patch, or the picture is a prefix.
    if model.config.get_text_config(decoder=True).is_encoder_decoder or model.config.is_encoder_decoder:
        return "the picture is read by the encoder; the decoder's sequence has no image tokens"
    ids = inputs.get("input_ids")
    image_token = getattr(model.config, "image_token_id", None)
    resampler = _resampler(model)
    if resampler is not None:
        return f"image tokens are queries of {resampler}, which have no place in the picture"
    if ids is None or image_token is None:
        return _prefix(model, inputs, n_images)
    # 2. Each row by itself: its image tokens, and where the inputs say nothing of shapes, the runs in which they stand.
    shapes = _shapes(model, inputs)
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


def model_views(
    model: PreTrainedModel, processor: Any, inputs: Mapping[str, Any], grids: Grids | str, counts: Sequence[int]
) -> Views:
    """Return the pictures of a batch as the model saw them, resized and cropped: what lies under their patch grids.

    Args:
        model: The model.
        processor: Its processor, which knows how pixels were normalised; or None.
        inputs: The batch.
        grids: What `find_grids` gave for it.
        counts: Number of pictures in each row.

    Returns:
        For each row its pictures: what lies under their grids. None where that is not in one block of pixels: packed
        pixels, or the whole picture next to its tiles, squashed. A grid then covers the picture as it was given.
    """
    unknown: Views = [(None,) * count for count in counts]
    image_processor = getattr(processor, "image_processor", None)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or mean is None or std is None:
        return unknown
    sizes = inputs.get("image_sizes") if pixels.ndim == 4 else None
    if pixels.ndim == 5 and pixels.shape[1] == 1:  # pictures that could have had tiles, but have none
        pixels = pixels[:, 0]
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        return unknown
    # The processor's normalisation is undone: the result has channels last, and 0 to 1 before the rounding.
    plain = (pixels.float().permute(0, 2, 3, 1).cpu().numpy() * np.array(std) + np.array(mean)) * 255
    views = [Image.fromarray(values.clip(0, 255).round().astype(np.uint8)) for values in plain]
    if isinstance(sizes, Tensor) and len(sizes) == len(views):  # what a batch is padded with is no part of a picture
        views = [view.crop((0, 0, width, height)) for view, (height, width) in zip(views, sizes.tolist(), strict=True)]
    blocks = _blocks(model, inputs, grids, len(views), counts)
    return [tuple(None if block is None else views[block] for block in row) for row in blocks]


def _blocks(
    model: PreTrainedModel, inputs: Mapping[str, Any], grids: Grids | str, n_blocks: int, counts: Sequence[int]
) -> list[tuple[int | None, ...]]:
    """Return the number of the block of pixels that each picture's grid belongs to; None where it cannot be told.

    Blocks, of pictures or of tiles, have as many tokens each, and stand in the order of their tokens.
    """
    if sum(counts) == n_blocks:  # a block for each picture, whatever their sizes
        numbers = iter(range(n_blocks))
        return [tuple(next(numbers) for _ in range(count)) for count in counts]
    image_token = getattr(model.config, "image_token_id", None)
    ids = inputs.get("input_ids")
    if isinstance(grids, str) or ids is None or image_token is None:
        return [(None,) * count for count in counts]
    # The number of a row's first image token among all of the batch, then of each grid's first token in its row.
    marked = (ids == image_token).cpu()
    each, rest = divmod(int(marked.sum()), n_blocks)
    found: list[tuple[int | None, ...]] = []
    before = 0
    for row, mine in zip(grids, marked, strict=True):
        places = [before + int(mine[: int(grid.positions[0])].sum()) for grid in row]
        fits = [
            rest == 0 and place % each == 0 and len(grid.positions) == each
            for place, grid in zip(places, row, strict=True)
        ]
        found.append(tuple(place // each if fit else None for place, fit in zip(places, fits, strict=True)))
        before += int(mine.sum())
    return found


_RESAMPLERS: WeakKeyDictionary[nn.Module, tuple[int, str | None]] = WeakKeyDictionary()
"""Of each model how old it was, and what was found then: its modules are many to look through for each batch."""


def _resampler(model: PreTrainedModel) -> str | None:
    """Return the path of what makes queries of patches; None where nothing does."""
    now = age(model)
    known_at, found = _RESAMPLERS.get(model, (-1, None))
    if known_at != now:
        found = _find_resampler(model)
        _RESAMPLERS[model] = now, found
    return found


def _find_resampler(model: PreTrainedModel) -> str | None:
    """Look for it between vision tower and language model, then in the tower."""
    language = {id(m) for m in language_model(model).modules()}
    for name, module in model.named_modules():
        between = name and id(module) not in language and not any(tower in name.lower() for tower in _TOWERS)
        if between and (mixes_positions(module) or isinstance(module, nn.MultiheadAttention)):
            return name
    # A vision tower that ends in queries of its own (mPLUG-Owl2's abstractor).
    for name, module in model.named_modules():
        own = [path for path, _ in module.named_parameters(recurse=False)]
        if any(tower in name.lower() for tower in _TOWERS) and any("query" in path for path in own):
            return name
    return None


def _prefix(model: PreTrainedModel, inputs: Mapping[str, Any], n_images: int) -> Grids | str:
    """Find the grids of a model that puts the picture's tokens before the text by itself, a class token first (GIT)."""
    crosses = any("cross" in name.lower() for name, _ in model.named_modules())
    side = _tower_side(model)
    if crosses or side is None or "pixel_values" not in inputs or n_images > 1:
        return "the language model's input has no image tokens"
    positions = torch.arange(1, side * side + 1)
    return [(PatchGrid(positions, side, side),)] * len(inputs["pixel_values"])


def _shapes(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Return (height, width) of each picture in patches, where the inputs say them."""
    for name in _SHAPES:
        if name in inputs:
            return [(h, w) for *_, h, w in inputs[name].tolist()]
    if _PLACES in inputs:
        ends = inputs[_PLACES].amax(1) + 1
        return [(h, w) for w, h in ends.tolist()]
    # Pictures of any size, padded to the largest of the batch (Pixtral); of tiles, sizes are those before the cutting.
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    patch = getattr(getattr(model.config, "vision_config", None), "patch_size", None)
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and isinstance(sizes, Tensor) and isinstance(patch, int):
        return [(h // patch, w // patch) for h, w in sizes.tolist()]
    return None


def _from_shapes(shapes: list[tuple[int, int]], places: Tensor) -> tuple[PatchGrid, ...] | str:
    """Split a row's image tokens by the shapes of its pictures; the merge is the one that makes the count right."""
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
    """Tell pictures, tiles and rows apart by the runs of image tokens and what stands between them."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(places.tolist())) if b != a + 1]
    runs = list(places.tensor_split(cuts))
    # Pictures with nothing between them are one run; all have as many tokens, or it cannot be told.
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
    """Find the grid of one picture; `sides` lists the possible sides of one tile in tokens, empty if that is open."""
    # Several runs: tiles with something between them, or rows of one picture, each with a line end behind it.
    lengths = {len(run) for run in runs}
    if len(runs) > 1:
        if len(lengths) == 1 and lengths <= {side * side for side in sides}:
            return _whole(model, runs)
        between = {int(ids[int(run[-1]) + 1]) for run in runs[:-1]}
        single = all(int(b[0]) - int(a[-1]) == 2 for a, b in pairwise(runs))
        if single and len(lengths) == 1 and len(between) == 1:  # rows of one picture, with the same token after each
            return PatchGrid(torch.cat(runs), len(runs), len(runs[0]))
        return f"{len(runs)} runs of image tokens are neither tiles nor rows of one picture"
    # One run: a square picture; the same behind a class token; or tiles with nothing between them.
    run = runs[0]
    root = math.isqrt(len(run))
    if root * root == len(run) and (not sides or root in sides):
        return _square(run)
    if any(len(run) == side * side + 1 for side in sides):  # a class token stands first
        return _square(run[1:])
    tile = next((side * side for side in sides if len(run) > side * side), 0)
    if tile and family_of(model.config).whole == "first":  # behind the whole, tiles may have line ends among them
        return _square(run[:tile])
    tile = next((side * side for side in sides if len(run) % (side * side) == 0), 0)
    if tile:
        return _whole(model, list(run.split(tile)))
    known = f"{sides[0]} x {sides[0]} patches of the vision tower, merged or not" if sides else "patches of a square"
    return f"{len(run)} image tokens are not the {known}"


def _whole(model: PreTrainedModel, tiles: list[Tensor]) -> PatchGrid | str:
    """Return the grid of the whole picture that stands beside its tiles, if it is known which of them that is."""
    place = family_of(model.config).whole
    if place is None:
        return f"the picture is cut into {len(tiles)} tiles, and which is the whole of it is not known for this model"
    return _square(tiles[0 if place == "first" else -1])


def _square(run: Tensor) -> PatchGrid:
    """Return the grid of a square picture."""
    side = math.isqrt(len(run))
    return PatchGrid(run, side, side)


def _tile_sides(model: PreTrainedModel, inputs: Mapping[str, Any], marked: Tensor) -> list[int]:
    """List the sides that one tile can have in tokens: the tower's merged; just one where tiles can be counted."""
    side, pixels = _tower_side(model), inputs.get("pixel_values")
    sides = [side // merge for merge in _MERGES if side % merge == 0 and side > merge] if side else []
    # Pixels as (tiles, channels, height, width): all image tokens, shared out among the tiles, must make squares.
    if isinstance(pixels, Tensor) and pixels.ndim == 4:
        tile = math.isqrt(int(marked.sum()) // len(pixels))
        if tile * tile * len(pixels) == int(marked.sum()) and (not sides or tile in sides):
            return [tile]
    return sides


def _tower_side(model: PreTrainedModel) -> int | None:
    """Return the patches along one side of what the vision tower sees, or None where it takes any size."""
    vision = getattr(model.config, "vision_config", None)
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    image_size, patch_size = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        return None
    return image_size // patch_size
