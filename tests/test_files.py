"""Reading files that others made: what is no file of a sane size is refused before it is read."""

from __future__ import annotations

import os
import sys

import pytest

from mmneurons.errors import FormatError
from mmneurons.files import read_file, read_text

unix = pytest.mark.skipif(sys.platform == "win32", reason="devices and pipes are files on Unix")


def test_a_file_is_read_through_a_link(tmp_path):
    (tmp_path / "a").write_bytes(b"12\r\n\x00")
    (tmp_path / "b").symlink_to("a")
    assert read_file(tmp_path / "b") == b"12\r\n\x00"
    assert read_file(os.fspath(tmp_path / "a"), limit=5) == b"12\r\n\x00"


def test_a_text_is_read_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffein Käse".encode())
    assert read_text(tmp_path / "a") == "ein Käse"
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        read_text(tmp_path / "a")


def _folder(path):
    path.mkdir()


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(2**31)


def _nothing(path):
    pass


def _loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [_nothing, _folder, _sparse, _loop])
def test_what_is_no_file_of_a_sane_size_is_refused(tmp_path, make):
    path = tmp_path / "it"
    make(path)
    with pytest.raises(FormatError, match="it"):
        read_file(path)


def test_one_byte_more_than_the_limit_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    assert read_file(tmp_path / "a", limit=3) == b"123"
    with pytest.raises(FormatError, match="too large"):
        read_file(tmp_path / "a", limit=2)


@unix
def test_a_pipe_that_nobody_writes_to_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="a device or a pipe"):
        read_file(tmp_path / "pipe")


@unix
def test_a_device_without_end_is_refused():
    with pytest.raises(FormatError, match="a device or a pipe"):
        read_file("/dev/zero")


def test_a_name_with_a_null_character_is_refused():
    with pytest.raises(FormatError, match="name"):
        read_file("a\0b")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "a").chmod(0)
    with pytest.raises(FormatError, match="Permission denied"):
        read_file(tmp_path / "a")
