"""Questions about the neurons of one run or several, each answered by one query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb

from mmneurons.atlas.index import MEMORY, index_of
from mmneurons.data.run import Run, pyarrow
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.progress import Progress, untold
from mmneurons.words import singular

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 8
"""How many images are named for a neuron."""
_VIEWS = ("images", "nouns", "top", "lemmas", "pairs", "neurons", "words")
_ROWS = """
CREATE VIEW rows AS
SELECT top.run, nouns.position, [images.name] AS images, images.prompt, images.answer_prefix, images.caption,
    score_name, against, says, baseline, noun::BIGINT AS noun, word, lemma, start::BIGINT AS start, token,
    token_id::BIGINT AS token_id, step::BIGINT AS step, n_tokens::BIGINT AS n_tokens,
    probability::DOUBLE AS probability, logit::DOUBLE AS logit, rank::BIGINT AS rank, neuron, layer::BIGINT AS layer,
    expert::BIGINT AS expert, "index"::BIGINT AS "index", score::DOUBLE AS score, activation::DOUBLE AS activation,
    baseline_activation::DOUBLE AS baseline_activation, tokens, suppressed, lost_without_image,
    NULL::DOUBLE AS internal_confidence, NULL::DOUBLE AS grounded
FROM top
    JOIN nouns ON nouns.run = top.run AND nouns.id = top.noun_id
    JOIN images ON images.run = top.run AND images.position = nouns.position
    JOIN neurons ON neurons.run = top.run AND neurons.id = top.neuron_id
    LEFT JOIN words ON words.run = top.run AND words.neuron_id = top.neuron_id
        AND words.below = (activation - coalesce(baseline_activation, 0) < 0)
