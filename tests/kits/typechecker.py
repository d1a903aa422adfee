"""How types and shapes are checked while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_strictly = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is taken for a float, as type checkers do."""
_inner: dict[Any, Callable[..., Any]] = {}
"""The checks of functions that are defined inside others."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make what checks the arguments of a function of this signature, and does nothing else.

    A hook that a function defines is another one at each call, with the same signature: its checks are made once, since
    making them takes longer than most calls.
    """
    if "<locals>" not in function.__qualname__:
        return _strictly(function)
    hints = tuple(function.__annotations__.items())
    key = function.__module__, function.__qualname__, function.__code__.co_varnames, hints
    try:
        known = _inner.get(key)
    except TypeError:  # a hint that has no hash
        return _strictly(function)
    if known is None:
        known = _inner[key] = _strictly(function)
    return known
