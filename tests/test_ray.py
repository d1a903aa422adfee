"""Ray Data: two actors make the run that one process makes, also if one of them is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mmneurons as mmn
from mmneurons.errors import ModelError, SettingError
from mmneurons.sweeping import by_ray

pytest.importorskip("pyarrow")

PROGRAM = '''
import os, signal, sys
from pathlib import Path

import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150 * 2**20)

import mmneurons as mmn
from mmneurons.errors import ModelError

folder, how = Path(sys.argv[1]), {"shard_size": 2, "batch_size": 2, "top": 5, "max_new_tokens": 8, "limit": 12}


def load():
    import torch

    import mmneurons as mmn

    torch.set_num_threads(1)
    (folder / f"actor-{os.getpid()}").touch()
    return mmn.load(device="cpu")


def refusing():
    from mmneurons.errors import ModelError

    raise ModelError("There is no such model.", fix="Name another.")


killed = []


def told(stage, done, total):
    """After the first shard, kill an actor that is at work: of those that loaded the model, one that is alive."""
    if stage == "images" and not killed:
        for actor in sorted(folder.glob("actor-*"), key=lambda path: path.stat().st_mtime, reverse=True):
            pid = int(actor.name.partition("-")[2])
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(pid)
            return


# Two actors that take a whole CPU each, on two CPUs: nothing is left over for anything that reads.
mmn.sweep(load, "pocket:find-500", folder / "ray", engine="ray", actors=mmn.Actors(2, 0, 1), progress=told, **how)
assert killed
assert len(list(folder.glob("actor-*"))) > 2
mmn.sweep(load(), "pocket:find-500", folder / "local", **how)
try:
    mmn.sweep(refusing, "pocket:find-500", folder / "none", engine="ray", **how)
except ModelError as error:
    assert str(error) == "There is no such model.\\nName another.", error
else:
    raise AssertionError("no error")
'''


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".parquet", ".jsonl"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Inside:
    """What is asked of Ray, done in this process: one actor, and a block after the other."""

    def __init__(self) -> None:
        self.data = SimpleNamespace(from_items=self.from_items, ActorPoolStrategy=lambda **options: options)
        self.blocks: list[int] = []
        self.asked: list[dict[str, Any]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, "GPU": 1.0}

    def remote(self, **resources: float) -> Callable[..., Any]:
        self.asked.append(resources)
        return lambda task: SimpleNamespace(remote=lambda *given: (task, given))

    def get(self, promised: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
        task, given = promised
        return task(*given)

    def from_items(self, rows: list[dict[str, Any]], override_num_blocks: int) -> SimpleNamespace:
        def map_batches(actor: type, fn_constructor_args: tuple, batch_size: int, **asked: Any) -> SimpleNamespace:
            self.blocks.append(override_num_blocks)
            self.asked.append(asked)

            def made() -> Iterator[dict[str, Any]]:
                maker = actor(*fn_constructor_args)
                for i in range(0, len(rows), batch_size):
                    some = rows[i : i + batch_size]
                    batch = {name: np.array([row[name] for row in some], dtype=object) for name in some[0]}
                    done = maker(batch)
                    yield from ({name: done[name][j] for name in done} for j in range(len(some)))

            return SimpleNamespace(iter_rows=made)

        return SimpleNamespace(map_batches=map_batches)


def test_an_actor_makes_the_shards_that_are_missing_as_one_process_does(vlm, tmp_path, monkeypatch):
    ray = Inside()
    monkeypatch.setattr(by_ray, "_ray", lambda: ray)
    how: dict[str, Any] = {"shard_size": 2, "batch_size": 2, "top": 5, "max_new_tokens": 8, "limit": 5}
    told = list[tuple[str, float, int]]()

    def remotely(folder: Path) -> mmn.Run:
        return mmn.sweep(
            lambda: vlm, "pocket:find-500", folder, engine="ray", actors=mmn.Actors(4, 0.5, 2),
            progress=lambda *now: told.append(now), **how,
        )  # fmt: skip

    assert remotely(tmp_path / "ray").is_complete
    mmn.sweep(vlm, "pocket:find-500", tmp_path / "local", **how)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert [done for stage, done, _ in told if stage == "images"] == [2, 4, 5]
    assert ray.blocks == [3]
    share = {"num_gpus": 0.5, "num_cpus": 2}
    assert ray.asked == [share, {"compute": {"min_size": 1, "max_size": 3}, **share}, share]
    # A shard that is lost is made again, and no other.
    lost = min((tmp_path / "ray" / "shards").rglob("*.parquet"))
    lost.unlink()
    remotely(tmp_path / "ray")
    assert ray.blocks == [3, 1]
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_the_batch_size_is_found_where_the_actors_run(vlm, tmp_path, monkeypatch):
    ray = Inside()
    monkeypatch.setattr(by_ray, "_ray", lambda: ray)
    run = mmn.sweep(
        lambda: vlm, "pocket:find-500", tmp_path / "run", engine="ray", batch_size="auto", limit=5, max_new_tokens=4
    )
    assert run.is_complete
    assert run.settings["batch_size"] == 4  # so few images are too few to try others
    assert [("compute" in asked) for asked in ray.asked] == [False, False, True, False]


def test_what_a_model_is_refused_for_is_told_as_it_is_without_ray(tmp_path, monkeypatch):
    def refusing() -> mmn.VLM:
        raise ModelError("There is no such model.", fix="Name another.")

    monkeypatch.setattr(by_ray, "_ray", Inside)
    with pytest.raises(ModelError, match="There is no such model"):
        mmn.sweep(refusing, "pocket:find-500", tmp_path / "none", engine="ray", limit=1)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None and not os.environ.get("MMNEURONS_REQUIRE_RAY"), reason="Ray is not installed"
)
def test_actors_make_the_same_run_and_a_killed_one_loses_nothing(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            said, _ = started.communicate(timeout=540)
        finally:
            if started.poll() is None:  # Ray has processes of its own
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said[-3000:]

    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "ray")) == 2 * 6 + 3


def test_a_model_in_memory_is_refused(vlm, tmp_path):
    with pytest.raises(SettingError, match="cannot be sent to other machines"):
        mmn.sweep(vlm, "pocket:find-500", tmp_path / "run", limit=1, engine="ray")
