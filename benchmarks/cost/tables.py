"""What was measured, as tables between the markers of a page."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmneurons.vlm import provenance

HOME = Path(__file__).parents[2]
PAGE = HOME / "docs" / "measurements" / "benchmarks.md"

Table = defaultdict[str, dict[str, str]]
"""Row name -> column name -> cell."""


@dataclass(frozen=True)
class Tables:
    """What was measured."""

    cost: Table = field(default_factory=lambda: Table(dict))
    memory: Table = field(default_factory=lambda: Table(dict))
    rivals: Table = field(default_factory=lambda: Table(dict))
    growth: Table = field(default_factory=lambda: Table(dict))
    edits: Table = field(default_factory=lambda: Table(dict))
    counts: Table = field(default_factory=lambda: Table(dict))
    app: Table = field(default_factory=lambda: Table(dict))

    def markdown(self) -> list[str]:
        """Every table that has something."""
        named = {
            "`find` and `generate`": Table(dict, self.cost | self.memory),
            "Rivals, one image": self.rivals,
            "Growth, one image": self.growth,
            "Edits": self.edits,
            "Launches and calls": self.counts,
            "The web app": self.app,
        }
        return [markdown(title, table) for title, table in named.items() if table]


def markdown(title: str, table: Table) -> str:
    """One table; a cell that was not measured is a dash."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | {' | '.join(row.get(column, '-') for column in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


def report(script: str, tables: Tables, facts: Sequence[str], *, toy: bool) -> str:
    """All that was measured so far: command, commit, machine, `facts`, tables."""
    note = " (toy sizes: no measurement)" if toy else ""
    arguments = shlex.join(["python", "-m", f"benchmarks.cost.{script}", *sys.argv[1:]])
    command = f"Command: `{arguments}`{note}, at commit {_commit()}."
    return "\n\n".join(
        [command, f"Machine: {_machine()}.", "\n".join(f"- {fact}" for fact in facts), *tables.markdown()]
    )


def write(page: Path, script: str, measured: str) -> None:
    """Put it between the script's markers in the page; at the end of a page without them."""
    begin, end = f"<!-- begin: benchmarks.cost.{script} -->", f"<!-- end: benchmarks.cost.{script} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in text:
        text += f"{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{measured}\n{end}{after}", encoding="utf-8")


def _machine() -> str:
    """Where this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = provenance.versions()
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "mmneurons"))
    gpu = ""
    if torch.cuda.is_initialized():
        gpu = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), "
    return f"{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {packages}"


def _commit() -> str:
    """The commit of the source tree, and whether the package or the benchmarks differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HOME, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
