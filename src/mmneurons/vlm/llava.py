"""Load LLaVA as its authors published it (liuhaotian/llava-*): other names, no tower in the config, no processor.

Their weights are read under the names of transformers' LlavaForConditionalGeneration, which computes the same; their
conversation becomes a chat template. Source: github.com/haotian-liu/LLaVA, Liu et al., NeurIPS 2023.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from mmneurons.errors import ModelError

KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""Type of the language model, by the type that a config of the authors' names."""
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""What stands between the two layers of a projector, by its type; a linear one has the identity for a second layer."""
IMAGE_TOKEN = "<image>"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# The authors tokenise what is behind a picture by itself, so that SentencePiece puts a space before its line end.
_PARTS = (
    "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>JOINT\n{% endfor %}"
    "{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
CONVERSATIONS = {
    "vicuna": f"{_VICUNA} USER: {_PARTS} ASSISTANT:",
    "llama-2": f"[INST] <<SYS>>\n{_LLAMA_2}\n<</SYS>>\n\n{_PARTS} [/INST]",
    "mistral": f"[INST] {_PARTS} [/INST]",
    "chatml": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"
    f"{_PARTS}<|im_end|><|im_start|>assistant\n",
}
"""How a question is written, by the name of a conversation."""


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config is of LLaVA in its authors' layout."""
    return config.get("model_type") in KINDS and "mm_vision_tower" in config


def check_published(source: str, config: Mapping[str, Any]) -> None:
    """Refuse what transformers' Llava does not compute.

    Raises:
        ModelError: tiles of pictures, another projector, a resampler.
    """
    kind, names = KINDS[config["model_type"]], _names(source, config)
    instead = {
        "llama": "llava-v1.6-vicuna-7b-hf",
        "mistral": "llava-v1.6-mistral-7b-hf",
        "qwen2": "llava-onevision-qwen2-7b-ov-hf",
    }
    seen = {
        "image_aspect_ratio": (config.get("image_aspect_ratio") or "square", ("square", "pad")),
        "mm_patch_merge_type": (config.get("mm_patch_merge_type") or "flat", ("flat",)),
        "mm_projector_type": (config.get("mm_projector_type") or "linear", tuple(PROJECTORS)),
        "mm_resampler_type": (config.get("mm_resampler_type") or "none", ("none",)),
        "conversation": ("mpt" if re.search(r"\bmpt\b", names) else "v0" if "-v0" in names else "known", ("known",)),
    }
    other = [f"{key}: {value}" for key, (value, known) in seen.items() if value not in known]
    if other:
        raise ModelError(
            f"'{source}' is a LLaVA in its authors' layout, of a kind that is not mapped here.",
            seen=", ".join(other),
            fix=f"Give the same model in transformers' own layout: llava-hf/{instead[kind]} or another of llava-hf.",
        )


