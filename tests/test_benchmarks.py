"""The benchmarks run, check themselves and fill their page; how fast anything is, is not tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quality import results

ROOT = Path(__file__).parents[1]
COST = """nouns scored|`generate`, seconds|`find`, seconds|**`find` / `generate`**|- recording, % of `generate`
- words, % of `generate`|- scoring, % of `generate`|- describing, % of `generate`|- picture, % of `generate`
- versions, % of `generate`|- rest, % of `generate`|`find` with maps / without|`find` with a blank image / without
weights hash, once per model, seconds|analysis in `load`, seconds|- one forward pass over as many tokens, seconds"""
RIVALS = """nouns of the image|released algorithm / `find`|- its projections, built once, seconds
- their size, MiB (and over that of the weights)|gradient x activation, whole prefix / `find`
- gradient x activation, whole prefix: ms for each noun|gradient x activation, cached / `find`
- gradient x activation, cached: ms for each noun|integrated gradients, cached, 20 steps / `find`
- integrated gradients, cached, 20 steps: ms for each noun|- `find`: ms for each further noun"""
GROWTH = ["one read of every `w_out`, ms"]
GROWTH += [
    f"{k} nouns: {what}" for k in (1, 3, 10, 30, 100) for what in ("scoring, ms (over that read)", "describing, ms")
]
ROWS = re.split(r"[|\n]", COST) + re.split(r"[|\n]", RIVALS) + GROWTH
CPU_ROWS = [*ROWS, "peak memory, `find` / `generate`", "- integrated gradients: most missed of a block's share, %"]


def run(module: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *options]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)


def filled(page: Path, module: str, *options: str) -> dict[str, list[str]]:
    """What a quick run writes between its markers, row by row; all else on the page is as it was."""
    begin, end = f"<!-- begin: {module} -->", f"<!-- end: {module} -->"
    other = "<!-- begin: benchmarks.cost.other -->\nkept\n<!-- end: benchmarks.cost.other -->"
    page.write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n{other}\n", encoding="utf-8")
    done = run(module, "--quick", *options, "--out", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Before.\n{begin}\n")
    assert text.endswith(f"\n{end}\nAfter.\n{other}\n")
    assert "old" not in text
    assert "toy sizes: no measurement" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def check_rows(table: dict[str, list[str]], rows: list[str], n_cases: int) -> None:
    assert set(rows) <= set(table)
    for row in rows:
        cells = [cell for cell in table[row] if cell != "-"]
        assert cells, row
        assert all(re.search(r"\d", cell) and not re.search(r"nan|inf", cell) for cell in cells), (row, cells)
    ratios = [cell.strip("*").split(" (") for cell in table["**`find` / `generate`**"]]
    assert len(ratios) == n_cases
    assert all(float(median) > 0 for median, _ in ratios)


@pytest.mark.slow
def test_the_quick_benchmark_fills_every_row_between_the_markers(tmp_path):
    table = filled(tmp_path / "page.md", "benchmarks.cost.find", "--bfloat16")
    check_rows(table, CPU_ROWS, n_cases=10)
    assert table["`find` and `generate`"][-1] == "random Qwen2.5-VL bfloat16, batch 8"
    assert table["Rivals, one image"] == ["pocket float32", "random LLaVA float32"]


@pytest.mark.slow
def test_the_gpu_benchmark_fills_every_row_at_toy_sizes_on_the_cpu(tmp_path):
    table = filled(tmp_path / "page.md", "benchmarks.cost.gpu")
    check_rows(table, ROWS, n_cases=2)


@pytest.mark.slow
def test_the_benchmark_of_edits_fills_every_row_with_a_small_reference(tmp_path):
    table = filled(tmp_path / "page.md", "benchmarks.cost.edits")
    rows = [f"`{method}` / `generate`" for method in ("closed_form", "selective", "optimised")]
    rows += [
        "`generate` over the edit images, seconds",
        "- the same again / the same, which shows what disturbed the run",
    ]
    rows += ["reference of 8 images and 8 texts: worked out, seconds; read from disk by the next edit"]
    assert all(re.search(r"\d", table[row][0]) for row in rows)


@pytest.mark.slow
def test_the_gpu_benchmark_says_that_there_is_no_gpu(tmp_path):
    page = tmp_path / "page.md"
    done = run("benchmarks.cost.gpu", "--out", str(page), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "measures on a CUDA GPU, and torch finds none here" in done.stderr
    assert "python -m benchmarks.cost.gpu --quick" in done.stderr
    assert not page.exists()


@pytest.mark.slow
def test_the_quick_comparison_of_finders_fills_both_tables(tmp_path):
    table = filled(tmp_path / "page.md", "benchmarks.cost.finders")
    finders = ["logit", "logprob", "paper", "activation", "random", "true effect"]
    rivals = ["gradient x activation", "integrated gradients"]
    rivals += [f"{rival}, cheapest" for rival in rivals]
    names = [*finders, *rivals, *(f"`find`, {score}" for score in finders[:3])]
    assert set(names) <= set(table)
    assert not [(name, cell) for name in names for cell in table[name] if re.search(r"nan|inf", cell)]
    for name in (*finders, *(f"`find`, {score}" for score in finders[:3])):
        own, beyond, whole, _ = table[name]
        assert float(own.split()[0]) > 0
        assert re.match(r"-?\d", beyond)
        assert float(whole.split()[0]) > 0
    assert float(table["logit"][-1].split()[0]) > 0  # its peak, the only one that a quick run measures
    for rival in rivals:  # the second table has the same rows: what stands there is read last
        goal, *ratios, met, whole = table[rival]
        least = float(goal.removeprefix("at least "))
        medians = [float(ratio.split()[0]) for ratio in ratios]
        assert len(medians) == 3
        assert (met == "yes") == all(median >= least for median in medians)
        assert (met == "no") == all(median < least for median in medians)
        assert re.match(r"-?\d", whole)


def lay_out(monkeypatch: pytest.MonkeyPatch, page: Path, data: Path, *folder: str) -> str:
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "DATA", data)
    monkeypatch.setattr(sys, "argv", ["results", *folder])
    results.main()
    return page.read_text(encoding="utf-8")


def test_results_are_laid_out_between_their_markers_and_kept_as_csv(tmp_path, monkeypatch):
    (tmp_path / "regions.csv").write_text(
        "measure,neurons,k,mean,low,high,n\npatch AUROC,top,10,0.5,0.25,0.75,4\nIoU at equal area,top,1,,,,\n"
        "unused,top,1,0.5,,,\nnot measured,,,3.0,,,\n"
    )
    (tmp_path / "edits-by-score.md").write_text(
        "| way | n | locality | bleed |\n| --- | --- | --- | --- |\n"
        "| logit,last,50 | 4 | 0.995, 1.000 (0.978) | - |\n"
        "| logit,all,50 | 4 | 1.000, 1.000 (1.000) | 0.5, 0.5 (0.5) |\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- regions -->\nold\n<!-- end -->\nbetween\n<!-- edits-by-score -->\nold\n<!-- end -->\n"
        "<!-- causal -->\nkept\n<!-- end -->\nafter\n"
    )
    made = lay_out(monkeypatch, page, tmp_path / "kept", str(tmp_path))
    assert (tmp_path / "kept" / "regions.csv").read_text() == (tmp_path / "regions.csv").read_text()
    assert (tmp_path / "kept" / "edits-by-score.csv").read_text() == (
        'way,figure,mean,median,worst\n"logit,last,50",n,4,,\n"logit,last,50",locality,0.995,1.000,0.978\n'
        '"logit,all,50",n,4,,\n"logit,all,50",locality,1.000,1.000,1.000\n"logit,all,50",bleed,0.5,0.5,0.5\n'
    )
    assert made == (
        "before\n<!-- regions -->\n\n| map | k = 10 | k = 1 |\n| --- | --- | --- |\n"
        "| top: patch AUROC | 0.500 [0.250, 0.750] | not measured |\n"
        "| top: IoU at equal area | not measured | not measured |\n\n"
        "All figures: [regions.csv](kept/regions.csv).\n\n<!-- end -->\nbetween\n<!-- edits-by-score -->\n\n"
        "| score | 50 columns of the last block | 50 columns of all blocks |\n| --- | --- | --- |\n"
        "| logit: locality | 0.995 (0.978) | 1.000 (1.000) |\n\n"
        "All figures: [edits-by-score.csv](kept/edits-by-score.csv).\n\n<!-- end -->\n"
        "<!-- causal -->\nkept\n<!-- end -->\nafter\n"
    )


def test_the_page_of_results_is_what_its_csv_files_say(tmp_path, monkeypatch):
    docs = ROOT / "docs" / "measurements"
    page = tmp_path / "results.md"
    page.write_text((docs / "results.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert lay_out(monkeypatch, page, docs / "results") == (docs / "results.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_everything_followed_is_the_gradient():
    done = run("research.following", "--limit", "1", "--timed", "1", "--rounds", "1")
    assert done.returncode == 0, done.stderr  # it asserts that itself
    apart = re.findall(r"against autograd, (\w+): at most (\S+) of the largest", done.stdout)
    assert {name for name, _ in apart} == {"logprob", "logit"}
    assert all(float(value) < 1e-4 for _, value in apart)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    agreement = {row[0]: row[1] for row in rows[: rows.index(["followed (effect on the logit)", *rows[0][1:]])]}
    assert agreement["FFNs + own attention + pattern"] == agreement["gradient x activation"]
    assert float(agreement["nothing followed"].split()[0]) < float(agreement["FFNs"].split()[0])


@pytest.mark.slow
def test_readings_are_judged_and_a_stopped_run_goes_on(tmp_path):
    file = tmp_path / "reading.csv"
    for n in ("1", "2"):
        done = run("benchmarks.quality.reading", str(file), "--n", n, "--n-reference", "4", "--similar-every", "1")
        assert done.returncode == 0, done.stderr
    assert len({line.split(",")[0] for line in file.read_text().splitlines()[1:]}) == 2
    assert "1 of 2," not in done.stdout  # it was judged before
    again = run("benchmarks.quality.reading", str(file), "--table")
    rows = [line.strip("| ").split(" | ") for line in again.stdout.splitlines() if line.startswith("| log")]
    assert len(rows) == 12 + 12 + 5 + 6
    assert all(re.match(r"-?\d", cell) for row in rows for cell in row[3:])
    shares = {(row[0], row[1], row[2]): [float(cell.split()[0]) for cell in row[3:9]] for row in rows[:12]}
    assert all(0 <= share <= 1 for cells in shares.values() for share in cells[:5])
