"""Image tokens told apart by hand-made rows of token ids: tiles, rows, several pictures. Grids of whole families, with
the pixels behind each token, are tested in tests/test_families.py."""

import pytest
import torch
from kits.zoo import FAMILIES

from mmneurons.vlm.grid import PatchGrid, find_grids

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
