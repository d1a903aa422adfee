"""Exported models: plain transformers says the same, nothing else changed, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from filelock import FileLock
from kits import processor_zoo, zoo
from kits.library import hf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.errors import ModelError, SettingError
from mmneurons.patches.export import export
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.settings import PROMPT
from mmneurons.vlm.columns import column_hashes
from mmneurons.vlm.provenance import weights_hash
from mmneurons.vlm.vlm import VLM

IMAGES = [pocket.scene(i, ["dog"]).image for i in range(4)]


def a_patch(vlm: VLM, places: dict[tuple[int, int | None], list[int]], seed: int = 0, size: float = 1.0) -> Patch:
    """Random changes: {(layer, expert): columns}."""
    random, parts = torch.Generator().manual_seed(seed), []
    for place, columns in places.items():
        indices = torch.tensor(columns)
        hashes = column_hashes(ledger_of(vlm).pristine(place, indices))
        deltas = size * torch.randn(len(columns), vlm.anatomy.hidden, generator=random)
        parts.append(PatchPart(*place, indices, hashes, deltas))
    return Patch(vlm.anatomy.hidden, tuple(parts), None, {"seed": seed})


def state(vlm: VLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture
def live(random_vlm):
    """The model; after the test it is as it was, its config too."""
    before, config = weights_hash(random_vlm.model), random_vlm.model.config.to_dict()
    yield random_vlm
    for patch in ledger_of(random_vlm).active:
        patch.revert(random_vlm)
    assert weights_hash(random_vlm.model) == before
    assert random_vlm.model.config.to_dict() == config


PLAIN = """
import json, sys
sys.modules["mmneurons"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, prompt, *images = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
texts = []
for image in images:
    asked = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}], add_generation_prompt=True
    )
    inputs = processor(images=Image.open(image), text=f"{asked} An image of", return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
    texts.append(processor.decode(made, skip_special_tokens=True).strip())
print(json.dumps(texts))
"""


def test_plain_transformers_says_the_same_without_us(vlm, tmp_path):
    patch = a_patch(vlm, {(4, None): list(range(300)), (2, None): [7]}, size=3.0)
    paths = []
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    usual = vlm.caption(list(paths), max_new_tokens=12)
    with patch.applied(vlm):
        expected = vlm.caption(list(paths), max_new_tokens=12)
    assert expected != usual
    folder = export(vlm, [patch], tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), PROMPT, *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    again = mmn.load(folder)
    assert again.caption(list(paths), max_new_tokens=12) == expected
    assert again.model.dtype == vlm.model.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_columns_are_the_patched_ones_and_the_rest_is_the_same(vlm, tmp_path, dtype):
    from conftest import make_random_vlm

    model = make_random_vlm(vlm, dtype)
    before, patch = state(model), a_patch(model, {(1, None): [3, 40]})
    written = loaded(export(model, [patch], tmp_path / "out"))
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    changed = before[name].clone()
    for column, delta in zip([3, 40], patch.deltas(patch.parts[0]), strict=True):
        changed[:, column] = (before[name][:, column].float() + delta).to(dtype)
    assert same(written, before | {name: changed})
    assert same(state(model), before)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == dtype


def test_what_is_active_does_not_matter_and_stays(live, tmp_path):
    """Active and given counts once; active and not given is left out; both touch one column."""
    given, other, third = (a_patch(live, {(0, None): [1, 5], (i, None): [9]}, i) for i in (1, 2, 1))
    third = 2 * third
    with given.applied(live), third.applied(live):
        both = state(live)
    with given.applied(live), other.applied(live):
        active, now = ledger_of(live).active, state(live)
        assert same(loaded(export(live, [third, given], tmp_path / "out")), both)
        assert ledger_of(live).active == active
        assert same(state(live), now)
        pristine = loaded(export(live, [], tmp_path / "none"))
    assert same(pristine, state(live))


def test_the_folder_says_what_it_is(vlm, tmp_path):
    patches = [a_patch(vlm, {(0, None): [1]}, seed) for seed in range(2)]
    with patches[1].applied(vlm):
        export(vlm, patches, tmp_path / "out")
    note = json.loads((tmp_path / "out" / "mmneurons_patches.json").read_text(encoding="utf-8"))
    assert [(p["hash"], p["columns"], p["provenance"]) for p in note["patches"]] == [
        (p.hash, 1, dict(p.provenance)) for p in patches
    ]
    assert note["model"]["id"] == "pocket"
    assert note["model"]["weights_hash"] == weights_hash(vlm.model)
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == vlm.processor.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["qwen3_5_moe", "aria", "gemma3", "florence2"])
def test_other_families(name, tmp_path):
    """Fused experts are written apart, tied weights once, as their own checkpoints have them."""
    family = next(family for family in zoo.FAMILIES if family.name == name)
    vlm = mmn.load(zoo.randomise(family.build()))
    places = {}
    for ffn in vlm.anatomy.ffns:
        for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
            places[ffn.layer, expert] = [0, ffn.n_neurons - 1]
    before, patch = state(vlm), a_patch(vlm, places)
    with patch.applied(vlm):
        expected = state(vlm)
    folder = export(vlm, [patch], tmp_path / "out")
    assert same(type(vlm.model).from_pretrained(folder).state_dict(), expected)
    assert same(state(vlm), before)
    assert not (folder / "tokenizer.json").exists()  # this model came without a processor


# The processor


def test_a_processor_without_its_part_for_videos_is_copied_as_it_was(tmp_path):
    """It can be saved neither with that part nor without; whoever has torchvision needs its settings."""
    source = tmp_path / "source"
    zoo.randomise(next(f for f in zoo.FAMILIES if f.name == "qwen2_vl").build()).save_pretrained(source)
    config = (source / "config.json").read_text(encoding="utf-8")
    next(f for f in processor_zoo.FAMILIES if f.model_type == "qwen2_vl").save(source)
    (source / "config.json").write_text(config, encoding="utf-8")
    (source / "video_preprocessor_config.json").write_text('{"fps": 3}')
    (source / "model.safetensors.index.json").write_text("{}")
    vlm = mmn.load(source)
    folder = export(vlm, [a_patch(vlm, {(0, None): [1]})], tmp_path / "out")
    if getattr(vlm.processor, "video_processor", None) is None:
        kept = ["tokenizer.json", "chat_template.jinja", "video_preprocessor_config.json", "preprocessor_config.json"]
        for name in kept:
            if (source / name).exists():
                assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / "model.safetensors.index.json").exists()
    assert type(mmn.load(folder).processor).__name__ == type(vlm.processor).__name__


def test_a_pair_of_image_processor_and_tokenizer(tmp_path):

    from mmneurons.vlm.processors import ImageAndTokenizer, load_processor

    family = next(family for family in zoo.FAMILIES if family.name == "vision-encoder-decoder")
    pair = ImageAndTokenizer(hf.ViTImageProcessorPil(size={"height": 8, "width": 8}), processor_zoo.byte_level({}))
    vlm = mmn.load(zoo.randomise(family.build()), processor=pair)
    folder = export(vlm, [a_patch(vlm, {(0, None): [1]})], tmp_path / "out")
    again = load_processor(str(folder), model_type="vision-encoder-decoder")
    assert again.image_processor.size == pair.image_processor.size
    assert again.tokenizer("a dog").input_ids == pair.tokenizer("a dog").input_ids


# What is refused


def test_folders_that_are_not_written_to(live, tmp_path):
    patch = a_patch(live, {(0, None): [1]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(SettingError, match=f"{name} is there already"):
            export(live, [patch], tmp_path / name)
    with pytest.raises(SettingError, match="There is no folder"):
        export(live, [patch], tmp_path / "none" / "out")
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (export(live, [patch], str(tmp_path / "empty")) / "config.json").exists()


def test_the_model_s_own_folder_is_not_written_to(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(pocket.folder(), source)
    vlm = mmn.load(source)
    patch = a_patch(vlm, {(0, None): [1]})
    for folder in (source, source / "edited", tmp_path / "link" / "edited"):
        if folder.parent.name == "link":
            folder.parent.symlink_to(source)
        with pytest.raises(SettingError, match="own folder"):
            export(vlm, [patch], folder)
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in pocket.folder().iterdir())


def test_the_pocket_model_s_own_folder_too(vlm):
    with pytest.raises(SettingError, match="own folder"):
        export(vlm, [], pocket.folder() / "edited")


def test_one_patch_twice_and_patches_of_other_models_are_refused(live, vlm, tmp_path):
    patch = a_patch(live, {(0, None): [1]})
    with pytest.raises(SettingError, match="given twice"):
        export(live, [patch, patch], tmp_path / "out")
    other = a_patch(vlm, {(0, None): [1]})
    with patch.applied(live), pytest.raises(ModelError, match="another model"):
        export(live, [other], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_adapters_and_quantised_weights_are_refused(vlm, tmp_path):
    from conftest import make_random_vlm

    model = make_random_vlm(vlm).model
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"(?s)adapters \(LoRA\).*merge_and_unload"):
        export(mmn.load(wrapped, processor=vlm.processor), [], tmp_path / "out")
    merged = mmn.load(wrapped.merge_and_unload(), processor=vlm.processor)  # pyright: ignore[reportCallIssue]
    assert same(loaded(export(merged, [], tmp_path / "merged")), state(merged))
    packed = make_random_vlm(vlm)
    packed.model.model.language_model.layers[0].self_attn.q_proj = Linear8bitLt(48, 48, has_fp16_weights=False)
    with pytest.raises(ModelError, match=r"(?s)quantised model.*Linear8bitLt.*without quantisation"):
        export(packed, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_accelerate_keeps_in_memory(vlm, tmp_path):
    from conftest import make_random_vlm

    expected, other = make_random_vlm(vlm), make_random_vlm(vlm)
    accelerate.cpu_offload(other.model, execution_device=torch.device("cpu"))
    patch = a_patch(other, {(1, None): [2]})
    with pytest.raises(ModelError, match=r"(?s)off-loaded in a way.*device_map"):
        export(other, [patch], tmp_path / "out")
    vars(other.model)["hf_device_map"] = {"": "cpu"}  # as from_pretrained notes it
    with patch.applied(expected):
        wanted = state(expected)
    with pytest.warns(UserWarning, match="offloaded modules"):
        folder = export(other, [patch], tmp_path / "out")
    assert same(loaded(folder), wanted)


# What goes wrong on the way


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["model", "processor", "note"])
@pytest.mark.parametrize(("fails", "error"), [(no_room, SettingError), (interrupted, KeyboardInterrupt)])
def test_a_stop_leaves_nothing(live, tmp_path, monkeypatch, what, fails, error):
    given, active = a_patch(live, {(0, None): [1]}), a_patch(live, {(0, None): [1, 2]}, seed=1)
    places = {
        "model": (type(live.model.config), "save_pretrained"),
        "processor": (type(live.processor), "save_pretrained"),
        "note": (Path, "write_text"),
    }
    with active.applied(live):
        before = state(live)
        with monkeypatch.context() as patched:
            patched.setattr(*places[what], fails)
            with pytest.raises(error, match="(?s)Cannot write.*No space left" if fails is no_room else None):
                export(live, [given], tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        assert same(state(live), before)
        assert ledger_of(live).active == (active,)


def test_a_disk_that_is_full_while_weights_are_written(live, tmp_path):
    """By a limit on the size of files: safetensors raises an error of its own."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(SettingError, match=r"(?s)Cannot write .*out.*make room"):
            export(live, [a_patch(live, {(0, None): [1]})], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import mmneurons as mmn
from mmneurons.patches import export
def killed(vlm, patches, folder):
    (folder / "half.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGTERM)
export._write = killed
export.export(mmn.load(device="cpu"), [], sys.argv[1])
"""


def test_what_a_killed_export_left_is_removed_by_the_next(live, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGTERM
    assert (tmp_path / ".out.tmp" / "half.safetensors").exists()
    export(live, [], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_exports_to_one_folder_do_not_meet(live, tmp_path):
    with FileLock(tmp_path / ".out.lock"), pytest.raises(SettingError, match="Another run"):
        export(live, [], tmp_path / "out")
