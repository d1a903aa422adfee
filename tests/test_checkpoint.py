"""Checkpoints as people bring them: incomplete, misnamed, broken, pickled, of other layouts, adapters."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kits.zoo import FAMILIES, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.errors import ModelError
from mmneurons.vlm.checkpoint import read_checkpoint, running

PLAIN = {"dtype": "auto", "revision": None, "trust_remote_code": False}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The pocket model, to be changed."""
    return Path(shutil.copytree(pocket.folder(), tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def dropped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in sorted(weights)[35:]}


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    wrong = set(sorted(weights)[:35])
    return {f"old.{name}" if name in wrong else name: value for name, value in weights.items()}


def in_the_authors_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As liuhaotian/llava-v1.5-7b names its weights."""
    begins = {
        "language_model.lm_head": "lm_head_",
        "language_model.model": "model",
        "multi_modal_projector.linear_": "model.mm_projector.",
        "vision_tower": "model.vision_tower.vision_tower",
    }
    return {next(b + k.removeprefix(a) for a, b in begins.items() if k.startswith(a)): v for k, v in weights.items()}


def narrower(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(name for name in weights if name.endswith("layers.2.mlp.down_proj.weight"))
    return weights | {name: weights[name][:, :-1].contiguous()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped, r"35 of the \d+ weights.*lm_head\.weight: missing\n.*and 30 more\nGive"),
        (
            renamed,
            r"35 of the \d+ weights.*lm_head\.weight: missing\n.*Not read: 35 weights \(old\..* of the checkpoint",
        ),
        (in_the_authors_layout, r"155 of the 155 weights.*missing.*llava-hf/llava-1\.5-7b-hf"),
        (
            narrower,
            r"1 of .*layers\.2\.mlp\.down_proj.weight: of (shape \(\d+, 1023\)|another shape) there, \(\d+, 1024\)",
        ),
    ],
)
def test_a_checkpoint_that_lacks_what_runs_is_refused(folder, change, said):
    change_weights(folder, change)
    with pytest.raises(ModelError, match=f"(?s){said}"):
        mmn.load(folder, device="cpu")


def test_the_names_are_told_where_the_processor_is_missing_too(folder):
    change_weights(folder, in_the_authors_layout)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="155 of the 155 weights"):
        mmn.load(folder)


def test_weights_without_a_place_are_noted(folder, sample_paths):
    change_weights(folder, lambda weights: weights | {"model.reward_head.weight": torch.zeros(2)})
    vlm = mmn.load(folder, device="cpu")
    note = "Not read: 1 weight (model.reward_head.weight) of the checkpoint, for which the model has no place."
    assert note in mmn.find(vlm, sample_paths[0]).notes
    check = mmn.doctor(vlm, sample_paths[0], max_new_tokens=2).checks[0]
    assert check.passed
    assert check.detail == f"none is missing. {note}"


def test_doctor_says_what_it_knows_of_the_weights(vlm, sample_paths):
    given = mmn.load(vlm.model, processor=vlm.processor)
    checks = [mmn.doctor(v, sample_paths[0], max_new_tokens=2).checks[0] for v in (vlm, given)]
    assert {check.name for check in checks} == {"every weight that runs came from the checkpoint"}
    assert [check.detail for check in checks] == ["none is missing", "not known: the model came loaded"]


class Reads(nn.Module):
    """A layer that uses its part's weight without running the part, as nn.MultiheadAttention does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


def test_what_runs_is_told_from_what_does_not(random_vlm, sample_paths):
    model = copy.deepcopy(random_vlm.model)
    projector = model.model.multi_modal_projector
    projector.linear_2 = Reads(projector.linear_2)
    model.model.spare = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read, spare = "model.multi_modal_projector.linear_2.inner.weight", "model.spare.weight"
    vlm = mmn.load(model, processor=random_vlm.processor)
    picture = Image.open(sample_paths[0])
    assert running(vlm, [spare, "lm_head.weight"], picture) == {"lm_head.weight"}
    assert read in running(vlm, [spare, read], picture)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llava", "gemma4", "qwen3_vl_moe", "blip-2 (opt)", "mllama", "florence2"])
def test_a_saved_model_is_read_whole(tmp_path, name):
    family = next(family for family in FAMILIES if family.name == name)
    randomise(family.build()).save_pretrained(tmp_path)
    _, loading = read_checkpoint(str(tmp_path), PLAIN)
    assert (dict(loading.made_up), loading.unexpected) == ({}, ())


@pytest.mark.parametrize("size", [5, 100_000])
def test_a_weights_file_cut_short_is_named_so(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"(?s)broken or was cut short.*again"):
        mmn.load(folder)


@pytest.mark.parametrize("kind", ["folder", "file", "hub"])
def test_gguf_is_refused_by_name(tmp_path, kind):
    (tmp_path / "llava-v1.5-7b.Q4_K_M.gguf").write_bytes(b"GGUF")
    sources = {"folder": tmp_path, "file": tmp_path / "llava-v1.5-7b.Q4_K_M.gguf", "hub": "nobody/llava-7b-GGUF"}
    with pytest.raises(ModelError, match=r"(?s)holds GGUF files.*such as llava-hf/llava-1\.5-7b-hf"):
        mmn.load(sources[kind])


def test_pickled_weights_are_refused_with_the_line_that_converts_them(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)nothing is unpickled.*python -c") as refused:
        mmn.load(folder)
    code = refused.value.fix.partition('python -c "')[2].removesuffix('"').replace("'converted'", repr(str(folder)))
    exec(code, {})
    assert "Not read" not in "".join(mmn.load(folder, device="cpu").loading.notes)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("values", "trusted", "said"),
    [
        ({"model_type": "llava_llama"}, False, r"type 'llava_llama', which transformers .* llava-hf/llava-1\.5-7b-hf"),
        (
            {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.Config", "AutoModel": "a.Model"}},
            False,
            r"code of its own, which is not run unasked.*OpenGVLab/InternVL3-1B-hf.*--trust-remote-code",
        ),
        (
            {"model_type": "florence_2", "auto_map": {"AutoConfig": "broken.Config"}},
            True,
            r"The code that comes with.*no attribute 'forced'.*florence-community",
        ),
    ],
)
def test_types_that_transformers_does_not_know(folder, values, trusted, said):
    change_config(folder, **values)
    (folder / "broken.py").write_text("raise AttributeError(\"'Config' object has no attribute 'forced'\")")
    with pytest.raises(ModelError, match=f"(?s){said}"):
        mmn.load(folder, trust_remote_code=trusted)


def test_a_config_that_is_no_object_is_refused(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"not a vision-language model that transformers knows|Cannot load the model"):
        mmn.load(folder)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device, monkeypatch):
    monkeypatch.setattr("mmneurons.vlm.load.read_checkpoint", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=rf"(?s)no device '{device}'.*Choose one of: cpu"):
        mmn.load(device=device)
    with pytest.raises(ModelError, match=rf"no device '{device}'"):
        mmn.load(device_map=device)


