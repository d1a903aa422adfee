"""Flat rows hold what experiments found; tables are made of their means, image by image.

The columns are those of docs/reference/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar, runtime_checkable

import numpy as np

TOP, MATCHED, ANY = "top", "matched random", "any random"
"""Neurons that a row is about: the top k, random ones as loud in the same blocks, random ones of any block."""
ELSEWHERE = "top, another object"
"""The top k again, whose map is held against the masks of the other objects of the same picture."""
EQUAL_CHANGE = "matched random, equal change"
"""Matched random neurons whose activations are so scaled that the residual stream changes as by silence of the top."""
LOUDNESS, NEURONS = "loudness / the top's", "neurons"
"""Measures of a set of random neurons: how loud it is, and how many they are."""
LOST_BLANK, LOST_OTHER = "lose half with a blank image", "lose half with another image"
DECODED, STAYS = "decoded hit@10", "stay when patches are shuffled"
POINTING, AREA, LEAD = "pointing game", "the mask's share of the image", "pointing game - the mask's share"
IOU, IOU_EQUAL_AREA, AUROC = "IoU, strongest 5 %", "IoU at equal area", "patch AUROC"
"""Measures of sensitivity."""
IMAGES, OWN_SHARE, SHARED, IN_BLOCK = "images that say it", "own share", "shared top neurons", "in the block"
"""Measures of specificity."""
DIFFERENT, ALIKE = "different nouns", "different nouns, as frequent and at the same place"
"""Which pairs of nouns are compared with pairs of the same noun."""
GONE, UNCHANGED = "no longer says the noun", "the rest unchanged"
"""Measures of causal effect."""
CHANGE, TIMES = "change / the top's", "activations times"
"""Measures of random neurons there: how far they move the residual stream, and by what they are multiplied for that."""
AGREEMENT, FALL = "rank agreement", "fall of log p"
"""Measures of finders; `DECODED` is one of theirs, too."""


class SensitivityRow(TypedDict):
    """A row of sensitivity is one measure of one noun of one image."""

    image: str
    noun: int
    """Place among the nouns of the answer, from 0: a word can be said twice."""
    word: str
    lemma: str
    is_shown: bool | None
    measure: str
    neurons: str
    k: int
    value: float | None


class CausalRow(TypedDict):
    """A row of the causal experiment is one measure of one noun of one image, some neurons being disturbed."""

    image: str
    noun: int
    word: str
    lemma: str
    disturbance: str
    neurons: str
    k: int
    measure: str
    value: float | None


class FinderRow(TypedDict):
    """A row of finders is one measure of one finder at one noun of one image."""

    image: str
    noun: int
    word: str
    token: str
    finder: str
    measure: str
    effect: str | None
    scope: str | None
    neurons: str | None
    k: int | None
    value: float | None


class SpecificityRow(TypedDict):
    """A row of specificity is one measure of a concept, of two of them, or of a block; over all images."""

    measure: str
    k: int | None
    concept: str | None
    other: str | None
    block: int | None
    value: float | None


Row = TypeVar("Row", covariant=True)


@runtime_checkable
class HasRows(Protocol[Row]):
    """What an experiment finds of one noun can be told as rows."""

    def rows(self, image: str = "", noun: int = 0) -> Iterator[Row]:
        """Yield its rows."""
        ...


def rows_of(found: Mapping[str, Sequence[HasRows[Row]]]) -> list[Row]:
    """List the rows of all nouns of all images, in their order."""
    return [row for image, nouns in found.items() for i, noun in enumerate(nouns) for row in noun.rows(image, i)]


def by_image(rows: Sequence[Mapping[str, Any]], *labels: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """Average the rows of each image, for each combination of labels: intervals are over these means.

    So an image of many nouns weighs as much as one of few.

    Args:
        rows: With an `image`, a `value` and the labels.
        labels: Columns.

    Returns:
        In order of first appearance. Combinations without any value have no image; images without a value are left
        out.
    """
    import duckdb  # here: `import mmneurons` and `--help` need not wait for it

    # Columns of numpy, which DuckDB reads where they lie.
    images = {image: i for i, image in enumerate(dict.fromkeys(row["image"] for row in rows))}
    names = list(images)  # DuckDB sees numbers: a file may have a name that is no UTF-8
    columns = {label: np.array([row[label] for row in rows], dtype=object) for label in labels}
    columns["image"] = np.array([images[row["image"]] for row in rows], dtype=np.int64)
    columns["value"] = np.array([row["value"] for row in rows], dtype=np.float64)  # None as NaN
    columns["place"] = np.arange(len(rows))
    means: dict[tuple[Any, ...], dict[str, float]] = {}
    with duckdb.connect(config={"threads": 1}) as database:  # one thread adds up in the order of the rows
        database.execute(f"SET pandas_analyze_sample = {len(rows)}")  # the type of a column is told by all of it
        database.register("rows", columns)
        listed = ", ".join(f'"{label}"' for label in labels)
        found = database.execute(f"""
            SELECT {listed}, image, avg(value) FILTER (NOT isnan(value))
            FROM rows
            GROUP BY {listed}, image
            ORDER BY min(place)
        """).fetchall()
    # The first group of each combination is the place where it was first met.
    for *key, image, mean in found:
        mine = means.setdefault(tuple(key), {})
        if mean is not None:
            mine[names[image]] = mean
    return means