"""


@dataclass(frozen=True, eq=False)
class NeuronPage:
    """A NeuronPage holds what is known of one neuron."""

    neuron: str
    says: pa.Table
    """run, fires ("above" or "below" what it is compared with), tokens, suppressed."""
    concepts: pa.Table
    """run, lemma, mean, n_images, frequency, own_share: the nouns that it gave most to, the highest mean first."""
    images: pa.Table
    """run, position, image, caption, word, rank, score, activation: where it gave most."""


@dataclass(frozen=True, eq=False)
class ImagePage:
    """An ImagePage holds what is known of one image."""

    image: pa.Table
    """One row for each run: position, name, caption, objects, captions, content."""
    nouns: pa.Table
    """run, noun, word, probability, rank, neuron, score, activation, tokens: the top neurons of each noun."""


class Atlas:
    """An Atlas answers questions about runs: which neurons say a word, what a neuron says, on which images.

    A mean contribution is over all images that say the word; where a neuron is not among the top ones that the sweep
    kept, it counts as 0. Several runs stand side by side, told apart by the column `run`: two models, or one before and
    after a patch.

    Args:
        runs: The folder of a run, or several. Nothing of them is run, and nothing is written into them.
        progress: Told while a run is read for the first time.

    Raises:
        FormatError: a folder holds no run, or a damaged one.
        SettingError: pyarrow is not installed.
    """

    def __init__(
        self,
        runs: str | os.PathLike[str] | Run | Sequence[str | os.PathLike[str] | Run],
        *,
        progress: Progress = untold,
    ) -> None:
        pyarrow()
        given = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
        if not given:
            raise SettingError("An atlas needs a run.", fix='Atlas("RUN")')
        self.runs = [run if isinstance(run, Run) else Run(run) for run in given]
        self.names = _names([run.folder.resolve().name for run in self.runs])
        """The name of each run in the column `run`."""
        config: dict[str, Any] = {"memory_limit": MEMORY, "temp_directory": "", "python_enable_replacements": "false"}
        self._connection = duckdb.connect(config=config)
        for i, run in enumerate(self.runs):
            place = str(index_of(run, progress)).replace("'", "''")
            self._connection.execute(f"ATTACH '{place}' AS r{i} (READ_ONLY)")
        self._make_views()
        # From here on no statement reads or writes a file, loads an extension, or undoes this.
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions", "enable_external_access"):
            self._connection.execute(f"SET {setting} = false")
        self._connection.execute("SET lock_configuration = true")

    def _make_views(self) -> None:
        for view in _VIEWS:
            parts = (
                f"SELECT '{name}' AS run, * FROM r{i}.{view}"
                for i, name in enumerate(one.replace("'", "''") for one in self.names)
            )
            self._connection.execute(f"CREATE VIEW {view} AS {' UNION ALL '.join(parts)}")
        self._connection.execute(_ROWS)

    @property
    def notes(self) -> list[str]:
        """What a reader of any answer should be told: which runs are not whole, so that it is of a part of them."""
        return [
            f"{name} is not whole: {len(run.done)} of {run.n_shards} shards are there, and only their {run.n_used} "
            "images count. The command of its sweep, given again, makes the others."
            for name, run in zip(self.names, self.runs, strict=True)
            if len(run.done) < run.n_shards
        ]

    def close(self) -> None:
        """Let go of the indexes."""
        self._connection.close()

    def __enter__(self) -> Atlas:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """Answer a query in DuckDB's SQL over the views `rows`, `images`, `nouns`, `top`, `neurons`, `pairs`, `words`.

        Raises:
            SettingError: the query cannot be run, or reaches for a file or an extension.
        """
        try:
            answer = self._connection.sql(query, params=list(parameters))
            return pyarrow().table({}) if answer is None else answer.to_arrow_table()
        except duckdb.Error as error:
            raise SettingError("DuckDB refuses this query.", seen=str(error)[:600]) from error

    def word(self, word: str, limit: int = 20) -> pa.Table:
        """Return the neurons that gave most to a noun.

        Args:
            word: The noun, in the singular or not.
            limit: How many neurons.

        Returns:
            A table: run, neuron, mean (contribution over all images that say the word), n_images (in which it is among
            the top neurons), frequency (their share of the images that say the word), own_share (of all that the
            neuron gives to nouns on the mean, what it gives to this one), tokens.

        Raises:
            SettingError: no image says the word; the message names words like it.
        """
        lemma = self._lemma(word)
        found = f"""
            SELECT pairs.run, neuron, mean, pairs.n_images, pairs.n_images / lemmas.n_images AS frequency,
                greatest(mean, 0) / nullif(positive, 0) AS own_share, {_said("pairs.neuron_id", "pairs.run")} AS tokens
            FROM pairs JOIN lemmas ON lemmas.run = pairs.run AND lemmas.id = lemma_id
                JOIN neurons ON neurons.run = pairs.run AND neurons.id = neuron_id
            WHERE lemma = ? QUALIFY row_number() OVER (PARTITION BY pairs.run ORDER BY mean DESC, neuron_id) <= ?
            ORDER BY max(mean) OVER (PARTITION BY neuron) DESC, neuron, pairs.run
        """
        return self._answer(found, [lemma, limit])

    def neuron(self, neuron: str | Neuron, limit: int = 20) -> NeuronPage:
        """Return what a neuron says, the nouns that it gave most to, and the images on which it gave most.

        Raises:
            SettingError: it is no name of a neuron, or a neuron that is among the top ones of no noun.
        """
        name = self._neuron(neuron)
        says = """
            SELECT words.run, CASE WHEN below THEN 'below' ELSE 'above' END AS fires, tokens, suppressed
            FROM words JOIN neurons ON neurons.run = words.run AND neurons.id = neuron_id WHERE neuron = ? ORDER BY ALL
        """
        concepts = """
            SELECT pairs.run, lemma, mean, pairs.n_images, pairs.n_images / lemmas.n_images AS frequency,
                greatest(mean, 0) / nullif(positive, 0) AS own_share
            FROM pairs JOIN lemmas ON lemmas.run = pairs.run AND lemmas.id = lemma_id
                JOIN neurons ON neurons.run = pairs.run AND neurons.id = neuron_id
            WHERE neuron = ? QUALIFY row_number() OVER (PARTITION BY pairs.run ORDER BY mean DESC, lemma) <= ?
            ORDER BY pairs.run, mean DESC, lemma
        """
        # The highest rows first, and only then what belongs to them: few are joined.
        images = """
            WITH best AS (
                SELECT top.* FROM top JOIN neurons ON neurons.run = top.run AND neurons.id = neuron_id WHERE neuron = ?
                QUALIFY row_number() OVER (PARTITION BY top.run ORDER BY score DESC, noun_id) <= ?
            )
            SELECT best.run, nouns.position, name AS image, caption, word, rank, score, activation
            FROM best JOIN nouns ON nouns.run = best.run AND nouns.id = noun_id
                JOIN images ON images.run = best.run AND images.position = nouns.position
            ORDER BY best.run, score DESC, noun_id
        """
        return NeuronPage(
            name,
            self._answer(says, [name]),
            self._answer(concepts, [name, limit]),
            self._answer(images, [name, min(limit, EXAMPLES)]),
        )

    def image(self, image: str | int, limit: int = 10) -> ImagePage:
        """Return what was said of an image, and the top neurons of each noun.

        Args:
            image: Its place in the list of images, its name, or the end of its name.
            limit: How many neurons of each noun.

        Raises:
            SettingError: there is no such image among those that were used, or the end of a name has several.
        """
        place = self._position(image)
        facts = "SELECT run, position, name, caption, objects, captions, notes, content FROM images WHERE position = ?"
        nouns = """
            SELECT run, noun, word, probability, rank, neuron, score, activation, tokens FROM rows
            WHERE position = ? AND rank < ? ORDER BY run, noun, rank
        """
        return ImagePage(self._answer(f"{facts} ORDER BY run", [place]), self._answer(nouns, [place, limit]))

    def concepts(self, limit: int | None = None) -> pa.Table:
        """Return the nouns that were said: run, lemma, n_images, n_nouns, n_neurons, best (neuron), mean (its)."""
        found = """
            SELECT lemmas.run, lemma, lemmas.n_images, n_nouns, count(*) AS n_neurons,
                arg_max(neuron, mean) AS best, max(mean) AS mean
            FROM lemmas JOIN pairs ON pairs.run = lemmas.run AND lemma_id = lemmas.id
                JOIN neurons ON neurons.run = lemmas.run AND neurons.id = neuron_id
            GROUP BY ALL ORDER BY lemmas.n_images DESC, lemma, lemmas.run LIMIT ?
        """
        return self._answer(found, [2**31 if limit is None else limit])

    def similar(self, neuron: str | Neuron, limit: int = 20) -> pa.Table:
        """Return the neurons that give to the same nouns.

        Returns:
            A table: run, neuron, cosine (of the mean contributions to all nouns, 1: the same nouns in the same
            measure), best (the noun that it gives most to), own_share (of that one), n_images, tokens.

        Raises:
            SettingError: as `neuron`.
        """
        name = self._neuron(neuron)
        found = f"""
            WITH mine AS (
                SELECT pairs.run, lemma_id, mean, norm FROM pairs
                    JOIN neurons ON neurons.run = pairs.run AND neurons.id = neuron_id WHERE neuron = ?
            ), near AS (
                SELECT pairs.run, neuron_id, sum(pairs.mean * mine.mean) / any_value(mine.norm) AS along
                FROM pairs JOIN mine USING (run, lemma_id) GROUP BY ALL
            ), best AS (
                SELECT near.run, neuron_id, neuron, along / nullif(norm, 0) AS cosine, positive, neurons.n_images
                FROM near JOIN neurons ON neurons.run = near.run AND neurons.id = neuron_id WHERE neuron <> ?
                QUALIFY row_number() OVER (PARTITION BY near.run ORDER BY cosine DESC NULLS LAST, neuron_id) <= ?
            )
            SELECT best.run, neuron, cosine, arg_max(lemma, mean) AS best,
                greatest(max(mean), 0) / nullif(any_value(positive), 0) AS own_share,
                any_value(best.n_images) AS n_images, {_said("best.neuron_id", "best.run")} AS tokens
            FROM best JOIN pairs ON pairs.run = best.run AND pairs.neuron_id = best.neuron_id
                JOIN lemmas ON lemmas.run = best.run AND lemmas.id = lemma_id
            GROUP BY best.run, best.neuron_id, neuron, cosine ORDER BY best.run, cosine DESC NULLS LAST, neuron
        """
        return self._answer(found, [name, name, limit])

    def concept_neurons(self, word: str, limit: int = 20, *, own_share: float = 0.0) -> list[Neuron]:
        """Return the neurons of a noun: the highest mean contribution over all images that say it.

        Args:
            word: The noun.
            limit: At most so many, over all runs.
            own_share: Leave out those of which less than this share goes to the noun.

        Raises:
            SettingError: as `word`.
        """
        rows = self.word(word, 2**31 - 1).to_pylist()
        names = dict.fromkeys(row["neuron"] for row in rows if (row["own_share"] or 0) >= own_share)
        return [Neuron.parse(name) for name in list(names)[:limit]]

    def _answer(self, query: str, parameters: Sequence[Any]) -> pa.Table:
        """Answer one of our own queries; the column `run` is left out where there is only one."""
        table = self._connection.sql(query, params=list(parameters)).to_arrow_table()
        return table if len(self.runs) > 1 else table.drop_columns(["run"])

    def _one(self, query: str, parameters: Sequence[Any]) -> list[Any]:
        return [row[0] for row in self._connection.execute(query, list(parameters)).fetchall()]

    def _lemma(self, word: str) -> str:
        """Return the lemma under which a word is kept."""
        asked = word.strip().lower()
        found = self._one("SELECT DISTINCT lemma FROM lemmas WHERE lemma IN (?, ?)", [asked, singular(asked)])
        if found:
            return asked if asked in found else found[0]
        near = "SELECT DISTINCT lemma, jaro_winkler_similarity(lemma, ?) AS s FROM lemmas WHERE s > 0.8 ORDER BY s DESC"
        names = ", ".join(self._one(f"{near} LIMIT 5", [asked]))
        raise SettingError(f"No image says '{word}'.", seen=f"Said are: {names}" if names else "")

    def _neuron(self, neuron: str | Neuron) -> str:
        name = str(neuron if isinstance(neuron, Neuron) else Neuron.parse(neuron))
        if not self._one("SELECT 1 FROM neurons WHERE neuron = ? LIMIT 1", [name]):
            kept = self.runs[0].settings.get("top")
            raise SettingError(f"{name} is among the top {kept} of no noun.", fix="mmneurons atlas RUN concepts")
        return name

    def _position(self, image: str | int) -> int:
        """Return the place of an image in the list."""
        if isinstance(image, int) or image.isdecimal():
            found = self._one("SELECT position FROM images WHERE position = ? LIMIT 1", [int(image)])
        else:
            by_name = "SELECT DISTINCT position FROM images WHERE name = ? OR ends_with(name, '/' || ?) LIMIT 2"
            found = self._one(by_name, [image, image])
        if len(found) > 1:
            raise SettingError(f"Several images are called {image}.", fix="Give more of the name, or its position.")
        if not found:
            raise SettingError(f"There is no image {image} in this run.", fix="mmneurons atlas RUN sql 'FROM images'")
        return found[0]


def _said(neuron: str, run: str) -> str:
    """Write the SQL for what a neuron says: as it fires above what it is compared with, else as it does below."""
    said = f"FROM words WHERE words.run = {run} AND words.neuron_id = {neuron}"
    return f"(SELECT arg_min(tokens, below) {said})"


def _names(folders: Sequence[str]) -> list[str]:
    """Name runs by their folders; of the same name, with a number."""
    names: list[str] = []
    for folder in folders:
        name, n = folder or "run", 2
        while name in names:
            name, n = f"{folder} ({n})", n + 1
        names.append(name)
    return names
