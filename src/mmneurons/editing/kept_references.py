"""References on disk: what an edit leaves as it is, is answered and read once for a model, and not for each edit.

A file is found by the hash of all that makes a reference: weights, packages, question, pictures and texts. What is
found is tried against the model before it is used: hooks and other code change answers, and leave no trace in a hash.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmneurons.data.content import image_hash, key_of
from mmneurons.data.pictures import Picture, open_row
from mmneurons.editing.answers import TracedAnswers, TracedSteps, trace_answers, trace_texts
from mmneurons.files import cache_folder
from mmneurons.settings import Question
from mmneurons.vlm import age, provenance
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.vlm import VLM

LAYOUT = 1
"""Counted up when the same reference is written in another way, or worked out in another way."""
KEPT = 4
"""How many references stay on disk: those that were used last."""
LARGEST = 2**30
"""Bytes; a larger reference is not kept."""
DAY = 24 * 3600
"""Seconds after which a file that is still being written belongs to nobody."""
PARTS = ("residual", "token_ids", "logits", "answer_ids")
"""Fields of `TracedSteps` that are one tensor each."""

Answers = tuple[TracedAnswers | None, TracedSteps | None]
"""What was said of the pictures, and read in the texts."""

log = logging.getLogger(__name__)


def place_of(vlm: VLM, images: Sequence[Picture], texts: Sequence[str], question: Question) -> Path | None:
    """Return the file of what a model says of pictures and reads in texts, whether it is there or not.

    None while patches are applied: the weights' hash is that of the unedited model.
    """
    if age.patches(vlm.model):
        return None
    facts = {name: vlm.facts[name] for name in ("class", "weights_hash", "dtype", "device")}
    shown = [[image_hash(opened.image) for opened in open_row(image)] for image in images]
    read = [vlm.tokenizer(text).input_ids for text in texts] if texts else []
    key = key_of(LAYOUT, facts, provenance.versions(), asdict(question), question.prefix, shown, read)
    return cache_folder() / "references" / f"{key[:32]}.safetensors"


def load(place: Path, vlm: VLM, images: Sequence[Picture], texts: Sequence[str], question: Question) -> Answers | None:
    """Read what is kept; None where there is nothing, or the model now says something else."""
    try:
        with safe_open(place, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        with suppress(OSError):  # a folder that this user may only read
            os.utime(place)  # used last
        said, read = _steps(vlm, tensors, "said"), _steps(vlm, tensors, "read")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("A kept reference cannot be read and is made anew: %s: %s", place, error)
        return None
    answers = None
    if said is not None:
        answers = TracedAnswers(tuple(facts["texts"]), tuple(map(tuple, facts["token_ids"])), said)
    if not _is_said_now(vlm, images, texts, question, answers, read):
        log.warning("The model no longer answers as when this reference was kept; it is made anew: %s", place)
        return None
    return answers, read


def save(place: Path, answers: TracedAnswers | None, read: TracedSteps | None) -> None:
    """Keep what a model said and read, whole or not at all, and let go of what was not used for longest.

    Where it cannot be kept (no room, no right to write), it is made anew the next time.
    """
    tensors = dict[str, Tensor]()
    for name, steps in (("said", answers and answers.steps), ("read", read)):
        if steps is not None:
            tensors |= {f"{name}.activations.{i}": part.contiguous() for i, part in enumerate(steps.activations)}
            tensors |= {f"{name}.norms.{i}": part.contiguous() for i, part in enumerate(steps.norms)}
            tensors |= {f"{name}.{part}": getattr(steps, part).contiguous() for part in PARTS}
    if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST:
        return
    facts = {"texts": answers.texts, "token_ids": answers.token_ids} if answers is not None else {}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="making-", ignore_cleanup_errors=True) as folder:
            made = Path(folder) / "reference"
            save_file(tensors, made, {"facts": json.dumps(facts)})
            os.replace(made, place)
        for folder in place.parent.glob("making-*"):  # of processes that were killed, a day ago or longer
            if time.time() - folder.stat().st_mtime > DAY:
                shutil.rmtree(folder, ignore_errors=True)
        for old in sorted(place.parent.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            with suppress(FileNotFoundError):
                old.unlink()
    except (OSError, SafetensorError) as error:
        log.info("The reference is not kept: %s", error)


def _steps(vlm: VLM, tensors: dict[str, Tensor], name: str) -> TracedSteps | None:
    """Put the tensors of one part together again; None where it was not there.

    Raises:
        KeyError: a tensor is missing.
        ValueError: they are not those of this model.
    """
    if f"{name}.residual" not in tensors:
        return None
    anatomy = vlm.anatomy
    activations = tuple(tensors[f"{name}.activations.{i}"] for i in range(len(anatomy.ffns)))
    norms = tuple(tensors[f"{name}.norms.{i}"] for i in range(len(anatomy.norms)))
    residual = tensors[f"{name}.residual"]
    widths = [ffn.size for ffn in anatomy.ffns]
    if [part.shape[1] for part in activations] != widths or residual.shape[1] != anatomy.hidden:
        raise ValueError("tensors of another shape")
    return TracedSteps(anatomy, activations, norms, *(tensors[f"{name}.{part}"] for part in PARTS))


def _is_said_now(
    vlm: VLM,
    images: Sequence[Picture],
    texts: Sequence[str],
    question: Question,
    answers: TracedAnswers | None,
    read: TracedSteps | None,
) -> bool:
    """Whether the model says and reads now what was kept: tried with the first picture and the first text."""
    pairs = list[tuple[TracedSteps, TracedSteps]]()
    if answers is not None:
        pairs.append((trace_answers(vlm, images[:1], question).steps, answers.steps.at(answers.steps.answer_ids == 0)))
    if read is not None:
        pairs.append((trace_texts(vlm, texts[:1]), read.at(read.answer_ids == 0)))
    return all(_agree(now, kept, tolerance(vlm)) for now, kept in pairs)


def _agree(now: TracedSteps, kept: TracedSteps, tolerance: float) -> bool:
    """Whether steps are the same but for rounding."""
    if now.residual.shape != kept.residual.shape:
        return False
    tiny = torch.finfo(torch.float32).tiny
    pairs = [(now.residual, kept.residual), *zip(now.activations, kept.activations, strict=True)]
    ranges = [other.float().abs().max().clamp_min(tiny) for _, other in pairs]
    errors = [(one.float() - other.float()).abs().max() for one, other in pairs]
    return all(bool(error <= tolerance * most) for error, most in zip(errors, ranges, strict=True))
