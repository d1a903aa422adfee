"""Image tokens told apart by hand-made rows of token ids: tiles, rows, several pictures. Grids of whole families, with
the pixels behind each token, are tested in tests/test_families.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kits.library import hf
from kits.processor_zoo import processor
from kits.zoo import FAMILIES
from PIL import Image, ImageDraw

from mmneurons.vlm.grid import PatchGrid, find_grids, model_views
from mmneurons.vlm.prompts import encode_prompt

MODELS = {family.name: family for family in FAMILIES}
WORD, TAG, IMAGE = 30, 5, 2


def ids_of(model, *parts):
    """One row of ids: an int is so many image tokens in a run, a list is other tokens."""
    row = [t for part in parts for t in (part if isinstance(part, list) else [model.config.image_token_id] * part)]
    return torch.tensor([row])


def grids_of(name, *parts, n_images=1, tiles=None):
    model = MODELS[name].build()
    inputs = {"input_ids": ids_of(model, *parts)}
    if tiles is not None:
        inputs["pixel_values"] = torch.zeros(tiles, 3, 2, 2)
    return find_grids(model, inputs, n_images)


def places(grids) -> list[tuple[int, int, int]]:
    """First position, rows, columns of each picture of the only row."""
    assert not isinstance(grids, str), grids
    assert all(isinstance(grid, PatchGrid) and len(grid.positions) == grid.rows * grid.columns for grid in grids[0])
    return [(int(grid.positions[0]), grid.rows, grid.columns) for grid in grids[0]]


def test_several_pictures_in_one_prompt_in_runs_of_their_own_or_in_one():
    apart = grids_of("llava", [1], 16, [WORD], 16, [WORD], n_images=2)
    assert places(apart) == [(1, 4, 4), (18, 4, 4)]
    assert places(grids_of("llava", [1], 32, [WORD], n_images=2, tiles=2)) == [(1, 4, 4), (17, 4, 4)]


@pytest.mark.parametrize(
    ("name", "between", "first"),
    [
        ("idefics3", [TAG, TAG + 1], False),
        ("llama4", [TAG], False),
        ("ovis2", [TAG], True),
        ("gemma3", [TAG, WORD], True),
    ],
)
def test_of_tiles_the_whole_picture_is_taken_where_the_family_puts_it(name, between, first):
    grids = grids_of(name, [1], 16, between, 16, between, 16, [WORD])
    assert places(grids) == [(1 if first else 1 + 2 * (16 + len(between)), 4, 4)]


def test_tiles_in_one_run_are_counted_by_their_pixels_not_by_what_looks_square():
    # Four tiles of 4 x 4 are 64 tokens: a square of 8 x 8 as well.
    assert places(grids_of("internvl", [1], 64, [WORD], tiles=4)) == [(1 + 48, 4, 4)]


def test_tiles_of_a_family_that_nothing_is_known_of_get_no_map():
    assert "which is the whole of it is not known" in grids_of("llava", [1], 16, [TAG], 16, [WORD])


def test_rows_are_told_by_the_token_that_ends_each():
    assert places(grids_of("mistral3", [1], 6, [TAG], 6, [TAG], 6, [TAG + 1, WORD])) == [(1, 3, 6)]
    assert isinstance(grids_of("mistral3", [1], 6, [TAG], 5, [TAG], 6, [WORD]), str)
    assert isinstance(grids_of("mistral3", [1], 6, [TAG], 6, [TAG + 1], 6, [WORD]), str)


def test_what_cannot_be_told_gives_a_reason():
    assert "15 image tokens are not the" in grids_of("llava", [1], 15, [WORD])
    assert "cannot be told apart as 2 pictures" in grids_of("llava", [1], 15, [WORD], n_images=2)
    assert "there is no picture" in grids_of("llava", [1, WORD], n_images=0)
    assert "queries of" in grids_of("idefics2", [1], 6, [WORD])


PLACES = ((0.25, 0.75), (0.75, 0.25))
"""Where in each picture, from its left upper corner, a green square lies; each has a shade of its own."""
SHAPES = ((180, 90), (60, 150))


def lit(number: int, shape: tuple[int, int]) -> Image.Image:
    """A grey picture with a green square."""
    (width, height), (x, y) = shape, PLACES[number]
    picture = Image.new("RGB", shape, (60 + 120 * number, 0, 60))
    box = [(x - 0.2) * width, (y - 0.2) * height, (x + 0.2) * width, (y + 0.2) * height]
    ImageDraw.Draw(picture).rectangle(box, fill=(0, 255, 60))
    return picture


def told(view: Image.Image) -> tuple[float, float, int]:
    """The middle of the green square in a view, as shares of its width and height, and the shade around it."""
    pixels = np.asarray(view).astype(int)
    rows, columns = np.nonzero(pixels[..., 1] > 128)
    height, width = pixels.shape[:2]
    return (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height, int(np.median(pixels[..., 0]))


def views_of(name: str, rows: list[list[Image.Image]], **options) -> list[tuple[Image.Image | None, ...]]:
    """What lies under the maps of a batch, by the family's own processor."""
    found, model = processor(name), MODELS[name].build()
    before = {option: getattr(found.image_processor, option) for option in options}
    for option, value in options.items():
        setattr(found.image_processor, option, value)
    # The model is asked for nothing but its config, and whether anything stands between its tower and its language.
    image_token_id = getattr(found.tokenizer, "image_token_id", None) or found.image_token_id
    model.config.image_token_id = image_token_id
    vision = model.config.vision_config
    if name == "mistral3":
        vision.image_size, vision.patch_size = 32, 4
    elif hasattr(vision, "image_size"):
        vision.image_size, vision.patch_size = ([28, 28], [7, 7]) if name == "internvl" else (28, 7)
    inputs = encode_prompt(found, rows, "a dog", image_token_id=image_token_id)
    for option, value in before.items():  # all tests share the processor
        setattr(found.image_processor, option, value)
    grids = find_grids(model, inputs, len(rows[0]))
    assert not isinstance(grids, str), grids
    return model_views(model, found, inputs, grids, [len(row) for row in rows])


