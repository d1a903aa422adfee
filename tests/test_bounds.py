"""The limits that the property tests set do stop what they are to stop."""

from __future__ import annotations

import contextlib
import sys

import pytest
from kits.bounds import bounded

from mmneurons.errors import ImageError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set on Linux alone")


def endless():
    while True:
        with contextlib.suppress(Exception):  # a decoder that goes on whatever happens
            sum(range(10**6))


def greedy():
    try:
        bytearray(600 * 2**20)
    except MemoryError as error:
        raise ImageError("cannot be decoded", seen="", fix="") from error


def test_work_without_an_end_is_stopped_whatever_it_catches():
    with pytest.raises(pytest.fail.Exception, match=r"2\.0 s"), bounded():
        endless()


def test_an_image_refused_for_want_of_memory_is_no_answer():
    with pytest.raises(AssertionError, match="500 MB"), bounded():
        greedy()
    with bounded():
        assert bytearray(100 * 2**20)
