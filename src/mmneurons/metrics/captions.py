"""What stays of a caption where a word was changed."""

from __future__ import annotations

import re

REPLACED = 3
"""At most so many words may stand in the place of a noun and its article: 'a fire engine'."""


def rest_unchanged(before: str, after: str, noun: str) -> bool:
    """Whether a caption still says what it said before and after `noun`, with no more than a phrase in its place.

    An article right before the noun belongs to it: 'a dog' may become 'an owl' or 'some bread'. What stands there
    instead is at most `REPLACED` words, without a comma and without an 'and': one thing, not several.
    """
    found = re.search(rf"(\b(?:a|an|the|some)\s+)?\b{re.escape(noun)}\b", before, flags=re.IGNORECASE)
    if found is None:
        return before == after
    start, end = before[: found.start()], before[found.end() :]
    if len(after) < len(start) + len(end) or not (after.startswith(start) and after.endswith(end)):
        return False
    instead = after[len(start) : len(after) - len(end)].split()
    return len(instead) <= REPLACED and not any("," in word or word == "and" for word in instead)
