"""What users do to a model between two calls: it is noticed, and what was known of the old weights is not used."""

import copy

import pytest
import torch
from test_patch import a_patch
from torch import Tensor, nn

import mmneurons as mmn
from mmneurons.errors import ModelError
from mmneurons.vlm import age as ages
from mmneurons.vlm.age import age, editing
from mmneurons.vlm.provenance import weights_hash


@pytest.fixture
def own(random_vlm) -> mmn.VLM:
    return mmn.load(copy.deepcopy(random_vlm.model), processor=random_vlm.processor)


def train(vlm: mmn.VLM) -> None:
    norm = vlm.model.model.language_model.norm.weight
    optimizer = torch.optim.SGD([norm], lr=0.1)
    (norm * torch.arange(len(norm))).sum().backward()
    optimizer.step()


def cast_and_back(vlm: mmn.VLM) -> None:
    vlm.model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    vlm.model.to(torch.float32)  # pyright: ignore[reportArgumentType]


def reload(vlm: mmn.VLM) -> None:
    vlm.model.load_state_dict({name: 1.1 * value for name, value in vlm.model.state_dict().items()})


def swap(vlm: mmn.VLM) -> None:
    head = vlm.model.lm_head
    vlm.model.lm_head = nn.Linear(head.in_features, head.out_features, bias=False)


def replace_a_weight(vlm: mmn.VLM) -> None:
    layer = vlm.model.model.language_model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def write_in_inference_mode(vlm: mmn.VLM) -> None:
    with torch.inference_mode():
        vlm.model.model.language_model.norm.weight.mul_(2)


@pytest.mark.parametrize("change", [train, cast_and_back, reload, swap, replace_a_weight, write_in_inference_mode])
def test_a_change_of_the_weights_is_noticed(own, sample_paths, change):
    before = dict(own.facts)
    change(own)
    fresh = mmn.load(copy.deepcopy(own.model), processor=own.processor)
    assert own.facts == fresh.facts | {"id": before["id"]}
    assert own.facts["weights_hash"] == weights_hash(own.model) != before["weights_hash"]
    assert torch.equal(own.anatomy.norm.weight, fresh.anatomy.norm.weight)
    assert mmn.doctor(own, sample_paths[0], max_new_tokens=3).passed


def test_a_cast_is_in_the_provenance(own, sample_paths):
    assert own.facts["dtype"] == "float32"
    own.model.to(torch.bfloat16)
    finding = mmn.find(own, sample_paths[0])
    assert finding.provenance["model"]["dtype"] == "bfloat16"


def test_a_resized_vocabulary_is_noticed(own):
    assert own.anatomy.vocab == len(own.tokenizer)
    own.model.resize_token_embeddings(len(own.tokenizer) + 8, mean_resizing=False)
    assert own.anatomy.vocab == len(own.tokenizer) + 8
    assert own.anatomy.head is own.model.lm_head


def test_running_and_reading_change_nothing(own, sample_paths):
    anatomy, facts = own.anatomy, own.facts
    mmn.find(own, sample_paths[:2], maps=True, blank=True)
    mmn.doctor(own, sample_paths[0], max_new_tokens=2)
    own.model.requires_grad_(False).train().eval()
    assert own.anatomy is anatomy
    assert own.facts is facts


def test_edits_of_ours_are_no_change(own):
    anatomy, facts = own.anatomy, own.facts
    patch = a_patch(own, {0: [1, 2]})
    with patch.applied(own):
        other = mmn.load(own.model, processor=own.processor)
        assert own.anatomy is anatomy
        assert own.facts == facts | {"patches": [patch.hash]}
    assert own.anatomy is anatomy
    assert own.facts is facts
    assert other.facts["weights_hash"] == weights_hash(own.model) == facts["weights_hash"]


def test_what_was_found_under_a_patch_says_so(own, sample_paths):
    patch = a_patch(own, {0: [3]})
    with patch.applied(own):
        assert mmn.find(own, sample_paths[0], token_ids=[]).provenance["model"]["patches"] == [patch.hash]
    assert "patches" not in own.facts


def test_a_change_below_a_patch_is_refused(own):
    a_patch(own, {0: [1, 2]}).apply(own)
    own.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"(?s)changed by something else while patches were applied.*weight"):
        _ = own.facts


def test_what_is_written_within_editing_ages_nothing(own):
    weight: Tensor = own.model.lm_head.weight
    with editing(own.model), torch.no_grad():
        weight.add_(1)
    assert age(own.model) == 0
    with torch.no_grad():
        weight.add_(1)
    assert age(own.model) == age(own.model) == 1


def test_what_another_thread_edits_while_this_one_looks_ages_nothing(own, monkeypatch):
    weight: Tensor = own.model.lm_head.weight
    looked = ages._changed

    def while_another_edits(watch):
        monkeypatch.setattr(ages, "_changed", looked)
        with editing(own.model), torch.no_grad():
            weight.add_(1)
            return [place.name for place in watch.places if not place.is_as_it_was]

    monkeypatch.setattr(ages, "_changed", while_another_edits)
    assert age(own.model) == age(own.model) == 0


def test_a_watched_model_is_let_go(random_vlm):
    import gc
    import weakref

    vlm = mmn.load(copy.deepcopy(random_vlm.model), processor=random_vlm.processor)
    _ = vlm.facts
    gone = weakref.ref(vlm.model)
    del vlm
    gc.collect()
    assert gone() is None
