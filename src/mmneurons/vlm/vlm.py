"""A vision-language model as the rest of the package uses it; it *has* a Hugging Face model and is not one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from typing import Any, cast, overload

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmneurons.data.images import OpenedImage, check_scaled
from mmneurons.data.pictures import Picture, Pictures, as_list
from mmneurons.errors import ModelError, SettingError
from mmneurons.pocket import SIDE
from mmneurons.settings import MAX_NEW_TOKENS, PROMPT, Question
from mmneurons.vlm import provenance
from mmneurons.vlm.age import age, patches, weights_hash
from mmneurons.vlm.anatomy.find import find_anatomy
from mmneurons.vlm.anatomy.parts import Anatomy, check_finite
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.checkpoint import Loading
from mmneurons.vlm.context import evaluating, greedy, hooked, input_device, placeholder_ids, set_aside, stop_ids
from mmneurons.vlm.failures import told
from mmneurons.vlm.families import Family, family_of
from mmneurons.vlm.locking import alone
from mmneurons.vlm.prompts import encode_prompt
from mmneurons.vlm.tokens import TokenIds, pieces, text_of

Inputs = Mapping[str, Any]
"""Inputs of the model, tensors by name."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers hold what the model generated, or read, for one batch."""

    token_ids: tuple[tuple[int, ...], ...]
    """Tokens of each answer, end-of-text included where it came, padding left out."""
    texts: tuple[str, ...]
    """Text of each answer, without special tokens and spaces around it; the answer prefix is not part of it."""
    sequences: Int[Tensor, "batch positions"]
    """Tokens of prompt and answer, padded, as the language model reads them; for reading the same words again."""
    logits: Float[Tensor, "batch steps"]
    """Logit of each token of the answers; of generated ones the largest, tokens that stand for a picture aside."""
    log_totals: Float[Tensor, "batch steps"]
    """Log of the sum of the exponentials of all logits at that step, so that log p = logit - log total."""
    n_prompt: int
    """Number of positions of the prompt: token s of an answer is predicted at position n_prompt + s - 1."""


