import pytest
import torch

import mmneurons as mmn
from mmneurons.attribution.controls import NEAREST, column_norms, loudness, matched
from mmneurons.attribution.finders import finder_scores
from mmneurons.inspection import faithfulness as truth
from mmneurons.inspection.faithfulness import DELETED, finder_truth

IMAGE = mmn.pocket.scene(3, ["dog", "car"]).image


@pytest.fixture(scope="module")
def told(random_vlm):
    words = [judged.word.text for judged in finder_scores(random_vlm, IMAGE, ["logit"], words=said(random_vlm))]
    return finder_truth(random_vlm, IMAGE, words=words[:1])


def said(vlm):
    """Words that an untrained model says."""
    return [word for word in vlm.caption(IMAGE).split() if word.isalpha()][:1]


@pytest.fixture(scope="module")
def step(random_vlm):
    return finder_scores(random_vlm, IMAGE, ["logit"], words=said(random_vlm))[0].replay


def test_loudness_is_the_length_of_what_a_neuron_writes(random_vlm, step):
    loud = loudness(step.activations, step.experts, column_norms(random_vlm.anatomy))
    for layer, index in ((0, 3), (2, 79)):
        w = random_vlm.model.model.language_model.layers[layer].mlp.down_proj.weight.detach()
        written = step.activations[layer][index] * w[:, index]
        assert float(loud[int(step.slot_starts[layer]) + index]) == pytest.approx(float(written.norm()), rel=1e-5)


def check_stand_ins(step, chosen, sets):
    """None is one of those that they stand for, none is there twice, each block has some."""
    blocks = set(torch.bucketize(chosen, step.slot_starts, right=True).tolist())
    for one in sets:
        assert not set(one.tolist()) & set(chosen.tolist())
        assert len(set(one.tolist())) == len(one)
        assert set(torch.bucketize(one, step.slot_starts, right=True).tolist()) == blocks


def test_as_many_stand_ins_are_each_about_as_loud(step):
    loud = torch.arange(step.n_slots).float()
    chosen = torch.tensor([1, 5, 100, 230, 231])
    sets = matched(step.slot_starts, loud, chosen, draws=50, seed=0, as_many=True).sets
    assert len({tuple(one.tolist()) for one in sets}) > 40
    check_stand_ins(step, chosen, sets)
    for one in sets:
        assert len(one) == len(chosen)
        assert ((loud[one].sort().values - loud[chosen]).abs() <= NEAREST + len(chosen)).all()
    again = matched(step.slot_starts, loud, chosen, 50, seed=0, as_many=True).sets
    assert all(torch.equal(a, b) for a, b in zip(sets, again, strict=True))


def test_stand_ins_are_together_as_loud_as_the_loudest(step):
    """The loudest of a block have no equals: more of the others make up for them."""
    loud = (torch.arange(step.n_slots) % 80 / 80) ** 2
    chosen = torch.tensor([79, 78, 239, 238])
    found = matched(step.slot_starts, loud, chosen, draws=20, seed=0)
    check_stand_ins(step, chosen, found.sets)
    shares = [float(loud[one].sum() / loud[chosen].sum()) for one in found.sets]
    assert shares == pytest.approx([1] * 20, abs=0.05)
    assert found.loudness == pytest.approx(sum(shares) / 20)
    assert found.n_neurons > len(chosen)
    assert len({tuple(sorted(one.tolist())) for one in found.sets}) > 15


def test_where_all_others_are_too_quiet_they_all_stand_in_and_it_is_told(step):
    loud = torch.ones(step.n_slots)
    chosen = torch.arange(60)
    found = matched(step.slot_starts, loud, chosen, draws=2, seed=0)
    assert [sorted(one.tolist()) for one in found.sets] == [list(range(60, 80))] * 2
    assert found.loudness == pytest.approx(20 / 60)


def test_deleting_what_truly_does_most_does_most(told):
    by_name = {(d.finder, d.k): d for d in told[0].deletions}
    assert {k for _, k in by_name} == set(DELETED)
    most = by_name["true effect", 1]
    for finder in ("logit", "logprob", "gradient", "random"):
        assert most.fall >= by_name[finder, 1].fall - 1e-9
    assert most.fall > max(most.matched, most.unmatched)


def test_a_fall_is_what_silence_of_the_top_does(random_vlm, told):
    (judged,) = finder_scores(random_vlm, IMAGE, ["logprob"], words=said(random_vlm))
    for deletion in told[0].deletions:
        if deletion.finder == "logprob":
            top = judged.scores["logprob"].argsort(descending=True)[: deletion.k]
            assert deletion.fall == pytest.approx(float(judged.replay.effects([top]).logprob[0]), abs=1e-4)


def test_agreement_is_highest_for_what_asks_the_same_question(told):
    rho = {(a.finder, a.scope, a.effect): a.rho for a in told[0].agreements}
    assert rho["gradient", "all blocks", "logprob"] > 0.8
    assert rho["logprob", "last third", "logprob"] > 0.8
    assert rho["logprob", "all blocks", "logprob"] > rho["logit", "all blocks", "logprob"]
    assert abs(rho["random", "all blocks", "logprob"]) < 0.2


def test_of_a_large_model_a_pool_is_silenced(random_vlm, monkeypatch):
    monkeypatch.setattr(truth, "SMALL", 100)
    monkeypatch.setattr(truth, "POOL", 60)
    monkeypatch.setattr(truth, "POOL_TOP", 5)
    steps = []
    (noun,) = finder_truth(
        random_vlm,
        IMAGE,
        ["logit", "random"],
        words=said(random_vlm),
        progress=lambda stage, done, of: steps.append((done, of)),
    )
    assert 60 <= noun.n_silenced <= 70
    assert steps[-1] == (noun.n_silenced, noun.n_silenced)
    assert {a.scope for a in noun.agreements} == {"all blocks", "last third", "finders' top 5"}
