"""What a file of anybody's may cost to be read or refused."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

SECONDS = 2.0
"""Of the processor, not of a clock: what else runs on the machine does not count."""
MEGABYTES = 500


class _TooLong(BaseException):
    """No exception that code which expects any would take for one of a decoder."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TooLong


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the body takes more processor time or memory; what it may not have, it cannot allocate.

    On Linux only: elsewhere the answer is checked and not its cost.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEGABYTES * 2**20, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except _TooLong:
        pytest.fail(f"More than {SECONDS} s of the processor.")
    except Exception as error:
        if isinstance(error.__cause__, MemoryError):  # refused for want of memory alone
            raise AssertionError(f"More than {MEGABYTES} MB.") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
