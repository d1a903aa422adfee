"""Read a checkpoint, and tell which weights of the model were not in it.

transformers fills what a checkpoint lacks with random numbers and only logs it. Here each such weight is accounted for,
so that `load` can refuse a model that runs one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from mmneurons.errors import MmneuronsError, ModelError
from mmneurons.vlm import mplug_owl2
from mmneurons.vlm.age import editing
from mmneurons.vlm.anatomy.parts import NotFiniteError
from mmneurons.vlm.failures import first_line, is_out_of_memory
from mmneurons.vlm.llava import is_published, read_published
from mmneurons.vlm.processors import is_installed, missing_package

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM

CONVERTED = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "florence": "florence-community/Florence-2-base",
}
"""Checkpoints in transformers' own layout, by the beginning of the model type of those in another layout."""
USUAL = ("dtype", "revision", "trust_remote_code")
"""Options that `load` always passes on, whether the user gave them or not."""
PICKLES = ("*.bin", "*.pt", "*.pth")
"""File names of weights that are pickled."""


@dataclass(frozen=True)
class Loading:
    """A record of how a model's weights and its checkpoint fit together."""

    made_up: Mapping[str, str]
    """Weights that transformers drew at random, by name, with the reason why they were not read."""
    unexpected: tuple[str, ...]
    """Names of weights in the checkpoint for which the model has no place."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for a reader of this model's results."""
        if not self.unexpected:
            return ()
        return (f"Not read: {_counted(self.unexpected)} of the checkpoint, for which the model has no place.",)


def read_checkpoint(
    source: str, options: Mapping[str, Any], vision_tower: str | None = None
) -> tuple[PreTrainedModel, Loading]:
    """Load a model from safetensors, in evaluation mode; nothing is unpickled.

    Args:
        source: A hub id or a folder; of an adapter (PEFT), its base model is loaded and the adapter put on.
        options: Options of transformers' `from_pretrained`.
        vision_tower: Where the vision tower of a LLaVA in its authors' layout lies, if not where its config says.

    Returns:
        The model, and how its weights and the checkpoint fit together.

    Raises:
        ModelError: if it cannot be loaded.
    """
    asked = source
    try:
        # `asked` is the name that is being loaded, for the error: an adapter's base model can fail in the adapter's
        # place.
        adapter = _adapter(source, options)
        published = {} if adapter else config_or_nothing(source, options)
        if is_published(published):
            model, said = read_published(source, published, options, vision_tower)
            reports = [said]
        elif adapter is None:
            model, said = _from_pretrained(source, options)
            reports = [said]
        elif not is_installed("peft"):
            raise ModelError(
                f"'{source}' is an adapter: loading it needs the package peft, which is not installed.",
                fix='pip install "mmneurons[peft]"',
            )
        else:
            asked = _base(source, adapter)
            # The revision that the user gave is the adapter's; its config may name one of the base model.
            model, said = _from_pretrained(asked, {**options, "revision": adapter.get("revision")})
            asked = source
            more = model.load_adapter(source, adapter_kwargs={"revision": options.get("revision")})
            reports = [said] if more is None else [said, more.to_dict()]  # transformers 4 reports nothing on adapters
    except MmneuronsError:
        raise
    except Exception as error:  # a config or code of somebody's own can raise anything
        raise refusal(asked, error, options) from error
    made_up = {name: why for report in reports for name, why in _made_up(model, report)}
    unexpected = sorted({name for report in reports for name in report["unexpected_keys"]})
    return model.eval(), Loading(made_up, tuple(unexpected))


def original(source: str, options: Mapping[str, Any]) -> str | None:
    """Return the model whose processor should fit this one too: an adapter's base, or a fine-tuned model's origin."""
    try:
        adapter = _adapter(source, options)
        return adapter["base_model_name_or_path"] if adapter else _config(source, options).get("_name_or_path")
    except Exception:  # noqa: BLE001 - whatever is wrong with these files, they name nothing
        return None


def running(vlm: VLM, names: Iterable[str], picture: Image.Image) -> set[str]:
    """Return those of some weights that matter to an answer about a picture.

    A weight does not matter if neither its module nor the same module of another block or expert is entered, and if the
    answer stays the same to the bit with NaN in its place. A weight that cannot be filled with NaN (quantised,
    off-loaded) counts as one that matters.
    """
    # 1. Which modules are entered while the model answers, counted for all blocks and experts together: another picture
    # could be routed to another expert.
    model, inputs, entered = vlm.model, vlm.encode([picture]), set[nn.Module]()
    hooks = [module.register_forward_pre_hook(lambda module, args: entered.add(module)) for module in model.modules()]
    try:
        before = vlm.generate(inputs, 2)
    finally:
        for hook in hooks:
            hook.remove()
    ran = {_everywhere(path) for path, module in model.named_modules() if module in entered}
    tensors = {name: _tensor(model, name) for name in names}
    idle = {
        name: tensor
        for name, tensor in tensors.items()
        if _everywhere(name.rpartition(".")[0]) not in ran and tensor.is_floating_point() and not tensor.is_meta
    }
    # 2. NaN in every weight that seems idle: a weight can be read without its module being entered, and NaN shows it in
    # the logits. The numbers are put back in any case, and `editing` keeps the model as old as it was.
    kept = {name: tensor.detach().clone() for name, tensor in idle.items()}
    with editing(model):
        try:
            with torch.no_grad():
                for tensor in idle.values():
                    tensor.fill_(torch.nan)
            after = vlm.generate(inputs, 2)
            same = torch.equal(before.logits, after.logits) and torch.equal(before.log_totals, after.log_totals)
        except NotFiniteError:
            same = False
        finally:
            with torch.no_grad():
                for name, tensor in idle.items():
                    tensor.copy_(kept[name])
    # If anything changed, it is not known which of them did it: all count as running.
    return set(tensors) - set(idle) if same else set(tensors)