@dataclass(eq=False)
class VLM:
    """A VLM holds a model, its processor and its anatomy; it is made by `load`."""

    model: PreTrainedModel
    processor: Any
    """The processor, or None: the model then works on ready-made inputs, and tokens are shown by number."""
    analysed: Anatomy
    """The anatomy as last found, to be read as `anatomy`, which looks whether the weights are still the same."""
    model_id: str
    revision: str | None = None
    is_pocket: bool = False
    """Whether this is the pocket model, which knows only its own scenes."""
    weights_hash: str | None = None
    """Hash taken when the model was loaded, if running it changes how its weights are stored (4-bit on CPUs)."""
    loading: Loading | None = None
    """How the weights and their checkpoint fit together; None for a model that came loaded."""
    day: date | None = None
    """The day that chat templates take for today; None for the real one."""
    _age: int = field(default=0, init=False, repr=False)
    _facts: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _token_texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        kind, dtype = type(self.model).__name__, str(self.anatomy.dtype).removeprefix("torch.")
        size = f"{len(self.anatomy.blocks)} blocks, {self.anatomy.n_neurons:,} neurons"
        return f"VLM({self.model_id!r}, {kind}: {size}, {dtype} on {self.device})"

    def alone(self) -> AbstractContextManager[None]:
        """Give this thread the model to itself inside the `with`; other threads wait for its end. It may be nested."""
        return alone(self.analysed.owner)

    @cached_property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or a stand-in that writes tokens as numbers."""
        return TokenIds() if self.processor is None else getattr(self.processor, "tokenizer", self.processor)

    @property
    def family(self) -> Family:
        """The family, which says what is special about this type of model."""
        return family_of(self.model.config)

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        return input_device(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model answers in a decoder of its own: the prompt is not in its sequence."""
        return bool(self.model.config.get_text_config(decoder=True).is_encoder_decoder) or bool(
            getattr(self.model.config, "is_encoder_decoder", False)
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens that can be written: rows of the unembedding without those that only pad it."""
        return min(self.anatomy.vocab, pieces(self.tokenizer))

    def __post_init__(self) -> None:
        """Look at the weights, to notice when something else changes them."""
        self._age = age(self.model)

    @property
    def anatomy(self) -> Anatomy:
        """The anatomy of the model, found anew if something else than patches has changed the weights."""
        self._notice()
        return self.analysed

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the model: id, revision, class, weights hash, dtype, device, form of `w_out`.

        The weights are read once, for their hash without patches; those that are applied are named beside it.
        """
        kinds = dict.fromkeys(type(ffn.module).__name__ for ffn in self.anatomy.ffns)
        with self.alone():
            if self._facts is None:
                weights = self.weights_hash or weights_hash(self.model)
                known = provenance.model_facts(self.model, self.model_id, self.revision, weights, self.anatomy.dtype)
                self._facts = known | {"w_out_class": ", ".join(kinds)} | set_aside(self.model)
            now = {"date": self.day.isoformat()} if self.day else {}
            now |= {"patches": list(found)} if (found := patches(self.model)) else {}
            return self._facts | now if now else self._facts

    def _notice(self) -> None:
        """Find the anatomy anew, and forget what was known of the weights, if something else has changed them."""
        if age(self.model) == self._age:
            return
        with self.alone():
            self.analysed = find_anatomy(self.model, self.analysed.decoder_name)
            self._age, self._facts, self.weights_hash, self.loading = age(self.model), None, None, None

    def token_text(self, token_id: int) -> str:
        """Return one token as text, leading space kept; part of a character is given as the vocabulary writes it."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = text_of(self.tokenizer, token_id)
        return self._token_texts[token_id]

    @overload
    def caption(
        self, images: Pictures, prompt: str = ..., answer_prefix: str | None = ..., *,
        max_new_tokens: int = ..., batch_size: int = ...,
    ) -> list[str]: ...  # fmt: skip
    @overload
    def caption(
        self, images: Picture | None = ..., prompt: str = ..., answer_prefix: str | None = ..., *,
        max_new_tokens: int = ..., batch_size: int = ...,
    ) -> str: ...  # fmt: skip
    def caption(  # pyright: ignore[reportInconsistentOverload]
        self,
        images: Picture | Pictures | None = None,
        prompt: str = PROMPT,
        answer_prefix: str | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 8,
    ) -> str | list[str]:
        """Let the model say what is in one image, or in each of several, or answer a question.

        Args:
            images: A path, PIL image or array, or a list of them; a list in the list is several images in one prompt;
                None for a prompt without an image.
            prompt: What is asked.
            answer_prefix: Words that the answer is made to begin with; not part of what is returned. None: "An image
                of" with the default prompt, none with another. Spaces around them do not matter.
            max_new_tokens: Number of tokens after which to stop if the model does not.
            batch_size: Number of prompts answered at once.

        Returns:
            One text, or a list of as many texts as prompts: greedy, whatever the checkpoint's own settings.

        Raises:
            ImageError: if something is not an image.
        """
        question = Question(prompt, answer_prefix, max_new_tokens, batch_size)
        texts = texts_of(self, as_list(images), question)
        return texts if isinstance(images, list | tuple) else texts[0]

    def encode(
        self, images: Sequence[Image.Image | Sequence[Image.Image]], prompt: str = PROMPT, answer_prefix: str = ""
    ) -> Inputs:
        """Encode one prompt for each RGB image, or list of images, as inputs on the model's device and in its dtype.

        Raises:
            ModelError: if the model came without a processor, or its processor cannot write this prompt.
            ImageError: a picture that the processor would scale up without bound.
        """
        if self.processor is None:
            raise ModelError(
                "This model came without a processor: pictures and words cannot be turned into its inputs.",
                fix="load(model, processor=...), or give tensors: find(vlm, inputs={...}), doctor(vlm, inputs={...})",
            )
        rows = [[row] if isinstance(row, Image.Image) else list(row) for row in images]
        image_processor = getattr(self.processor, "image_processor", None)
        check_scaled((picture.size for row in rows for picture in row), image_processor)
        with self.alone():  # the tokenizer is told how to pad
            # A decoder goes on from its last position, so it pads to the left; an encoder's positions count from the
            # left.
            batch = encode_prompt(
                self.processor,
                rows,
                prompt,
                answer_prefix,
                image_token_id=getattr(self.model.config, "image_token_id", None),
                padding_side="right" if self.is_encoder_decoder else "left",
                decoder_start=self._decoder_start() if self.is_encoder_decoder else None,
                names=inspect.signature(self.model.forward).parameters,
                day=self.day,
            )
        return self.placed(batch)

    def placed(self, inputs: Inputs) -> Inputs:
        """Move inputs to the model's device, floating ones also to its dtype."""
        return {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def check_batch(self, n_rows: int) -> None:
        """Refuse several prompts at once where a batch changes what the model computes."""
        if n_rows > 1 and self.family.one_at_a_time:
            raise SettingError(
                "This model's prompts run one at a time.", seen=self.family.why, fix="Give inputs of one row."
            )

    def generate(self, inputs: Inputs, max_new_tokens: int = MAX_NEW_TOKENS) -> Answers:
        """Generate greedy answers for one encoded batch, with a KV cache and nothing compiled.

        Raises:
            SettingError: no token is asked for, or the prompt leaves no place for one.
            ModelError: the model's own code fails on these inputs, there is not enough memory, or the logits are NaN.
        """
        if max_new_tokens < 1:
            raise SettingError("An answer has at least one token.", seen=f"max_new_tokens={max_new_tokens}")
        self._check_length(inputs)
        watch = _Chosen(placeholder_ids(self.model.config))
        watching = hooked([partial(self.anatomy.owner.register_forward_hook, watch)])
        decoding = greedy(self.model, self.tokenizer, max_new_tokens)
        with self.alone(), watching, torch.inference_mode(), decoding, told():
            made = cast(Any, self.model).generate(**inputs)
        # One forward pass of the owner per generated token; what is before them is the prompt, as the language model
        # has it.
        n_prompt = made.shape[1] - len(watch.logits)
        stops = stop_ids(self.model, self.tokenizer)
        rows = tuple(_until_stop(row, stops) for row in made[:, n_prompt:].tolist())
        texts = tuple(self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
        logits, totals = torch.stack(watch.logits, dim=1), torch.stack(watch.log_totals, dim=1)
        check_finite(totals, self.model.dtype)
        return Answers(rows, texts, made, logits, totals, n_prompt)

    def _check_length(self, inputs: Inputs) -> None:
        """Refuse a prompt that leaves no place for an answer in what the model was made for."""
        if self.is_encoder_decoder or "input_ids" not in inputs:
            return
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if isinstance(context, int) and length >= context:
            raise SettingError(
                "The prompt is longer than what the model was made to read.",
                seen=f"{length} tokens, those of pictures among them; the model's context is {context}.",
                fix="Ask, or answer, in fewer words, with fewer or smaller pictures.",
            )

    def given(self, inputs: Inputs, token_ids: Sequence[Sequence[int]]) -> Answers:
        """Make answers of tokens that the model did not choose, for `read`; short ones are filled up by the longest."""
        if self.is_encoder_decoder or "input_ids" not in inputs:
            first = self.generate(inputs, 1)  # shows the prompt as the language model's own sequence has it
            prompts = first.sequences[:, : first.n_prompt]
        else:
            prompts = inputs["input_ids"]
        longest = max(token_ids, key=len)
        filled = [[*row, *longest[len(row) :]] for row in token_ids]
        fed = torch.tensor(filled, dtype=prompts.dtype, device=prompts.device).view(len(filled), len(longest))
        nothing, n_prompt = torch.empty(len(filled), 0, dtype=torch.float32), prompts.shape[1]
        rows = tuple(map(tuple, token_ids))
        texts = tuple(self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
        return Answers(rows, texts, torch.cat([prompts, fed], dim=1), nothing, nothing, n_prompt)

    def read(self, inputs: Inputs, answers: Answers | None = None) -> None:
        """Run the model once over a prompt and, if given, an answer, for the sake of what is recorded on the way."""
        batch = dict(inputs) if answers is None else self.extended(inputs, answers)
        with self.alone(), torch.inference_mode(), evaluating(self.model), told():
            self.model(**batch, **self.once())

    def scored(self, inputs: Inputs, answers: Answers) -> Answers:
        """Return the same answers with the logits of their tokens, read in one forward pass over prompt and answer.

        Raises:
            SettingError: prompt and answer are longer than the model's context.
            ModelError: as `generate`.
        """
        n_added = answers.sequences.shape[1] - answers.n_prompt
        extended = self.extended(inputs, answers)
        self._check_length(extended)
        with self.alone(), torch.inference_mode(), evaluating(self.model), told():
            output = self.model(**extended, **self.once(n_added + 1))
        # The logits at a position are about the next token: from the prompt's last one to the answer's last but one.
        logits = output.logits[:, -n_added - 1 : -1].float()
        totals = logits.logsumexp(-1)
        check_finite(totals, self.model.dtype)
        said = answers.sequences[:, answers.n_prompt :, None].to(logits.device)
        return replace(answers, logits=logits.gather(-1, said)[..., 0], log_totals=totals)

    def once(self, n_logits: int = 1) -> dict[str, Any]:
        """Return options for a forward pass that nothing follows: no cache, and logits of the last positions alone."""
        # A number of logits to keep would let Gemma 4 skip positions in its last blocks; a list of them does not.
        options = {"use_cache": False, "logits_to_keep": torch.arange(-n_logits, 0, device=self.device)}
        takes = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in options.items() if name in takes}

    def extended(self, inputs: Inputs, answers: Answers) -> dict[str, Any]:
        """Extend the inputs of a prompt by an answer."""
        batch = dict(inputs)
        if self.is_encoder_decoder:
            return batch | {"decoder_input_ids": answers.sequences}
        n_rows, n_added = len(answers.sequences), answers.sequences.shape[1] - answers.n_prompt
        # Every input with one entry per position of the prompt gets one for each token of the answer.
        for name, value in inputs.items():
            if name == "pixel_values" or not isinstance(value, Tensor) or value.shape[:2] != (n_rows, answers.n_prompt):
                continue
            if value.ndim > 2:  # one row of something per token: the answer sees what the prompt's last token saw
                added = value[:, -1:].expand(-1, n_added, *value.shape[2:])
            else:
                filling = 1 if name == "attention_mask" else self.family.suffix.get(name, 0)
                added = value.new_full((n_rows, n_added), filling)
            batch[name] = torch.cat([value, added], dim=1)
        if self.family.counts_positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return batch | {"input_ids": answers.sequences}

    def notes(self, opened: OpenedImage) -> tuple[str, ...]:
        """Return notes for a reader of an answer about this image."""
        width, height = opened.image.size
        if self.is_pocket and (width, height) != (SIDE, SIDE):
            warning = (
                f"The pocket model knows only its own {SIDE} x {SIDE} scenes of drawings; this picture is "
                f"{width} x {height}. Whatever it is shown, it names what its scenes hold: do not believe it here."
            )
            return (*opened.notes, warning)
        return opened.notes

    def _decoder_start(self) -> list[int]:
        """Return the tokens that the decoder's text begins with, as `generate` of the model that holds it begins."""
        owner = cast(PreTrainedModel, self.anatomy.owner)
        text = self.model.config.get_text_config(decoder=True)
        configs = (owner.generation_config, self.model.generation_config, self.model.config, text)

        def said(name: str) -> int | None:
            return next((token for c in configs if (token := getattr(c, name, None)) is not None), None)

        start = said("decoder_start_token_id")
        start = said("bos_token_id") if start is None else start
        forced = said("forced_bos_token_id")
        return [token for token in (start, forced) if token is not None]


class _Chosen:
    """A hook that notes at each step what is needed of the logits, which are too large to keep.

    Args:
        unsaid: Tokens that are never chosen, however likely; log totals are over all tokens, as the model gave them.
    """

    def __init__(self, unsaid: Sequence[int]) -> None:
        self.unsaid = list(unsaid)
        self.logits: list[Tensor] = []
        self.log_totals: list[Tensor] = []

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        scores = output.logits[:, -1].to(torch.float32, copy=True)
        self.log_totals.append(scores.logsumexp(-1))
        scores[:, [token for token in self.unsaid if token < scores.shape[1]]] = -torch.inf
        self.logits.append(scores.max(-1).values)


def _until_stop(row: list[int], stops: set[int]) -> tuple[int, ...]:
    """Cut a row of tokens off behind the first that ends an answer."""
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return tuple(row[:end])
