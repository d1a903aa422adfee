"""Tiny random models of the families that docs/reference/models.md lists."""

import inspect
import sys
from dataclasses import replace

from transformers import PreTrainedModel

from kits.library import lacking
from mmneurons.errors import ModelError
from mmneurons.vlm.families import check_version

from . import cross, extra, llava_like, queries, qwen_like
from .base import Family, Row, quiet_vision, randomise

__all__ = ["FAMILIES", "Family", "Row", "quiet_vision", "randomise"]


def _loadable(family: Family) -> Family:
    """The same; its tests are skipped where `load` refuses it under this version of transformers."""

    def build() -> PreTrainedModel:
        model = family.build()
        code = inspect.getsource(sys.modules[type(model).__module__])
        if "AriaGroupedExpertsGemm" in code:
            lacking("Aria's experts are one product, without neurons of each")
        if model.config.model_type == "paligemma" and "final_logit_softcapping" not in code:
            lacking("PaliGemma leaves out the softcap of its language model")
        if "position_ids + past_key_values_length" in code:
            lacking("GIT moves the positions that it is told once more")
        try:
            check_version(model.config)
        except ModelError as error:
            lacking(str(error))
        return model

    return replace(family, build=build)


FAMILIES: tuple[Family, ...] = tuple(
    _loadable(family) for module in (llava_like, qwen_like, queries, cross, extra) for family in module.FAMILIES
)
