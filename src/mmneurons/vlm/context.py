"""Prepare a model to run: where its inputs go, and states that it is put into for the length of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedModel

from mmneurons.vlm.locking import restored

_SET_ASIDE = frozenset(
    """
    do_sample temperature top_k top_p min_p typical_p num_beams num_beam_groups length_penalty early_stopping
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty
    penalty_alpha bad_words_ids suppress_tokens begin_suppress_tokens forced_eos_token_id min_length min_new_tokens
    max_length max_new_tokens guidance_scale cache_implementation
    """.split()
)
"""Settings of a checkpoint that would change what it answers, and that greedy decoding by our settings leaves out."""


@restored
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the `with`; modules that were training go on training afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@restored
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients inside the `with`: below the first change that does, a pass keeps no graph."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@restored
def greedy(model: PreTrainedModel, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Let a model generate greedily, by our settings alone, inside the `with`; its own are put back afterwards.

    Settings are swapped, not overridden: `generate` fills every setting that is left open from the model's own. Models
    inside the model (BLIP-2's language model generates by itself) have settings of their own. Tokens that stand for a
    picture in a prompt are never written: no pixels belong to them, and the answer could not be read again.
    """
    stops = sorted(stop_ids(model, tokenizer))
    generators = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate()]
    own = [(m, m.generation_config) for m in generators if m.generation_config is not None]
    try:
        for module, config in own:
            # Without a token for padding, rows that end early cannot be filled up: any token that ends an answer will
            # do, since what stands behind it is cut off.
            pad = config.pad_token_id if config.pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
            module.generation_config = GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                disable_compile=True,  # hooks are skipped in a compiled decode step
                bos_token_id=config.bos_token_id,
                eos_token_id=stops or None,
                pad_token_id=pad if pad is not None else next(iter(stops), None),
                suppress_tokens=list(placeholder_ids(model.config)) or None,
                decoder_start_token_id=config.decoder_start_token_id,
            )
        with evaluating(model):
            yield
    finally:
        for module, config in own:
            module.generation_config = config


@restored
def hooked(setters: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Set hooks inside the `with`, one by each of `setters`, and remove them all whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        for setter in setters:
            handles.append(setter())
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model's inputs go to, which is that of its first weights that are not off-loaded."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer, by the model's settings or else by its tokenizer."""
    eos = None if model.generation_config is None else model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def set_aside(model: PreTrainedModel) -> dict[str, Any]:
    """Return which of a checkpoint's own settings of generation are not used here, as a fact about the model, or none.

    Tokens that begin, end and fill up an answer are used.
    """
    config = model.generation_config
    own = {} if config is None else config.to_diff_dict()
    told = {name: value for name, value in own.items() if name in _SET_ASIDE and value is not None}
    return {"generation_set_aside": told} if told else {}


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Return the tokens that stand for pictures, videos and sounds in a prompt, sorted."""
    names = (f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index"))
    found = {getattr(config, name, None) for name in names}
    return tuple(sorted(token for token in found if isinstance(token, int) and token >= 0))
