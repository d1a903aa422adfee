"""Export an edited model as an ordinary Hugging Face folder, for people who do not have this package.

export(vlm, [Patch.load("dog-to-cat.safetensors")], "model-without-dogs")

AutoModelForImageTextToText.from_pretrained("model-without-dogs")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from mmneurons.errors import ModelError, SettingError
from mmneurons.patches.ledger import Ledger, ledger_of
from mmneurons.patches.patch import Patch
from mmneurons.vlm import provenance
from mmneurons.vlm.locking import by_one_thread, restored
from mmneurons.vlm.processors import ImageAndTokenizer
from mmneurons.vlm.vlm import VLM
from mmneurons.vlm.weights import stored

NOTE = "mmneurons_patches.json"
"""Name of the file that says in the folder where it comes from."""
SCHEMA = 1
CHANGED_BY_SAVING = ("dtype", "architectures")
"""Entries that `save_pretrained` changes in the config of the live model."""
PROCESSOR_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "chat_templates/*.jinja")
"""Names of files that processors are made of."""
NOT_OF_PROCESSOR = ("config.json", "generation_config.json", NOTE)
"""Files that match those names, but belong to the model."""


@by_one_thread
def export(vlm: VLM, patches: Sequence[Patch], folder: str | os.PathLike[str]) -> Path:
    """Write the unedited model with these patches, and nothing else, as a folder that plain transformers loads.

    Patches that are active in the live model do not matter, and are active again afterwards. The folder is written
    beside its place and renamed at the end: whatever happens, it is there whole or not at all.

    Args:
        vlm: The model, from `load`.
        patches: Patches to write into the weights; none writes the model as it was loaded.
        folder: Path of the folder, not there yet or empty. Its parent must be there.

    Returns:
        The folder. Weights have the dtype in which the live model holds them, and those that no patch names are the
        same bit for bit. The processor lies beside them, if there is one, and `mmneurons_patches.json`: the facts of
        the model before, hash and provenance of each patch.

    Raises:
        SettingError: something given is no patch; the folder is not empty, is in the folder of the model itself, or
            cannot be written (disk full).
        ModelError: a patch is of another model; adapters (LoRA) are attached, or weights are quantised.
    """
    folder = Path(folder).expanduser().resolve()
    # Everything that can be refused is refused before gigabytes are written.
    for patch in patches:
        if not isinstance(patch, Patch):
            raise SettingError(
                "Only patches can be exported.",
                seen=f"Given a {type(patch).__name__}.",
                fix="Give a list of patches: export(vlm, [patch], folder). LoRA and changes of the head are none.",
            )
    if len({patch.hash for patch in patches}) < len(patches):
        raise SettingError("One patch is given twice.", fix="Scale it to change more: 2 * patch")
    _check_folder(vlm, folder)
    _check_model(vlm.model)
    try:
        with _beside(folder) as temporary:
            _write(vlm, patches, temporary)
            if folder.is_dir():
                folder.rmdir()  # known to be empty; Windows renames no folder to a name that is taken
            temporary.rename(folder)
    except Timeout as error:
        raise SettingError(f"Another run is exporting to {folder}.", fix="Wait for it, or choose another.") from error
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the system in its own
        raise SettingError(
            f"Cannot write {folder}.", seen=str(error), fix="Choose another place, or make room there."
        ) from error
    return folder


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Make an empty folder to build this one in; what a run that was killed has left there is removed.

    A lock tells such a run from one that is still writing: the system releases it when a process ends, however it ends.
    """
    temporary, lock = (folder.with_name(f".{folder.name}.{what}") for what in ("tmp", "lock"))
    with FileLock(lock, timeout=0):
        # This run has the lock, so that nobody writes in a folder that is there: it is left over.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # Windows does not remove a file that is open
                lock.unlink()


def _write(vlm: VLM, patches: Sequence[Patch], folder: Path) -> None:
    """Write weights, config, processor and note into an empty folder."""
    # 1. The weights. The live model gets these patches for as long as it is saved, and keeps its own config: of it
    # `save_pretrained` changes entries.
    config = vlm.model.config
    kept = {name: getattr(config, name, None) for name in CHANGED_BY_SAVING}
    try:
        with _exactly(ledger_of(vlm), ()):
            # Not `vlm.facts`, which may have been computed while some patch was active.
            facts = provenance.model_facts(vlm.model, vlm.model_id, vlm.revision, vlm.weights_hash, vlm.anatomy.dtype)
        with _exactly(ledger_of(vlm), patches):
            vlm.model.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        raise ModelError("transformers cannot save this model.", seen=str(error)) from error
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
    # 2. The processor, and the note that says of which model and which patches this one is made.
    _save_processor(vlm, folder)
    note = {
        "schema": SCHEMA,
        "model": facts,
        "patches": [
            {"hash": patch.hash, "columns": len(patch.neurons), "provenance": dict(patch.provenance)}
            for patch in patches
        ],
        "packages": provenance.versions(),
    }
    text = json.dumps(note, ensure_ascii=False, indent=2, sort_keys=True, default=str)
    (folder / NOTE).write_text(f"{text}\n", encoding="utf-8")