TILED = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
SCANNED = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 8,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("internvl", TILED),
        ("internvl", {}),
        ("mistral3", {}),
        ("gemma3", {}),
        ("gemma3", SCANNED),
        ("qwen2_vl", {}),
        ("llava_next", {}),
    ],
    ids=["internvl-tiles", "internvl", "mistral3", "gemma3", "gemma3-scanned", "qwen2_vl", "llava_next"],
)
@pytest.mark.parametrize("in_one_prompt", [False, True], ids=["batch", "prompt"])
def test_under_a_map_lies_its_own_picture_whole_and_without_padding(name, options, in_one_prompt):
    pictures = [lit(0, SHAPES[0]), lit(1, SHAPES[1])]
    views = views_of(name, [pictures] if in_one_prompt else [[picture] for picture in pictures], **options)
    assert [len(row) for row in views] == ([2] if in_one_prompt else [1, 1])
    for number, view in enumerate(view for row in views for view in row):
        if view is None:  # the map is of the picture as given
            assert name in ("qwen2_vl", "llava_next")
            continue
        x, y, shade = told(view)
        assert (x, y) == pytest.approx(PLACES[number], abs=0.06)
        assert shade == pytest.approx(60 + 120 * number, abs=8)


def test_several_pictures_of_onevision_are_padded_to_squares_and_so_are_their_views():
    [views] = views_of("llava_onevision", [[lit(0, SHAPES[0]), lit(1, SHAPES[1])]])
    assert [view is not None and view.size for view in views] == [(28, 28), (28, 28)]
    assert views[1] is not None
    x, y, _ = told(views[1])  # 60 x 150: what is 0.75 of its width is 0.6 of the square's
    assert (x, y) == pytest.approx((0.6, 0.25), abs=0.06)


def test_a_tile_is_not_shown_where_nothing_tells_whose_it_is():
    inputs = {"pixel_values": torch.zeros(3, 3, 2, 2), "input_ids": torch.tensor([[1, 2]])}
    found = SimpleNamespace(image_processor=hf.CLIPImageProcessorPil())
    assert model_views(MODELS["llava"].build(), found, inputs, "no map", [1]) == [(None,)]
    assert model_views(MODELS["llava"].build(), None, inputs, "no map", [2]) == [(None, None)]
