"""The documents: their code runs, their JSON parses, their links and names exist, the format page lists every field."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from test_patch import a_patch
from typer.testing import CliRunner

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.cli import app
from mmneurons.finding import result
from mmneurons.finding.result import Finding, NeuronFinding, NounFinding, Parts
from mmneurons.neurons import Neuron

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mmneurons"
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
METHOD, FORMAT = ROOT / "docs" / "reference" / "method.md", ROOT / "docs" / "reference" / "format.md"
JSON_TYPES = {
    "text": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "list": list,
    "object": dict,
    "null": types.NoneType,
}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    line: int
    """Of its first line of text, counted from 1."""
    text: str
    not_run: str | None
    """What the comment `<!-- not run: ... -->` above it says; None without one."""


def blocks(markdown: str) -> Iterator[Block]:
    fences = re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ \t]*$", markdown, re.DOTALL | re.MULTILINE)
    for fence in fences:
        comment = re.search(r"<!-- not run:(.*?)-->\s*\Z", markdown[: fence.start()], re.DOTALL)
        line = markdown.count("\n", 0, fence.start(3)) + 1
        yield Block(fence[2].strip(), line, fence[3], comment[1].strip() if comment else None)


def prose(markdown: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1[ \t]*$", "", markdown, flags=re.DOTALL | re.MULTILINE)


def spans(markdown: str) -> list[str]:
    """What stands in `code font` in a line of prose."""
    return re.findall(r"`([^`\n]+)`", prose(markdown))


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def run(path: Path, folder: Path) -> int:
    """Run the Python blocks of a document in order, in one namespace; how many. Pictures that they name are there."""
    code = [block for block in blocks(read(path)) if block.language == "python" and block.not_run is None]
    named = re.findall(r"""["'](\w[\w.-]*\.(?:png|jpe?g))["']""", "\n".join(block.text for block in code))
    for i, name in enumerate(dict.fromkeys(named)):
        shutil.copy(pocket.samples()[i].path, folder / name)
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in code:
        source = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the document
        exec(compile(source, str(path), "exec"), namespace)
    return len(code)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@each_document
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmneurons.editing.dehallucinate.ROWS", 8)  # answers read at each step, fewer than for figures
    monkeypatch.setattr("mmneurons.editing.dehallucinate.REFERENCES", 4)
    run(path, tmp_path)


def test_blocks_are_found_and_share_names(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n<!-- not run: needs a download -->\n\n```python\n1 / 0\n```\n"
        '````python\nassert x == 1\nfrom pathlib import Path\nassert Path("dog.png").is_file()\n````\n'
        "```text\n)(\n```\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(page, tmp_path) == 2
    page.write_text("```python\nx = 1\n```\n\n```python\n\nassert x == 2\n```\n")
    read.cache_clear()
    with pytest.raises(AssertionError) as error:
        run(page, tmp_path)
    assert error.traceback[-1].lineno == 6


@each_document
def test_a_block_that_is_not_run_gives_a_reason(path):
    assert [block.line for block in blocks(read(path)) if block.not_run == ""] == []


@each_document
def test_json_blocks_parse(path):
    for block in blocks(read(path)):
        if block.language == "json":
            json.loads(block.text)


def anchors(markdown: str) -> set[str]:
    """Where a link into a document can point, by GitHub's rule."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(read(path))):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(read(target)), f"{link}: there is no such heading"


@each_document
def test_files_that_are_named_exist(path):
    folders = "|".join(["src", "docs", "tests", "benchmarks", "research", "training", *packages()])
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)(?::[\w.]+)?`", prose(read(path))):
        ours = [ROOT / name, SOURCE / name]
        assert any(place.exists() for place in ours) or is_theirs(path, name), f"{name}: there is no such file"


def packages() -> list[str]:
    return [folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").exists()]


def is_theirs(path: Path, name: str) -> bool:
    """Whether a path is one of the released code, which one section of the method names."""
    _, _, released = read(path).partition("## What differs from the released code")
    return path == METHOD and name in released


def resolve(name: str) -> object:
    """What `mmneurons.x.y` names: a module, or what stands in one, through classes and dataclass fields."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            fields = {field.name for field in dataclasses.fields(found)}
            if part in fields:
                return found
        if not hasattr(found, part) and isinstance(found, types.ModuleType):
            importlib.import_module(".".join(parts[: i + 1]))
        found = getattr(found, part)
    return found


@each_document
def test_names_exist(path):
    """`path:function` and `mmneurons.x.y`, in prose."""
    for span in spans(read(path)):
        if match := re.fullmatch(r"([\w/]+)\.py:([\w.]+)", span):
            assert (SOURCE / f"{match[1]}.py").is_file(), span
            resolve(f"mmneurons.{match[1].replace('/', '.')}.{match[2]}")
        for name in re.findall(r"\bmmneurons(?:\.\w+)+", span):
            resolve(name)


def test_the_method_names_functions():
    named = [span for span in spans(read(METHOD)) if re.fullmatch(r"[\w/]+\.py:[\w.]+", span)]
    assert len(set(named)) > 20
    with pytest.raises((ImportError, AttributeError)):
        resolve("mmneurons.maths.readout.no_such_function")


@each_document
def test_commands_and_options_exist(path):
    from typer.main import get_command

    from mmneurons.cli import app

    commands = getattr(get_command(app), "commands")  # noqa: B009
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    text = read(path)
    lines = [line for block in blocks(text) if block.language in ("", "bash") for line in block.text.splitlines()]
    for said in [line for line in [*lines, *spans(text)] if line.startswith("mmneurons ")]:
        name = said.split()[1]
        for one in [] if name.startswith("-") else name.split("|"):
            assert one in commands, said
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", said)) <= known | {"--help", "--no-maps", "--no-grounded"}, said


def without_numbers(text: str) -> list[str]:
    """The lines of a terminal, without blank ones and maps; figures are #, as a processor may round them otherwise."""
    lines = (re.sub(r"(?<![\w.])[+-]?\d+\.\d+", "#", re.sub(r"[░▒▓█]", "", line)) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def test_the_terminal_of_the_readme_is_what_find_prints():
    shown = next(block.text for block in blocks(read(ROOT / "README.md")) if block.text.startswith("$ mmneurons find"))
    command, _, expected = shown.partition("$ mmneurons edit")[0].partition("\n")
    arguments = command.partition("#")[0].split()[2:]
    printed = without_numbers(CliRunner().invoke(app, arguments).output)
    # Where the README leaves lines out, it says "...".
    at = 0
    for part in expected.split("...\n"):
        lines = without_numbers(part)
        starts = [i for i in range(at, len(printed)) if printed[i : i + len(lines)] == lines]
        assert starts, f"find does not print this: {lines}"
        at = starts[0] + len(lines)


def test_the_page_of_the_python_names_has_every_one():
    page = read(ROOT / "docs" / "reference" / "api.md")
    listed = set(re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE))
    homes = {f"{module}.{name}" for module, name in mmn._HOMES.values()}
    assert homes - listed == {"mmneurons.pocket"}
    assert listed - homes == set()


# The form of the file


def documented() -> dict[str, tuple[str, bool]]:
    """Every field of docs/reference/format.md by its path: its type, and whether it can be absent."""
    fields: dict[str, tuple[str, bool]] = {}
    prefix = None
    for line in read(FORMAT).splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"### .*: `([\w.\[\]]*)`", line)
            prefix = heading and heading[1]
        elif (row := re.match(r"\| `(\w+)` \| ([\w ]+?) \| .* \| (.*)\|$", line)) and prefix is not None:
            fields[f"{prefix}.{row[1]}".lstrip(".")] = row[2], bool(row[3].strip())
    return fields


def written(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a JSON value by their paths; keys that are numbers, and what provenance holds, are no fields."""
    if isinstance(value, dict) and not all(key.isdigit() for key in value):
        for key, entry in value.items():
            here = f"{path}.{key}".lstrip(".")
            yield here, entry
            if here not in ("provenance", "provenance.packages"):
                yield from written(entry, here)
    elif isinstance(value, list):
        for entry in value:
            yield from written(entry, f"{path}[]")


def filled(hint: Any) -> Any:
    """Something of a type, every optional field given: whatever is added to a dataclass is in it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        return hint(**{field.name: filled(hints[field.name]) for field in dataclasses.fields(hint)})
    if origin in (typing.Union, types.UnionType):
        return filled(arguments[0])
    if origin is typing.Literal:
        return arguments[0]
    if origin is tuple:
        return (filled(arguments[0]),)
    if origin is not None and issubclass(origin, Mapping):
        return {filled(arguments[0]): filled(arguments[1])}
    plain = {bool: True, int: 10, float: 0.5, str: "word", Any: "anything", Image.Image: Image.new("RGB", (1, 1))}
    return plain[hint]


def hand_made() -> Finding:
    made = filled(Finding)
    assert made.nouns[0].neurons[0].neuron.expert is not None
    return made


def test_the_format_lists_exactly_the_fields_that_are_written():
    fields = {path for path in documented() if not path.startswith("provenance.")}
    assert fields == {path for path, _ in written(json.loads(result.to_json([hand_made()])))}


def test_every_field_of_a_finding_is_in_the_format():
    names = {path.rpartition(".")[2] for path in documented()} | {"neuron", "views"}
    for kind in (Finding, NounFinding, NeuronFinding, Parts, Neuron):
        assert {field.name for field in dataclasses.fields(kind)} <= names, kind


def test_fields_have_the_types_that_the_format_says():
    document = json.loads(result.to_json([hand_made()]))
    plain = dataclasses.replace(hand_made(), against=None)
    for path, value in [*written(document), *written(json.loads(result.to_json([plain])))]:
        if path in documented():
            said = documented()[path][0]
            assert type(value) in [JSON_TYPES[name] for name in said.split(" or ")], f"{path}: {value!r} is no {said}"


def test_fields_that_can_be_absent_are_absent_when_they_have_no_value():
    noun = hand_made().nouns[0]
    neuron = NeuronFinding(Neuron(0, 1), 0.5, 0.25, ("a",))
    plain = dataclasses.replace(hand_made(), nouns=(dataclasses.replace(noun, neurons=(neuron,), grounded=None),))
    here = {path for path, _ in written(json.loads(result.to_json([plain])))}
    missing = {path for path in documented() if not path.startswith("provenance.")} - here
    missing = {
        path for path in missing if path.rpartition(".")[0] not in missing
    }  # fields of an object that is not there
    optional = {path for path, (_, can_be_absent) in documented().items() if can_be_absent}
    assert missing == {path for path in optional if not path.startswith("provenance.")}


@pytest.mark.parametrize("choices", [{}, {"maps": True, "blank": True, "words": "a", "against": "castle"}])
def test_a_real_run_has_no_other_fields(vlm, sample_paths, choices):
    with a_patch(vlm, {0: [1]}).applied(vlm) if choices else nullcontext():
        document = json.loads(result.to_json([mmn.find(vlm, sample_paths[0], **choices)]))
    fields = documented()
    made_by = dict(written(document["provenance"], "provenance"))
    expected = {path for path in fields if path.startswith("provenance.")}
    absent = {"provenance.model.date", "provenance.model.generation_set_aside"}  # of other models
    assert set(made_by) == expected - absent - (set() if choices else {"provenance.model.patches"})
    for path, value in [*written(document), *made_by.items()]:
        assert path in fields
        assert type(value) in [JSON_TYPES[name] for name in fields[path][0].split(" or ")], path


def test_rows_have_the_columns_and_types_of_the_table(vlm, sample_paths):
    section = read(FORMAT).partition("## As a flat table")[2].partition("\n## ")[0]
    columns = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))
    kinds = {"list<string>": tuple, "string": str, "int64": int, "double": float}
    finding = mmn.find(vlm, sample_paths[0], blank=True)
    rows = [*finding.rows(), *hand_made().rows()]
    assert len(finding.rows()) == 10 * len(finding.nouns)
    for row in rows:
        assert list(row) == list(columns)
        for name, value in row.items():
            kind, _, null = columns[name].partition(" or ")
            assert type(value) is kinds[kind] or (null and value is None), f"{name}: {value!r}"
    best = finding.nouns[1].neurons[2]
    (row,) = (row for row in finding.rows() if (row["noun"], row["rank"]) == (1, 2))
    assert (row["neuron"], row["score"], row["activation"]) == (str(best.neuron), best.score, best.activation)
    assert (row["layer"], row["index"], row["word"]) == (best.neuron.layer, best.neuron.index, finding.nouns[1].word)


