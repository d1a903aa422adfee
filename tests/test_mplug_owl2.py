"""mPLUG-Owl2 as published, next to what its authors' own code computed with the same numbers.

tests/golden/mplug_owl2_published.json was made with github.com/X-PLUG/mPLUG-Owl (mPLUG-Owl2, commit 0f3068f) under
transformers 4.31.0, which it pins: their `MPLUGOwl2LlamaForCausalLM`, every floating tensor of the state dict drawn as
`drawn` draws it here (but for the places of queries and patches, `fixed`, which they compute), run on the rows of
`ROWS` with the pictures of `PICTURES` as their `process_images` makes them. It holds the config, the shapes of the
weights, the mean of each channel of each picture, the vectors of the pictures (`features`), and logits: of each row
alone (`image`), of two pictures in one row (`two`), of words alone (`words`); at each of five greedy steps with their
cache (`cached`) the tokens of which are `said`; and of the last three positions of all rows in one batch (`padded`):
their blocks were given the embeddings and indicators that they make of each row, padded on the left, and the mask of
that, since the mask that they make themselves does not fit rows that are padded. `prompts` are questions as their
conversation writes them, and the tokens that their `tokenizer_image_token` makes of them, -200 standing for a picture.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.library import hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import mmneurons as mmn
from mmneurons.errors import ModelError, SettingError
from mmneurons.vlm.grid import find_grids
from mmneurons.vlm.mplug_owl2 import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from mmneurons.vlm.prompts import prompt_text
from mmneurons.vlm.vlm import VLM

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mplug_owl2_published.json").read_text())
ROWS = [[1, 5, -200, 9, 8], [1, 6, 7, -200, 10, 11, 12], [1, -200, 20]]
GENERATOR = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(GENERATOR.integers(0, 255, (height, width, 3), dtype=np.uint8))
    for height, width in ((28, 28), (20, 44), (50, 30))
]
N_WORDS, N_VECTORS = 23, 4
WORDS = [" ", " USER:", " ASSISTANT:", " Which", " colour?", " An", " image", " of", " a", " dog", " cat"]
WORDS += [f" w{i}" for i in range(3 + len(WORDS), N_WORDS)]


def drawn(name: str, shape: list[int]) -> torch.Tensor:
    """A weight that depends on its name alone, or a fixed one."""
    fixed = GOLDEN["fixed"].get(name.rpartition("attention.")[2])
    if fixed is not None:
        return torch.tensor(fixed, dtype=torch.float32).reshape(shape)
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.4, shape)
    return torch.from_numpy(np.asarray(values, dtype="float32"))


def published(folder: Path, **config) -> Path:
    """Write a checkpoint as published: Llama's tokenizer, CLIP's pictures, and no processor."""
    folder.mkdir(exist_ok=True)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    hf.CLIPImageProcessorPil(**size).save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *(word.replace(" ", "\u2581") for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    weights = {name: drawn(name, shape) for name, shape in GOLDEN["weights"].items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = GOLDEN["config"] | {"torch_dtype": "float32"} | config
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def vlm(folder) -> VLM:
    return mmn.load(folder)


def same(found: torch.Tensor, told: list) -> None:
    expected = torch.tensor(told, dtype=torch.float32).flatten()
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-5)


def expanded(ids: list[int]) -> list[int]:
    """The same with as many tokens for a picture as it has vectors."""
    return [i for token in ids for i in ([N_WORDS] * N_VECTORS if token == -200 else [token])]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, padded on the left."""
    rows = [expanded(row) for row in ROWS]
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def pixels_of(vlm: VLM, pictures: list[Image.Image] = PICTURES) -> torch.Tensor:
    return torch.cat([vlm.encode([picture], "a")["pixel_values"] for picture in pictures])


