"""The command line, a thin layer: each command loads a model, calls one function of the package and prints.

torch is imported when a command runs, so that the help is quick.
"""

from __future__ import annotations

import io
import os
import signal
import sys

# Each adds its commands to the app, in the order in which the help lists them.
# isort: off
import mmneurons.cli.find
import mmneurons.cli.check
import mmneurons.cli.inspect
import mmneurons.cli.edit
import mmneurons.cli.dehallucinate
import mmneurons.cli.sweep
import mmneurons.cli.atlas
import mmneurons.cli.web  # noqa: F401

# isort: on
from mmneurons.cli.options import Stopped, err
from mmneurons.cli.options import app as app
from mmneurons.errors import MmneuronsError


def main() -> None:
    """Run the command line: an error that a user can cause ends with one message and exit code 2.

    Ctrl-C ends with 130 and SIGTERM with 143, both by way of KeyboardInterrupt, so that what is under way is put back.
    """
    # 1. The process: no warning from tokenizers about forks, no crash on output that cannot be encoded.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal or pipe cannot write is a question mark
    # 2. SIGTERM takes the way of Ctrl-C, and is remembered for the exit code.
    terminated: list[int] = []

    def terminate(number: int, _: object) -> None:
        terminated.append(number)
        raise KeyboardInterrupt  # not by SIGINT, which is ignored where a shell runs the program in the background

    usual = signal.signal(signal.SIGTERM, terminate)
    # 3. The command; what it raises becomes one message and an exit code. Anything else is a fault, with its traceback.
    try:
        app()
    except MmneuronsError as error:
        err.print(str(error), style="red", soft_wrap=True)
        sys.exit(2)
    except OSError as error:  # a disk that is full, a folder that vanished: the system's word, not a traceback
        where = "" if error.filename is None else f": {error.filename}"
        err.print(f"The system refuses: {error.strerror or error}{where}", style="red", soft_wrap=True)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stop:
        err.print(f"stopped; {stop}" if stop.args else "stopped", soft_wrap=True)
        sys.exit(143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, usual)
