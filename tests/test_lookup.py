"""What a neuron says and which neurons say a word, against plain loops over the raw weights."""

import json

import pytest
import torch
from kits.zoo import FAMILIES
from kits.zoo.base import randomise

import mmneurons as mmn
from mmneurons.errors import SettingError, WordError
from mmneurons.finding import lookup
from mmneurons.neurons import Neuron


@pytest.fixture(scope="module")
def columns(vlm):
    """All columns of the pocket model end to end: (neurons, hidden)."""
    return torch.cat([layer.mlp.down_proj.weight.detach().T for layer in vlm.model.model.language_model.layers])


@pytest.fixture(scope="module")
def read(vlm):
    """Columns as the head reads them, to logits."""
    gamma = vlm.model.model.language_model.norm.weight.detach()
    return lambda column: vlm.model.lm_head.weight.detach() @ (gamma * column)


def test_a_neuron_promotes_and_suppresses_what_its_column_gives(vlm, columns, read):
    card = mmn.explain_neuron(vlm, "L0.u945", n_tokens=7, n_neighbours=0, says="raw")
    order = read(columns[945]).argsort(descending=True).tolist()
    assert card.tokens == tuple(vlm.token_text(i) for i in order[:7])
    assert card.suppressed == tuple(vlm.token_text(i) for i in order[::-1][:7])
    assert card.neighbours == ()


def test_norm_and_its_rank_among_the_ffns_own(vlm, columns):
    card = mmn.explain_neuron(vlm, Neuron(2, 3), n_neighbours=0)
    lengths = columns[2048:3072].norm(dim=1)
    assert card.norm == pytest.approx(float(lengths[3]), rel=1e-5)
    assert card.norm_rank == pytest.approx(float((lengths < lengths[3]).float().mean()))


def test_neighbours_are_the_largest_cosines_of_the_whole_model(vlm, columns):
    card = mmn.explain_neuron(vlm, "L1.u5", n_neighbours=6)
    cosines = torch.nn.functional.cosine_similarity(columns, columns[1024 + 5][None])
    cosines[1024 + 5] = 0
    expected = cosines.abs().topk(6).indices.tolist()
    assert [n.neuron for n in card.neighbours] == [Neuron(i // 1024, i % 1024) for i in expected]
    assert [n.cosine for n in card.neighbours] == pytest.approx(cosines[expected].tolist(), abs=1e-5)


@pytest.mark.parametrize(("probes", "at_once"), [(1024, 512), (16, 8)])
@pytest.mark.parametrize("says", ["standardised", "raw"])
def test_neurons_of_a_word_are_those_a_full_search_finds(vlm, columns, says, probes, at_once, monkeypatch):
    """Every neuron is ranked for the word among all tokens, in the reading asked for, with the sign that suits it."""
    monkeypatch.setattr(lookup, "PROBES", probes)
    monkeypatch.setattr(lookup, "AT_ONCE", at_once)
    unembed = vlm.model.lm_head.weight.detach().double()
    seen = columns.double() * vlm.model.model.language_model.norm.weight.detach().double()
    pushes = seen @ unembed.T
    if says == "standardised":
        seen, pushes = seen - seen.mean(0), (pushes - pushes.mean(0)) / pushes.std(0, correction=0)
    for word in ("dog", "apple", "the", "on"):
        found = mmn.neurons_for(vlm, word, top=20, says=says)
        assert found.token == f" {word}"
        cosines = torch.nn.functional.cosine_similarity(seen, unembed[found.token_id][None])
        mine = pushes * cosines.sign()[:, None]
        ranks = (mine > mine[:, found.token_id, None]).sum(1).tolist()
        best = sorted(range(len(ranks)), key=lambda i: (ranks[i], -abs(float(cosines[i]))))[:20]
        assert [(n.neuron, n.rank) for n in found.neurons] == [(Neuron(i // 1024, i % 1024), ranks[i]) for i in best]
        assert [n.cosine for n in found.neurons] == pytest.approx(cosines[best].tolist(), abs=1e-5)
        assert found.neurons[0].tokens == tuple(vlm.token_text(i) for i in mine[best[0]].topk(10).indices.tolist())


def test_what_does_not_exist_is_told(vlm):
    with pytest.raises(SettingError, match=r"(?s)no neuron L9\.u1.*L0 to L4"):
        mmn.explain_neuron(vlm, "L9.u1")
    with pytest.raises(SettingError, match="is not the name of a neuron"):
        mmn.explain_neuron(vlm, (0, 945))  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match=r"(?s)no neuron L0\.u1024.*u0 to u1023"):
        mmn.explain_neuron(vlm, "L0.u1024")
    with pytest.raises(SettingError, match=r"no neuron L0\.e1\.u3"):
        mmn.explain_neuron(vlm, "L0.e1.u3")
    with pytest.raises(SettingError, match="not the name of a neuron"):
        mmn.explain_neuron(vlm, "23.6012")
    with pytest.raises(WordError, match="no token of its own"):
        mmn.neurons_for(vlm, " ")


def test_both_are_plain_data(vlm):
    card = json.loads(json.dumps(mmn.explain_neuron(vlm, "L0.u945").to_dict()))
    assert card["neuron"] == "L0.u945"
    assert card["neighbours"][0]["neuron"].startswith("L")
    word = json.loads(json.dumps(mmn.neurons_for(vlm, "dog", top=2).to_dict()))
    assert [entry["rank"] for entry in word["neurons"]] == [0, 0]


@pytest.fixture(scope="module")
def tiny():
    """One tiny model of a family, without a tokenizer."""
    families = {family.name: family for family in FAMILIES}
    return lambda name: mmn.load(randomise(families[name].build()))


def test_columns_of_experts_are_found_by_their_expert(tiny):
    model = tiny("qwen3_vl_moe")
    column = model.model.model.language_model.layers[0].mlp.experts.down_proj.detach()[3, :, 7]
    card = mmn.explain_neuron(model, "L0.e3.u7", n_neighbours=1)
    assert card.norm == pytest.approx(float(column.norm()), rel=1e-5)
    found = mmn.neurons_for(model, "<17>", top=400, says="raw").neurons
    seen = model.anatomy.norm.weight * column
    cosine = torch.nn.functional.cosine_similarity(seen, model.anatomy.unembed[17], dim=0)
    mine = next(n for n in found if str(n.neuron) == "L0.e3.u7")
    assert mine.cosine == pytest.approx(float(cosine), abs=1e-5)


def test_a_column_counts_as_it_comes_through_the_norm_after_its_ffn(tiny):
    model = tiny("gemma3")
    layer = model.model.model.language_model.layers[1]
    through = layer.mlp.down_proj.weight.detach()[:, 4] * (1 + layer.post_feedforward_layernorm.weight.detach())
    seen = model.anatomy.norm.weight * through
    found = mmn.neurons_for(model, "<21>", top=300, says="raw").neurons
    mine = next(n for n in found if str(n.neuron) == "L1.u4")
    cosine = torch.nn.functional.cosine_similarity(seen, model.anatomy.unembed[21], dim=0)
    assert mine.cosine == pytest.approx(float(cosine), abs=1e-5)
    read = model.anatomy.unembed @ (model.anatomy.norm.weight * through)
    card = mmn.explain_neuron(model, "L1.u4", n_tokens=3, says="raw")
    assert card.tokens == tuple(f"<{i}>" for i in read.topk(3).indices.tolist())
