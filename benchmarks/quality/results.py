"""Put what was measured into docs/measurements/results.md: the tables that matter, and all figures as CSV beside it.

python -m benchmarks.quality.results inspection

takes from this folder NAME.csv, as `mmneurons inspect` leaves them, and NAME.md, tables that another benchmark printed.
Without a folder the page is made again, of the CSV files that are beside it.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "results.md"
DATA = Path(__file__).parents[2] / "docs" / "measurements" / "results"
"""The CSV files, one for each table of `mmneurons inspect` and for each that is read from Markdown."""
NUMBERS = (
    re.compile(r"(?P<mean>-?[\d.]+)"),
    re.compile(r"(?P<mean>-?[\d.]+) \[(?P<low>-?[\d.]+), (?P<high>-?[\d.]+)\]"),
    re.compile(r"(?P<mean>-?[\d.]+), (?P<median>-?[\d.]+) \((?P<worst>-?[\d.]+)\)"),
)
"""What a cell of a printed table can be."""
Row = dict[str, str]
Tables = Mapping[str, list[Row]]
"""The rows of CSV files, by name."""


def shown(row: Row | None) -> str:
    """Write mean and interval, or mean and worst case."""
    if row is None or not row["mean"]:
        return "not measured"
    mean = f"{float(row['mean']):.3f}"
    if row.get("worst"):
        return f"{mean} ({float(row['worst']):.3f})"
    return f"{mean} [{float(row['low']):.3f}, {float(row['high']):.3f}]" if row.get("low") else mean


def pivot(corner: str, cells: Iterable[tuple[str, str, Row]], missing: str = "not measured") -> str:
    """Lay out (line, column, what was measured) as Markdown, lines and columns in the order in which they come."""
    by_place: dict[tuple[str, str], Row] = {}
    for line, column, row in cells:
        if (line, column) in by_place:
            raise ValueError(f"{line}, {column} stands twice")
        by_place[line, column] = row
    columns = list(dict.fromkeys(column for _, column in by_place))
    made = [f"| {corner} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for line in dict.fromkeys(line for line, _ in by_place):
        texts = [shown(by_place[line, c]) if (line, c) in by_place else missing for c in columns]
        made.append(f"| {line} | " + " | ".join(texts) + " |")
    return "\n".join(made)


def _sensitivity(tables: Tables) -> str:
    return pivot("measure", ((row["measure"], "share", row) for row in tables["sensitivity"]))


def _regions(tables: Tables) -> str:
    """Show what does not follow from another line, and what it is to be compared with."""
    told = (
        "pointing game",
        "the mask's share of the image",
        "IoU at equal area",
        "patch AUROC",
        "loudness / the top's",
    )
    rows = [row for row in tables["regions"] if row["k"] and row["measure"] in told]
    return pivot("map", ((f"{row['neurons']}: {row['measure']}", f"k = {row['k']}", row) for row in rows))


def _specificity(tables: Tables) -> str:
    cells = [(row["pairs"], f"top {row['k']}", row) for row in tables["overlap"]]
    cells += [("own share", "top 10", row) for row in tables["own-share"]]
    cells += [(f"share that lies in block {row['block']}", f"top {row['k']}", row) for row in tables["layers"]]
    return pivot("pairs, or top neurons", cells, missing="")


def _causal(tables: Tables) -> str:
    """Show the strongest noise, and silence with its controls."""
    rows = [
        row
        for row in tables["causal"]
        if row["disturbance"] == "times 0"
        or (row["disturbance"] == "noise 4" and row["measure"] in ("no longer says the noun", "the rest unchanged"))
    ]
    cells = [(f"{r['disturbance']}, {r['neurons']}: {r['measure']}", f"k = {r['k']}", r) for r in rows]
    return pivot("disturbed", sorted(cells, key=lambda cell: cell[0].partition(",")[0]))


def _finders(tables: Tables) -> str:
    """Show of each finder how well it agrees, what its top neurons do together, and what they say."""
    cells = [
        (row["finder"], f"agreement on {row['effect on']}, {row['scope']}", row)
        for row in tables["agreement"]
        if row["effect on"] != "logprob, mean" and (row["effect on"], row["scope"]) != ("logit", "last third")
    ]
    # Each finder has matched random neurons of its own; those of the first stand for all.
    first = tables["deletion"][0]["finder"]
    for row in tables["deletion"]:
        name = {"top": row["finder"], "matched random": f"matched random, as loud as {first}'s"}.get(row["measure"])
        if name and row["k"] in ("10", "50", "100") and (row["measure"] == "top" or row["finder"] == first):
            cells.append((name, f"fall of log p, top {row['k']}", row))
    told = ("decoded hit@10", "BERTScore F1 to the noun")
    cells += [(row["finder"], row["measure"], row) for row in tables["meaning"] if row["measure"] in told]
    return pivot("finder", cells, missing="")


def _edits_by_score(tables: Tables) -> str:
    """Show generality and locality of each score, mean and worst pair."""
    rows = [row for row in tables["edits-by-score"] if row["figure"] in ("generality", "locality")]
    cells: list[tuple[str, str, Row]] = []
    for row in rows:
        score, block, columns = row["way"].split(",")
        where = "the last block" if block == "last" else "all blocks"
        cells.append((f"{score}: {row['figure']}", f"{columns} columns of {where}", row))
    return pivot("score", sorted(cells, key=lambda cell: cell[0].split(": ")[1]), missing="")


def _hallucination(tables: Tables) -> str:
    rows = [row for row in tables["hallucination"] if row["group"].startswith(("three kinds", "all four"))]
    return pivot("", ((row["group"], row["figure"], row) for row in rows))


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Tables], str]]] = {
    "sensitivity": (("sensitivity",), _sensitivity),
    "regions": (("regions",), _regions),
    "specificity": (("overlap", "own-share", "layers"), _specificity),
    "causal": (("causal",), _causal),
    "finders": (("agreement", "deletion", "meaning"), _finders),
    "edits-by-score": (("edits-by-score",), _edits_by_score),
    "hallucination": (("hallucination",), _hallucination),
}
"""Marker -> the CSV files that it is made of, and how."""
PRINTED = {"edits-by-score": ("way", "figure"), "hallucination": ("group", "figure")}
"""Tables that another benchmark prints -> what their lines and their columns are."""


def printed(text: str, labels: tuple[str, str]) -> Iterator[Row]:
    """Yield the cells of a Markdown table: the names of its line and its column, and its numbers."""
    head, _, *lines = (
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.strip().splitlines()
    )
    for name, *cells in lines:
        for column, cell in zip(head[1:], cells, strict=True):
            found = next((told for kind in NUMBERS if (told := kind.fullmatch(cell))), None)
            if found is not None:  # a dash, or words: not measured
                yield dict(zip(labels, (name, column), strict=True)) | found.groupdict()


def keep(folder: Path) -> None:
    """Copy the CSV files of a folder beside the page, and those that its Markdown tables make."""
    DATA.mkdir(exist_ok=True)
    for name in dict.fromkeys(name for names, _ in LAYOUTS.values() for name in names):
        if name in PRINTED and (folder / f"{name}.md").exists():
            rows = list(printed((folder / f"{name}.md").read_text(encoding="utf-8"), PRINTED[name]))
            with (DATA / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                fields = dict.fromkeys(field for row in rows for field in row)
                writer = csv.DictWriter(file, list(fields), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        elif (folder / f"{name}.csv").exists():
            (DATA / f"{name}.csv").write_bytes((folder / f"{name}.csv").read_bytes())


def read(name: str) -> list[Row]:
    """Read the rows of a CSV file beside the page."""
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill(page: str) -> str:
    """Make every table of the page anew whose CSV files are there."""
    for marker, (names, layout) in LAYOUTS.items():
        if all((DATA / f"{name}.csv").exists() for name in names):
            links = ", ".join(f"[{name}.csv]({DATA.name}/{name}.csv)" for name in names)
            made = f"{layout({name: read(name) for name in names})}\n\nAll figures: {links}."
            before, begin, rest = page.partition(f"<!-- {marker} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            page = f"{before}{begin}\n{made}\n\n{end}{after}" if begin else page
    return page


def main() -> None:
    """Keep what a folder holds, then fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    if folder is not None:
        keep(folder)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
