import pytest
import torch

import mmneurons as mmn
from mmneurons.attribution.ablation import log_p
from mmneurons.attribution.finders import FINDERS, finder_scores
from mmneurons.errors import ModelError, SettingError


@pytest.fixture(scope="module")
def judged(vlm):
    return finder_scores(vlm, mmn.pocket.scene(3, ["dog", "car"]).image)


def test_every_finder_scores_every_neuron_of_every_noun(vlm, judged):
    finding = mmn.find(vlm, mmn.pocket.scene(3, ["dog", "car"]).image)
    assert [one.word.text for one in judged] == [noun.word for noun in finding.nouns]
    (first,) = finder_scores(vlm, mmn.pocket.scene(3, ["dog", "car"]).image, ["random"], words=[finding.nouns[0].word])
    assert {one.caption for one in (first, *judged)} == {finding.caption}, "whole, whichever noun is judged"
    for one in judged:
        assert set(one.scores) == set(FINDERS)
        assert {len(scores) for scores in one.scores.values()} == {vlm.anatomy.n_neurons}


@pytest.mark.parametrize("score", ["logit", "logprob", "paper", "followed", "gradient"])
def test_scores_are_those_of_find(vlm, judged, score):
    finding = mmn.find(vlm, mmn.pocket.scene(3, ["dog", "car"]).image, score=score)
    for one, noun in zip(judged, finding.nouns, strict=True):
        for neuron in noun.neurons:
            slot = int(one.replay.slot_starts[neuron.neuron.layer]) + neuron.neuron.index
            assert float(one.scores[score][slot]) == pytest.approx(neuron.score, rel=1e-4, abs=1e-6)


def test_gradient_finders_agree_with_silence_in_the_last_block(judged):
    """There nothing but the final norm and the softmax lies between a neuron and log p."""
    replay = judged[0].replay
    last = torch.arange(int(replay.slot_starts[-1]), replay.n_slots)
    effects = replay.effects([slot[None] for slot in last]).logprob
    for finder in ("gradient", "logprob"):
        assert torch.corrcoef(torch.stack([effects, judged[0].scores[finder][last]]))[0, 1] > 0.95


def test_integrated_gradients_of_a_block_add_up_to_its_effect(judged):
    """Completeness: from nothing to all activations of one block, in so many steps that the sum is the integral."""
    replay, n = judged[0].replay, 400
    midpoints = (torch.arange(n) + 0.5) / n
    for layer in range(len(replay.anatomy.blocks)):
        start, fired = int(replay.slot_starts[layer]), replay.activations[layer]
        block = torch.arange(start, start + len(fired))
        whole = float(replay.effects([block]).logprob[0])
        added = float((replay.gradients(layer, midpoints)[block] * fired).sum())
        assert added == pytest.approx(whole, rel=2e-3, abs=1e-5)


def test_integrated_gradients_take_twenty_steps_block_by_block(judged):
    for one in judged:
        fired, steps = torch.cat(one.replay.activations), (torch.arange(20) + 0.5) / 20
        expected = torch.zeros(len(fired))
        for layer in range(len(one.replay.anatomy.blocks)):
            for step in steps:
                expected += one.replay.gradients(layer, step[None]) * fired / 20
        torch.testing.assert_close(one.scores["integrated"], expected, rtol=1e-3, atol=1e-5)


def test_random_scores_depend_on_the_seed(vlm):
    image = mmn.pocket.scene(3, ["dog", "car"]).image
    one, same, other = (finder_scores(vlm, image, ["random"], seed=seed)[0].scores["random"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_an_unknown_finder_is_refused(vlm):
    with pytest.raises(SettingError, match="no finder 'magic'"):
        finder_scores(vlm, mmn.pocket.scene(3).image, ["magic"])  # pyright: ignore[reportArgumentType]


def test_an_answer_without_the_word_gives_nothing(vlm):
    assert finder_scores(vlm, mmn.pocket.scene(3).image, ["logit"], words=["zebra"]) == []


def test_log_p_is_exact_where_it_is_almost_zero():
    logits = torch.tensor([[30.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    expected = [-float(torch.tensor(-30.0).exp() + torch.tensor(-31.0).exp()), -float(torch.log(torch.tensor(3.0)))]
    for given in (logits, logits.double()):
        before = given.clone()
        assert log_p(given, 0).tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(given, before)


def test_a_finder_that_the_model_refuses_is_left_out_with_the_reason(mixture_vlm):
    image = mmn.pocket.scene(3, ["dog", "car"]).image
    words = [word for word in mixture_vlm.caption(image).split() if word.isalpha()][:1]
    (one,) = finder_scores(mixture_vlm, image, words=words)
    assert set(one.scores) == set(FINDERS) - {"followed"} - ({"paper"} & {*one.refused})
    assert "It has experts" in one.refused["followed"]
    with pytest.raises(ModelError, match="It has experts"):
        finder_scores(mixture_vlm, image, ["logit", "followed"], words=words)
