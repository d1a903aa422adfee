import numpy as np
import pytest

import mmneurons as mmn
from mmneurons.data.dataset import Item
from mmneurons.finding.batch import targets_of
from mmneurons.finding.maps import region_maps
from mmneurons.finding.scoring import score_targets
from mmneurons.inspection.sensitivity import as_seen, sensitivity
from mmneurons.inspection.tables import sensitivity_tables
from mmneurons.metrics.regions import match, mean_match
from mmneurons.settings import ANSWER_PREFIX, PROMPT, FindSettings, Question
from mmneurons.vlm.grid import find_grids


@pytest.fixture(scope="module")
def scene():
    return mmn.pocket.scene(3, ["dog", "car"])


@pytest.fixture(scope="module")
def item(scene):
    return Item("scene", scene.image, scene.objects, tuple(scene.masks))


@pytest.fixture(scope="module")
def told(vlm, item):
    return sensitivity(vlm, item, mmn.pocket.scene(8, ["tree"]).image)


def test_blank_images_are_read_as_find_reads_them(vlm, scene, told):
    finding = mmn.find(vlm, scene.image, blank=True, says="raw")
    for noun, mine in zip(finding.nouns, told, strict=True):
        assert mine.word == noun.word
        assert mine.lost_blank == pytest.approx([n.lost_without_image for n in noun.neurons], rel=1e-4, abs=1e-5)
        assert mine.hits == tuple(noun.token in n.tokens for n in noun.neurons)


def test_what_is_shown_is_compared_with_its_mask(told, scene):
    shown = [one for one in told if one.lemma in scene.objects]
    assert shown
    for one in told:
        assert one.is_shown == (one.lemma in scene.objects)
        assert set(one.regions) == ({1, 10, 50, 100, 500, 1000} if one.is_shown else set())
    for one in shown:
        mask = scene.masks[scene.objects.index(one.lemma)]
        assert one.regions[10].area == pytest.approx(mask.mean(), abs=0.01)


def test_as_many_random_neurons_are_beside_each_region(told):
    for one in told:
        assert set(one.matched) == set(one.regions)
        for k, other in one.matched.items():
            assert other.n_neurons <= k
            assert 0 < other.loudness < 1.1
            assert other.match.area == one.regions[k].area
        if one.matched:
            assert one.matched[10].n_neurons == 10
            assert one.matched[10].match != one.regions[10]


def test_the_map_is_held_against_the_other_object_of_the_picture(vlm, scene, told):
    """By what `find` gives: the map of one noun and the mask of the other; alone in its picture it has no other."""
    finding = mmn.find(vlm, scene.image, maps=True)
    shown = [(noun, mine) for noun, mine in zip(finding.nouns, told, strict=True) if noun.lemma in scene.objects]
    assert len(shown) == 2
    for noun, mine in shown:
        other = as_seen(vlm, scene.masks[1 - scene.objects.index(noun.lemma)], scene.image, Question())
        assert set(mine.elsewhere) == set(mine.regions)
        for k, found in mine.elsewhere.items():
            by_hand = match(noun.regions[k][0], other)
            assert (found.area, found.iou_equal_area) == pytest.approx((by_hand.area, by_hand.iou_equal_area), abs=0.02)
            assert found.auroc == pytest.approx(by_hand.auroc, abs=0.01)
        assert mine.elsewhere[100] != mine.regions[100]
    alone = Item("alone", scene.image, ("dog", "car"), (scene.masks[scene.objects.index("dog")], None))
    for one in sensitivity(vlm, alone):
        assert one.elsewhere == {}


def test_several_other_objects_count_alike():
    """A map that points at the first of two other objects: half a hit, the mean of their areas."""
    grid = np.zeros((2, 2))
    grid[0, 0] = 1
    first, second = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    first[:4, :4] = second[4:, :] = True
    mean = mean_match([match(grid, first), match(grid, second)])
    assert (mean.pointing, mean.area) == (0.5, 0.375)


def test_maps_of_the_top_as_a_set_are_its_region(vlm, scene):
    """What random neurons are mapped with gives, for the top k, what `find` shows."""
    finding = mmn.find(vlm, scene.image, maps=True)
    choices = FindSettings(maps=True)
    inputs = vlm.encode([[scene.image]], PROMPT, ANSWER_PREFIX)
    with mmn.record(vlm.anatomy) as recording:
        answers = vlm.generate(inputs)
    scored = score_targets(vlm, recording, answers, targets_of(vlm, answers, 0, choices), choices)
    sets = [[ranked[:10].flip(0), ranked[:50]] for ranked in scored.ranked]
    grids = find_grids(vlm.model, inputs, 1)
    assert not isinstance(grids, str)
    found = region_maps(vlm, inputs, grids, scored, sets)
    for noun, (ten, fifty) in zip(finding.nouns, found, strict=True):
        np.testing.assert_allclose(ten, noun.regions[10], atol=1e-4)
        np.testing.assert_allclose(fifty, noun.regions[50], atol=1e-4)


def test_the_same_image_in_place_of_another_loses_nothing(vlm, item, scene):
    (first, *_) = sensitivity(vlm, item, scene.image)
    assert np.abs(first.lost_other).max() < 1e-3
    assert first.dependence is not None


def test_shuffled_patches_are_told_for_each_size(told):
    for one in told:
        assert set(one.stays) == {10, 100}
        assert all(0 <= share <= 1 for share in one.stays.values())


def test_an_image_of_which_nothing_is_known(vlm, scene):
    told = sensitivity(vlm, Item("scene", scene.image))
    assert {one.is_shown for one in told} == {None}
    assert not any(one.regions or one.lost_other for one in told)


def test_what_is_not_measured_is_said_in_the_table(vlm):
    scene = mmn.pocket.scene(3)
    nothing, everything = np.zeros((112, 112), bool), np.ones((112, 112), bool)
    said = [noun.lemma for noun in sensitivity(vlm, Item("a", scene.image))]
    items = [
        Item("empty", scene.image, (said[0], "zebra"), (nothing, nothing)),
        Item("whole", scene.image, (said[0],), (everything,)),
        Item("none", scene.image),
    ]
    found = {item.name: sensitivity(vlm, item) for item in items}
    table = sensitivity_tables(found, items)[1]
    n = len(said)
    assert {labels[0]: value for labels, value in table.rows if labels[1:] == ("", "")} == {
        "nouns not measured: the mask is empty, or outside of what the model sees": 1,
        "nouns not measured: the mask covers all that the model sees": 1,
        **({"nouns not measured: no mask of the noun": 2 * (n - 1)} if n > 1 else {}),
        "nouns not measured: their image has no masks": n,
        "objects not measured: the caption does not name them": 1,
    }
    assert len(sensitivity_tables({"none": found["none"]}, items)) == 1
