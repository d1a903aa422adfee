"""What several test files need: the pocket model, and small models made on the spot."""

from __future__ import annotations

import copy
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MixtralConfig
from transformers.utils import logging

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing import kept_references
from mmneurons.vlm.vlm import VLM

settings.register_profile("quiet", deadline=None)  # speed is measured in benchmarks/, never asserted in a test
settings.load_profile("quiet")
logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def no_reference_is_kept():
    """Nothing that a test works out stays on disk, or comes from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_references, "LARGEST", 0)
        yield


@pytest.fixture(scope="session")
def vlm() -> VLM:
    """The pocket model, float32."""
    return mmn.load(device="cpu")


@pytest.fixture(scope="session")
def sample_paths() -> list[str]:
    return [str(sample.path) for sample in pocket.samples()]


@pytest.fixture(scope="session")
def random_vlm(vlm: VLM) -> VLM:
    """A LLaVA with random weights, no two of its norm weights alike, other sizes than the pocket model's."""
    return make_random_vlm(vlm)


@pytest.fixture(scope="session")
def mixture_vlm(vlm: VLM) -> VLM:
    """The same with four experts a block, of which two are asked: scores that follow FFNs refuse it."""
    return make_random_vlm(vlm, kind=MixtralConfig, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)


def make_random_vlm(
    vlm: VLM, dtype: torch.dtype = torch.float32, seed: int = 0, kind: type = LlamaConfig, **text_options
) -> VLM:
    """Untrained, but with every weight and norm away from its initial value, which would hide errors."""
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    text = kind(
        vocab_size=len(vlm.tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **(sizes | text_options),
    )
    config = LlavaConfig(
        vision_config=copy.deepcopy(vlm.model.config.vision_config),
        text_config=text,
        image_token_id=vlm.model.config.image_token_id,  # pyright: ignore[reportCallIssue]
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            spread = 0.3 if "norm" in name else 2.0 / parameter.shape[-1] ** 0.5
            parameter.copy_((1.0 if "norm" in name else 0.0) + spread * torch.randn_like(parameter))
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) / 4)
    return mmn.load(model.to(dtype), processor=vlm.processor)  # pyright: ignore[reportArgumentType]
