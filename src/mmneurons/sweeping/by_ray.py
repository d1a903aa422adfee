"""A sweep on several machines by Ray Data: shards go to actors that each hold the model, and write them themselves.

Scheduling, autoscaling and what happens when a machine dies are Ray's: a shard that was not written is given to another
actor. The folder of the run, and the images, must be on a disk that all machines share.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmneurons.data.dataset import Item
from mmneurons.data.run import Run, differences
from mmneurons.errors import MmneuronsError, SettingError
from mmneurons.finding.finder import made_by
from mmneurons.progress import Progress, untold
from mmneurons.settings import SweepSettings
from mmneurons.sweeping.shards import make_shards
from mmneurons.vlm.vlm import VLM

RAY_EXTRA = 'pip install "mmneurons[ray]"'


@dataclass(frozen=True)
class Actors:
    """Actors are the processes that each hold the model.

    Raises:
        SettingError: a number has no meaning.
    """

    most: int = 1
    """How many there are at most; Ray starts as many as there is room for."""
    gpus: float | None = None
    """Share of a GPU that each takes, so that several fit on one; None: one, or none where the cluster has no GPU."""
    cpus: float = 1.0
    """CPUs that each takes."""

    def __post_init__(self) -> None:
        if self.most < 1 or self.cpus <= 0 or (self.gpus is not None and self.gpus < 0):
            raise SettingError("There is at least one actor, on more than no CPU.", seen=repr(self))


class ShardMaker:
    """An actor: it loads the model once, and makes the shards that it is given.

    Args:
        load: Loads the model.
        folder: The folder of the run.
        settings: What is asked and kept.
        workers: How many threads read images.
    """

    def __init__(self, load: Callable[[], VLM], folder: str, settings: SweepSettings, workers: int) -> None:
        self._vlm, self._settings, self._workers = load(), settings, workers
        self._run = Run(folder)
        _check_same(self._run, described(self._vlm, settings))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Make one shard or several; return their numbers, and of how many images each is."""
        shards = [int(shard) for shard in batch["shard"]]
        for shard, held in zip(shards, batch["items"], strict=True):
            # Our own process pickled them a moment ago: they come from no file.
            items: dict[int, Item] = pickle.loads(held)
            make_shards(self._vlm, self._run, items, [shard], self._settings, workers=self._workers)
        return {"shard": shards, "n_images": [len(self._run.slice_of(shard)) for shard in shards]}


def described(vlm: VLM, settings: SweepSettings) -> dict[str, Any]:
    """Return what makes a run: model, packages, settings."""
    return made_by(vlm, settings, given=settings.given)


def ask_cluster(actors: Actors, task: Callable[..., Any], load: Callable[[], VLM], *more: Any) -> Any:
    """Run one task, given the model and `more`, where an actor would run; return what it returns."""
    ray = _ray()
    remote = ray.remote(num_gpus=_gpus(ray, actors), num_cpus=actors.cpus)(_with_model)
    with _told():
        return ray.get(remote.remote(task, load, *more))


def _with_model(task: Callable[..., Any], load: Callable[[], VLM], *more: Any) -> Any:
    return task(load(), *more)


def make_shards_by_ray(
    load: Callable[[], VLM],
    folder: Path,
    items: Sequence[Item],
    todo: Sequence[int],
    settings: SweepSettings,
    actors: Actors,
    *,
    workers: int,
    progress: Progress = untold,
) -> None:
    """Let actors make the shards of a run that are missing.

    Args:
        load: Loads the model; it is sent to the actors.
        folder: The folder of the run, on a disk that all machines share.
        items: The data set.
        todo: The shards.
        settings: What is asked and kept.
        actors: How many actors, and what each takes.
        workers: How many threads of each actor read images.
        progress: Told how many images are done.

    Raises:
        MmneuronsError: as `sweep`, from an actor.
    """
    if not todo:
        return
    ray, run = _ray(), Run(folder)
    rows = [{"shard": shard, "items": pickle.dumps({i: items[i] for i in run.slice_of(shard)})} for shard in todo]
    # One block for each shard: what an actor takes at once, and what is done again if it dies.
    plan = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardMaker,
        fn_constructor_args=(load, str(folder.resolve()), settings, workers),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors.most, len(rows))),
        num_gpus=_gpus(ray, actors),
        num_cpus=actors.cpus,
    )
    n_images, n_done = sum(len(run.slice_of(shard)) for shard in todo), 0
    with _told():
        for made in plan.iter_rows():
            n_done += int(made["n_images"])
            progress("images", n_done, n_images)


def _check_same(run: Run, maker: Mapping[str, Any]) -> None:
    """Refuse an actor's model or packages that are not the run's."""
    if found := differences(run.facts.made_by, maker):
        raise SettingError("An actor would make other results than this run holds.", seen=found)


def _ray() -> Any:
    """Import Ray Data, and start Ray where nobody has: here, or the cluster that RAY_ADDRESS names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError("The engine ray needs the package ray, which is not installed.", fix=RAY_EXTRA) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _gpus(ray: Any, actors: Actors) -> float:
    if actors.gpus is not None:
        return actors.gpus
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


class _told:  # noqa: N801 - read as a word: with _told():
    """Turn what Ray says of an error of ours, inside the `with`, into that error."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        here = error
        while here is not None:
            # Ray's own error is of our class, too, with its traceback for a message: its cause comes first.
            for one in (getattr(here, "cause", None), here):
                if isinstance(one, MmneuronsError) and not hasattr(one, "cause"):
                    raise one from error
            here = here.__cause__
