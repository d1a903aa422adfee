"""Writing of a run: the tables of a shard, whole or not at all, and the files that belong to all shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mmneurons.data.run import FAILURES, MANIFEST, WORDS, Failure, FileFacts, Run, ShardFacts, pyarrow
from mmneurons.files import write_whole

FLOATS = ("probability", "logit", "score", "activation", "baseline_activation")
"""Columns of float32, whose bytes are stored apart by their place: the leading ones are alike."""
LEVEL = 9
"""How hard shards are compressed, by zstd."""


@dataclass
class ImageRow:
    """One image of a run."""

    position: int
    """Its place in the list of images, from 0."""
    name: str
    content: str
    """SHA-256 of the bytes of its file, or of its pixels where there is no file."""
    width: int
    height: int
    prompt: str
    answer_prefix: str
    caption: str
    given: bool
    """Whether the caption was read instead of generated."""
    token_ids: tuple[int, ...]
    n_nouns: int
    notes: tuple[str, ...]
    objects: tuple[str, ...] | None
    """What is truly shown, where the data set says."""
    captions: tuple[str, ...]
    """What people say of it, where the data set says."""


@dataclass
class NounColumns:
    """The nouns of a shard and their top neurons: lists with an entry for each noun, arrays of (ranks,) in them."""

    image: list[int] = field(default_factory=list)
    """Which of the shard's images, counted among those that were used."""
    noun: list[int] = field(default_factory=list)
    word: list[str] = field(default_factory=list)
    lemma: list[str] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    token: list[str] = field(default_factory=list)
    token_id: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    logit: list[float] = field(default_factory=list)
    layer: list[np.ndarray] = field(default_factory=list)
    expert: list[np.ndarray] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    score: list[np.ndarray] = field(default_factory=list)
    activation: list[np.ndarray] = field(default_factory=list)
    baseline: list[np.ndarray] = field(default_factory=list)
    """Empty where activations are compared with zero."""


def image_table(rows: Sequence[ImageRow]) -> Any:
    """Make the table of a shard's images."""
    pa = pyarrow()
    texts, numbers = pa.list_(pa.string()), pa.list_(pa.int32())
    kinds = {
        "position": pa.int64(),
        "name": pa.string(),
        "content": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "prompt": pa.string(),
        "answer_prefix": pa.string(),
        "caption": pa.string(),
        "given": pa.bool_(),
        "token_ids": numbers,
        "n_nouns": pa.int32(),
        "notes": texts,
        "objects": texts,
        "captions": texts,
    }
    schema = pa.schema(list(kinds.items()))
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


def neuron_table(images: Sequence[ImageRow], nouns: NounColumns, constants: dict[str, str | None]) -> Any:
    """Make the table of a shard's neurons: the columns of `Finding.rows()`, but for what follows from others.

    Args:
        images: The shard's images.
        nouns: Their nouns.
        constants: What is the same in every row: `score_name`, `against`, `says`, `baseline`.
    """
    pa = pyarrow()
    n_ranks = [len(scores) for scores in nouns.score]
    n_rows = sum(n_ranks)
    of_noun = np.repeat(np.arange(len(n_ranks)), n_ranks)  # each row's noun
    of_image = np.asarray(nouns.image, np.int32)[of_noun]

    def spread(values: Sequence[Any], kind: Any, places: np.ndarray) -> Any:
        # Texts as a dictionary, each once: the same few words in thousands of rows.
        held = pa.array(values, kind)
        return (held.dictionary_encode() if kind == pa.string() else held).take(pa.array(places))

    def by_image(values: Sequence[Any], kind: Any) -> Any:
        return spread(values, kind, of_image)

    def by_noun(values: Sequence[Any], kind: Any) -> Any:
        return spread(values, kind, of_noun)

    def by_rank(values: Sequence[np.ndarray], kind: Any) -> Any:
        return pa.array(np.concatenate([*values, np.empty(0)]), kind) if n_rows else pa.array([], kind)

    def constant(value: str | None) -> Any:
        return pa.array([None] * n_rows, pa.string()) if value is None else pa.repeat(value, n_rows)

    expert = np.concatenate(nouns.expert) if n_rows else np.empty(0, np.int64)
    name = by_image([image.name for image in images], pa.string())
    nothing = pa.nulls(n_rows, pa.float32())
    columns = {
        "position": by_image([image.position for image in images], pa.int64()),
        "images": pa.ListArray.from_arrays(pa.array(np.arange(n_rows + 1), pa.int32()), name),
        "prompt": by_image([image.prompt for image in images], pa.string()),
        "answer_prefix": by_image([image.answer_prefix for image in images], pa.string()),
        "caption": by_image([image.caption for image in images], pa.string()),
        **{key: constant(value) for key, value in constants.items()},
        "noun": by_noun(nouns.noun, pa.int32()),
        "word": by_noun(nouns.word, pa.string()),
        "lemma": by_noun(nouns.lemma, pa.string()),
        "start": by_noun(nouns.start, pa.int32()),
        "token": by_noun(nouns.token, pa.string()),
        "token_id": by_noun(nouns.token_id, pa.int32()),
        "step": by_noun(nouns.step, pa.int32()),
        "n_tokens": by_noun(nouns.n_tokens, pa.int32()),
        "probability": by_noun(nouns.probability, pa.float32()),
        "logit": by_noun(nouns.logit, pa.float32()),
        "rank": pa.array(np.arange(n_rows) - np.repeat(np.cumsum([0, *n_ranks])[:-1], n_ranks), pa.int32()),
        "layer": by_rank(nouns.layer, pa.int32()),
        "expert": pa.array(expert, pa.int32(), mask=expert < 0),
        "index": by_rank(nouns.index, pa.int32()),
        "score": by_rank(nouns.score, pa.float32()),
        "activation": by_rank(nouns.activation, pa.float32()),
        "baseline_activation": by_rank(nouns.baseline, pa.float32()) if nouns.baseline else nothing,
        "lost_without_image": nothing,
        "internal_confidence": nothing,
        "grounded": nothing,
    }
    return pa.table(columns)


