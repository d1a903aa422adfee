"""Put what `mmneurons inspect` measured into docs/results.md: between its markers, from the CSV files of a folder.

python benchmarks/results.py inspection
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
Rows = list[dict[str, str]]


def shown(row: dict[str, str] | None) -> str:
    """Mean and interval."""
    if row is None or not row["mean"]:
        return "not measured"
    mean = f"{float(row['mean']):.3f}"
    return f"{mean} [{float(row['low']):.3f}, {float(row['high']):.3f}]" if row["low"] else mean


def pivot(rows: Rows, down: str, across: str, head: Sequence[str] | None = None) -> str:
    """One row for each value of `down`, one column for each of `across`."""
    lines = list(dict.fromkeys(row[down] for row in rows))
    columns = list(head or dict.fromkeys(row[across] for row in rows))
    cells = {(row[down], row[across]): row for row in rows}
    made = [f"| {down} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    made += [f"| {line} | " + " | ".join(shown(cells.get((line, c))) for c in columns) + " |" for line in lines]
    return "\n".join(made)


def _agreement(rows: Rows) -> str:
    for row in rows:
        row["on, over"] = f"{row['effect on']}, {row['scope']}"
    return pivot(rows, "finder", "on, over")


def _deletion(rows: Rows) -> str:
    """The top of each finder; the controls of the first."""
    kept = [row | {"silent": f"{row['finder']}, top k"} for row in rows if row["measure"] == "top"]
    first = rows[0]["finder"]
    names = {
        "matched random": f"matched random, as loud as {first}'s",
        "loudness / the top's": "- their loudness / the top's",
        "matched neurons": "- their number",
        "any random": "any random, k",
    }
    for measure, name in names.items():
        kept += [row | {"silent": name} for row in rows if (row["finder"], row["measure"]) == (first, measure)]
    return pivot(kept, "silent", "k")


def _deletion_differences(rows: Rows) -> str:
    return pivot([row for row in rows if row["measure"] == "top - matched random"], "finder", "k")


def _causal(rows: Rows) -> str:
    """Rows of which every figure is 0, or every one 1, are left out; BERTScore and controls of silence alone."""
    lines: dict[str, Rows] = {}
    for row in rows:
        apart = row["measure"] not in ("no longer says the noun", "the rest unchanged")
        if apart and row["disturbance"] != "times 0":
            continue
        name = f"{row['disturbance']}, {row['neurons']}: {row['measure']}"
        lines.setdefault(name, []).append(row | {"disturbed": name, "apart": "yes" if apart else ""})
    told = [mine for mine in lines.values() if mine[0]["apart"] or {float(r["mean"]) for r in mine} not in ({0}, {1})]
    return pivot([row for mine in told for row in mine], "disturbed", "k")


def _regions(rows: Rows) -> str:
    return pivot([row | {"map": f"{row['neurons']}: {row['measure']}"} for row in rows if row["k"]], "map", "k")


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "sensitivity": ("sensitivity", lambda rows: pivot([r | {"": "share"} for r in rows], "measure", "")),
    "regions": ("regions", _regions),
    "overlap": ("overlap", lambda rows: pivot(rows, "pairs", "k")),
    "own-share": ("own-share", lambda rows: pivot([r | {"": "share"} for r in rows], "measure", "")),
    "layers": ("layers", lambda rows: pivot(rows, "k", "block")),
    "causal": ("causal", _causal),
    "agreement": ("agreement", _agreement),
    "deletion": ("deletion", _deletion),
    "deletion-differences": ("deletion", _deletion_differences),
    "meaning": ("meaning", lambda rows: pivot(rows, "finder", "measure")),
}
"""Marker -> CSV file, and how it is laid out."""


def main() -> None:
    """Fill every marker whose CSV is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    page = PAGE.read_text(encoding="utf-8")
    for marker, (name, layout) in TABLES.items():
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        with path.open(encoding="utf-8") as file:
            made = layout(list(csv.DictReader(file)))
        pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = pattern.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", page)
        print(f"{marker}: {path}")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
