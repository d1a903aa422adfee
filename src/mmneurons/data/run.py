"""A run: the folder of Parquet shards that a sweep over a data set leaves, and what the atlas reads.

The form is that of docs/reference/format.md. No torch, and nothing in a run is ever executed: shards are found by their
number, never by a name that stands in a file, and are read as Parquet and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from mmneurons.errors import FormatError, MissingFileError, SettingError
from mmneurons.files import check_facts, decode_json, no_file, read_file, read_text

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
"""Number of the form; a reader refuses any other."""
FACTS, WORDS, MANIFEST, FAILURES, SHARDS = "run.json", "words.parquet", "manifest.parquet", "failures.jsonl", "shards"
KINDS: tuple[Literal["images", "neurons"], ...] = ("images", "neurons")
"""The tables of a shard."""
SWEEP_EXTRA = 'pip install "mmneurons[sweep]"'
"""The command that installs what runs are written and read with."""
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class FileFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of a shard must be."""

    bytes: Count
    rows: Count
    sha256: str


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that could not be used."""

    position: Count
    """Its place in the list of images, from 0."""
    name: str
    reason: str


class ShardFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of one shard: it is written after the shard's tables, and makes them count."""

    shard: Count
    first: Count
    """Position of its first image."""
    stop: Count
    """One past its last."""
    made_by: str
    """Hash of what made it: that of `RunFacts.key`."""
    images: FileFacts
    neurons: FileFacts
    failures: tuple[Failure, ...]
    smaller_batches: tuple[str, ...]
    """Which batches memory was too small for; their images ran in halves of them."""
    stamps: tuple[str, ...]
    """Of each image, by which a changed file is noticed without reading it."""
    seconds: tuple[float, ...]
    """Of each image that was read: its share of the time of its batch."""


class RunFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What made a run, the same for all of its shards."""

    schema: Literal[1]
    made_by: dict[str, Any]
    """Model, packages and settings, as in the provenance of a finding."""
    source: str
    """The data set as it was named."""
    n_images: Count
    shard_size: Annotated[int, msgspec.Meta(ge=1)]
    names_sha256: str
    """Of the names of all images, in order."""

    @property
    def key(self) -> str:
        """Hash of everything that a shard depends on."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class _Schema(msgspec.Struct):
    schema: Any = None


