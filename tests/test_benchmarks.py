"""The benchmark runs, checks itself and fills its page; how fast anything is, is not tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "find.py"
COST = """nouns scored|`generate`, seconds|`find`, seconds|**`find` / `generate`**|- recording, % of `generate`
- words, % of `generate`|- scoring, % of `generate`|- describing, % of `generate`|- picture, % of `generate`
- versions, % of `generate`|- rest, % of `generate`|`find` with maps / without|`find` with a blank image / without
weights hash, once per model, seconds|peak memory, `find` / `generate`"""
RIVALS = """nouns of the image|released algorithm / `find`|- its projections, built once, seconds
- their size, MiB (and over that of the weights)|gradient x activation, whole prefix / `find`
- gradient x activation, whole prefix: ms for each noun|gradient x activation, cached / `find`
- gradient x activation, cached: ms for each noun|- `find`: ms for each further noun"""
GROWTH = ["one read of every `w_out`, ms"]
GROWTH += [
    f"{k} nouns: {what}" for k in (1, 3, 10, 30, 100) for what in ("scoring, ms (over that read)", "describing, ms")
]
ROWS = re.split(r"[|\n]", COST) + re.split(r"[|\n]", RIVALS) + GROWTH


@pytest.mark.slow
def test_the_quick_benchmark_fills_every_row_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    begin, end = "<!-- begin: benchmarks/find.py -->", "<!-- end: benchmarks/find.py -->"
    page.write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--quick", "--bfloat16", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Before.\n{begin}\n")
    assert text.endswith(f"\n{end}\nAfter.\n")
    assert "old" not in text
    assert "toy sizes: no measurement" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {name: cells for name, *cells in lines}
    assert set(ROWS) <= set(table)
    for row in ROWS:
        cells = [cell for cell in table[row] if cell != "-"]
        assert cells, row
        assert all(re.search(r"\d", cell) and not re.search(r"nan|inf", cell) for cell in cells), (row, cells)
    ratios = [cell.strip("*").split(" (") for cell in table["**`find` / `generate`**"]]
    assert len(ratios) == 6
    assert all(float(median) > 0 for median, _ in ratios)
