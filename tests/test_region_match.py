import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmneurons.errors import ImageError
from mmneurons.metrics.regions import _cover, match

LEFT = np.zeros((8, 8), dtype=bool)
LEFT[:, :4] = True


def test_a_map_of_the_object_itself_is_right_in_every_way():
    found = match([[1.0, 0.0]], LEFT)
    assert (found.iou_equal_area, found.pointing, found.auroc, found.area) == (1, 1, 1, 0.5)
    turned = match([[0.0, 1.0]], LEFT)
    assert (turned.iou_equal_area, turned.pointing, turned.auroc) == (0, 0, 0)


def test_a_constant_map_is_chance():
    found = match([[2.0, 2.0], [2.0, 2.0]], LEFT)
    assert (found.pointing, found.auroc) == (0.5, 0.5)
    assert found.iou == 0, "a constant map has no strongest pixels"


def test_iou_by_hand():
    grid = np.zeros((8, 8))
    grid[0, 0], grid[0, 7] = 3, 2  # 5 % of 64 pixels: three, and the third ties with all others
    found = match(grid, LEFT)
    assert found.iou == pytest.approx(1 / 33), "two pixels, one of them among the 32 of the mask"


def test_signed_maps_are_weak_where_they_are_negative():
    assert match([[0.5, -9.0]], LEFT).pointing == 1


@given(arrays(bool, (12, 7)), st.integers(1, 5), st.integers(1, 5))
def test_cover_shares_out_the_mask(mask, rows, columns):
    cover = _cover(mask, (rows, columns))
    assert cover.mean() == pytest.approx(mask.mean())
    assert ((cover >= -1e-9) & (cover <= 1 + 1e-9)).all()


@pytest.mark.parametrize("value", [True, False])
def test_a_mask_without_an_edge_is_refused(value):
    with pytest.raises(ImageError):
        match([[1.0, 0.0]], np.full((8, 8), value))
