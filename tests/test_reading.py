"""What neurons say next to all neurons of the model: against the whole table of neurons by vocabulary, in float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import pytest
import torch
from kits.zoo import FAMILIES
from kits.zoo.base import randomise
from peft import LoraConfig, get_peft_model
from test_forms import PLACES, load_quantised
from test_show import toy
from torch import Tensor

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.errors import SettingError
from mmneurons.finding import reading
from mmneurons.finding.reading import Yardstick, yardstick_of
from mmneurons.maths.moments import Moments
from mmneurons.patches.describe import describe_patch
from mmneurons.report.patch import patch_text
from mmneurons.settings import Says
from mmneurons.vlm import weights
from mmneurons.vlm.vlm import VLM


def pushes(vlm: VLM) -> Tensor:
    """How far every neuron of a LLaVA pushes every token, (neurons, vocab), from the bare weights."""
    language = vlm.model.model.language_model
    columns = torch.cat([layer.mlp.down_proj.weight.detach().double().T for layer in language.layers])
    return (columns * language.norm.weight.detach().double()) @ vlm.model.lm_head.weight.detach().double().T


def standardised(table: Tensor) -> Tensor:
    return (table - table.mean(0)) / table.std(0, correction=0)


def agrees(mine: Yardstick, vlm: VLM, table: Tensor) -> None:
    """A yardstick is the mean and the deviation of each token's column of the table."""
    unembed = vlm.anatomy.unembed[: vlm.n_tokens].double().to(mine.mean.device)
    torch.testing.assert_close(mine.deviations.double(), table.std(0, correction=0), rtol=1e-4, atol=0)
    means, size = unembed @ mine.mean.double(), table.pow(2).mean(0).sqrt()
    assert float(((means - table.mean(0)) / size).abs().max()) < 1e-5


def fresh(vlm: VLM) -> VLM:
    return mmn.load(copy.deepcopy(vlm.model), processor=vlm.processor)


@pytest.fixture(scope="module")
def slow(vlm):
    return standardised(pushes(vlm))


