"""docs/reference/cli.md is what the commands say of themselves.

Written anew by
`python -m typer src/mmneurons/cli/__init__.py utils docs --name mmneurons --output docs/reference/cli.md`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_reference_is_that_of_the_commands(tmp_path):
    command = [sys.executable, "-m", "typer", "src/mmneurons/cli/__init__.py", "utils", "docs", "--name", "mmneurons"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "cli.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == (ROOT / "docs" / "reference" / "cli.md").read_text(
        encoding="utf-8"
    )
