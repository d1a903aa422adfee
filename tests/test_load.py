import copy
import json
import shutil

import pytest
import torch
from conftest import make_random_vlm
from kits.library import hf, lacking
from PIL import Image
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.errors import ModelError
from mmneurons.vlm.anatomy.find import find_anatomy
from mmneurons.vlm.provenance import weights_hash


def test_the_pocket_model_is_an_ordinary_folder(vlm):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(pocket.folder(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(pocket.folder())
    sample = pocket.samples()[0]
    from PIL import Image

    text = "USER: <image>\nDescribe the image in few words. ASSISTANT: An image of"
    batch = processor(images=[Image.open(sample.path)], text=[text], return_tensors="pt")
    ids = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **batch, max_new_tokens=32, do_sample=False
    )[:, batch["input_ids"].shape[1] :]
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == vlm.caption(str(sample.path))
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert (pocket.folder() / "model.safetensors").stat().st_size < 16e6


def test_the_pocket_model_has_the_same_weights_under_every_version_of_transformers(vlm):
    """Key names that a version does not know leave random numbers in their place."""
    assert weights_hash(vlm.model) == "a08c76217174a1b0011c2081c3633c02d54467b0ada7e3049c5ce15cfab5f29c"


def test_anatomy_of_a_llava(random_vlm):
    anatomy = random_vlm.anatomy
    language = random_vlm.model.model.language_model
    assert [ffn.module for ffn in anatomy.ffns] == [layer.mlp.down_proj for layer in language.layers]
    assert [source.module for source in anatomy.sources] == [layer.self_attn.o_proj for layer in language.layers]
    assert anatomy.norm_module is language.norm
    assert anatomy.head is random_vlm.model.lm_head
    assert anatomy.n_neurons == 240
    torch.testing.assert_close(anatomy.norm.weight, language.norm.weight.detach())


def test_a_config_with_several_end_tokens_is_analysed(random_vlm):
    model = copy.deepcopy(random_vlm.model)
    model.config.text_config.eos_token_id = [1, 2]  # as Gemma 3 and Llama 3 have them
    assert find_anatomy(model).doubts == ()


def test_an_ffn_as_wide_as_the_stream_is_found_by_what_it_writes(vlm):
    square = make_random_vlm(vlm, intermediate_size=48)
    layers = square.model.model.language_model.layers
    assert [ffn.module for ffn in square.anatomy.ffns] == [layer.mlp.down_proj for layer in layers]
    assert [type(ffn.activation).__name__ for ffn in square.anatomy.ffns] == ["SiLUActivation"] * 3
    assert square.anatomy.doubts == ()


def test_two_matches_are_an_error_that_lists_both(random_vlm):
    model = copy.deepcopy(random_vlm.model)
    model.model.language_model.other_layers = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(
        ModelError, match=r"(?s)found 2.*language_model\.layers.*language_model\.other_layers.*decoder="
    ):
        find_anatomy(model)


def test_a_block_without_an_ffn_is_an_error_that_names_it(random_vlm):
    model = copy.deepcopy(random_vlm.model)
    model.model.language_model.layers[1].mlp = nn.Identity()
    with pytest.raises(ModelError, match=r"output projection of block '.*layers\.1'"):
        find_anatomy(model)


def test_the_decoder_can_be_named_and_a_wrong_name_is_told(random_vlm):
    named = mmn.load(random_vlm.model, processor=random_vlm.processor, decoder="model.language_model")
    assert named.anatomy.decoder_name == "model.language_model"
    with pytest.raises(ModelError, match=r"no part named 'model\.nothing'"):
        mmn.load(random_vlm.model, processor=random_vlm.processor, decoder="model.nothing")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "Cannot load the model"),
        ("config.json", "not a vision-language model"),
        ("preprocessor_config.json", "Cannot load the processor"),
    ],
)
def test_a_folder_that_lacks_a_file(tmp_path, missing, message):
    folder = tmp_path / "model"
    shutil.copytree(pocket.folder(), folder)
    (folder / missing).unlink()
    if missing == "preprocessor_config.json" and not hasattr(hf.configuration_utils, "PreTrainedConfig"):
        lacking("makes up an image processor")
    with pytest.raises(ModelError, match=message):
        mmn.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.num_attention_heads", "x", "cannot build"),
        ("text_config.hidden_act", "nope", "cannot build.*\n.*'nope'"),
        ("vision_config.num_attention_heads", 0, "cannot build.*\n.*zero"),
        ("image_token_index", 4, "own code fails on this prompt.*\n.*image tokens do not match"),
        ("vision_config.image_size", 113, r"own code fails on this prompt.*\n.*113\*113"),
        ("vision_config.num_channels", 4, "weights of .* are not in its checkpoint"),
    ],
)
def test_a_config_that_contradicts_its_processor_or_itself_is_told(tmp_path, path, value, message):
    folder = tmp_path / "model"
    shutil.copytree(pocket.folder(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    *way, last = path.split(".")
    holder = config
    for key in way:
        holder = holder[key]
    assert last in holder
    holder[last] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        mmn.load(folder, device="cpu").caption(Image.new("RGB", (112, 112)))


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    shutil.copytree(pocket.folder(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="Cannot load the processor"):
        mmn.load(tmp_path / "model")


def test_a_folder_that_does_not_exist():
    with pytest.raises(ModelError, match=r"Cannot load the model 'no/such-model'"):
        mmn.load("no/such-model")


def test_a_language_model_is_not_a_vision_language_model(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a vision-language model"):
        mmn.load(tmp_path)
    with pytest.raises(ModelError, match="'gpt2' is not a vision-language model"):
        mmn.load(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)), processor=object())


def test_other_objects_are_refused(vlm):
    with pytest.raises(ModelError, match="not a model of the transformers library"):
        mmn.load(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="without a processor"):
        mmn.find(mmn.load(vlm.model), Image.new("RGB", (8, 8)))
    with pytest.raises(ModelError, match="no dtype 'int8'"):
        mmn.load(dtype="int8")


def test_dtype_is_passed_on():
    assert mmn.load(dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_a_config_that_asks_for_code_of_its_own_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pocket.folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(ModelError):
        mmn.load(folder)


def test_one_changed_weight_changes_the_hash(random_vlm):
    model = copy.deepcopy(random_vlm.model)
    before = weights_hash(model)
    assert weights_hash(copy.deepcopy(model)) == before
    weight = model.lm_head.weight.data
    weight[3, 5] += 1e-3
    changed = weights_hash(model)
    weight[3, 5] -= 1e-3
    weight[3, 5], weight[3, 6] = weight[3, 6].item(), weight[3, 5].item()
    assert len({before, changed, weights_hash(model)}) == 3


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (ImportError("requires accelerate: `pip install 'accelerate>=1.1.0'`"), "accelerate", "pip install accelerate"),
        (ValueError("requires `accelerate`. You can install it"), "package accelerate", "pip install accelerate"),
        (ImportError("`pip install -U bitsandbytes>=0.46.1`"), "package bitsandbytes", "pip install bitsandbytes"),
        (ValueError("Some modules are dispatched on the CPU"), "with device_map", "other options"),
        (OSError("is not a valid model identifier"), "Cannot load the model", "hub id"),
        (ValueError("Too old: `pip install --upgrade transformers`"), "Cannot load the model", "other options"),
        (ValueError("Unrecognized configuration class"), "not a vision-language model", "llava"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_told(monkeypatch, error, what, fix):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("mmneurons.vlm.checkpoint.AutoModelForImageTextToText.from_pretrained", refuse)
    monkeypatch.setattr("mmneurons.vlm.processors.is_installed", lambda package: package == "transformers")
    with pytest.raises(ModelError, match=f"(?s){what}.*{fix}"):
        mmn.load("some/model", device_map="auto")