@torch.no_grad()
def test_it_computes_what_its_authors_code_does(vlm):
    assert vlm.loading is not None
    assert (vlm.loading.made_up, vlm.loading.unexpected) == ({}, ())
    pixels = pixels_of(vlm)
    same(pixels.double().mean((2, 3)).float(), GOLDEN["pixels"])
    same(vlm.model.model.encode_pictures(pixels), GOLDEN["features"])
    for i, row in enumerate(ROWS):
        ids = torch.tensor([expanded(row)])
        same(vlm.model(input_ids=ids, pixel_values=pixels[i : i + 1]).logits, GOLDEN["image"][i])
    same(vlm.model(input_ids=torch.tensor([[1, 5, 9, 8, 7]])).logits, GOLDEN["words"])
    two = torch.tensor([expanded([1, 5, -200, 6, -200, 9])])
    same(vlm.model(input_ids=two, pixel_values=pixels[:2]).logits, GOLDEN["two"])
    ids, mask = batch()
    same(vlm.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, -3:], GOLDEN["padded"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_generates_what_their_code_says_to_each_row(vlm, use_cache):
    ids, mask = batch()
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "use_cache": use_cache}
    made = vlm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels_of(vlm),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert made.sequences[:, ids.shape[1] :].tolist() == GOLDEN["said"]
    same(torch.stack(made.logits, 1), GOLDEN["cached"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_each_kind_of_attention_computes_the_same(folder, attention):
    vlm = mmn.load(folder, attn_implementation=attention)
    ids, mask = batch()
    made = vlm.model(input_ids=ids, attention_mask=mask, pixel_values=pixels_of(vlm))
    same(made.logits[:, -3:], GOLDEN["padded"])


def test_a_fresh_model_has_the_names_and_the_places_of_the_published_one():
    state = MplugOwl2ForConditionalGeneration(MplugOwl2Config(**GOLDEN["config"])).state_dict()
    told = {name: shape for name, shape in GOLDEN["weights"].items() if not name.endswith("inv_freq")}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == told
    for name, tensor in state.items():
        if name.rpartition("attention.")[2] in GOLDEN["fixed"]:
            same(tensor, GOLDEN["fixed"][name.rpartition("attention.")[2]])


def test_what_the_config_leaves_out_is_as_published():
    config = MplugOwl2Config()
    assert (config.image_token_id, config.n_image_tokens) == (32000, 65)
    assert (config.vision_shape.image_size, config.abstractor_shape.grid_size) == (448, 32)


@pytest.mark.parametrize("told", GOLDEN["prompts"], ids=lambda told: f"{told['pictures']}-{told['answer']}")
def test_a_question_is_written_as_the_authors_write_it(vlm, told):
    text = prompt_text(vlm.processor, told["question"], told["answer"], told["pictures"])
    assert text == told["text"]
    inputs = vlm.encode([PICTURES[: told["pictures"]]], told["question"], told["answer"])
    assert inputs["input_ids"].tolist() == [expanded(told["ids"])]
    assert len(inputs.get("pixel_values", ())) == told["pictures"]


def test_the_token_of_a_picture_is_not_taken_from_words(vlm):
    with pytest.raises(SettingError, match=r"<\|image\|>"):
        vlm.encode([[PICTURES[0]]], "Which <|image|> dog")
    with pytest.raises(ValueError, match="1 pictures for 2 times"):
        vlm.processor(images=PICTURES[:1], text="<|image|><|image|>")
    with pytest.raises(ValueError, match="4 tokens stand for pictures, which have 8 vectors"):
        vlm.model(input_ids=torch.tensor([[1, *[N_WORDS] * N_VECTORS]]), pixel_values=pixels_of(vlm)[:2])


def test_doctor_passes_and_no_map_is_drawn(vlm):
    assert mmn.doctor(vlm).passed
    inputs = vlm.encode([PICTURES[0]], "Which colour?")
    assert find_grids(vlm.model, inputs, 1) == (
        "image tokens are queries of model.visual_abstractor, which have no place in the picture"
    )


def test_it_is_found_edited_and_exported_under_the_published_names(vlm, folder, tmp_path):
    answer = vlm.caption(PICTURES, "Which colour?", max_new_tokens=2)
    finding = mmn.find(vlm, PICTURES[1], caption="a dog", maps=True, top=3)
    assert [noun.word for noun in finding.nouns] == ["dog"]
    assert any("no place in the picture" in note for note in finding.notes)
    assert finding.nouns[0].neurons[0].maps == ()
    said = answer[0].split()[0]
    patch = mmn.edit(vlm, PICTURES[:1], source=said, target="cat", prompt="Which colour?", max_new_tokens=2)
    with patch.applied(vlm):
        assert vlm.caption(PICTURES[0], "Which colour?", max_new_tokens=1) == "cat"
    assert vlm.caption(PICTURES, "Which colour?", max_new_tokens=2) == answer
    mmn.export(vlm, [patch], tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == {name for name in before if not name.endswith("inv_freq")}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = {neuron.layer for neuron in patch.neurons}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers}
    again = mmn.load(tmp_path / "out")
    assert again.caption(PICTURES[0], "Which colour?", max_new_tokens=1) == "cat"
    assert again.processor.n_image_tokens == N_VECTORS


def test_pickled_weights_are_refused_with_a_line_that_writes_them_anew(folder, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    for i, part in enumerate((names[:40], names[40:]), start=1):
        torch.save({name: weights[name] for name in part}, copy / f"pytorch_model-{i}-of-2.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="nothing is unpickled") as refused:
        mmn.load(copy)
    (line,) = re.findall(r"python (-c \".*\")", str(refused.value))
    subprocess.run([sys.executable, *shlex.split(line)], check=True)
    loading = mmn.load(copy).loading
    assert loading is not None
    assert loading.made_up == {}


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("visual_model", {"use_cls_token": False}),
        ("visual_model", {"use_post_layernorm": False}),
        ("visual_abstractor", {"add_v2t_pos_emb": True}),
        ("visual_abstractor", {"encoder_hidden_size": 32}),
    ],
)
def test_parts_that_the_published_model_does_not_have_are_refused(tmp_path, part, entries):
    visual = GOLDEN["config"]["visual_config"]
    changed = visual | {part: visual[part] | entries}
    with pytest.raises(ModelError, match=r"(?s)cannot build.*not mPLUG-Owl2's"):
        mmn.load(published(tmp_path / "other", visual_config=changed))
