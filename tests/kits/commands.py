"""The command line, run in a process of its own or in this one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mmneurons import cli
from mmneurons.cli import options


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "mmneurons", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[object, str, str]:
    """In this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["mmneurons", *map(str, arguments)])
    monkeypatch.setattr(options.out, "_file", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err
