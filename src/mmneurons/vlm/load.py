"""Load a vision-language model: the pocket model, a hub id, a folder, or a model object of the user's own."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmneurons import pocket
from mmneurons.errors import ModelError
from mmneurons.vlm import provenance
from mmneurons.vlm.anatomy.find import find_anatomy
from mmneurons.vlm.processors import load_processor, missing_package
from mmneurons.vlm.vlm import VLM

POCKET = "pocket"
"""The name of the model that comes with the package."""


def load(
    model: str | os.PathLike[str] | nn.Module | None = None,
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    decoder: str | None = None,
    **options: Any,
) -> VLM:
    """Load a model and find its neurons.

    Args:
        model: A hub id, a folder, or a loaded model, also one with LoRA attached (PEFT); None (or "pocket") for the
            pocket model. A loaded model is used as it is: nothing in it is moved, cast or changed.
        processor: Its processor; found beside the weights if None. A loaded model without one works on ready-made
            inputs: `find(vlm, inputs={...})`, `doctor(vlm, inputs={...})`.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or None for the checkpoint's own (pocket: float32).
        device: Where to put it; None for the first GPU if there is one, else the CPU. Not with a model object.
        device_map: Passed to transformers instead of `device` (needs the extra `accelerate`).
        options: Passed to transformers' from_pretrained: quantization_config, attn_implementation, offload_folder ...
        revision: Passed to transformers.
        trust_remote_code: Passed to transformers; off, so that no code of a hub runs unasked.
        decoder: Path of the language model in the model, if it cannot be told.

    Raises:
        ModelError: if there is no such model, it has no weights, is no vision-language model, or its parts cannot be
            told.
    """
    if isinstance(model, nn.Module):
        return _adopt(model, processor, decoder)
    if model is not None and not isinstance(model, str | os.PathLike):
        raise _not_a_model(model)
    is_pocket = model is None or model == POCKET
    source = str(pocket.folder()) if model is None or is_pocket else os.fspath(model)
    if is_pocket and dtype is None:
        dtype = torch.float32  # it is stored in half precision, which CPUs compute slowly
    options |= {"dtype": _dtype(dtype), "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    loaded = _load_model(source, options)
    if device_map is None and not getattr(loaded, "is_quantized", False):
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    if processor is None:
        processor = load_processor(
            source,
            model_type=loaded.config.model_type,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    quantised = bool(getattr(loaded, "is_quantized", False))
    weights_hash = provenance.weights_hash(loaded) if quantised else None
    return VLM(
        model=loaded,
        processor=processor,
        anatomy=find_anatomy(loaded, decoder),
        model_id=POCKET if is_pocket else source,
        revision=getattr(loaded.config, "_commit_hash", None) or revision,
        is_pocket=is_pocket,
        weights_hash=weights_hash,
    )


def _adopt(model: nn.Module, processor: Any, decoder: str | None) -> VLM:
    """Use a model object as it is."""
    wrapped = getattr(model, "get_base_model", None)  # of PEFT; the adapters stay inside the model
    if wrapped is not None and hasattr(model, "peft_config"):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            raise ModelError(
                "Adapters that learn a prompt change the input, not the weights, and are not supported.",
                fix="Give a model with LoRA or another adapter of its weights, or the model without the adapter.",
            )
        model = wrapped()
    if not isinstance(model, PreTrainedModel):
        raise _not_a_model(model)
    _check_kind(model.config)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return VLM(model, processor, find_anatomy(model, decoder), name, getattr(model.config, "_commit_hash", None))


def _not_a_model(given: Any) -> ModelError:
    return ModelError(
        "This is not a model of the transformers library.",
        seen=f"{type(given).__module__}.{type(given).__name__}",
        fix='Give a hub id, a folder, or a loaded model: load("llava-hf/llava-1.5-7b-hf")',
    )


def _load_model(source: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        return AutoModelForImageTextToText.from_pretrained(source, **options).eval()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise _refusal(source, error) from error


def _refusal(source: str, error: Exception) -> ModelError:
    """What to tell a user whose model cannot be loaded; `error` is what transformers said."""
    package = missing_package(error)
    if package is not None:
        return ModelError(
            f"Loading '{source}' this way needs the package {package}, which is not installed.",
            seen=_first_line(error),
            fix=f"pip install {package}",
        )
    if isinstance(error, ValueError) and re.search("[Uu]nrecognized|does not recognize", str(error)):
        return ModelError(
            f"'{source}' is not a vision-language model that transformers knows.",
            seen=_first_line(error),
            fix="Give a model for image-text-to-text, such as llava-hf/llava-1.5-7b-hf.",
        )
    return ModelError(
        f"Cannot load the model '{source}'.",
        seen=_first_line(error),
        fix="Give a hub id, or a folder with config.json and model.safetensors.",
    )


def _check_kind(config: Any) -> None:
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"A model of type '{config.model_type}' is not a vision-language model that transformers knows.",
            fix="Give a model for image-text-to-text, such as llava-hf/llava-1.5-7b-hf.",
        )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ModelError(f"There is no dtype '{dtype}'.", fix="Choose one of: float32, bfloat16, float16.")
    return named


def _first_line(error: Exception) -> str:
    """The first line that says something; transformers' messages run to hundreds of lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
