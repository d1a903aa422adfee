"""The index of a run: its rows as one DuckDB file in the cache, with what is asked of them often worked out once.

Neurons and nouns are numbers there, made of their parts, so that nothing has to be joined to make the index. The run
itself is not touched: it can be anybody's, or on a disk that cannot be written.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import duckdb

from mmneurons.data.run import WORDS, Run
from mmneurons.errors import FormatError
from mmneurons.files import cache_folder
from mmneurons.progress import Progress, untold

LAYOUT = 1
"""Counted up when the same run is indexed in another way."""
MEMORY = "1400MB"
"""The most memory that DuckDB takes, to make an index and to ask it."""
NEURON = 'layer::BIGINT * 68719476736 + (coalesce(expert, -1)::BIGINT + 1) * 16777216 + "index"'
"""The number of a neuron: layer, expert and index side by side, in 36, 24 and the rest of its bits."""
NOUN = "position::BIGINT * 65536 + noun"
"""The number of a noun of an image."""
_IN_BOUNDS = 'layer BETWEEN 0 AND 65535 AND coalesce(expert, 0) BETWEEN 0 AND 4094 AND "index" BETWEEN 0 AND 16777215'
_TABLES = f"""
CREATE TABLE images AS
    SELECT position::BIGINT AS position, name, content, width, height, prompt, answer_prefix, caption, given, n_nouns,
        token_ids, notes, objects, captions
    FROM read_parquet($images) ORDER BY position;
CREATE TABLE nouns AS
    SELECT {NOUN} AS id, position::BIGINT AS position, noun, word, lemma, start, token, token_id, step, n_tokens,
        probability, logit, score_name, against, says, baseline,
        (1 / count(*) OVER (PARTITION BY position, lemma))::FLOAT AS weight
    FROM read_parquet($neurons) WHERE rank = 0 ORDER BY id;
CREATE TABLE top AS
    SELECT {NOUN} AS noun_id, rank::INTEGER AS rank, {NEURON} AS neuron_id, score::FLOAT AS score,
        activation::FLOAT AS activation, baseline_activation::FLOAT AS baseline_activation, lost_without_image
    FROM read_parquet($neurons);
CREATE TABLE lemmas AS
    SELECT (row_number() OVER (ORDER BY lemma) - 1)::INTEGER AS id, lemma, count(DISTINCT position) AS n_images,
        count(*) AS n_nouns
    FROM nouns GROUP BY lemma;
CREATE TEMP TABLE placed AS
    SELECT nouns.id AS noun_id, lemmas.id AS lemma_id, position, weight FROM nouns JOIN lemmas USING (lemma);
CREATE TABLE pairs AS
    WITH once AS (
        SELECT neuron_id, lemma_id, count(*) AS n_images, sum(score::DOUBLE) AS total
        FROM top JOIN placed USING (noun_id) WHERE weight = 1 GROUP BY ALL
    ), repeated AS (
        SELECT neuron_id, lemma_id, count(DISTINCT position) AS n_images, sum(score::DOUBLE * weight) AS total
        FROM top JOIN placed USING (noun_id) WHERE weight < 1 GROUP BY ALL
    )
    SELECT neuron_id, lemma_id, sum(parts.n_images)::INTEGER AS n_images,
        (sum(total) / any_value(lemmas.n_images))::DOUBLE AS mean
    FROM (FROM once UNION ALL FROM repeated) AS parts JOIN lemmas ON lemmas.id = lemma_id
    GROUP BY ALL ORDER BY lemma_id, mean DESC;
CREATE TABLE neurons AS
    SELECT neuron_id AS id, (neuron_id // 68719476736)::INTEGER AS layer,
        nullif((neuron_id // 16777216) % 4096 - 1, -1)::INTEGER AS expert, (neuron_id % 16777216)::INTEGER AS "index",
        'L' || layer || coalesce('.e' || expert, '') || '.u' || "index" AS neuron,
        sum(n_images)::INTEGER AS n_images, count(*)::INTEGER AS n_lemmas,
        sum(greatest(mean, 0)) AS positive, sqrt(sum(mean * mean)) AS norm
    FROM pairs GROUP BY neuron_id ORDER BY id;
"""
_WORDS = f"""
CREATE TABLE words AS SELECT {NEURON} AS neuron_id, below, tokens, suppressed FROM read_parquet($words) ORDER BY ALL;
"""
_NO_WORDS = """
CREATE TABLE words (neuron_id BIGINT, below BOOLEAN, tokens VARCHAR[], suppressed VARCHAR[]);
"""


def index_of(run: Run, progress: Progress = untold) -> Path:
    """Return the DuckDB file of a run's index; it is made where it is not there, or the run has grown.

    Raises:
        FormatError: the run has no shard yet, or its shards are damaged or no tables of a run.
    """
    if not run.done:
        raise FormatError(
            f"{run.folder} has no whole shard yet.", fix=f"mmneurons sweep {run.facts.source} --out {run.folder}"
        )
    place = cache_folder() / "atlas" / f"{_place_hash(run)}-{_content_hash(run)}.duckdb"
    if place.is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    progress("reading the run", 0, 1)
    made = place.with_name(f".{place.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _make(run, made)
        os.replace(made, place)
    finally:
        made.unlink(missing_ok=True)
        made.with_name(f"{made.name}.wal").unlink(missing_ok=True)
    for older in place.parent.glob(f"{_place_hash(run)}-*.duckdb"):
        if older != place:
            with suppress(OSError):  # one that is being read, on a system that holds it
                older.unlink()
    progress("reading the run", 1, 1)
    return place


def _make(run: Run, place: Path) -> None:
    """Fill a new database with a run's tables."""
    files: dict[str, Sequence[str]] = {
        "images": [str(file) for file in run.files("images")],
        "neurons": [str(file) for file in run.files("neurons")],
        "words": [str(run.folder / WORDS)],
    }
    has_words = (run.folder / WORDS).is_file()
    try:
        with duckdb.connect(place, config={"memory_limit": MEMORY, "autoinstall_known_extensions": "false"}) as made:
            made.execute(f"SET temp_directory = '{place.parent}'".replace("\n", ""))
            outside = f"SELECT count(*) FROM read_parquet(?) WHERE NOT ({_IN_BOUNDS} AND noun BETWEEN 0 AND 65535)"
            (n_outside,) = made.execute(outside, [files["neurons"]]).fetchone() or (0,)
            if n_outside:
                raise FormatError(f"{run.folder} is damaged.", seen=f"{n_outside} of its rows name no neuron.")
            for statement in (_TABLES + (_WORDS if has_words else _NO_WORDS)).split(";\n"):
                if statement.strip():
                    wanted = {name: paths for name, paths in files.items() if f"${name}" in statement}
                    made.execute(statement, wanted)
    except duckdb.Error as error:
        raise FormatError(
            f"{run.folder} is damaged, or holds no tables of a run.",
            seen=str(error).splitlines()[0][:300],
            fix="Give the command of its sweep again: damaged shards are made anew.",
        ) from error


def _place_hash(run: Run) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(run.folder))).hexdigest()[:16]


def _content_hash(run: Run) -> str:
    """Hash what a run holds, by what its shards say of their tables."""
    words = run.folder / WORDS
    parts = [str(LAYOUT), run.facts.key, str(words.stat().st_mtime_ns if words.is_file() else "")]
    parts += [facts.neurons.sha256 + facts.images.sha256 for facts in run.done.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
