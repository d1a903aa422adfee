import pytest

import mmneurons as mmn
from mmneurons.inspection.causal import How, causal, rest_unchanged
from mmneurons.inspection.items import Item


@pytest.fixture(scope="module")
def told(vlm):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    return causal(vlm, Item("scene", scene.image), sizes=(10, 10**6), ways=(How(sigma=8.0), How(scale=0), How(scale=1)))


def test_every_noun_is_disturbed_in_every_way(told):
    for noun in told:
        assert len(noun.outcomes) == 6, "top and matched, three ways; more neurons than there are: left out"
        assert {(o.how, o.is_top) for o in noun.outcomes} == {
            (how, top) for how in ("noise 8", "times 0", "times 1") for top in (True, False)
        }


def test_doing_nothing_changes_nothing(told):
    for noun in told:
        for outcome in noun.outcomes:
            if outcome.how == "times 1":
                assert (outcome.caption, outcome.gone, outcome.rest_unchanged) == (noun.caption, False, True)


def test_outcomes_are_captions_under_the_intervention(vlm, told):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    finding = mmn.find(vlm, scene.image)
    for noun, mine in zip(finding.nouns, told, strict=True):
        neurons = [n.neuron for n in noun.neurons]
        with mmn.intervene(vlm, neurons, noise=8.0, seed=0):
            expected = vlm.caption(scene.image)
        (outcome,) = [o for o in mine.outcomes if o.is_top and o.how == "noise 8"]
        assert outcome.caption == expected


@pytest.mark.parametrize(
    ("before", "after", "noun", "same"),
    [
        ("a dog and a cat on the grass", "a fox and a cat on the grass", "dog", True),
        ("a dog and a cat on the grass", "an owl and a cat on the grass", "dog", True),
        ("a dog and a cat on the grass", "a dog and a bus on the grass", "dog", False),
        ("a dog and a cat on the grass", "a fox and a cat", "dog", False),
        ("a dog and a cat on the grass", "a dog and some bread on the grass", "cat", True),
        ("a dog on the grass", "on the grass", "dog", False),
        ("the sun in the sky", "the sun in the sky", "sun", True),
        ("a carrot and a car", "a carrot and a bus", "car", True),
    ],
)
def test_the_rest_by_hand(before, after, noun, same):
    assert rest_unchanged(before, after, noun) == same
