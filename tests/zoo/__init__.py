"""Tiny random models of the families that docs/models.md lists."""

from . import cross, extra, llava_like, queries, qwen_like
from .base import Family, Row, quiet_vision, randomise

__all__ = ["FAMILIES", "Family", "Row", "quiet_vision", "randomise"]

FAMILIES: tuple[Family, ...] = (
    *llava_like.FAMILIES,
    *qwen_like.FAMILIES,
    *queries.FAMILIES,
    *cross.FAMILIES,
    *extra.FAMILIES,
)
