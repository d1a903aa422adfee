import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmneurons.maths.statistics import Estimate, auroc, estimate, ranks, ratio, spearman


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


small = arrays(np.float64, st.integers(2, 12), elements=st.integers(-4, 4).map(float))


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = [one.low <= 3 <= one.high for one in (known(estimate(random.normal(3, 2, 40))) for _ in range(300))]
    assert 0.90 < np.mean(hits) < 0.985


def test_an_estimate_is_repeatable_and_knows_its_size():
    one = known(estimate([1.0, 2.0, 6.0]))
    assert one == estimate([1.0, 2.0, 6.0])
    assert (one.mean, one.n) == (3.0, 3)
    assert one.low < 3 < one.high
    assert estimate([]) is None
    assert str(estimate([0.5, 0.5])) == "0.500 [0.500, 0.500]"


def test_a_ratio_is_of_means_and_resamples_units_together():
    above, below = np.array([2.0, 20.0, 4.0]), np.array([1.0, 10.0, 2.0])
    one = known(ratio(above, below))
    assert (one.mean, one.low, one.high) == (2.0, 2.0, 2.0), "each unit has the ratio 2: so has every sample"
    assert ratio([1.0], [0.0]) is None


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
