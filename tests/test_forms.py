"""Whole models whose weights come in other forms: LoRA, 8 and 4 bits, off-loaded; and models that were changed before.

`python tests/test_forms.py` writes the table of end-to-end differences into docs/reference/models.md.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.finding.scoring import score_targets
from mmneurons.vlm import weights
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM

QUANTISED = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits (nf4)": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "4 bits (fp4, double)": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
}
LANGUAGE = "model.language_model"
PLACES = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu", LANGUAGE: "disk"}


def load_quantised(name: str) -> VLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        return mmn.load(pocket.folder(), dtype="float32", quantization_config=QUANTISED[name], device_map="cpu")


@pytest.fixture(scope="module")
def packed():
    made: dict[str, VLM] = {}
    return lambda name: made.setdefault(name, made.get(name) or load_quantised(name))


@pytest.fixture(scope="module")
def image(sample_paths):
    return sample_paths[0]


def dequantised(vlm: VLM) -> VLM:
    """The same model with every packed projection replaced by a plain one that holds its dense matrix."""
    model = copy.deepcopy(vlm.model)
    for path, module in list(model.named_modules()):
        if weights.is_quantised(module) and hasattr(module, "in_features"):
            dense, bias = weights.dense(module).float(), weights.bias(module)
            plain = nn.Linear(dense.shape[1], dense.shape[0], bias=bias is not None)
            with torch.no_grad():
                plain.weight.copy_(dense)
                if bias is not None:
                    plain.bias.copy_(bias)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    return mmn.load(model, processor=vlm.processor)


def difference(one: mmn.Finding, other: mmn.Finding) -> tuple[float, float]:
    """Largest difference of scores over the largest score, and the share of top neurons shared, over nouns of both."""
    apart, shared, n = 0.0, 0, 0
    for mine in one.nouns:
        theirs = next((noun for noun in other.nouns if (noun.word, noun.step) == (mine.word, mine.step)), None)
        if theirs is None:
            continue
        scores = {found.neuron: found.score for found in theirs.neurons}
        both = [(found.score, scores[found.neuron]) for found in mine.neurons if found.neuron in scores]
        apart = max([apart, *(abs(a - b) / mine.neurons[0].score for a, b in both)])
        shared, n = shared + len(both), n + len(mine.neurons)
    return apart, shared / max(n, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_read_as_it_computes(packed, image, name):
    vlm = packed(name)
    report = mmn.doctor(vlm, image, max_new_tokens=8)
    assert report.passed, report.checks
    finding = mmn.find(vlm, image)
    assert not any("Approximate" in note for note in finding.notes)
    said = finding.provenance["model"]["w_out_class"]
    assert said == ("Linear8bitLt" if name == "8 bits" else "Linear4bit")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", QUANTISED)
def test_given_the_same_activations_scores_are_those_of_the_dequantised_copy(packed, image, name):
    vlm = packed(name)
    plain = dequantised(vlm)
    inputs = vlm.encode([mmn.pocket.scene(3, nouns=["dog"]).image], answer_prefix="An image of")
    with record(vlm.anatomy) as recording:
        answers = vlm.generate(inputs, 8)
    from mmneurons.finding import batch
    from mmneurons.settings import FindSettings

    choices = FindSettings()
    targets = batch.targets_of(vlm, answers, 0, choices)
    assert targets
    ours = score_targets(vlm, recording, answers, targets, choices)
    copied = score_targets(plain, replace(recording, anatomy=plain.anatomy), answers, targets, choices)
    torch.testing.assert_close(ours.scores, copied.scores, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours.scores, torch.zeros_like(ours.scores))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_spread_over_cpu_and_disk_the_findings_are_the_same(vlm, image, tmp_path):
    spread = mmn.load(pocket.folder(), dtype="float32", device_map=PLACES, offload_folder=str(tmp_path))
    meta = [name for name, parameter in spread.model.named_parameters() if parameter.is_meta]
    assert meta, "nothing was off-loaded"
    mine, theirs = (mmn.find(each, image, maps=True, blank=True) for each in (spread, vlm))
    assert difference(mine, theirs) == (pytest.approx(0, abs=1e-4), 1.0)
    assert mine.nouns[0].neurons[0].maps[0][3] == pytest.approx(theirs.nouns[0].neurons[0].maps[0][3], abs=1e-4)
    assert mine.provenance["model"]["weights_hash"] == theirs.provenance["model"]["weights_hash"]
    assert mmn.doctor(spread, image, max_new_tokens=6).passed
    assert mmn.neurons_for(spread, "dog", top=3) == mmn.neurons_for(vlm, "dog", top=3)
    assert meta == [name for name, parameter in spread.model.named_parameters() if parameter.is_meta]


# Models that their owner has changed


def lora(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        config = LoraConfig(r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False, **options)
        return get_peft_model(copy.deepcopy(model), config)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> list[tuple[str, int, int]]:
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("wrapped", ["PEFT model", "model inside"])
def test_lora_is_read_as_it_computes_and_left_attached(vlm, image, wrapped):
    tuned = lora(vlm.model)
    adopted = mmn.load(tuned if wrapped == "PEFT model" else tuned.get_base_model(), processor=vlm.processor)
    before = state(tuned)
    attached = mmn.find(adopted, image)
    assert mmn.doctor(adopted, image, max_new_tokens=6).passed
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())
    merged = mmn.load(copy.deepcopy(tuned).merge_and_unload(), processor=vlm.processor)
    assert difference(attached, mmn.find(merged, image)) == (pytest.approx(0, abs=1e-3), 1.0)
    assert attached.nouns[0].neurons[0].score != mmn.find(vlm, image).nouns[0].neurons[0].score


def test_resized_embeddings_are_kept_and_padding_rows_say_nothing(vlm, image):
    model = copy.deepcopy(vlm.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(len(vlm.tokenizer) + 60, mean_resizing=False)
    with torch.no_grad():  # rows that every neuron would say, were they tokens; none is the answer itself
        model.lm_head.weight[len(vlm.tokenizer) :] = 5 * torch.randn(60, 192)
        model.lm_head.weight[len(vlm.tokenizer) :] -= 0
    resized = mmn.load(model, processor=vlm.processor)
    assert resized.anatomy.vocab == len(vlm.tokenizer) + 60
    said = mmn.explain_neuron(resized, "L0.u945")
    assert said.tokens == mmn.explain_neuron(vlm, "L0.u945").tokens
    assert "60 rows of padding" in mmn.doctor(resized, image, max_new_tokens=2).structure["head"]


def test_hooks_of_the_user_stay_and_what_they_change_is_told(vlm, image):
    model = copy.deepcopy(vlm.model)
    calls = []
    model.model.language_model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    adopted = mmn.load(model, processor=vlm.processor)
    assert adopted.anatomy.doubts == ()
    adopted.caption(image)  # transformers puts hooks of its own on the vision tower at the first run
    before = hooks(model)
    mmn.find(adopted, image)
    assert hooks(model) == before
    assert calls
    model.model.language_model.layers[2].register_forward_hook(lambda m, i, output: torch.tanh(output))
    bent = mmn.load(model, processor=vlm.processor)
    assert "layers.2" in bent.anatomy.doubts[0]
    report = mmn.doctor(bent, image, max_new_tokens=4)
    failed = {check.name for check in report.checks if not check.passed}
    assert "every write into the residual stream is known" in failed
    assert any("approximate: error" in check.detail for check in report.checks)
    assert any("Approximate" in note for note in mmn.find(bent, image, words="a").notes)


def test_a_model_object_is_left_bit_for_bit_as_it_was(vlm, image):
    model = copy.deepcopy(vlm.model).train()
    before, own = state(model), model.generation_config
    flags = [(name, module.training) for name, module in model.named_modules()]
    adopted = mmn.load(model, processor=vlm.processor)
    mmn.find(adopted, image, maps=True, blank=True)
    mmn.doctor(adopted, image, max_new_tokens=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(name, module.training) for name, module in model.named_modules()] == flags
    assert model.generation_config is own
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


BEGIN, END = "<!-- begin: tests/test_forms.py -->", "<!-- end: tests/test_forms.py -->"


def table() -> str:
    """End-to-end differences between quantised models and their dequantised copies, on four samples."""
    images = [str(sample.path) for sample in pocket.samples()[:4]]
    rows = [
        "| weights | captions equal | scores differ by, of the top score | top 10 shared |",
        "| --- | --- | --- | --- |",
    ]
    for name in QUANTISED:
        packed = load_quantised(name)
        plain = dequantised(packed)
        pairs = list(zip(mmn.find(packed, images), mmn.find(plain, images), strict=True))
        same = sum(a.caption == b.caption for a, b in pairs)
        apart = [difference(a, b) for a, b in pairs]
        rows.append(
            f"| {name} | {same} of {len(pairs)} | at most {max(a for a, _ in apart):.1e} "
            f"| {sum(s for _, s in apart) / len(apart):.0%} |"
        )
    return "\n".join(rows)


def test_the_page_has_the_table():
    text = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    for name in QUANTISED:
        assert f"| {name} |" in text, "write it anew: python tests/test_forms.py"


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
