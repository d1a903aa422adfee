"""Execute the notebooks of docs/notebooks, each in an empty folder: `make test-notebooks`.

An error in a cell is one here. With `--write` the outputs are kept in the files, which is how they got there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

NOTEBOOKS = Path(__file__).parents[1] / "docs/notebooks"
MOST = 300_000
"""Bytes of a notebook with its outputs: it is read in a browser."""


def main(write: bool) -> None:
    """Execute all of them, in the order of their names."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when it ran: new at every execution
            if cell.cell_type == "code":  # progress and warnings of the machine
                cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
                for one in cell.outputs:
                    one.get("data", {}).pop("image/jpeg", None)  # the same as PNG stands beside it
        text = nbformat.writes(notebook) + "\n"
        if len(text) > MOST:
            sys.exit(f"{path.name} has {len(text)} bytes with its outputs; at most {MOST}")
        if write:
            path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells, {len(text)} bytes")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
