"""A vision-language model as the rest of the package uses it. It *has* a Hugging Face model, and is not one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig, PreTrainedModel

from mmneurons.errors import SettingError
from mmneurons.pocket import SIDE
from mmneurons.vlm import provenance
from mmneurons.vlm.anatomy import Anatomy
from mmneurons.vlm.images import OpenedImage, open_image
from mmneurons.vlm.prompts import ANSWER_PREFIX, MAX_NEW_TOKENS, PROMPT, chat_text

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""What `open_image` takes."""
Pictures = list[Any] | tuple[Any, ...]
"""Several of them; `Any`, because a list of paths is no list of `Picture` to a type checker."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model generated for one batch."""

    token_ids: tuple[tuple[int, ...], ...]
    """Per row, end-of-text included where it came, padding left out."""
    texts: tuple[str, ...]
    """Per row, decoded without special tokens and stripped; the answer prefix is not part of it."""
    sequences: Int[Tensor, "batch positions"]
    """Prompt and answer, padded; for reading the same words again."""
    logits: tuple[Float[Tensor, "batch vocab"], ...]
    """Per step, as the model gave them; empty unless asked for."""
    n_prompt: int
    """Positions of the prompt: what predicted generated token s stands at n_prompt + s - 1."""


@dataclass(eq=False)
class VLM:
    """A model, its processor and its anatomy; made by `load`."""

    model: PreTrainedModel
    processor: Any
    anatomy: Anatomy
    model_id: str
    revision: str | None = None
    is_pocket: bool = False
    """The model that comes with the package, which knows only its own scenes."""
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Id, revision, class, weights hash, dtype and device, for provenance; the weights are read once."""
        return provenance.model_facts(self.model, self.model_id, self.revision)

    def token_text(self, token_id: int) -> str:
        """One token as text, leading space kept; part of a character is given as the vocabulary writes it."""
        if token_id not in self._token_texts:
            text = self.tokenizer.decode([token_id])
            if not text or "\ufffd" in text:
                text = self.tokenizer.convert_ids_to_tokens(token_id)
            self._token_texts[token_id] = text
        return self._token_texts[token_id]

    @overload
    def caption(self, images: Pictures, prompt: str = ..., answer_prefix: str = ..., **limits: int) -> list[str]: ...
    @overload
    def caption(self, images: Picture, prompt: str = ..., answer_prefix: str = ..., **limits: int) -> str: ...
    def caption(  # pyright: ignore[reportInconsistentOverload]
        self,
        images: Picture | Pictures,
        prompt: str = PROMPT,
        answer_prefix: str = ANSWER_PREFIX,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 8,
    ) -> str | list[str]:
        """Say what is in one image, or in each of several.

        Args:
            images: A path, PIL image or array, or a list of them.
            prompt: What is asked.
            answer_prefix: Words that the answer is made to begin with; not part of what is returned.
            max_new_tokens: Where to stop if the model does not.
            batch_size: Images generated for at once.

        Returns:
            One text, or a list of as many texts as images: greedy, whatever the checkpoint's own settings.

        Raises:
            ImageError: if something is not an image.
        """
        if batch_size < 1:
            raise SettingError("A batch holds at least one image.", seen=f"batch_size={batch_size}")
        opened = [open_image(image) for image in as_list(images)]
        texts: list[str] = []
        for start in range(0, len(opened), batch_size):
            inputs = self.encode([o.image for o in opened[start : start + batch_size]], prompt, answer_prefix)
            texts += self.generate(inputs, max_new_tokens).texts
        return texts if isinstance(images, list | tuple) else texts[0]

    def encode(self, images: Sequence[Image.Image], prompt: str = PROMPT, answer_prefix: str = "") -> BatchFeature:
        """Model inputs for RGB images, one a row, all with the same prompt; on the model's device and in its dtype."""
        text = chat_text(self.processor, prompt, answer_prefix)
        bos = getattr(self.tokenizer, "bos_token", None)
        batch = self.processor(
            images=list(images),
            text=[text] * len(images),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and text.startswith(bos)),  # some chat templates write it themselves
        )
        return batch.to(device=self.device, dtype=self.model.dtype)

    def generate(self, inputs: BatchFeature, max_new_tokens: int = MAX_NEW_TOKENS, *, logits: bool = False) -> Answers:
        """Greedy answers for one encoded batch, with a KV cache and nothing compiled; `logits` keeps those too."""
        if max_new_tokens < 1:
            raise SettingError("An answer has at least one token.", seen=f"max_new_tokens={max_new_tokens}")
        with torch.inference_mode(), _greedy(self.model, self.tokenizer, max_new_tokens):
            made = cast(Any, self.model).generate(**inputs, return_dict_in_generate=True, output_logits=logits)
        sequences = made.sequences
        n_prompt = inputs["input_ids"].shape[1]
        stops = _stop_ids(self.model, self.tokenizer)
        rows = tuple(_until_stop(row, stops) for row in sequences[:, n_prompt:].tolist())
        texts = tuple(self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
        return Answers(rows, texts, sequences, made.logits or (), n_prompt)

    def read(self, inputs: BatchFeature, answers: Answers | None = None) -> None:
        """Run the model once over a prompt, and an answer if one is given, for what `record` records on the way."""
        batch = dict(inputs)
        if answers is not None:
            batch["input_ids"] = answers.sequences
            generated = answers.sequences.shape[1] - answers.n_prompt
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, generated), value=1)
        with torch.inference_mode(), _evaluating(self.model):
            self.model(**batch, use_cache=False, logits_to_keep=1)

    def notes(self, opened: OpenedImage) -> tuple[str, ...]:
        """What a reader of an answer about this image should be told."""
        width, height = opened.image.size
        if self.is_pocket and (width, height) != (SIDE, SIDE):
            warning = (
                f"The pocket model knows only its own {SIDE} x {SIDE} scenes of drawings; this picture is "
                f"{width} x {height}. Whatever it is shown, it names what its scenes hold: do not believe it here."
            )
            return (*opened.notes, warning)
        return opened.notes


def as_list(images: Picture | Pictures) -> list[Picture]:
    """One image or several, as a list."""
    return list(images) if isinstance(images, list | tuple) else [images]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Greedy generation by our settings alone; the checkpoint's are put back afterwards.

    They are swapped, not overridden: `generate` fills every setting that is left open from the model's own.
    """
    own = model.generation_config
    stops = sorted(_stop_ids(model, tokenizer))
    pad = own.pad_token_id if own.pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        disable_compile=True,  # hooks are skipped in a compiled decode step
        bos_token_id=own.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else next(iter(stops), None),
        decoder_start_token_id=own.decoder_start_token_id,
    )
    try:
        with _evaluating(model):
            yield
    finally:
        model.generation_config = own


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _until_stop(row: list[int], stops: set[int]) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return tuple(row[:end])