def made_up_weights(source: str, model: PreTrainedModel, loading: Loading, names: Iterable[str]) -> ModelError:
    """Return the error for a model that runs weights which its checkpoint does not have."""
    names = sorted(names)
    shown = [f"  {name}: {loading.made_up[name]}" for name in names[:5]]
    left = [f"  and {len(names) - 5} more"] if len(names) > 5 else []
    return ModelError(
        f"{len(names)} of the {len(model.state_dict())} weights of '{source}' are not in its checkpoint; "
        "transformers would fill them with random numbers.",
        seen="\n".join([*shown, *left, *loading.notes]),
        fix="Give a complete checkpoint, its weights named as transformers names them (such as "
        f"{_converted(model.config.model_type)}); or load it by the code that "
        "wrote it, and give the model: load(model).",
    )


def refusal(source: str, error: Exception, options: Mapping[str, Any]) -> ModelError:
    """Return the error for a user whose model cannot be loaded; `error` came from transformers or the model's code."""
    seen, text = first_line(error), str(error)
    if _is_gguf(source):
        return ModelError(
            f"'{source}' holds GGUF files, which are for llama.cpp: vision-language models are not loaded from them.",
            seen=seen,
            fix="Give the checkpoint that they were made from, in transformers' own layout, such as "
            f"{_converted('llava')}; smaller in memory with --bits 4 (quantization_config=...).",
        )
    # From the surest sign to the vaguest. First the causes that the error itself names.
    package = missing_package(error)
    if package is not None:
        return ModelError(
            f"Loading '{source}' this way needs the package {package}, which is not installed.",
            seen=seen,
            fix=f"pip install {package}",
        )
    if is_out_of_memory(error):
        return ModelError(
            f"'{source}' does not fit into the memory of the device.",
            seen=seen,
            fix='Load it smaller or elsewhere: dtype="bfloat16", device_map="auto" or device="cpu"    '
            "CLI: --dtype bfloat16, --bits 4, --device-map auto, --device cpu",
        )
    if isinstance(error, SafetensorError):
        return ModelError(
            f"A weights file of '{source}' is broken or was cut short.", seen=seen, fix="Download or copy it again."
        )
    if _has_pickles_only(source, text):
        return _pickled(source, seen, config_or_nothing(source, options))
    # Then those that the checkpoint's config shows: code of its own, or a type that this transformers does not know.
    config = config_or_nothing(source, options)
    kind = str(config.get("model_type") or "")
    if "auto_map" in config and kind not in CONFIG_MAPPING:
        return _own_code(source, kind, seen, trusted=bool(options.get("trust_remote_code")))
    if kind and kind not in CONFIG_MAPPING:
        return ModelError(
            f"'{source}' is of type '{kind}', which transformers {transformers.__version__} does not know.",
            seen=seen,
            fix=f"Give a checkpoint in transformers' own layout, such as {_converted(kind)}; for a model newer than "
            "that transformers: pip install --upgrade transformers",
        )
    if isinstance(error, ValueError) and re.search("[Uu]nrecognized|does not recognize", text):
        return ModelError(
            f"'{source}' is not a vision-language model that transformers knows.",
            seen=seen,
            fix=f"Give a model for image-text-to-text, such as {_converted('')}.",
        )
    # At last what is left: no such source, an option of the user's, or a config that makes no model.
    given = [name for name in options if name not in USUAL]
    if isinstance(error, OSError) or not (given or kind):
        what = f"Cannot load the model '{source}'."
        fix = "Give a hub id, or a folder with config.json and model.safetensors."
        if not Path(source).is_dir():
            fix += f" There is no folder '{source}' here."
    elif given:
        what = f"Cannot load the model '{source}' with {', '.join(given)}."  # values can be secrets
        fix = "Give other options, or none; if that does not help, its config.json is at fault."
    else:
        what = f"transformers cannot build the model that the config.json of '{source}' describes."
        fix = "Mend the entry of which it speaks, or take the config.json of the model that this one was made from."
    return ModelError(what, seen=seen, fix=fix)


def _is_gguf(source: str) -> bool:
    """Whether a source is a GGUF file, or has such files and no others; of a hub id its name tells."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix.lower() == ".gguf" or (not path.exists() and "gguf" in path.name.lower())


def _from_pretrained(source: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model by transformers, with its report of missing, unexpected and mismatched weights."""
    return AutoModelForImageTextToText.from_pretrained(  # pyright: ignore[reportReturnType]  # with what it reports
        source,
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # its report on them says more than its error
        **options,
    )