def test_a_neuron_says_what_it_pushes_hardest_next_to_all_others(vlm, slow):
    for neuron in (0, 945, 5 * 1024 - 1):
        card = mmn.explain_neuron(
            vlm, mmn.Neuron(neuron // 1024, neuron % 1024), n_tokens=7, n_neighbours=0, says="standardised"
        )
        order = slow[neuron].argsort(descending=True).tolist()
        assert card.tokens == tuple(vlm.token_text(i) for i in order[:7])
        assert card.suppressed == tuple(vlm.token_text(i) for i in order[::-1][:7])
        assert card.says == "standardised"


def test_find_reads_with_the_sign_of_the_activation(vlm, slow, sample_paths):
    found, raw = (mmn.find(vlm, sample_paths[0], top=200, says=says) for says in ("standardised", "raw"))
    assert (found.says, found.provenance["settings"]["says"], raw.says) == ("standardised", "standardised", "raw")
    mine = found.nouns[0].neurons
    assert any(n.activation < 0 for n in mine)
    for n, other in zip(mine, raw.nouns[0].neurons, strict=True):
        assert (n.neuron, n.score, n.activation) == (other.neuron, other.score, other.activation)
        z = slow[n.neuron.layer * 1024 + n.neuron.index] * (1 if n.activation >= 0 else -1)
        assert n.tokens == tuple(vlm.token_text(i) for i in z.topk(10).indices.tolist())
        assert n.suppressed == tuple(vlm.token_text(i) for i in (-z).topk(3).indices.tolist())
    assert [n.tokens for n in mine] != [n.tokens for n in raw.nouns[0].neurons]


def test_the_papers_columns_are_measured_as_they_are(vlm, sample_paths):
    columns = torch.cat([layer.mlp.down_proj.weight.detach().T for layer in vlm.model.model.language_model.layers])
    z = standardised(columns.double() @ vlm.model.lm_head.weight.detach().double().T)
    for n in mmn.find(vlm, sample_paths[0], score="paper", says="standardised").nouns[0].neurons:
        mine = z[n.neuron.layer * 1024 + n.neuron.index] * (1 if n.activation >= 0 else -1)
        assert n.tokens[:5] == tuple(vlm.token_text(i) for i in mine.topk(5).indices.tolist())


def test_ranks_of_a_word_are_places_in_the_same_reading(vlm, slow):
    found = mmn.neurons_for(vlm, "dog", top=5, says="standardised")
    assert found.says == "standardised"
    for mine in found.neurons:
        z = slow[mine.neuron.layer * 1024 + mine.neuron.index] * (1 if mine.cosine >= 0 else -1)
        assert mine.rank == int((z > z[found.token_id]).sum())
        assert mine.tokens == tuple(vlm.token_text(i) for i in z.topk(10).indices.tolist())


def test_a_patch_is_read_before_and_after_by_one_yardstick_the_unedited_models(vlm, slow):
    own = fresh(vlm)
    token = vlm.tokenizer(" cat", add_special_tokens=False).input_ids[0]
    direction = vlm.anatomy.unembed[token].detach().float()
    patch = toy(own, {4: [3]}, direction[None] / direction.norm(), [[5.0]])
    with patch.applied(own):  # the first use of the yardstick: the edited columns are not in it
        during = describe_patch(patch, own, says="standardised")
        agrees(yardstick_of(own), own, pushes(vlm))
    assert describe_patch(patch, own, says="standardised") == during
    assert during.says == "standardised"
    (change,) = during.changes
    assert change.before == tuple(vlm.token_text(i) for i in slow[4 * 1024 + 3].topk(10).indices.tolist())
    assert change.after[0] == " cat"
    assert "read raw: the tokens that its column pushes most" in patch_text(describe_patch(patch, own, says="raw"))
    assert "read" not in patch_text(during)


def raw_table(vlm: VLM) -> Tensor:
    """The same of any model, through the reading function of weights: (neurons of all experts, vocab)."""
    anatomy, parts = vlm.anatomy, []
    for ffn in anatomy.ffns:
        for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
            columns, step = weights.dense(ffn.module, expert).double().cpu().T, ffn.path
            while step is not None:
                columns = step.scale * columns
                if step.norm is not None:
                    norm = step.norm.norm
                    columns = (columns - columns.mean(-1, keepdim=True) if norm.centred else columns) * norm.weight
                step = step.then
            if anatomy.norm.centred:
                columns = columns - columns.mean(-1, keepdim=True)
            parts.append(columns * anatomy.norm.weight.double())
    return torch.cat(parts) @ anatomy.unembed[: vlm.n_tokens].double().T


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma3", "blip-2 (opt)", "llama4"])
def test_experts_and_norms_on_the_way_count(name):
    """Fused experts; a norm behind the FFN; LayerNorms; experts beside a shared FFN, stored the other way round."""
    model = mmn.load(randomise({family.name: family for family in FAMILIES}[name].build()))
    table = raw_table(model)
    assert len(table) == model.anatomy.n_neurons
    agrees(yardstick_of(model), model, table)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_and_off_loaded_weights_are_measured(vlm, tmp_path):
    for name in ("8 bits", "4 bits (nf4)"):
        packed = load_quantised(name)
        agrees(yardstick_of(packed), packed, raw_table(packed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        spread = mmn.load(pocket.folder(), dtype="float32", device_map=PLACES, offload_folder=str(tmp_path))
    agrees(yardstick_of(spread), spread, pushes(vlm))
    assert mmn.explain_neuron(spread, "L2.u7", says="standardised") == mmn.explain_neuron(
        vlm, "L2.u7", says="standardised"
    )


def test_it_is_measured_once_and_anew_where_weights_change(random_vlm, monkeypatch):
    own, read = fresh(random_vlm), list[object]()
    real = weights.chunks

    def counted(module, expert=None):
        read.append(module)
        return real(module, expert)

    monkeypatch.setattr(reading.weights, "chunks", counted)
    first = yardstick_of(own)
    assert len(read) == len(own.anatomy.ffns)
    assert yardstick_of(own) is first
    assert len(read) == len(own.anatomy.ffns)
    with torch.no_grad():
        own.model.model.language_model.norm.weight.mul_(torch.linspace(0.5, 2, own.anatomy.hidden))
    agrees(yardstick_of(own), own, pushes(own))
    assert not torch.equal(yardstick_of(own).deviations, first.deviations)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names in transformers that PEFT still reads
def test_each_decoder_tokens_and_adapters_have_their_own_yardstick(random_vlm, monkeypatch):
    """None of these changes a weight: it is still another set of columns, or of tokens, that is measured."""
    own = fresh(random_vlm)
    whole = yardstick_of(own)
    fewer = own.n_tokens - 50
    with monkeypatch.context() as patched:
        patched.setattr(VLM, "n_tokens", property(lambda vlm: fewer))
        assert len(yardstick_of(own).deviations) == fewer
    assert yardstick_of(own) is whole
    config = LoraConfig(r=2, target_modules=[own.anatomy.ffns[0].name], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(own.model), config)
    on = mmn.load(adapted, processor=own.processor)
    first = yardstick_of(on)
    cast("Any", adapted.base_model).disable_adapter_layers()
    assert not torch.equal(yardstick_of(on).deviations, first.deviations)
    torch.testing.assert_close(yardstick_of(on).deviations, whole.deviations)


def test_a_token_that_all_neurons_push_alike_is_said_by_none(random_vlm):
    model = copy.deepcopy(random_vlm.model)
    with torch.no_grad():
        model.lm_head.weight[17] = 0
        model.lm_head.weight[17, 0] = 1e4  # raw, every neuron says it
        model.lm_head.weight[18] = 0
        for layer in model.model.language_model.layers:
            layer.mlp.down_proj.weight[0] = 0.7
    own = mmn.load(model, processor=random_vlm.processor)
    assert torch.isinf(yardstick_of(own).deviations).nonzero()[:, 0].tolist() == [17, 18]
    there: dict[Says, bool] = {"raw": True, "standardised": False}
    for says, is_there in there.items():
        card = mmn.explain_neuron(own, "L1.u4", says=says)
        assert (own.token_text(17) in card.tokens) == is_there


def test_moments_do_not_depend_on_the_parts_and_survive_a_large_mean():
    rows = torch.randn(999, 12, generator=torch.Generator().manual_seed(0)) + 1000
    whole, parts = Moments(12, rows.device), Moments(12, rows.device)
    whole.add(rows)
    for part in rows.split([1, 500, 498]):
        parts.add(part)
    expected = torch.cov(rows.double().T, correction=0)
    for moments in (whole, parts):
        torch.testing.assert_close(moments.covariance.double(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(moments.mean.double(), rows.double().mean(0))
    alike = Moments(12, rows.device)
    alike.add(rows[:1].expand(50, -1))
    alike.add(rows[:1].expand(7, -1))
    assert bool(torch.isinf(alike.deviations(torch.eye(12))).all())


def test_a_reading_that_does_not_exist_is_refused(vlm, sample_paths):
    wrong = cast(Says, "cosine")
    for ask in (
        lambda: mmn.find(vlm, sample_paths[0], says=wrong),
        lambda: mmn.explain_neuron(vlm, "L0.u1", says=wrong),
        lambda: mmn.neurons_for(vlm, "dog", says=wrong),
    ):
        with pytest.raises(SettingError, match=r"(?s)cosine'.*standardised, raw"):
            ask()
