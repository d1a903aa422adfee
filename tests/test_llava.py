"""LLaVA in its authors' layout, next to what their own code computed with the same numbers.

tests/golden/llava_published.json was made with github.com/haotian-liu/LLaVA of May 2024 under transformers 4.37.2:
their model classes with a tower, every floating tensor of the state dict drawn as `drawn` draws it here, run on the
rows of `ROWS` with the pictures of `PICTURES` as their `process_images` makes them. It holds, for each kind, the
config, the shapes of the weights, the mean of each channel of each picture, and logits: at the last position of each
row alone (`image`) and padded on the left to one batch (`padded`), at the last three positions of the second row
(`positions`), and of words alone (`words`).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.library import hf
from kits.processor_zoo import byte_level, metaspace_bpe
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mmneurons as mmn
from mmneurons.errors import ModelError
from mmneurons.vlm.llava import conversation_of, published_processor
from mmneurons.vlm.prompts import prompt_text

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llava_published.json").read_text())
ROWS = [[1, 5, -200, 9, 8], [1, 6, 7, -200, 10, 11, 12], [1, -200, 20]]
GENERATOR = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(GENERATOR.integers(0, 255, (height, width, 3), dtype=np.uint8))
    for height, width in ((28, 28), (20, 44), (50, 30))
]
N_WORDS, N_PATCHES = 23, 4


def drawn(name: str, shape: list[int]) -> torch.Tensor:
    """A weight that depends on its name alone."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.4, shape)
    return torch.from_numpy(values.astype("float32"))


def published(folder: Path, kind: str, *, with_tower: bool = True, **config) -> Path:
    """Write a published checkpoint, and its tower beside it."""
    tower = folder / "tower"
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    made = hf.CLIPVisionModel(hf.CLIPVisionConfig(**vision, image_size=28, patch_size=14))
    made.save_pretrained(tower)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    hf.CLIPImageProcessorPil(**size).save_pretrained(tower)
    folder = folder / "llava-v1.5-tiny"
    words = {f"w{i}": i for i in range(3, N_WORDS)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    weights = {name: drawn(name, shape) for name, shape in GOLDEN[kind]["weights"].items()}
    if not with_tower:
        weights = {name: value for name, value in weights.items() if "vision_tower" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = GOLDEN[kind]["config"] | {"mm_vision_tower": str(tower), "torch_dtype": "float32"} | config
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def same(found: torch.Tensor, told: list[float]) -> None:
    torch.testing.assert_close(found.flatten(), torch.tensor(told, dtype=torch.float32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_published_llava_computes_what_its_authors_code_does(tmp_path, kind):
    vlm = mmn.load(published(tmp_path, kind))
    picture = vlm.model.config.image_token_id
    assert picture == N_WORDS
    # Pictures, padded to a square or cropped, as theirs.
    pixels = torch.cat([vlm.encode([image], "w5")["pixel_values"] for image in PICTURES])
    same(pixels.double().mean((2, 3)).float(), GOLDEN[kind]["pixels"])
    rows = [[i for token in row for i in ([picture] * N_PATCHES if token == -200 else [token])] for row in ROWS]

    def logits(ids, pixels=None, mask=None):
        inputs = {"input_ids": torch.tensor(ids)}
        if mask is not None:
            mask = torch.tensor(mask)
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        with torch.no_grad():
            return vlm.model(**inputs, pixel_values=pixels).logits[..., :N_WORDS]

    # Each row alone, all in one batch, and words without a picture.
    alone = [logits([row], pixels[i : i + 1]) for i, row in enumerate(rows)]
    same(torch.cat([one[:, -1] for one in alone]), GOLDEN[kind]["image"])
    same(alone[1][0, -3:], GOLDEN[kind]["positions"])
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    same(logits(ids, pixels, mask)[:, -1], GOLDEN[kind]["padded"])
    same(logits([[1, 5, 9, 8, 7]])[0, -1], GOLDEN[kind]["words"])
    assert mmn.doctor(vlm).passed


def test_a_tower_that_is_not_in_the_checkpoint_is_the_one_that_is_named(tmp_path):
    folder = published(tmp_path, "llava_llama-mlp", with_tower=False, mm_vision_tower="nobody/clip")
    with pytest.raises(ModelError, match=r"vision tower 'nobody/clip'(.|\n)*vision_tower="):
        mmn.load(folder)
    vlm = mmn.load(folder, vision_tower=str(tmp_path / "tower"))
    own = hf.CLIPVisionModel.from_pretrained(tmp_path / "tower").state_dict()
    for name, value in vlm.model.model.vision_tower.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_it_is_found_edited_and_exported(tmp_path):
    vlm = mmn.load(published(tmp_path, "llava_llama-mlp"))
    finding = mmn.find(vlm, PICTURES[1], caption="w7 w9", words="w9", maps=True, top=2)
    assert finding.nouns[0].neurons[0].maps
    assert finding.views[0] is not None
    assert finding.views[0].size == (28, 28)
    mmn.export(vlm, [], tmp_path / "out")
    again = mmn.load(tmp_path / "out")
    assert mmn.find(again, PICTURES[1], caption="w7 w9", words="w9", top=2).nouns[0].logit == pytest.approx(
        finding.nouns[0].logit, abs=1e-5
    )


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "anyres, mm_patch_merge_type"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"mm_resampler_type": "perceiver"}, "perceiver"),
        ({"_name_or_path": "liuhaotian/LLaVA-Lightning-MPT-7B-preview"}, "mpt"),
    ],
)
def test_what_is_not_mapped_is_refused_with_what_to_use(tmp_path, config, seen):
    with pytest.raises(ModelError, match=rf"(?s)not mapped here.*{seen}.*llava-hf/llava-v1\.6-vicuna-7b-hf"):
        mmn.load(published(tmp_path, "llava_llama-mlp", **config))


def test_pickled_weights_are_refused_with_the_line_that_writes_them_anew(tmp_path):
    folder = published(tmp_path, "llava_llama-mlp")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"(?s)nothing is unpickled.*safetensors.torch"):
        mmn.load(folder)


@pytest.mark.parametrize(
    ("source", "model_type", "conversation"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava", "vicuna"),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llava", "llama-2"),
        ("someone/llava-mistral", "llava_mistral", "mistral"),
        ("someone/llava-qwen", "llava_qwen", "chatml"),
    ],
)
def test_the_conversation_is_the_one_of_the_authors(source, model_type, conversation):
    assert conversation_of(source, {"model_type": model_type}) == conversation


def test_the_question_is_written_as_the_authors_write_it(tmp_path):
    # Theirs tokenises what is behind the picture alone; SentencePiece puts a space before it, byte-level BPE none.
    folder = published(tmp_path, "llava_llama-mlp")
    config = json.loads((folder / "config.json").read_text())
    for tokenizer, joint in ((metaspace_bpe(), " "), (byte_level({}), "")):
        tokenizer.save_pretrained(folder)
        text = prompt_text(published_processor(str(folder), config), "Which colour?", "", 1)
        assert text.startswith("A chat between a curious user and an artificial intelligence assistant. ")
        assert text.endswith(f"user's questions. USER: <image>{joint}\nWhich colour? ASSISTANT:")
