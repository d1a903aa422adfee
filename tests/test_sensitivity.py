import numpy as np
import pytest

import mmneurons as mmn
from mmneurons.inspection.items import Item
from mmneurons.inspection.sensitivity import sensitivity


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
    finding = mmn.find(vlm, scene.image, blank=True)
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
