import numpy as np
import pytest

import mmneurons as mmn
from mmneurons.data.dataset import Item
from mmneurons.errors import SettingError
from mmneurons.inspection.specificity import NounScores, noun_scores, specificity


def scores(*high, n=200):
    """Neurons that score 1, the rest falls off slowly below 0."""
    values = -np.arange(n, dtype=np.float32)
    values[list(high)] = 1.0
    return values


DOG, CAT = range(10), range(5, 15)
FOUND = [
    NounScores("a", "dog", scores(*DOG), 1),
    NounScores("b", "dog", scores(*DOG), 1),
    NounScores("b", "cat", scores(*CAT), 4),
]
LAYER_OF = [0] * 100 + [1] * 100


def test_overlaps_by_hand():
    told = specificity(FOUND, LAYER_OF)
    assert (told.concepts, told.counts) == (("cat", "dog"), (1, 2))
    ten = told.overlaps[0]
    assert (ten.k, ten.chance) == (10, 0.05)
    means = [None if one is None else one.mean for one in (ten.within, ten.between, ten.concepts)]
    assert means == [1, 0.5, 0.5]
    assert told.matrix.tolist() == [[1, 0.5], [0.5, 1]]


def test_pairs_are_of_two_images_and_their_intervals_of_images():
    """Two nouns of one image are no pair of images; 40 images of a noun are 40 units, not 780 pairs."""
    alone = specificity([NounScores("a", "dog", scores(*DOG), 1), NounScores("a", "cat", scores(*CAT), 4)], LAYER_OF)
    assert alone.overlaps[0].between is None
    chance = np.random.default_rng(0)
    dogs = [scores(*chance.choice(30, 10, replace=False)) for _ in range(40)]
    found = [NounScores(str(i), "dog", one, 1) for i, one in enumerate(dogs)]
    within = specificity(found, LAYER_OF).overlaps[0].within
    tops = [set(np.flatnonzero(one == 1)) for one in dogs]
    shares = [len(a & b) / 10 for i, a in enumerate(tops) for b in tops[:i]]
    assert within is not None
    assert within.low is not None
    assert within.high is not None
    assert (within.mean, within.n) == (pytest.approx(np.mean(shares)), 40)
    naive = 2 * 1.96 * np.std(shares) / len(shares) ** 0.5
    assert within.high - within.low > 1.2 * naive


def test_alike_are_different_nouns_as_frequent_and_at_the_same_place_by_hand():
    """Dog and cat share 5 of 10; dog and bus 2, at another place; dog and sea all, but the sea is said of four."""
    bus, sea = scores(*range(8, 18)), [NounScores(f"s{i}", "sea", scores(*DOG), 1) for i in range(4)]
    found = [
        NounScores("a", "dog", scores(*DOG), 1),
        NounScores("b", "cat", scores(*CAT), 1),
        NounScores("c", "bus", bus, 2),
        *sea,
    ]
    ten = specificity(found, LAYER_OF).overlaps[0]
    assert ten.alike is not None
    assert (ten.alike.mean, ten.alike.n) == (pytest.approx(0.5), 2)
    assert ten.between is not None
    # Pairs: dog-cat 5, dog-bus 2, cat-bus 7, and each of four seas with the dog 10, the cat 5, the bus 2.
    assert ten.between.mean == pytest.approx((5 + 2 + 7 + 4 * (10 + 5 + 2)) / 150)
    twice = [*found, NounScores("d", "dog", scores(*DOG), 1), NounScores("d", "cat", scores(*CAT), 5)]
    again = specificity(twice, LAYER_OF).overlaps[0].alike
    assert again is not None
    assert (again.mean, again.n) == (pytest.approx(0.5), 3), "two dogs are one noun, no pair of different ones"
    apart = specificity([found[0], found[2]], LAYER_OF).overlaps[0]
    assert (apart.alike, apart.between is None) == (None, False)


def test_own_share_by_hand():
    """Half of each noun's neurons give as much to the other, half nothing (below zero)."""
    told = specificity(FOUND, LAYER_OF)
    assert told.own_shares == (0.75, 0.75)


def test_own_shares_stand_in_the_places_of_their_concepts():
    """Of the ape's top neurons none gives anything to any noun: it has no share, and takes no other's place."""
    ape = np.full(200, -1, dtype=np.float32)
    ape[190:] = 0
    told = specificity([NounScores("c", "ape", ape, 1), *FOUND], LAYER_OF)
    assert dict(zip(told.concepts, told.own_shares, strict=True)) == {"ape": None, "cat": 0.75, "dog": 0.75}
    assert told.own_share is not None
    assert told.own_share.n == 2


def test_layers_count_where_the_top_neurons_are():
    assert specificity(FOUND, LAYER_OF).layers[10].tolist() == [1, 0]
    assert specificity(FOUND, [i % 2 for i in range(200)]).layers[10].tolist() == pytest.approx([0.5, 0.5])


def test_a_noun_said_twice_of_one_image_is_one_image():
    told = specificity([*FOUND, NounScores("a", "dog", scores(*CAT), 7)], LAYER_OF)
    assert told.counts == (1, 2)


def test_one_noun_or_one_image_gives_what_can_be_told():
    told = specificity(FOUND[:1], LAYER_OF)
    assert (told.overlaps[0].within, told.overlaps[0].between, told.overlaps[0].concepts) == (None, None, None)
    assert told.own_shares == (1.0,)


@pytest.mark.parametrize(("found", "at_least"), [([], 1), (FOUND, 3)])
def test_too_little_is_refused(found, at_least):
    with pytest.raises(SettingError, match="No noun was said"):
        specificity(found, LAYER_OF, at_least=at_least)


def test_scores_are_those_of_find_in_a_batch(vlm):
    items = [Item(str(seed), mmn.pocket.scene(seed).image) for seed in (3, 4)]
    found = noun_scores(vlm, items)
    expected = [(item.name, noun) for item in items for noun in mmn.find(vlm, item.image()).nouns]
    assert [(one.image, one.lemma) for one in found] == [(name, noun.lemma) for name, noun in expected]
    assert [one.step for one in found] == [noun.step for _, noun in expected]
    sizes = np.cumsum([0, *vlm.anatomy.layer_sizes])
    for one, (_, noun) in zip(found, expected, strict=True):
        assert len(one.scores) == vlm.anatomy.n_neurons
        for n in noun.neurons:
            assert one.scores[sizes[n.neuron.layer] + n.neuron.index] == pytest.approx(n.score, rel=1e-3)
    assert noun_scores(vlm, []) == []