def _check_folder(vlm: VLM, folder: Path) -> None:
    """Refuse a folder that is not empty, has no parent, or lies in the folder that the model was loaded from."""
    loaded_from = (vlm.model_id, getattr(vlm.model.config, "_name_or_path", ""))
    sources = [Path(name).resolve() for name in loaded_from if name and Path(name).is_dir()]
    if any(source in (folder, *folder.parents) for source in sources):
        raise SettingError("The model's own folder is not written to.", seen=str(folder), fix="Choose another folder.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} is there already, and is not an empty folder.", fix="Choose another folder.")
    if not folder.parent.is_dir():
        raise SettingError(f"There is no folder {folder.parent}.", fix="Make it first.")


def _check_model(model: Any) -> None:
    """Refuse what `save_pretrained` would write in another form than an ordinary checkpoint.

    Raises:
        ModelError: adapters, or packed weights.
    """
    # Adapters: attached by PEFT around modules, or by transformers' own `load_adapter`.
    modules: list[nn.Module] = list(model.modules())
    if any(map(stored.is_adapter, modules)) or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "A model with adapters (LoRA) attached is not exported: transformers would write the adapters alone.",
            fix="Merge them, load(peft_model.merge_and_unload()), and make the patches anew; or keep the patch files.",
        )
    # Off-loaded by `device_map`, which `hf_device_map` shows, weights are fetched by `save_pretrained` itself.
    if any(tensor.is_meta for tensor in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ModelError(
            "Weights are off-loaded in a way that transformers does not know, and so cannot write.",
            fix='Load the model whole, or off-loaded by load(..., device_map="auto").',
        )
    # Packed weights: of any module, not only of those that a patch could change, or the folder would not be ordinary.
    packed = [m for m in modules if getattr(m, "weight", None) is not None and stored.is_packed(m)]
    packed += [m for m in modules if stored.holds_experts(m) and stored.is_packed(m)]
    if packed or getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            "A quantised model is not exported: its weights cannot be edited.",
            seen=f"Quantised: a module of type {type(packed[0]).__name__}" if packed else "",
            fix="Load it without quantisation, make the patch for that, and quantise the exported model.",
        )


@restored
def _exactly(ledger: Ledger, patches: Sequence[Patch]) -> Iterator[None]:
    """Apply these patches and no others inside the `with`; afterwards those that were applied before."""
    before = ledger.active
    try:
        _change(ledger, patches)
        yield
    finally:
        _change(ledger, before)


def _change(ledger: Ledger, patches: Sequence[Patch]) -> None:
    """Revert and apply what it takes for these patches to be the active ones."""
    # Reverted first: two patches together can be too large for the dtype of the weights where each alone is not.
    wanted, active = ({patch.hash: patch for patch in each} for each in (patches, ledger.active))
    for patch in [patch for key, patch in active.items() if key not in wanted]:
        ledger.revert(patch)
    for patch in [patch for key, patch in wanted.items() if key not in active]:
        ledger.apply(patch)


def _save_processor(vlm: VLM, folder: Path) -> None:
    """Write the processor's files into the folder, if there is a processor."""
    processor = vlm.processor
    if processor is None:
        return
    if isinstance(processor, ImageAndTokenizer):
        processor.image_processor.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
    elif any(getattr(processor, name, None) is None for name in getattr(processor, "get_attributes", tuple)()):
        # A processor loaded without its video part: `save_pretrained` fails without that part, and there is none.
        _copy_processor(vlm, folder)
    else:
        processor.save_pretrained(folder)


def _copy_processor(vlm: VLM, folder: Path) -> None:
    """Copy the processor's files as they lie beside the weights that were loaded."""
    source = Path(vlm.model_id)
    if not source.is_dir():
        # A model of the hub: its files were downloaded when it was loaded, and nothing is downloaded now.
        patterns = list(PROCESSOR_FILES)
        options: dict[str, Any] = {"allow_patterns": patterns, "local_files_only": True}
        source = Path(huggingface_hub.snapshot_download(vlm.model_id, revision=vlm.revision, **options))
    for path in sorted({path for pattern in PROCESSOR_FILES for path in source.glob(pattern)}):
        place = folder / path.relative_to(source)
        if path.name not in NOT_OF_PROCESSOR and not path.name.endswith(".index.json"):
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