def test_a_merged_model_takes_the_processor_of_the_one_it_was_made_from(folder, vlm, sample_paths):
    for path in set(folder.iterdir()) - {folder / "config.json", folder / "model.safetensors"}:
        path.unlink()
    with pytest.raises(ModelError, match=r"(?s)Cannot load the processor.*save_pretrained"):
        mmn.load(folder)
    change_config(folder, _name_or_path=str(pocket.folder()))
    merged = mmn.load(folder, dtype="float32", device="cpu")
    assert merged.caption(sample_paths[0]) == vlm.caption(sample_paths[0])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # a name that PEFT still reads
def test_an_adapter_is_put_on_the_model_that_it_names(tmp_path, vlm, sample_paths, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*down_proj")
    torch.manual_seed(0)
    with_adapter = peft.get_peft_model(copy.deepcopy(vlm.model), config)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=20.0)
    with_adapter.save_pretrained(tmp_path)
    wanted = mmn.load(with_adapter, processor=vlm.processor).caption(sample_paths[0])
    assert wanted != vlm.caption(sample_paths[0])
    loaded = mmn.load(tmp_path, dtype="float32", device="cpu")
    assert loaded.caption(sample_paths[0]) == wanted
    monkeypatch.setattr("mmneurons.vlm.checkpoint.is_installed", lambda package: False)
    with pytest.raises(ModelError, match=r"(?s)is an adapter.*peft"):
        mmn.load(tmp_path)


@pytest.mark.parametrize(
    ("base", "message"),
    [(None, "does not say which model it is for"), ("no/such-base", "Cannot load the model 'no/such-base'")],
)
def test_an_adapter_whose_model_is_not_there_is_told(tmp_path, base, message):
    pytest.importorskip("peft")
    facts = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        mmn.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # within torch.compile itself
def test_compiled_and_wrapped_models(random_vlm, sample_paths):
    processor, plain = random_vlm.processor, copy.deepcopy(random_vlm.model)
    wanted = random_vlm.caption(sample_paths[0])
    for wrapped in (torch.compile(plain), nn.DataParallel(plain)):
        assert mmn.load(wrapped, processor=processor).caption(sample_paths[0]) == wanted  # pyright: ignore[reportArgumentType]
    layer = plain.model.language_model.layers[1]
    layer.forward = torch.compile(layer.forward)
    with pytest.raises(ModelError, match=r"(?s)compiled.*Compiled: model\.language_model\.layers\.1\n.*before torch"):
        mmn.load(plain, processor=processor)
    del layer.forward
    plain.compile()
    with pytest.raises(ModelError, match="compiled"):
        mmn.load(plain, processor=processor)


def test_results_without_names(random_vlm, folder):
    model = copy.deepcopy(random_vlm.model)
    model.model.config.return_dict = False
    with pytest.raises(ModelError, match=r"(?s)return_dict=False.*model\.config\.return_dict = True"):
        mmn.load(model, processor=random_vlm.processor)
    change_config(folder, return_dict=False)
    assert mmn.load(folder, device="cpu").model.config.return_dict
