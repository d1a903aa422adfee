"""The shape of the package: who may import whom, what must not need torch, and a few habits of its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mmneurons"
PACKAGE = SOURCE.name
LAYERS: Sequence[str] = """
    errors progress files neurons words settings pocket photo maths data vlm finding attribution metrics inspection
    patches editing baselines methods sweeping atlas report web cli __main__
""".split()
"""A module imports from its own layer and from those before it."""
SHOWN = {
    ("mmneurons.finding.result", "mmneurons.report.page"),
    ("mmneurons.patches.patch", "mmneurons.report.patch"),
    ("mmneurons.patches.hub", "mmneurons.report.model_card"),
}
"""The only arrows down the list: a notebook, or the Hub, asks an object itself how it looks, and the report knows."""
WITHOUT_TORCH = [
    "errors",
    "files",
    "neurons",
    "settings",
    "pocket",
    "data.dataset",
    "data.store",
    "data.content",
    "data.listing",
    "data.run",
    "data.run_writer",
    "words",
    "finding.result",
    "report",
    "maths.regions",
    "progress",
    "cli",
]
LONGEST = 400
MODULES = sorted(SOURCE.rglob("*.py"))
WRITTEN = [path for kind in ("py", "js", "css", "j2") for path in sorted(SOURCE.rglob(f"*.{kind}"))]

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
each_file = pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(SOURCE)))


def layer_of(module: str) -> str:
    """'mmneurons.data.images' -> 'data'; '' for the package itself."""
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def is_module(name: str) -> bool:
    place = SOURCE.joinpath(*name.split(".")[1:])
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import of this package, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            if origin.split(".")[0] == PACKAGE or node.level:
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield node.lineno, inner if is_module(inner) else origin


def violations(module: str, tree: ast.AST) -> list[str]:
    found = []
    for line, imported in imports(tree):
        mine, theirs = layer_of(module), layer_of(imported)
        if theirs not in LAYERS:
            found.append(f"{line}: {imported}; name the module itself, in full")
        elif mine == "cli" or (module, imported) in SHOWN:
            continue
        elif LAYERS.index(theirs) > LAYERS.index(mine):
            found.append(f"{line}: {imported}; {theirs} comes after {mine}")
        elif (mine, theirs) == ("report", "vlm"):
            found.append(f"{line}: {imported}; a report needs no torch")
    return found


def test_every_module_has_its_layer():
    assert {layer_of(name_of(path)) for path in MODULES} - {""} == set(LAYERS)


@each_module
def test_imports_point_up_the_list(path):
    if path != SOURCE / "__init__.py":  # which hands on the names of all others
        assert violations(name_of(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("mmneurons.maths.ranking", "from mmneurons.errors import SettingError", True),
        ("mmneurons.maths.ranking", "import mmneurons.maths.readout", True),
        ("mmneurons.maths.ranking", "from mmneurons.vlm import weights", False),
        ("mmneurons.maths.ranking", "def f():\n    from mmneurons.vlm.load import load", False),
        ("mmneurons.maths.ranking", "from mmneurons import finding", False),
        ("mmneurons.maths.ranking", "from mmneurons import find", False),
        ("mmneurons.maths.ranking", "import mmneurons", False),
        ("mmneurons.maths.ranking", "from .readout import Norm", False),
        ("mmneurons.maths.ranking", "import mmneurons_of_another_kind, torch", True),
        ("mmneurons.errors", "from mmneurons.neurons import Neuron", False),
        ("mmneurons.report.page", "from mmneurons.data.images import open_image", True),
        ("mmneurons.report.page", "from mmneurons.data import images", True),
        ("mmneurons.report.page", "from mmneurons.vlm.load import load", False),
        ("mmneurons.report", "from mmneurons.cli import app", False),
        ("mmneurons.finding.result", "from mmneurons.report.page import framed", True),
        ("mmneurons.finding.finder", "from mmneurons.report.page import framed", False),
        ("mmneurons.cli", "from mmneurons.finding.finder import find", True),
    ],
)
def test_the_rule_itself(module, line, allowed):
    assert (violations(module, ast.parse(line)) == []) == allowed


def test_torch_is_not_imported_where_it_is_not_needed():
    program = f"""
import importlib, sys
for name in {WITHOUT_TORCH}:
    importlib.import_module("mmneurons." + name)
    assert not {{"torch", "transformers", "duckdb"}} & set(sys.modules), name
from mmneurons.cli import main
sys.argv = ["mmneurons", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers", "duckdb"}} & set(sys.modules), "--help"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: mmneurons" in done.stdout


@each_file
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@each_module
def test_only_the_command_line_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert path.parent == SOURCE / "cli" or printed == []


@each_file
def test_no_file_names_a_place_outside_the_package(path):
    """No path that climbs out of its folder, none of one machine."""
    outside = re.compile(r"(?<![.\w])\.\./|(?<![\w./<])/(?:work|home|root|tmp|Users)\b")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{i}: {line}" for i, line in enumerate(lines, start=1) if outside.search(line)] == []


def test_shapes_are_checked_at_run_time_wherever_one_is_named():
    config = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (option,) = (o for o in config["tool"]["pytest"]["ini_options"]["addopts"] if o.startswith("--jaxtyping-packages="))
    checked = [name.strip() for name in option.partition("=")[2].split(",")]
    naming = {name_of(path) for path in MODULES if "from jaxtyping import" in path.read_text(encoding="utf-8")}
    unchecked = {name for name in naming if not any(name == part or name.startswith(f"{part}.") for part in checked)}
    # These refuse by themselves what a user may give them.
    own = ("attribution.finders", "finding.lookup", "finding.reading", "patches.patch", "pocket.scenes")
    assert unchecked == {f"{PACKAGE}.{name}" for name in own}
