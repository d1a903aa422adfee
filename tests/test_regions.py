"""maths/regions.py: upsampling and masks worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmneurons.maths import regions

GRIDS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=5),
    elements=st.floats(-100, 100, width=32),
)


def test_patch_centres_lie_half_a_patch_in_and_edges_are_continued():
    # Two patches over four pixels: centres at 1 and 3, pixel centres at 0.5, 1.5, 2.5, 3.5.
    heat = regions.upsample([[0.0, 4.0]], (1, 4))
    assert heat.tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_rows_run_down_and_columns_across():
    heat = regions.upsample([[0.0, 4.0], [8.0, 12.0], [16.0, 20.0]], (6, 4))
    assert heat[:, 0].tolist() == [0.0, 2.0, 6.0, 10.0, 14.0, 16.0]
    assert heat[0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert heat[2, 1] == 6.0 + 1.0  # separable: down, then across
    assert heat.dtype == np.float32


def test_a_side_that_is_no_multiple_of_the_grid():
    # Two patches over three pixels: centres at 0.75 and 2.25, pixels at 0.5 1.5 2.5; the middle lies half-way.
    assert regions.upsample([[2.0, 6.0]], (1, 3)).tolist() == [[2.0, 4.0, 6.0]]


def test_the_same_size_gives_the_same_grid_and_a_smaller_one_samples_it():
    grid = [[1.0, -2.0], [3.0, 5.0]]
    assert regions.upsample(grid, (2, 2)).tolist() == grid
    assert regions.upsample(grid, (1, 1)).tolist() == [[1.75]]


@settings(max_examples=50, deadline=None)
@given(GRIDS, st.integers(1, 13), st.integers(1, 13))
def test_upsampling_stays_in_range(grid: np.ndarray, height: int, width: int):
    heat = regions.upsample(grid, (height, width))
    assert heat.shape == (height, width)
    assert grid.min() <= heat.min()
    assert heat.max() <= grid.max()


def test_a_constant_grid_gives_its_constant_and_no_mask():
    heat = regions.upsample(np.full((8, 8), 0.1, dtype=np.float32), (112, 112))
    assert set(heat.ravel().tolist()) == {float(np.float32(0.1))}
    assert not regions.mask(heat).any()


def test_the_mask_is_the_strongest_twentieth():
    heat = np.arange(100, dtype=np.float32)[::-1].reshape(10, 10)
    # 99 places from lowest to highest; 95 % of the way is place 94.05, so five values lie above the 95th lowest.
    assert np.argwhere(regions.mask(heat)).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert regions.mask(heat, 50.0).sum() == 50


def test_the_mask_agrees_with_numpys_percentile():
    heat = np.random.default_rng(0).normal(size=(112, 112)).astype(np.float32)
    assert (regions.mask(heat) == (heat > np.percentile(heat, 95))).all()


def test_strong_and_negative_is_weak():
    heat = np.zeros((10, 10), dtype=np.float32)
    heat[0, 0], heat[9, 9] = -50, 1
    assert np.argwhere(regions.mask(heat)).tolist() == [[9, 9]]


def test_a_broad_maximum_is_still_found():
    # One patch of four: its corner of the image, 6.25 %, ties at the maximum, and nothing lies above it.
    heat = regions.upsample([[1.0, 0.0], [0.0, 0.0]], (8, 8))
    assert np.argwhere(regions.mask(heat)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("grid", [[[3.0]], [[0.0, 0.0]]])
def test_a_map_that_says_nothing_masks_nothing(grid: list[list[float]]):
    assert not regions.mask(regions.upsample(grid, (5, 5))).any()


def test_colours_are_clear_at_zero_and_strongest_at_the_ends():
    table = regions.colours().astype(int)
    assert table.shape == (2 * regions.LEVELS + 1, 4)
    assert table[regions.LEVELS, 3] == 0
    assert (np.diff(table[regions.LEVELS :, 3]) >= 0).all()
    assert (table[:, 3] == table[::-1, 3]).all()
    assert table[-1, 0] > table[-1, 2], "warm above zero"
    assert table[0, 0] < table[0, 2], "cold below"


def test_overlay_takes_the_sign_from_the_map_and_the_strength_from_its_bound():
    heat = np.array([[-2.0, 0.0, 1.0, 2.0]], dtype=np.float32)
    first, zero, half, last = regions.overlay(heat)[0].tolist()
    table = regions.colours().tolist()
    assert (first, zero, last) == (table[0], table[regions.LEVELS], table[-1])
    assert half == table[regions.LEVELS + 64]  # 63.5 rounds up
    assert regions.overlay(heat, bound=1.0)[0, 3].tolist() == last, "beyond the bound stays at the strongest"


def test_overlay_of_nothing_is_clear():
    assert not regions.overlay(np.zeros((3, 2), dtype=np.float32))[..., 3].any()
