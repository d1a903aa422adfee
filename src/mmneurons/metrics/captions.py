"""Comparison of a caption before and after one of its words was changed."""

from __future__ import annotations

import re

REPLACED = 3
"""The most words that may stand in the place of a noun and its article, such as 'a fire engine'."""


def rest_unchanged(before: str, after: str, noun: str) -> bool:
    """Tell whether a caption still says what it said around `noun`, with no more than a phrase in the noun's place.

    An article right before the noun belongs to it: 'a dog' may become 'an owl' or 'some bread'. What stands there
    instead is at most `REPLACED` words, without a comma and without an 'and': one thing, not several.

    Args:
        before: The caption before the change.
        after: The caption after it.
        noun: The noun that was changed; if `before` does not have it, the captions must be equal.
    """
    found = re.search(rf"(\b(?:a|an|the|some)\s+)?\b{re.escape(noun)}\b", before, flags=re.IGNORECASE)
    if found is None:
        return before == after
    start, end = before[: found.start()], before[found.end() :]
    # The first condition keeps what stood before and what stood after from being found in the same characters.
    if len(after) < len(start) + len(end) or not (after.startswith(start) and after.endswith(end)):
        return False
    instead = after[len(start) : len(after) - len(end)].split()
    return len(instead) <= REPLACED and not any("," in word or word == "and" for word in instead)
