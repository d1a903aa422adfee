import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmneurons.maths.statistics import Estimate, auroc, estimate, over_pairs, ranks, ratio, share, share_of, spearman


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def interval(found: Estimate | None) -> tuple[float, float]:
    one = known(found)
    assert one.low is not None
    assert one.high is not None
    return one.low, one.high


def covers(found: Estimate | None, value: float) -> bool:
    low, high = interval(found)
    return low <= value <= high


small = arrays(np.float64, st.integers(2, 12), elements=st.integers(-4, 4).map(float))


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = [covers(estimate(random.normal(3, 2, 40)), 3) for _ in range(300)]
    assert 0.90 < np.mean(hits) < 0.985


def test_an_estimate_is_repeatable_and_knows_its_size():
    one = known(estimate([1.0, 2.0, 6.0]))
    assert one == estimate([1.0, 2.0, 6.0])
    assert (one.mean, one.n) == (3.0, 3)
    assert covers(one, 3)
    assert estimate([]) is None
    assert str(Estimate(0.5, 0.25, 0.75, 4)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.1 + 0.2, 0.3, 0.3], [2.0]])
def test_without_spread_there_is_no_interval(values):
    for one in (known(estimate(values)), known(share(values)), known(ratio(values, values))):
        assert (one.low, one.high) == (None, None)
    assert str(known(estimate(values))) == f"{values[0]:.3f}"


def test_none_of_25_is_no_certain_zero():
    """Wilson: z^2 / (n + z^2) with z = 1.96."""
    assert interval(share([False] * 25)) == pytest.approx((0, 0.1332), abs=1e-4)
    assert interval(share([True] * 25)) == pytest.approx((0.8668, 1), abs=1e-4)
    assert interval(share([1.0, 0.0, 0.0, 0.0])) == pytest.approx((0.0456, 0.6994), abs=1e-4)


def test_shares_that_are_no_plain_yes_or_no_are_means():
    assert share([0.0, 1.0, 0.25, 0.5]) == estimate([0.0, 1.0, 0.25, 0.5])


def test_a_skewed_mean_has_a_skewed_interval():
    """BCa reaches farther to the side of the tail than to the other."""
    values = np.random.default_rng(1).exponential(size=30)
    low, high = interval(estimate(values))
    assert high - values.mean() > 1.1 * (values.mean() - low)


def test_a_ratio_is_of_means_and_resamples_units_together():
    above, below = np.array([2.0, 21.0, 4.0, 9.0]), np.array([1.0, 10.0, 2.0, 5.0])
    one = known(ratio(above, below))
    assert one.mean == 2.0
    assert covers(one, 2)
    assert interval(one)[1] < 2.2, "apart, 9 and 1 would meet"
    assert ratio([1.0], [0.0]) is None


def test_no_absent_object_of_any_caption_is_no_certain_zero():
    none, all_of_them = share_of([0.0] * 20, [3.0] * 20), share_of([3.0] * 20, [3.0] * 20)
    assert interval(none) == interval(share([False] * 20))
    assert interval(all_of_them) == interval(share([True] * 20))
    assert share_of([1.0, 0.0, 2.0, 3.0], [3.0, 1.0, 2.0, 3.0]) == ratio([1.0, 0.0, 2.0, 3.0], [3.0, 1.0, 2.0, 3.0])
    assert share_of([0.0], [0.0]) is None


def test_pairs_by_hand():
    sums, counts = np.array([[9.0, 1, 2], [1, 9, 0], [2, 0, 9]]), np.array([[1.0, 1, 2], [1, 1, 0], [2, 0, 1]])
    one = known(over_pairs(sums, counts))
    assert (one.mean, one.n) == (1.0, 3), "3 over three pairs; a unit makes none with itself"
    assert over_pairs(np.ones((3, 3)), np.eye(3)) is None


def test_units_are_resampled_where_pairs_share_them():
    """Means of two units: the mean over all pairs is that over units, and so must be what is known of it."""
    random = np.random.default_rng(0)
    hits = widths = 0.0
    for _ in range(100):
        units = random.normal(size=30)
        found = over_pairs((units[:, None] + units) / 2, np.ones((30, 30)))
        low, high = interval(found)
        alone_low, alone_high = interval(estimate(units))
        hits += covers(found, 0) / 100
        widths += (high - low) / (alone_high - alone_low) / 100
    assert 0.86 < hits < 0.99
    assert widths == pytest.approx(1, abs=0.1)


def test_ranks_by_hand():
    assert ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist() == [0.5, 3.0, 0.5, 2.0]


@given(small)
def test_spearman_of_anything_with_itself_is_one(values):
    same, turned = spearman(values, values), spearman(values, -values)
    if np.ptp(values) == 0:
        assert same is None
    else:
        assert same == pytest.approx(1)
        assert turned == pytest.approx(-1)


def test_spearman_by_hand():
    # ranks 0 1 2 3 against 1 0 3 2: 1 - 6 * 4 / (4 * 15)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])) == pytest.approx(0.6)


@given(small, st.data())
def test_auroc_counts_pairs(scores, data):
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    pairs = [(p > q) + 0.5 * (p == q) for p in scores[positive] for q in scores[~positive]]
    found = auroc(scores, positive)
    assert found is None if not pairs else found == pytest.approx(np.mean(pairs))
