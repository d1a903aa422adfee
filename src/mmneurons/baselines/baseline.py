"""Baselines: other ways to make a model say TARGET where it says SOURCE, all asked and evaluated alike.

`mmneurons.methods.edit` reaches them by `method=`.

| name | what changes | source |
| --- | --- | --- |
| `finetune` | all of one block's `w_out`, by Adam | |
| `lora` | every `w_out`, by a product of rank 8 | Hu et al., ICLR 2022 |
| `rome` | one block's `w_out`, by rank one | Meng et al., NeurIPS 2022 |
| `memit` | the `w_out` of a few blocks | Meng et al., ICLR 2023 |
| `random` | matched random columns, by the closed form of `edit` | |
| `logit_bias` | two logits, by a constant: an output-layer reference | |
| `head_rows` | two rows of the head, which change places: likewise | |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from mmneurons.baselines.finetune import finetune
from mmneurons.baselines.lora import Adapter, adapted, attached, lora
from mmneurons.baselines.matched import random
from mmneurons.baselines.memit import memit
from mmneurons.baselines.output_layer import HeadChange, head_rows, logit_bias
from mmneurons.baselines.rome import rome
from mmneurons.baselines.task import Facts, Task, dense_ffn
from mmneurons.data.pictures import Picture
from mmneurons.editing.edit import recorded_settings
from mmneurons.editing.reference import Reference, reference_of
from mmneurons.editing.request import make_requests, searched_images
from mmneurons.errors import SettingError
from mmneurons.patches.patch import Patch
from mmneurons.progress import Progress, untold
from mmneurons.settings import EditSettings
from mmneurons.vlm import provenance
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.vlm import VLM

Name = Literal["finetune", "lora", "rome", "memit", "random", "logit_bias", "head_rows"]
NAMES: tuple[Name, ...] = get_args(Name)
Change = Patch | Adapter | HeadChange
"""What a way of editing makes: each can be `applied(vlm)`, for as long as a `with` lasts, and has its `provenance`."""


@by_one_thread
def baseline(
    vlm: VLM,
    name: Name,
    images: Sequence[Picture],
    *,
    source: str,
    target: str,
    reference: Reference | Literal["own"] | None = None,
    settings: EditSettings | None = None,
    progress: Progress = untold,
) -> Change:
    """Make the model say `target` where it says `source`, as other work does. The model is left as it was.

    Args:
        vlm: The model, from `load`.
        name: Which of `NAMES`.
        images: Paths, PIL images or arrays; the model must say `source` of one of them at least.
        source: The word that is to go, singular.
        target: The word that is to come, singular.
        reference: What is to stay as it is, as of `edit`.
        settings: Prompts, answer prefix, batches, block and seed; how columns are chosen and moved for "random" alone.
        progress: Told what is being done.

    Returns:
        The change. Its `provenance` says what was asked, the `seconds` and the `steps` of Adam that it took, how many
        numbers of the model are `changed`, and how many are `stored` to say how.

    Raises:
        WordError: the model says `source` of none of the images, or a word cannot be written in its tokens.
        SettingError: source and target are one word; there is no such baseline or block; no strength turns any answer
            ("random", "logit_bias"); fewer other columns than `settings.top` ("random"); PEFT is missing ("lora").
        ModelError: columns that cannot be written, experts ("finetune", "lora", "rome", "memit"), adapters ("lora").
    """
    if name not in NAMES:
        raise SettingError(f"There is no baseline '{name}'.", fix=f"Choose one of: {', '.join(NAMES)}.")
    settings = settings or EditSettings()

    def tell(stage: str) -> None:
        progress(stage, 0, 0)

    began = time.perf_counter()
    tell("answering about the images")
    # 1. What the model says of the images: the same for all.
    requests = make_requests(vlm, images, settings.questions, source, target)
    _check(vlm, name, settings.block)
    reference = reference_of(vlm, reference, settings.question)
    task = Task(vlm, requests, source, target, reference, settings, settings.seed, tell)
    # 2. The change; the model's own weights take no part in what is learned.
    with torch.inference_mode(False), frozen(vlm.model), evaluating(vlm.model):
        change, facts = _MAKERS[name](task, settings.block)
    # 3. What made it, and at what cost.
    recorded = recorded_settings(settings, requests)
    recorded["settings"] |= {"method": name}
    made_by = {
        "source": source,
        "target": target,
        **recorded,
        "said_source": [len(one.saying) for one in requests],
        **facts,
        "seconds": time.perf_counter() - began,
        **_sizes(vlm, change),
        "images": len(images),
        "searched": searched_images(requests),
        "reference": None if reference is None else reference.facts,
        "model": dict(vlm.facts),
        "packages": provenance.versions(),
    }
    return replace(change, provenance=made_by)


def _check(vlm: VLM, name: Name, block: int | None) -> None:
    """Refuse what a way cannot work with before a reference is made, which takes long.

    Raises:
        SettingError, ModelError: as `baseline`.
    """
    if name == "lora":
        with attached(vlm, adapted(vlm), seed=0):
            pass
    elif name in ("finetune", "rome", "memit") and block is not None:
        dense_ffn(vlm, block)


def _sizes(vlm: VLM, change: Change) -> dict[str, int]:
    """`changed`: numbers of the model that are others; `stored`: numbers that say how."""
    if isinstance(change, HeadChange):
        return {"changed": 0, "stored": len(change.pairs) * 2 + (change.bias is not None)}
    if isinstance(change, Adapter):
        ffns = [ffn for ffn in vlm.anatomy.ffns if ffn.name in change.names]
        changed = sum(ffn.size for ffn in ffns) * vlm.anatomy.hidden
        return {"changed": changed, "stored": sum(each.numel() for each in change.weights.values())}
    # A patch: whole columns change, few numbers may say how.
    tensors = [change.directions, *(each for part in change.parts for each in (part.deltas, part.coefficients))]
    stored = sum(each.numel() for each in tensors if each is not None)
    return {"changed": len(change.neurons) * vlm.anatomy.hidden, "stored": stored}


_MAKERS: dict[str, Callable[[Task, int | None], tuple[Change, Facts]]] = {
    "finetune": finetune,
    "lora": lora,
    "rome": rome,
    "memit": memit,
    "random": random,
    "logit_bias": logit_bias,
    "head_rows": head_rows,
}