def write_shard(
    run: Run,
    shard: int,
    images: Any,
    neurons: Any,
    *,
    failures: Sequence[Failure],
    smaller_batches: Sequence[str],
    stamps: Sequence[str],
    seconds: Sequence[float],
) -> None:
    """Write the tables of a shard, each whole or not at all, and then the file that makes them count.

    Raises:
        SettingError: the disk is full, or the folder cannot be written; what was written before stays readable.
    """
    run.path_of(shard, "json").parent.mkdir(exist_ok=True)
    # The shard counts from the moment its facts are there: those of an older, damaged one go first.
    run.path_of(shard, "json").unlink(missing_ok=True)
    written = {}
    for kind, table in (("images", images), ("neurons", neurons)):
        content = parquet_bytes(table)
        write_whole(run.path_of(shard, f"{kind}.parquet"), content)
        written[kind] = FileFacts(len(content), table.num_rows, hashlib.sha256(content).hexdigest())
    mine = run.slice_of(shard)
    facts = ShardFacts(
        shard=shard,
        first=mine.start,
        stop=mine.stop,
        made_by=run.facts.key,
        failures=tuple(failures),
        smaller_batches=tuple(smaller_batches),
        stamps=tuple(stamps),
        seconds=tuple(round(one, 4) for one in seconds),
        **written,
    )
    write_whole(run.path_of(shard, "json"), msgspec.json.encode(facts))


def write_failures(run: Run) -> None:
    """Write the failures of all shards that are there, one JSON object a line."""
    lines = [msgspec.json.encode(failure) + b"\n" for failure in Run(run.folder).failures]
    write_whole(run.folder / FAILURES, b"".join(lines))


def write_manifest(run_folder: Any, names: Sequence[str]) -> None:
    """Write the names of all images, in order."""
    pa = pyarrow()
    write_whole(run_folder / MANIFEST, parquet_bytes(pa.table({"name": pa.array(names, pa.string())})))


def write_words(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    """Write what each neuron says."""
    pa = pyarrow()
    texts, number = pa.list_(pa.string()), pa.int32()
    kinds = {"layer": number, "expert": number, "index": number, "below": pa.bool_(), "tokens": texts}
    schema = pa.schema(list({**kinds, "suppressed": texts}.items()))
    write_whole(run.folder / WORDS, parquet_bytes(pa.Table.from_pylist(list(rows), schema=schema)))


def parquet_bytes(table: Any) -> bytes:
    """Write a table as Parquet: the same table gives the same bytes."""
    pa = pyarrow()
    sink = pa.BufferOutputStream()
    floats = [name for name in FLOATS if name in table.column_names]
    options: dict[str, Any] = {"use_byte_stream_split": floats} if floats else {}
    pa.parquet.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=[_leaf(pa, column) for column in table.schema if column.name not in floats],
        store_schema=False,  # dictionaries are a matter of storage: columns are read as plain texts
        **options,
    )
    return sink.getvalue().to_pybytes()


def _leaf(pa: Any, column: Any) -> str:
    """Return the path of a column's values inside a Parquet file."""
    return f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name