class Run:
    """A Run reads the folder of a run; the run can still be growing.

    Args:
        folder: The folder, from anybody: nothing of it is trusted.

    Raises:
        MissingFileError: there is no such folder.
        FormatError: it is no run, or one of another schema.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / FACTS
        if not self.folder.exists():
            raise no_file(folder, what="folder")
        if not path.is_file():
            raise FormatError(f"{self.folder} is no run: it has no {FACTS}.", fix="mmneurons sweep SOURCE --out RUN")
        text = read_text(path)
        schema = decode_json(text, _Schema, str(path)).schema
        if schema != SCHEMA:
            raise FormatError(
                f"This version reads runs of schema {SCHEMA}.", seen=f"{path} says schema {str(schema)[:40]}."
            )
        self.facts = decode_json(text, RunFacts, str(path))
        check_facts(self.facts.made_by, str(path))

    def __repr__(self) -> str:
        model, settings = (self.facts.made_by.get(name, {}) for name in ("model", "settings"))
        done = f"{len(self.done)} of {self.n_shards} shards"
        return (
            f"Run({self.folder.name}: {self.facts.n_images} images, {done}, {model.get('id')}, {settings.get('score')})"
        )

    @property
    def n_shards(self) -> int:
        """How many shards the whole run has."""
        return -(-self.facts.n_images // self.facts.shard_size)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the sweep."""
        return self.facts.made_by.get("settings", {})

    def slice_of(self, shard: int) -> range:
        """Return the positions of the images of a shard."""
        size = self.facts.shard_size
        return range(shard * size, min((shard + 1) * size, self.facts.n_images))

    def path_of(self, shard: int, kind: str) -> Path:
        """Return the path of a file of a shard: `images.parquet`, `neurons.parquet` or `json`."""
        return self.folder / SHARDS / f"{shard:06d}.{kind}"

    @cached_property
    def done(self) -> Mapping[int, ShardFacts]:
        """The shards that are there, whole by their number of bytes; `checked` reads them to their end."""
        found = ((shard, self.shard(shard)) for shard in range(self.n_shards))
        return {shard: facts for shard, facts in found if facts is not None}

    def shard(self, shard: int, *, to_the_end: bool = False) -> ShardFacts | None:
        """Return what is known of a shard, None where it is not there, not whole, or of another run.

        Args:
            shard: Its number.
            to_the_end: Whether the hashes of its tables are looked at as well, not only their size.
        """
        if not self.path_of(shard, "json").exists():  # of most shards of a run that has just begun
            return None
        try:
            facts = decode_json(read_file(self.path_of(shard, "json")), ShardFacts, "a shard")
            if (facts.shard, facts.made_by) != (shard, self.facts.key):
                return None
            for kind in KINDS:
                wanted: FileFacts = getattr(facts, kind)
                path = self.path_of(shard, f"{kind}.parquet")
                if path.stat().st_size != wanted.bytes:
                    return None
                if to_the_end and hashlib.sha256(read_file(path, limit=wanted.bytes)).hexdigest() != wanted.sha256:
                    return None
        except (FormatError, MissingFileError, OSError):
            return None
        return facts

    def files(self, kind: Literal["images", "neurons"]) -> list[Path]:
        """List the tables of one kind of all shards that are done, in order."""
        return [self.path_of(shard, f"{kind}.parquet") for shard in self.done]

    @property
    def is_complete(self) -> bool:
        """Whether every shard is there, and what the neurons say."""
        return len(self.done) == self.n_shards and self._has_words()

    def _has_words(self) -> bool:
        """Whether what the neurons say is there, in a table that can be read."""
        arrow = pyarrow()
        try:
            arrow.parquet.read_metadata(self.folder / WORDS)
        except (arrow.ArrowException, OSError):
            return False
        return True

    @property
    def n_used(self) -> int:
        """How many images its tables tell of: those of the shards that are done, without failures."""
        return sum(facts.images.rows for facts in self.done.values())

    @property
    def failures(self) -> list[Failure]:
        """The images that could not be used, in order."""
        return [failure for facts in self.done.values() for failure in facts.failures]

    def images(self) -> pa.Table:
        """Read one row for each image that was used: its name, what was said of it, the hash of its content."""
        return _read(self.files("images"))

    def neurons(self) -> pa.Table:
        """Read one row for each top neuron of each noun, as shards hold them: without what the neurons say."""
        return _read(self.files("neurons"))

    def words(self) -> pa.Table | None:
        """Read what each neuron says, above and below its baseline; None until the sweep has ended."""
        path = self.folder / WORDS
        return _read([path]) if path.is_file() else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows of `Finding.rows()` of all images, image by image.

        `tokens` and `suppressed` are empty until the sweep has ended.
        """
        words = self.words()
        said: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        for row in words.to_pylist() if words is not None else ():
            key = (row["layer"], row["expert"], row["index"], row["below"])
            said[key] = tuple(row["tokens"]), tuple(row["suppressed"])
        for file in self.files("neurons"):
            for row in _read([file]).to_pylist():
                del row["position"]
                expert = "" if row["expert"] is None else f".e{row['expert']}"
                excess = row["activation"] - (row["baseline_activation"] or 0.0)
                key = (row["layer"], row["expert"], row["index"], excess < 0)
                tokens, suppressed = said.get(key, ((), ()))
                neuron = f"L{row['layer']}{expert}.u{row['index']}"
                yield (
                    row
                    | {"images": tuple(row["images"]), "neuron": neuron}
                    | {
                        "tokens": tokens,
                        "suppressed": suppressed,
                    }
                )


def pyarrow() -> Any:
    """Import pyarrow, or say how it is installed.

    Raises:
        SettingError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SettingError("Runs need the package pyarrow, which is not installed.", fix=SWEEP_EXTRA) from error
    return pyarrow


def _read(files: list[Path]) -> pa.Table:
    arrow = pyarrow()
    try:
        return arrow.concat_tables([arrow.parquet.ParquetFile(file).read() for file in files])
    except (arrow.ArrowException, OSError) as error:
        raise FormatError(
            "A shard is damaged.", seen=str(error)[:300], fix="Give the sweep's command again: it is made anew."
        ) from error


def names_hash(names: Iterator[str]) -> str:
    """Hash names of images, in order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(json.dumps(name).encode("ascii") + b"\n")
    return digest.hexdigest()


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return what differs between what made a run and what is asked for, a line each; "" where nothing does."""
    before, now = _flat(dict(there)), _flat(msgspec.json.decode(msgspec.json.encode(dict(asked))))
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "\n".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in names)


def _flat(document: Any, place: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(document, dict):
        return {place: document}
    parts = (_flat(value, f"{place}.{name}" if place else str(name)) for name, value in document.items())
    return {name: value for part in parts for name, value in part.items()}
