import numpy as np
import pytest
import torch

import mmneurons as mmn
from mmneurons.attribution.controls import column_norms, loudness, matched
from mmneurons.attribution.equal_change import changes, equally_changing
from mmneurons.attribution.finders import finder_scores
from mmneurons.data.dataset import Item
from mmneurons.inspection.causal import How, causal
from mmneurons.inspection.rows import CHANGE, EQUAL_CHANGE, MATCHED, TOP
from mmneurons.maths.ranking import top_k
from mmneurons.metrics.captions import rest_unchanged
from mmneurons.words import says


@pytest.fixture(scope="module")
def told(vlm):
    scene = mmn.pocket.scene(3, ["dog", "car"])
    ways = (How(sigma=8.0), How(scale=0), How(scale=1))
    return causal(vlm, Item("scene", scene.image), sizes=(10, 10**6), ways=ways, draws=3, batch_size=5)


def test_every_noun_is_disturbed_in_every_way(told):
    for noun in told:
        assert len(noun.outcomes) == 7, "more neurons than there are: left out"
        assert {(o.how, o.neurons) for o in noun.outcomes} == {
            *((how, which) for how in ("noise 8", "times 0", "times 1") for which in (TOP, MATCHED)),
            ("times 0", EQUAL_CHANGE),
        }


def test_where_silence_changes_nothing_no_ratio_is_made_up(vlm, monkeypatch):
    monkeypatch.setattr("mmneurons.inspection.causal.changes", lambda replay, sets: torch.zeros(len(sets)))
    scene = mmn.pocket.scene(3, ["dog"])
    made = causal(vlm, Item("scene", scene.image), sizes=(1,), ways=(How(scale=0),), draws=1)
    values = [row["value"] for noun in made for row in noun.rows() if row["measure"] == CHANGE]
    assert values
    assert {*values} == {None}


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
        outcomes = {(o.how, o.neurons): o for o in mine.outcomes}
        outcome = outcomes["noise 8", TOP]
        assert list(outcome.captions) == expected
        assert outcome.gone == pytest.approx(np.mean([not says(caption, noun.word) for caption in expected]))


def test_what_is_drawn_is_drawn_as_often_as_asked_and_as_loud(told):
    for noun in told:
        draws = {(o.how, o.neurons): len(o.captions) for o in noun.outcomes}
        assert draws["times 0", TOP] == 1, "nothing is drawn"
        assert {n for which, n in draws.items() if which not in (("times 0", TOP), ("times 1", TOP))} == {3}
        for outcome in noun.outcomes:
            assert outcome.loudness == (1 if outcome.neurons == TOP else pytest.approx(1, abs=0.05))
            assert outcome.n_neurons >= 10


def test_what_changes_as_much_is_the_matched_neurons_scaled(vlm, told):
    """Its captions are those of the matched sets with the factors that the search finds, not of silence."""
    image, norms = mmn.pocket.scene(3, ["dog", "car"]).image, column_norms(vlm.anatomy)
    for judged, noun in zip(finder_scores(vlm, image, ["logit"]), told, strict=True):
        step = judged.replay
        top = top_k(judged.scores["logit"], 10)
        sets = matched(step.slot_starts, loudness(step.activations, step.experts, norms), top, 3, 0).sets
        factors, reached = equally_changing(step, top, sets)
        outcomes = {o.neurons: o for o in noun.outcomes if o.how == "times 0"}
        equal = outcomes[EQUAL_CHANGE]
        assert equal.change == pytest.approx(float(reached.mean()), rel=1e-3)
        assert equal.change == pytest.approx(1, abs=0.02)
        assert equal.times == pytest.approx(float(factors.mean()), rel=1e-3)
        (top_alone, *parts) = changes(step, [top, *sets]).tolist()
        assert outcomes[MATCHED].change == pytest.approx(np.mean(parts) / top_alone, rel=1e-3)
        expected = []
        for slots, factor in zip(sets, factors.tolist(), strict=True):
            with mmn.intervene(vlm, [step.neuron(slot) for slot in slots.tolist()], scale=factor):
                expected.append(vlm.caption(image))
        assert list(equal.captions) == expected


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
