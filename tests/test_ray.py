"""Ray Data: two actors make the run that one process makes, also if one of them is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mmneurons as mmn
from mmneurons.errors import SettingError

if not os.environ.get("MMNEURONS_REQUIRE_RAY"):
    pytest.importorskip("ray")
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

    def contents(folder: Path) -> dict[str, str]:
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".parquet", ".jsonl"))
        return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "ray")) == 2 * 6 + 3


def test_a_model_in_memory_is_refused(vlm, tmp_path):
    with pytest.raises(SettingError, match="cannot be sent to other machines"):
        mmn.sweep(vlm, "pocket:find-500", tmp_path / "run", limit=1, engine="ray")
