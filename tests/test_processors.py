import json
import sys
from importlib.util import find_spec

import pytest
import torch
from kits import processor_zoo
from kits.library import hf, lacking
from kits.processor_zoo import FAMILIES, QWEN, Family, byte_level, picture, processor
from transformers import AutoProcessor, LlavaProcessor

from mmneurons.errors import ModelError
from mmneurons.vlm import processors
from mmneurons.vlm.processors import ImageAndTokenizer, check_torchvision, load_processor

HAS_TORCHVISION = find_spec("torchvision") is not None
without_torchvision = pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
PAIR = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}


def by_pillow_alone() -> None:
    """Skip the test where no module of a family reads pictures by Pillow alone."""
    if find_spec("transformers.models.pixtral.image_processing_pil_pixtral") is None:
        lacking("one module holds both image processors of a family")


@without_torchvision
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_families_own_processor_loads_without_torchvision(family):
    found = processor(family.model_type)
    assert type(found).__name__ == family.processor
    assert type(found.image_processor) is type(family.image_processor())
    assert bool(found.chat_template) == bool(family.chat)
    assert getattr(found, "video_processor", None) is None
    for name, value in family.arguments.items():
        assert getattr(found, name) == value


@without_torchvision
def test_the_class_is_found_by_the_type_of_model_if_no_file_names_it(tmp_path):
    family = next(family for family in FAMILIES if family.model_type == "qwen3_vl")
    family.save(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    assert type(load_processor(str(tmp_path), model_type="qwen3_vl")).__name__ == "Qwen3VLProcessor"


@without_torchvision
def test_a_processor_of_another_family_is_taken_if_a_file_names_it(tmp_path):
    family = next(family for family in FAMILIES if family.model_type == "mistral3")
    family.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))  # Pixtral 12B
    assert type(load_processor(str(tmp_path), model_type="llava")).__name__ == "PixtralProcessor"


@without_torchvision
def test_a_class_that_was_hidden_leaves_nothing_behind():
    by_pillow_alone()
    processor("mistral3")
    assert "transformers.models.pixtral.image_processing_pixtral" not in sys.modules


def test_a_processor_as_transformers_saves_it(tmp_path):
    saved = LlavaProcessor(hf.CLIPImageProcessorPil(), byte_level({"image_token": "<image>"}), patch_size=14)
    saved.save_pretrained(tmp_path)
    if (tmp_path / "preprocessor_config.json").exists():
        lacking("saves a processor as older checkpoints have it")
    found = load_processor(str(tmp_path), model_type="llava")
    assert (type(found), found.patch_size) == (LlavaProcessor, 14)


def test_a_family_without_a_processor_gets_a_pair(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PAIR))
    byte_level({}).save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    found = load_processor(str(tmp_path), model_type="vision-encoder-decoder")
    assert isinstance(found, ImageAndTokenizer)
    made = found(images=[picture(0), picture(1)], text=["a dog", "a dog and a cat"], padding=True)
    assert made["pixel_values"].shape == (2, 3, 8, 8)
    assert made["input_ids"].shape == made["attention_mask"].shape
    assert "input_ids" not in found(images=picture(0))


@pytest.mark.parametrize("files", [[], ["tokenizer"], ["images"]], ids=str)
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "mistral3", "vision-encoder-decoder"])
def test_a_folder_that_lacks_files(tmp_path, model_type, files):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if "tokenizer" in files:
        byte_level(QWEN).save_pretrained(tmp_path)
    if "images" in files:
        hf.CLIPImageProcessorPil().save_pretrained(tmp_path)
    # Where tokenizer.json is missing, some versions look for the files of other tokenizers and want protobuf for them.
    told = (
        r"Cannot load the processor of '.*'\.\n.+\nName the model .* load\(model, processor=|needs the package protobuf"
    )
    with pytest.raises(ModelError, match=told):
        load_processor(str(tmp_path), model_type=model_type)


@without_torchvision
@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize(
    ("model_type", "name"), [("llama4", "Llama4"), ("cohere2_vision", "Cohere2Vision"), ("lfm2_vl", "Lfm2Vl")]
)
def test_families_that_read_pictures_by_torchvision_alone(tmp_path, monkeypatch, model_type, name, suffix):
    by_pillow_alone()
    byte_level({"image_token": "<image>"}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    stored = {"image_processor_type": f"{name}ImageProcessor{suffix}", "processor_class": f"{name}Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(
        ModelError,
        match=r"(?s)needs torchvision, which is not installed.*pip install torchvision --index-url \S+/whl/cpu "
        r".*fits torch 2\.13\.0\+cpu\).*inputs=\{",
    ):
        load_processor(str(tmp_path), model_type=model_type)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    with pytest.raises(
        ModelError, match=r"(?m)^pip install torchvision   \(of the version that fits torch 2\.13\.0\)$"
    ):
        load_processor(str(tmp_path), model_type=model_type)


@without_torchvision
def test_a_class_that_cannot_do_without_videos(tmp_path):
    options = {"special": {"image_token": "<image>"}, "chat": "<image>"}
    images = hf.MiniCPMV4_6ImageProcessorPil
    Family("minicpmv4_6", "MiniCPMV4_6Processor", images, 0, **options).save(tmp_path)
    with pytest.raises(ModelError, match="needs torchvision, which is not installed"):
        load_processor(str(tmp_path), model_type="minicpmv4_6")


def test_another_package_that_is_missing_is_named(tmp_path, monkeypatch):
    family = next(family for family in FAMILIES if family.model_type == "smolvlm")
    if processor_zoo.processing_smolvlm is None:
        lacking("SmolVLM's processor needs torchvision")
    monkeypatch.setattr(processor_zoo.processing_smolvlm, "num2words", None)
    with pytest.raises(ModelError, match=r"needs the package num2words, which is not installed(.|\n)*pip install num2"):
        load_processor(str(family.save(tmp_path)), model_type="smolvlm")


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError("T5Tokenizer requires the SentencePiece library but it was not found."), "sentencepiece"),
        (ImportError("Install it with `pip install -U timm`."), "timm"),
        (ModuleNotFoundError("No module named 'tiktoken.load'", name="tiktoken.load"), "tiktoken"),
    ],
)
def test_packages_are_named_whatever_the_error(monkeypatch, error, package):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "_processor_class", lambda name: None)
    with pytest.raises(ModelError, match=f"pip install {package}$"):
        load_processor("some/model", model_type="llava")


def test_a_tokenizer_of_sentencepiece_is_not_told_as_tiktokens(tmp_path, monkeypatch):
    def refuse(*_, **__):  # as transformers does where sentencepiece is missing, whatever the file is
        raise ImportError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    monkeypatch.setattr(processors, "is_installed", lambda package: False)
    for content, package in ((b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"), (b"IQ== 0\n", "tiktoken")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match=f"pip install {package}$"):
            load_processor(str(tmp_path), model_type="llava")


def test_a_torchvision_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    message = r"(?s)is installed, but does not work with this torch.*torch 2\.13\.0\+cpu; .*torchvision::nms\n"
    fix = (
        r"pip install --force-reinstall --no-deps torchvision --index-url \S+/whl/cpu   or: pip uninstall torchvision$"
    )
    with pytest.raises(ModelError, match=message + fix):
        check_torchvision()

    def refuse(*_, **__):  # as transformers does then
        raise ModuleNotFoundError("Could not import module 'CLIPImageProcessor'.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=message):
        load_processor("some/model", model_type="llava")


def test_a_torchvision_that_works_or_is_not_there_is_no_error():
    check_torchvision()
