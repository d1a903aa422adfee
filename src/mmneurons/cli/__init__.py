"""The command line: thin. Each command loads, calls one function and prints; torch is imported when a command runs."""

from __future__ import annotations

import os
import sys

# Each adds its commands to the app, in the order in which the help lists them.
# isort: off
import mmneurons.cli.find
import mmneurons.cli.inspect
import mmneurons.cli.edit
import mmneurons.cli.hallucination  # noqa: F401

# isort: on
from mmneurons.cli.options import app as app
from mmneurons.cli.options import err
from mmneurons.errors import MmneuronsError
from mmneurons.report.text import printable


def main() -> None:
    """Run the command line: errors that a user can cause end with one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except MmneuronsError as error:
        # Names in it can be anyone's: what a terminal would obey is shown instead.
        err.print("\n".join(map(printable, str(error).splitlines())), style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
