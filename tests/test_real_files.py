"""What checkpoints bring besides weights, as it lies on the hub: tokenizer, template, processor, generation settings.

MMNEURONS_REAL_FILES names a folder with one folder a family: the files of a checkpoint without weights, the sizes in
its config.json shrunk, vocabularies and special tokens kept. Each gets tiny random weights of the class that its config
names, in its own dtype. Most of these files may not be passed on, so that none is here; docs/reference/models.md lists
the families.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from kits.library import hf
from PIL import Image

import mmneurons as mmn
from mmneurons.errors import ModelError

FOLDER = os.environ.get("MMNEURONS_REAL_FILES")
FAMILIES = sorted(path.name for path in Path(FOLDER).iterdir() if (path / "config.json").exists()) if FOLDER else []
CAPTION = "a brown dog and two skateboards next to a fire hydrant"
NOUNS = ["dog", "skateboards", "fire", "hydrant"]


@pytest.mark.skipif(not FOLDER, reason="MMNEURONS_REAL_FILES names no folder with files of real checkpoints")
def test_there_are_real_files():
    assert FAMILIES


def with_weights(source: Path, folder: Path) -> Path:
    """Copy a checkpoint's files, and write tiny random weights beside them."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {path.name: path.read_bytes() for path in folder.glob("*config.json")}
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(hf.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower():
                parameter.add_(0.1 * torch.randn_like(parameter))
    dtype = config.get("torch_dtype") or config.get("text_config", {}).get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in (path.name for path in folder.glob("*config.json")):
        if name in kept:
            (folder / name).write_bytes(kept[name])
        else:  # as the checkpoint has it, which means without
            (folder / name).unlink()
    return folder


def pictures() -> list[Image.Image]:
    """Two pictures of different size and shape."""
    generator = np.random.default_rng(0)
    shapes = ((480, 640, 3), (600, 500, 3))
    return [Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_real_files(family, tmp_path):
    assert FOLDER is not None
    folder = with_weights(Path(FOLDER) / family, tmp_path / family)
    try:
        vlm = mmn.load(folder)
    except ModelError as error:
        if "needs the package" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise
    assert mmn.doctor(vlm).passed
    # A batch of two sizes: every noun has its neurons, every map its picture, and the parts add up.
    findings = mmn.find(vlm, pictures(), caption=CAPTION, maps=True, top=2)
    for finding in findings:
        assert [noun.word for noun in finding.nouns] == NOUNS
        assert not [note for note in finding.notes if note.startswith("Approximate")]
        assert finding.answer_prefix.lower() in finding.rendered_prompt.lower()
        if vlm.tokenizer.chat_template or getattr(vlm.processor, "chat_template", None):
            assert finding.rendered_prompt.strip() != f"{finding.prompt} {finding.answer_prefix}"
        for view in finding.views:
            maps = finding.nouns[0].neurons[0].maps
            if view is not None and maps:  # as many patches across as the picture is wide
                assert view.width / view.height == pytest.approx(len(maps[0][0]) / len(maps[0]), rel=0.15)
    assert mmn.neurons_for(vlm, "dog", top=2).token.strip() == "dog"
    assert all(isinstance(text, str) for text in vlm.caption(pictures(), max_new_tokens=3))