def read_published(
    source: str, config: Mapping[str, Any], options: Mapping[str, Any], vision_tower: str | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a published LLaVA as a LlavaForConditionalGeneration.

    Args:
        source: A hub id or a folder.
        config: Its config.json.
        options: Options of transformers' `from_pretrained`.
        vision_tower: Hub id or folder of the vision tower; None for the one that the config names.

    Returns:
        The model, and transformers' report of missing, unexpected and mismatched weights.

    Raises:
        ModelError: see `check_published`; or its weights are not in safetensors, or its tower is no CLIP.
    """
    check_published(source, config)
    revision = options.get("revision")
    tower = vision_tower or config["mm_vision_tower"]
    state = {_renamed(name): value for name, value in _weights(source, revision).items() if not _is_made(name)}
    # The token of a picture is a new one: its row in embedding and head is zero, and no answer can hold it.
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    image_token_id = tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in state and len(state[name]) <= image_token_id:
            missing = image_token_id + 1 - len(state[name])
            state[name] = torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])
    # A projector of one layer: the second is the identity.
    projector = config.get("mm_projector_type") or "linear"
    if projector == "linear":
        width = config["hidden_size"]
        first = state["multi_modal_projector.linear_1.weight"]
        state["multi_modal_projector.linear_2.weight"] = torch.eye(width, dtype=first.dtype)
        state["multi_modal_projector.linear_2.bias"] = first.new_zeros(width)
    n_words = len(state["language_model.model.embed_tokens.weight"])
    made = _config(source, config, _vision_config(tower, revision=None), image_token_id, n_words)
    given = {**options, "dtype": _dtype(options.get("dtype"), config)}
    given = {name: value for name, value in given.items() if name not in ("revision", "trust_remote_code")}
    reader: Any = LlavaForConditionalGeneration  # with its report it returns a pair
    model, report = reader.from_pretrained(
        None, config=made, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **given
    )
    # A tower that was not trained along is not in the checkpoint: it is the one that the config names.
    if any(".vision_tower." in f".{name}" for name in report["missing_keys"]):
        inner = model.model.vision_tower
        inner.load_state_dict(CLIPVisionModel.from_pretrained(tower, dtype=given["dtype"]).state_dict())
        report["missing_keys"] = type(report["missing_keys"])(
            name for name in report["missing_keys"] if ".vision_tower." not in f".{name}"
        )
    return model, report


def published_processor(
    source: str, config: Mapping[str, Any], revision: str | None = None, vision_tower: str | None = None
) -> Any:
    """Put together the processor of a published LLaVA: its tokenizer, its tower's pictures, its conversation.

    Args:
        source: A hub id or a folder.
        config: Its config.json.
        revision: Passed to transformers.
        vision_tower: As in `read_published`.
    """
    tower = vision_tower or config["mm_vision_tower"]
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    pictures: Any = AutoImageProcessor.from_pretrained(tower)
    if config.get("image_aspect_ratio") == "pad":
        # Padded to a square with the mean colour, where CLIP alone would cut the ends off.
        import transformers

        kind = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
        own = {"size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor"}
        pictures = kind(**{k: v for k, v in pictures.to_dict().items() if k in own and v is not None}, do_pad=True)
    joint = " " if tokenizer("a", add_special_tokens=False).tokens()[0].startswith("\u2581") else ""
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=_vision_config(tower, revision=None).patch_size,
        vision_feature_select_strategy=_strategy(config),
        chat_template=CONVERSATIONS[conversation_of(source, config)].replace("JOINT", joint),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def conversation_of(source: str, config: Mapping[str, Any]) -> str:
    """Return the name of the conversation that a published LLaVA was trained on, as its authors choose it: by name."""
    kind = KINDS[config["model_type"]]
    names = _names(source, config)
    if "llama-2" in names:
        return "llama-2"
    return {"llama": "vicuna", "mistral": "mistral", "qwen2": "chatml"}["mistral" if "mistral" in names else kind]


def _names(source: str, config: Mapping[str, Any]) -> str:
    """Return the names of a published LLaVA, by which its authors tell what it was trained on."""
    return f"{Path(source).name} {Path(config.get('_name_or_path') or '').name}".lower()


def _config(source: str, config: Mapping[str, Any], vision: Any, image_token_id: int, n_words: int) -> LlavaConfig:
    """Make transformers' config of a published one."""
    left_out = ("mm_", "image_", "model_type", "architectures", "torch_dtype", "dtype", "tune_mm", "freeze_mm")
    text = {name: value for name, value in config.items() if not name.startswith(left_out)}
    kind: Any = CONFIG_MAPPING[KINDS[config["model_type"]]]
    text_config = kind(**text | {"vocab_size": n_words})
    made = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=image_token_id,
        projector_hidden_act=PROJECTORS[config.get("mm_projector_type") or "linear"],
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=_strategy(config),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    made._name_or_path = source
    return made


def _strategy(config: Mapping[str, Any]) -> Literal["default", "full"]:
    """Return whether the class token is kept among a picture's tokens."""
    return "full" if config.get("mm_vision_select_feature") == "cls_patch" else "default"


def _vision_config(tower: str, revision: str | None) -> Any:
    """Return the config of a vision tower.

    Raises:
        ModelError: it is not there, or no CLIP.
    """
    try:
        config = AutoConfig.from_pretrained(tower, revision=revision)
    except OSError as error:
        raise ModelError(
            f"The vision tower '{tower}' of this LLaVA cannot be read.",
            seen=str(error).splitlines()[0],
            fix='Give a folder or another id of it: load(..., vision_tower="folder")    CLI: --vision-tower folder',
        ) from error
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise ModelError(
            f"The vision tower '{tower}' of this LLaVA is of type '{config.model_type}': CLIP alone is mapped here.",
            fix="Give the model in transformers' own layout, such as llava-hf/llava-1.5-7b-hf.",
        )
    return config


def _dtype(asked: Any, config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype asked for, or the checkpoint's own."""
    if isinstance(asked, torch.dtype):
        return asked
    return getattr(torch, str(config.get("torch_dtype") or config.get("dtype") or "float16"))


def _renamed(name: str) -> str:
    """Return the name of a weight in transformers' layout."""
    for theirs, ours in (
        ("model.vision_tower.vision_tower.", "vision_tower."),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.mm_projector.", "multi_modal_projector.linear_1."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _is_made(name: str) -> bool:
    """Whether a tensor is no weight: frequencies and positions that old versions of transformers saved, too."""
    return name.endswith(("inv_freq", "position_ids"))


def _weights(source: str, revision: str | None) -> dict[str, Tensor]:
    """Read all weights of a checkpoint in safetensors.

    Raises:
        ModelError: there are none in safetensors.
    """
    if Path(source).is_dir():
        files = sorted(map(str, Path(source).glob("*.safetensors")))
    else:
        options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        one = cached_file(source, "model.safetensors", **options)
        index = cached_file(source, "model.safetensors.index.json", **options) if one is None else None
        names = sorted({*json.loads(Path(index).read_text("utf-8"))["weight_map"].values()}) if index else []
        files = [one] if one else [str(cached_file(source, name, revision=revision)) for name in names]
    if not files:
        folder = source if Path(source).is_dir() else "FOLDER"
        raise ModelError(
            f"The weights of '{source}' are not in safetensors, and nothing is unpickled here.",
            fix="Download it, and if you trust where its pytorch_model*.bin come from, write them anew: python -c "
            '"import glob, torch, safetensors.torch as s; [s.save_file({k: v.clone() for k, v in '
            f"torch.load(f, weights_only=True).items()}}, f[:-3] + 'safetensors') "
            f"for f in glob.glob('{folder}/pytorch_model*.bin')]\"",
        )
    return {name: value for file in files for name, value in load_file(file).items()}