def _adapter(source: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of a PEFT adapter, or None where the source is no adapter, or holds a model as well."""
    found = find_adapter_config_file(source, revision=options.get("revision"))
    if found is None or (Path(found).parent / "config.json").exists():
        return None
    return json.loads(Path(found).read_text(encoding="utf-8"))


def _base(source: str, adapter: Mapping[str, Any]) -> str:
    """Return the model that an adapter is for."""
    base = adapter.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        return base
    raise ModelError(
        f"The adapter '{source}' does not say which model it is for.",
        seen=f"adapter_config.json: base_model_name_or_path is {base!r}",
        fix="Write the hub id or folder of that model there; or put the adapter on, and give the model: "
        "load(PeftModel.from_pretrained(model, adapter), processor=...)",
    )


def _pickled(source: str, seen: str, config: Mapping[str, Any]) -> ModelError:
    """Return the error for a checkpoint whose weights are pickled, with the line that writes them anew."""
    fix = (
        'convert them: python -c "from transformers import AutoModelForImageTextToText as M; '
        f"M.from_pretrained({source!r}).save_pretrained('converted')\""
    )
    if config.get("model_type") == mplug_owl2.MplugOwl2Config.model_type:  # which transformers alone does not load
        folder = source if Path(source).is_dir() else "FOLDER"
        download = "" if Path(source).is_dir() else f"hf download {source} --local-dir FOLDER; "
        fix = (
            f'write them anew, and load the folder: {download}python -c "import glob, torch, safetensors.torch as s; '
            f"s.save_file({{k: v.clone() for f in glob.glob('{folder}/pytorch_model*.bin') for k, v in "
            f"torch.load(f, weights_only=True).items()}}, '{folder}/model.safetensors', {{'format': 'pt'}})\""
        )
    return ModelError(
        f"The weights of '{source}' are pickled, and nothing is unpickled here.",
        seen=seen,
        fix=f"If you trust where they come from, {fix}",
    )


def _own_code(source: str, kind: str, seen: str, *, trusted: bool) -> ModelError:
    """Return the error for a repository whose model is code of its own."""
    fix = f"Give the same model in transformers' own layout, such as {_converted(kind)}"
    if trusted:
        what = f"The code that comes with '{source}' makes no model for image-text-to-text with this transformers."
        return ModelError(what, seen=seen, fix=f"{fix}.")
    return ModelError(
        f"'{source}' is a model of code of its own, which is not run unasked.",
        seen=seen,
        fix=f'{fix}. If you trust the code: load("{source}", trust_remote_code=True)    CLI: --trust-remote-code',
    )


def _made_up(model: PreTrainedModel, report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Iterate over the weights that transformers drew at random, each with the reason, from what it reports."""
    for name in report["missing_keys"]:
        if _is_drawn(model, name):
            yield name, "missing"
    for entry in report["mismatched_keys"]:
        name, *shapes = [entry] if isinstance(entry, str) else entry  # transformers 4 gives names alone
        stored = f"shape {tuple(shapes[0])}" if shapes else "another shape"
        yield name, f"of {stored} there, {tuple(_tensor(model, name).shape)} in the model"


def _is_drawn(model: PreTrainedModel, name: str) -> bool:
    """Whether a missing tensor is drawn at random: integers (position ids, counts) are set by the model's own code."""
    try:
        return _tensor(model, name).is_floating_point()
    except AttributeError:  # a quantised layer packs it under other names
        return True


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    """Return a parameter or buffer by its path in the model."""
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _everywhere(path: str) -> str:
    """Replace the numbers in a path, so that it stands for the same module of every block and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _counted(names: Iterable[str]) -> str:
    """Write how many weights there are, and the name of the first."""
    names = sorted(names)
    return f"{len(names)} weight{'' if len(names) == 1 else 's'} ({names[0]}{' ...' if len(names) > 1 else ''})"


def _converted(kind: str) -> str:
    """Return a checkpoint in transformers' layout for a type of model, or LLaVA's where none is known."""
    return next((name for begin, name in CONVERTED.items() if kind.startswith(begin)), CONVERTED["llava"])


def _has_pickles_only(source: str, text: str) -> bool:
    """Whether a folder, or a repository of the hub by what the error says, has pickled weights alone."""
    folder = Path(source)
    if folder.is_dir():
        return not any(folder.glob("*.safetensors")) and any(any(folder.glob(kind)) for kind in PICKLES)
    return "use_safetensors=True" in text  # what transformers says of a hub repository with other weights


def _config(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config.json as it is stored."""
    return transformers.PretrainedConfig.get_config_dict(source, revision=options.get("revision"))[0]


def config_or_nothing(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config.json as it is stored, or nothing if it cannot be read."""
    try:
        config = _config(source, options)
    except Exception:  # noqa: BLE001 - an unreadable config is what is being reported
        return {}
    return config if isinstance(config, dict) else {}  # pyright: ignore[reportUnnecessaryIsInstance]  # a list is JSON too
