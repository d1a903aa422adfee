"""What is written: whole or not at all, over nothing that is read, and devices stay devices."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from mmneurons import files
from mmneurons.errors import SettingError
from mmneurons.files import check_apart, check_folder, check_writable, json_bytes, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_keeps_its_mode_and_links_to_it_stay(tmp_path):
    real, link, hard = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "hard.json"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    hard.hardlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert hard.read_bytes() == b"old"  # the other name keeps what was there: nothing was written into it
    assert names(tmp_path) == ["hard.json", "link.json", "real.json"]


def test_a_new_file_has_the_mode_that_the_user_gives_files(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    write_whole(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full"])
def test_a_device_is_written_to_and_never_replaced(name):
    if name == "/dev/full":
        with pytest.raises(SettingError, match="No space left"):
            write_whole(name, b"words")
    else:
        write_whole(name, b"words")
    check_writable(name)
    assert stat.S_ISCHR(os.stat(name).st_mode)  # noqa: PTH116 - of what it is, whatever pathlib thinks


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"words")
    reader.join(10)
    assert read == [b"words"]
    assert pipe.is_fifo()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(b"old")

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SettingError, match="No space left"):
        write_whole(tmp_path / "a.json", b"new words")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a/b.json", "mkdir -p"),
        (".", "It is a folder"),
        ("file/b.json", "file is a file"),
        ("x" * 300, "too long"),
        (files.PACKAGE / "pocket/data/samples/x.png", "in the installed package"),
    ],
)
def test_what_cannot_be_written_is_told_beforehand(tmp_path, name, why):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=why):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_a_long_name_that_the_system_allows_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    check_writable(path)
    write_whole(path, b"words")
    assert path.read_bytes() == b"words"


def test_folders_are_tried_and_not_made(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "a/b/c")
    assert names(tmp_path) == ["file"]
    for name, why in (("file", "is a file"), ("file/a", "is a file"), (files.PACKAGE / "x", "installed package")):
        with pytest.raises(SettingError, match=why):
            check_folder(tmp_path / name)
    with pytest.raises(SettingError, match="Cannot write /proc/x"):
        check_folder("/proc/x")


def test_outputs_are_no_inputs_by_whatever_name(tmp_path):
    picture, link, hard = tmp_path / "a.png", tmp_path / "link.png", tmp_path / "hard.png"
    picture.write_bytes(b"pixels")
    link.symlink_to(picture)
    hard.hardlink_to(picture)
    for name in (picture, link, hard, tmp_path / "x/../a.png", str(picture)):
        with pytest.raises(SettingError, match="would be overwritten: it is read"):
            check_apart([name], [picture])
    with pytest.raises(SettingError, match="it is written already"):
        check_apart([tmp_path / "new.json", f"{tmp_path}/./new.json"], [])
    check_apart([tmp_path / "b.png", "-"], [picture])


def test_json_is_utf_8_whatever_a_name_holds():
    name = os.fsdecode(b"caf\xe9.png")
    assert json.loads(json_bytes({"name": name, "ü": [1.5]})) == {"name": "caf?.png", "ü": [1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes(float("nan"))