def test_the_schema_number_is_the_one_described():
    assert f"| `schema` | integer | {result.SCHEMA} |" in read(FORMAT)
    assert f"A file of schema {result.SCHEMA} has the fields of this page" in read(FORMAT)


# The example: `python tests/test_docs.py` writes it anew

EXAMPLE = re.compile(r"(?<=^```json\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
SAMPLE, WORD = "envelope-cat", "snow"


def make_example(vlm: mmn.VLM) -> str:
    path = next(sample.path for sample in pocket.samples() if sample.name == SAMPLE)
    finding = mmn.find(vlm, path, words=[WORD], top=1)
    text = result.to_json([dataclasses.replace(finding, images=(path.name,))])
    return re.sub(
        r"\[[^\[\]{}]*\]", lambda short: re.sub(r"\s*\n\s*", " ", short[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def test_the_example_is_what_its_command_gives(vlm):
    assert f"mmneurons find {SAMPLE}.png --word {WORD} --top 1 --no-maps --no-grounded --json -\n" in read(FORMAT)
    (shown,) = EXAMPLE.findall(read(FORMAT))
    ((here,), (there,)) = (result.from_json(text) for text in (shown, make_example(vlm)))
    assert json.loads(result.to_json([here])) == json.loads(shown)
    assert here.provenance["settings"] == there.provenance["settings"]
    again = "another model wrote the example; write it anew: python tests/test_docs.py"
    assert here.provenance["model"]["weights_hash"] == there.provenance["model"]["weights_hash"], again
    assert (here.caption, here.token_ids) == (there.caption, there.token_ids)
    for one, other in zip(here.nouns, there.nouns, strict=True):
        assert dataclasses.asdict(one.parts) == pytest.approx(dataclasses.asdict(other.parts), rel=1e-3, abs=1e-3)
        assert one.neurons[0].neuron == other.neurons[0].neuron
        assert one.neurons[0].tokens == other.neurons[0].tokens
        assert one.neurons[0].score == pytest.approx(other.neurons[0].score, rel=1e-3)


if __name__ == "__main__":
    made = make_example(mmn.load(device="cpu"))
    FORMAT.write_text(EXAMPLE.sub(lambda _: made, read(FORMAT)), encoding="utf-8")
