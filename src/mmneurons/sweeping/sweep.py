"""A data set through `find`, into a run on disk that goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import msgspec

from mmneurons.data.dataset import Item, Tell
from mmneurons.data.listing import list_items
from mmneurons.data.run import FACTS, SCHEMA, Run, RunFacts, ShardFacts, differences, names_hash, pyarrow
from mmneurons.data.run_writer import write_failures, write_manifest
from mmneurons.data.store import LOCK, one_writer
from mmneurons.errors import SettingError
from mmneurons.files import check_folder, write_whole
from mmneurons.progress import Progress, untold
from mmneurons.settings import SweepOptions, SweepSettings, settled
from mmneurons.sweeping import by_ray
from mmneurons.sweeping.batch_size import tried_on, with_best_batch_size
from mmneurons.sweeping.by_ray import Actors
from mmneurons.sweeping.reading import content_hash, stamp_of_item
from mmneurons.sweeping.shards import make_shards
from mmneurons.sweeping.words import make_words
from mmneurons.vlm.vlm import VLM

Engine = Literal["local", "ray"]
WORKERS = 2
"""How many threads read images where nobody says."""
NEW = 'Name another folder: sweep(..., out="RUN2")    CLI: --out RUN2'


def sweep(
    vlm: VLM | Callable[[], VLM],
    source: str | os.PathLike[str] | Sequence[Item],
    out: str | os.PathLike[str],
    settings: SweepSettings | None = None,
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    workers: int = WORKERS,
    engine: Engine = "local",
    actors: Actors | None = None,
    tell: Tell = lambda note: None,
    progress: Progress = untold,
    **options: Unpack[SweepOptions],
) -> Run:
    """Put a data set through `find` and keep what is found in a folder, the run, shard by shard.

    A sweep that was stopped or killed goes on after its last whole shard when it is called again, with the results of
    one that was not: shards and batches are fixed parts of the list of images. An image that cannot be read is
    recorded in `failures.jsonl` and left out; if its file is mended, its shard is made anew. Where memory is too small
    for a batch, its halves run, and the shard says so.

    Args:
        vlm: The model, or a function that loads it, which is called when it is known that there is something to do.
        source: The data set: what `read_items` takes, a pattern, a table, an archive; see docs/guide/sweep.md.
        out: The folder of the run, new or of the same sweep.
        settings: What is asked and kept; None: the defaults.
        limit: At most so many images.
        shuffle_seed: Take the images in an order drawn with this seed; with a limit, a sample.
        workers: How many threads read images ahead of the model.
        engine: "local", in this process; or "ray", by Ray Data on as many machines as it knows, which share the disk
            of `out` and the images. Then `vlm` is a function that loads the model, and is sent to them.
        actors: How many processes hold the model, and what each takes (ray only).
        tell: Called with notes: what of the source was left out, and the batch size that was found.
        progress: Told how many images are done.
        **options: Fields of `SweepSettings`, such as `top=50`, over those of `settings`.

    Returns:
        The run.

    Raises:
        SettingError: the folder holds a run of another model, other settings or other images, or another process writes
            there; a disk is full; or pyarrow is not installed.
        ImageError: there is no image in the source.
        ModelError: memory is too small for a single image, or the model refuses all images.
    """
    choices = settled(SweepSettings, settings, options)
    choices = replace(choices, answer_prefix=choices.prefix)
    folder = Path(out)
    pyarrow()  # a missing package is told before anything is worked out
    check_folder(folder)
    if isinstance(source, str | os.PathLike):
        named, items = os.fspath(source), list_items(source, limit=limit, shuffle_seed=shuffle_seed, tell=tell)
    else:
        named, items = f"{len(source)} items", source
    plan = Plan(folder, items, choices, named)
    with one_writer(folder, folder / LOCK):
        # What forbids to go on is told before a model is loaded, as far as it can be.
        if (folder / FACTS).exists():
            plan.check_list(Run(folder))
            plan = plan.gone_on_with(Run(folder), tell)
        if engine == "local":
            model = vlm if isinstance(vlm, VLM) else vlm()
            plan = plan.sized(partial(with_best_batch_size, model), tell)
            run, todo = plan.begun(by_ray.described(model, plan.choices))
            told = _kept(run, todo, progress)
            make_shards(model, run, items, todo, plan.choices, workers=workers, told=told)
            finish(model, run, plan.choices, is_new=bool(todo), progress=progress)
        else:
            if isinstance(vlm, VLM):
                raise SettingError(
                    "A model in memory cannot be sent to other machines.", fix="sweep(lambda: mmn.load(...), ...)"
                )
            actors = actors or Actors()
            plan = plan.sized(partial(by_ray.ask_cluster, actors, with_best_batch_size, vlm), tell)
            _by_ray(vlm, plan, actors, workers, progress)
    return Run(folder)


def _by_ray(load: Callable[[], VLM], plan: Plan, actors: Actors, workers: int, progress: Progress) -> None:
    """Sweep by Ray: what a model makes, and what its neurons say, is asked of the cluster, too."""
    folder, choices = plan.folder, plan.choices
    run, todo = plan.begun(by_ray.ask_cluster(actors, by_ray.described, load, choices))
    _kept(run, todo, progress)
    by_ray.make_shards_by_ray(load, folder, plan.items, todo, choices, actors, workers=workers, progress=progress)
    if todo or not Run(folder).is_complete:
        by_ray.ask_cluster(actors, _finish_there, load, str(folder.resolve()), choices)


def _finish_there(vlm: VLM, folder: str, choices: SweepSettings) -> None:
    finish(vlm, Run(folder), choices, is_new=True, progress=untold)


def _kept(run: Run, todo: Sequence[int], progress: Progress) -> Callable[[int], None]:
    """Tell what is there from before; return the callback that tells how many more images are done."""
    n_images = sum(len(run.slice_of(shard)) for shard in todo)
    n_done = 0
    if n_images < run.facts.n_images:
        progress("kept from before", run.facts.n_images - n_images, run.facts.n_images)

    def told(n_more: int) -> None:
        nonlocal n_done
        n_done += n_more
        progress("images", n_done, n_images)

    return told


def finish(vlm: VLM, run: Run, choices: SweepSettings, *, is_new: bool, progress: Progress) -> None:
    """Write what belongs to the whole run: failures, and what the neurons say."""
    run = Run(run.folder)
    write_failures(run)
    if is_new or not run.is_complete:
        make_words(vlm, run, choices, progress)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be swept, and what of it a folder holds already."""

    folder: Path
    items: Sequence[Item]
    choices: SweepSettings
    source: str

    def gone_on_with(self, run: Run, tell: Tell) -> Plan:
        """Take the batch size that a run was begun with, where none was asked for."""
        if self.choices.batch_size != "auto":
            return self
        size = run.settings.get("batch_size")
        tell(f"batch size {size}, which {self.folder} was begun with")
        return replace(self, choices=replace(self.choices, batch_size=size))

    def sized(self, find: Callable[..., tuple[SweepSettings, str]], tell: Tell) -> Plan:
        """Find the batch size, where none was asked for.

        Args:
            find: `with_best_batch_size` of the model.
            tell: Told what was found.
        """
        if self.choices.batch_size != "auto":
            return self
        choices, why = find(tried_on(self.items, self.choices), self.choices)
        tell(f"batch size {choices.batch_size}; {why}")
        return replace(self, choices=choices)

    def begun(self, maker: Mapping[str, Any]) -> tuple[Run, list[int]]:
        """Begin a run in an empty folder, or open the one that is there; return it with the shards that are missing.

        Args:
            maker: Model, packages and settings.

        Raises:
            SettingError: the run there was made by something else, or of other images.
        """
        facts = RunFacts(
            schema=SCHEMA,
            made_by=msgspec.json.decode(msgspec.json.encode(dict(maker))),
            source=self.source,
            n_images=len(self.items),
            shard_size=self.choices.shard_size,
            names_sha256=self._names_hash(),
        )
        path = self.folder / FACTS
        if not path.exists():
            self._check_empty()
            names = [item.name.encode("utf-8", "replace").decode() for item in self.items]
            write_manifest(self.folder, names)
            write_whole(path, msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
        run = Run(self.folder)
        self._check_made_by(run.facts, facts)
        done = {shard: run.shard(shard, to_the_end=True) for shard in range(run.n_shards)}
        there = {shard: kept for shard, kept in done.items() if kept is not None}
        again = self._changed(run, there)
        return run, [shard for shard in range(run.n_shards) if shard not in there or shard in again]

    def check_list(self, run: Run) -> None:
        """Refuse a run of other images.

        Raises:
            SettingError: so it is; the message names the first image that differs.
        """
        if run.facts.names_sha256 == self._names_hash():
            return
        before, now = _names(run), [item.name for item in self.items]
        gone, new = sorted({*before} - {*now}), sorted({*now} - {*before})
        first = next((f"first: {name}" for name in (*gone, *new)), "they are the same, in another order")
        raise SettingError(
            f"{self.folder} holds a run of other images.",
            seen=f"{len(gone)} of its images are not in the list now, and {len(new)} are new; {first}",
            fix=NEW,
        )

    def _names_hash(self) -> str:
        return names_hash(item.name for item in self.items)

    def _check_empty(self) -> None:
        """Refuse a folder with other things in it: a run is not mixed with them."""
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if [name for name in others if name != "manifest.parquet"]:
            raise SettingError(f"{self.folder} holds other files, but no run.", seen=", ".join(others[:5]), fix=NEW)

    def _check_made_by(self, there: RunFacts, asked: RunFacts) -> None:
        """Refuse a run that was made by something else, naming each difference."""
        before, now = ({**one.made_by, "shard_size": one.shard_size} for one in (there, asked))
        if found := differences(before, now):
            raise SettingError(f"{self.folder} holds a run that was made otherwise.", seen=found, fix=NEW)
        self.check_list(Run(self.folder))

    def _changed(self, run: Run, there: Mapping[int, ShardFacts]) -> set[int]:
        """Return the shards in which a failed image has changed.

        Raises:
            SettingError: an image has changed whose results are there.
        """
        again = set[int]()
        for shard, kept in there.items():
            failed = {failure.position for failure in kept.failures}
            places = [i for i in run.slice_of(shard) if stamp_of_item(self.items[i]) != kept.stamps[i - kept.first]]
            if not places:
                continue
            known = None
            for i in places:
                if i in failed:
                    again.add(shard)
                    continue
                if known is None:
                    table = pyarrow().parquet.read_table(
                        run.path_of(shard, "images.parquet"), columns=["position", "content"]
                    )
                    known = dict(zip(*(table[name].to_pylist() for name in ("position", "content")), strict=True))
                if known.get(i) != content_hash(self.items[i]):
                    raise SettingError(
                        f"The image {self.items[i].name} has changed since {self.folder} was begun.",
                        seen="Its results are those of another picture.",
                        fix=NEW,
                    )
        return again


def _names(run: Run) -> list[str]:
    return pyarrow().parquet.ParquetFile(run.folder / "manifest.parquet").read()["name"].to_pylist()
