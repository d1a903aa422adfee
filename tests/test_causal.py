import numpy as np
import pytest

import mmneurons as mmn
from mmneurons.data.dataset import Item
from mmneurons.inspection.causal import How, causal
from mmneurons.metrics.captions import rest_unchanged
from mmneurons.words import says


@pytest.fixture(scope="module")
def told(vlm):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    ways = (How(sigma=8.0), How(scale=0), How(scale=1))
    return causal(vlm, Item("scene", scene.image), sizes=(10, 10**6), ways=ways, draws=3, batch_size=5)


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
                assert set(outcome.captions) == {noun.caption}
                assert (outcome.gone, outcome.rest_unchanged) == (0, 1)


def test_outcomes_are_captions_under_the_intervention(vlm, told):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    finding = mmn.find(vlm, scene.image)
    for noun, mine in zip(finding.nouns, told, strict=True):
        neurons = [n.neuron for n in noun.neurons]
        expected = []
        for seed in range(3):
            with mmn.intervene(vlm, neurons, noise=8.0, seed=seed):
                expected.append(vlm.caption(scene.image))
        outcomes = {(o.how, o.is_top): o for o in mine.outcomes}
        outcome = outcomes["noise 8", True]
        assert list(outcome.captions) == expected
        assert outcome.gone == pytest.approx(np.mean([not says(caption, noun.word) for caption in expected]))


def test_what_is_drawn_is_drawn_as_often_as_asked_and_as_loud(told):
    for noun in told:
        draws = {(o.how, o.is_top): len(o.captions) for o in noun.outcomes}
        assert draws["times 0", True] == 1, "nothing is drawn"
        assert {n for which, n in draws.items() if which not in (("times 0", True), ("times 1", True))} == {3}
        for outcome in noun.outcomes:
            assert outcome.loudness == (1 if outcome.is_top else pytest.approx(1, abs=0.05))
            assert outcome.n_neurons >= 10


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
        ("a dog", "a fire engine", "dog", True),
        ("a dog", "a fire engine in the street", "dog", False),
        ("a dog on the grass", "a fox, a cat on the grass", "dog", False),
        ("a dog on the grass", "fox and cat on the grass", "dog", False),
        ("a carrot and a car", "a carrot and a bus", "car", True),
    ],
)
def test_the_rest_by_hand(before, after, noun, same):
    assert rest_unchanged(before, after, noun) == same
