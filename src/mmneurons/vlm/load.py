"""Load a vision-language model: the pocket model, a hub id, a folder, or a model object of the user's own."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmneurons import photo, pocket
from mmneurons.errors import ModelError, SettingError
from mmneurons.photo import tower  # noqa: F401 - transformers is told of it: a photo model can be exported and moved
from mmneurons.vlm import provenance
from mmneurons.vlm.anatomy.find import find_anatomy
from mmneurons.vlm.checkpoint import config_or_nothing, made_up_weights, original, read_checkpoint, refusal, running
from mmneurons.vlm.failures import first_line, is_out_of_memory
from mmneurons.vlm.families import check_version
from mmneurons.vlm.llava import is_published, published_processor
from mmneurons.vlm.processors import load_processor
from mmneurons.vlm.vlm import VLM

POCKET = "pocket"
"""Name of the model that comes with the package."""
PHOTO = "photo"
"""Name of the model that is put together from other packages, for photographs."""
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that name a way to spread a model and not a device."""


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
    date: str | datetime.date | None = None,
    vision_tower: str | None = None,
    **options: Any,
) -> VLM:
    """Load a model and find its neurons.

    Args:
        model: A hub id, a folder, or a loaded model, also one with LoRA attached (PEFT); None (or "pocket") for the
            pocket model; "photo" for the one that reads photographs, put together in the cache at first use (extra
            `photo`). A loaded model is used as it is: nothing in it is moved, cast or changed.
        processor: Its processor, or the hub id or folder of one; found beside the weights if None. A loaded model
            without one works on ready-made inputs: `find(vlm, inputs={...})`, `doctor(vlm, inputs={...})`.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or None for the checkpoint's (pocket, photo: float32).
        device: Where to put it; None for the first GPU if there is one, else the CPU. Not with a model object.
        device_map: Passed to transformers instead of `device` (needs the extra `accelerate`).
        options: Passed to transformers' from_pretrained: quantization_config, attn_implementation, offload_folder ...
        revision: Passed to transformers.
        trust_remote_code: Passed to transformers; off, so that no code of a hub runs unasked.
        decoder: Path of the language model in the model, if it cannot be told.
        vision_tower: Hub id or folder of the vision tower of a LLaVA in its authors' layout, if not the one that its
            config names.
        date: The day that chat templates which write today's date take for today, as YYYY-MM-DD; None for the real one.

    Raises:
        ModelError: if there is no such model, it has no weights, is no vision-language model, or its parts cannot be
            told.
        SettingError: if `date` is none.
    """
    day = _day(date)
    # A model object is used as it is: none of the steps below is about it.
    if isinstance(model, nn.Module):
        return _adopt(_unwrapped(model), processor, decoder, day, trust_remote_code=trust_remote_code)
    if model is not None and not isinstance(model, str | os.PathLike):
        raise _not_a_model(model)
    # 1. What to load and where to: a dtype or device that does not exist is refused before anything is read.
    is_pocket, is_photo = model is None or model == POCKET, model == PHOTO
    if (is_pocket or is_photo) and dtype is None:
        dtype = torch.float32  # they are stored in half precision, which CPUs compute slowly
    options |= {"dtype": _dtype(dtype), "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    _check_device(device if device_map is None else device_map)
    source = str(photo.folder()) if is_photo else str(pocket.folder()) if is_pocket else os.fspath(model or POCKET)
    # 2. The weights, and which of them the checkpoint did not have.
    loaded, loading = read_checkpoint(source, options, vision_tower)
    check_version(loaded.config)
    quantised = bool(getattr(loaded, "is_quantized", False))
    if device_map is None and not quantised:
        _move(loaded, source, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for part in loaded.modules():
        if isinstance(part, PreTrainedModel):
            part.config.return_dict = True  # the outputs of models are read by name here
    try:
        # 3. The processor, and the model's parts.
        vlm = VLM(
            model=loaded,
            processor=_processor(source, loaded.config.model_type, options, processor, vision_tower),
            analysed=find_anatomy(loaded, decoder),
            model_id=POCKET if is_pocket else PHOTO if is_photo else source,
            revision=getattr(loaded.config, "_commit_hash", None) or revision,
            is_pocket=is_pocket,
            weights_hash=provenance.weights_hash(loaded) if quantised else None,
            loading=loading,
            day=day,
        )
        # 4. Weights that the checkpoint lacked do not matter if no answer needs them: the model is run to find out.
        made_up = loading.made_up and running(vlm, loading.made_up, Image.open(pocket.samples()[0].path))
    except ModelError as error:
        if loading.made_up and not is_out_of_memory(error.__cause__):  # the likely cause, and the first to mend
            raise made_up_weights(source, loaded, loading, loading.made_up) from error
        raise
    if made_up:
        raise made_up_weights(source, loaded, loading, made_up)
    return vlm


def _processor(
    source: str, model_type: str, options: dict[str, Any], given: Any, vision_tower: str | None = None
) -> Any:
    """Return the processor given; else the one beside the weights, or beside those of a fine-tuned model's origin."""
    if isinstance(given, str | os.PathLike):
        return load_processor(os.fspath(given), model_type=model_type, trust_remote_code=options["trust_remote_code"])
    if given is not None:
        return given
    revision, trusted = options["revision"], options["trust_remote_code"]
    if is_published(config := config_or_nothing(source, options)):
        return published_processor(source, config, revision, vision_tower)
    try:
        return load_processor(source, model_type=model_type, revision=revision, trust_remote_code=trusted)
    except ModelError:
        first = original(source, options)
        if first is None or first == source:
            raise
        return load_processor(first, model_type=model_type, trust_remote_code=trusted)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what torch wraps around one for compilation or for several devices."""
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # the name that torch.compile gives it
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _check_calls(model: PreTrainedModel) -> None:
    """Refuse a model that is compiled or gives its results without names: hooks would not see what they need."""
    for name, module in model.named_modules():
        # Three ways of compiling: a wrapper around the module, `module.compile()`, and a compiled `forward` put on it.
        forward = getattr(module.forward, "__func__", module.forward)
        if (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            raise ModelError(
                "The model is compiled, and what its neurons do inside cannot be seen.",
                seen=f"Compiled: {name or type(module).__name__}",
                fix="Give it as it was before torch.compile or model.compile().",
            )
        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) and not getattr(config, "return_dict", True):
            raise ModelError(
                "The model gives its results without names.",
                seen=f"config.return_dict=False of {name or type(module).__name__}",
                fix=f"model.{name + '.' if name else ''}config.return_dict = True",
            )


def _adopt(
    model: nn.Module, processor: Any, decoder: str | None, day: datetime.date | None, *, trust_remote_code: bool
) -> VLM:
    """Make a VLM of a model object, which is used as it is."""
    wrapped = getattr(model, "get_base_model", None)  # a PEFT model; its adapters stay inside the model
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
    _check_calls(model)
    check_version(model.config)
    if isinstance(processor, str | os.PathLike):
        kind = model.config.model_type
        processor = load_processor(os.fspath(processor), model_type=kind, trust_remote_code=trust_remote_code)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    revision = getattr(model.config, "_commit_hash", None)
    return VLM(model, processor, find_anatomy(model, decoder), name, revision, day=day)


def _not_a_model(given: Any) -> ModelError:
    """Return the error for an object that is no model of transformers."""
    return ModelError(
        "This is not a model of the transformers library.",
        seen=f"{type(given).__module__}.{type(given).__name__}",
        fix='Give a hub id, a folder, or a loaded model: load("llava-hf/llava-1.5-7b-hf")',
    )


def _check_kind(config: Any) -> None:
    """Refuse a model that transformers does not list for image-text-to-text."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"A model of type '{config.model_type}' is not a vision-language model that transformers knows.",
            fix="Give a model for image-text-to-text, such as llava-hf/llava-1.5-7b-hf.",
        )


def _day(date: str | datetime.date | None) -> datetime.date | None:
    """Return the day that a text names."""
    if date is None or isinstance(date, datetime.date):
        return date
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise SettingError(
            "This is no date.", seen=f"date={date!r}", fix="Write it as YYYY-MM-DD: 2025-01-31"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """Return the torch dtype of a name, or "auto", which stands for the checkpoint's own."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ModelError(f"There is no dtype '{dtype}'.", fix="Choose one of: float32, bfloat16, float16.")
    return named


def _check_device(device: Any) -> None:
    """Refuse a device that is not there before anything is loaded; ways to spread a model are left to transformers."""
    if device is None or not isinstance(device, str | torch.device) or str(device) in SPREAD:
        return
    try:
        # The round trip to the CPU waits for the device: some errors come only then.
        torch.zeros(1, device=device, dtype=torch.float32).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ModelError(
            f"There is no device '{device}' here.", seen=first_line(error), fix=f"Choose one of: {', '.join(there)}."
        ) from error


def _move(model: PreTrainedModel, source: str, device: str | torch.device) -> None:
    """Move a model to its device, and say so if it does not fit there."""
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise refusal(source, error, {}) from error
