"""The atlas: its figures worked by hand on a small run, what SQL may not do, and runs that nobody vouches for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kits.commands import call

import mmneurons as mmn
from mmneurons.data.run import Run, RunFacts, names_hash
from mmneurons.data.run_writer import ImageRow, NounColumns, image_table, neuron_table, write_shard, write_words
from mmneurons.errors import FormatError, SettingError
from mmneurons.neurons import Neuron
from mmneurons.report.atlas import write_site
from mmneurons.web.atlas import Runs

pytest.importorskip("pyarrow")
SAID = {  # by image: word, lemma, and (layer, expert, index): score
    "a.png": [("dog", "dog", {(1, -1, 7): 4.0, (2, 3, 5): 1.0})],
    "b.png": [("dogs", "dog", {(1, -1, 7): 2.0}), ("cat", "cat", {(1, -1, 7): 1.0, (0, -1, 2): 3.0})],
    "c.png": [("dog", "dog", {(2, 3, 5): 2.0}), ("dog", "dog", {(2, 3, 5): 4.0, (1, -1, 7): 3.0})],
    "d.png": [("<b>'x'</b>", "<b>'x'</b>", {(0, -1, 2): -1.0})],
}


def make_run(folder: Path, *, factor: float = 1.0, words: bool = True) -> Path:
    """Write SAID as a run of two shards, with all scores multiplied."""
    names = list(SAID)
    made_by = {"model": {"id": "toy"}, "settings": {"top": 2, "score": "logit"}}
    folder.mkdir(parents=True)
    facts = RunFacts(1, made_by, "toy", len(names), 3, names_hash(iter(names)))
    (folder / "run.json").write_bytes(msgspec.json.encode(facts))
    run = Run(folder)
    constants = {"score_name": "logit", "against": None, "says": "raw", "baseline": "zero"}
    for shard in range(run.n_shards):
        images, nouns = list[ImageRow](), NounColumns()
        for place in run.slice_of(shard):
            said = SAID[names[place]]
            caption = " and ".join(word for word, _, _ in said)
            images.append(ImageRow(place, names[place], f"{place:064x}", 9, 9, "What?", "", caption, False, (1,),
                                   len(said), (), None, ()))  # fmt: skip
            for i, (word, lemma, scores) in enumerate(said):
                places = np.array(list(scores))
                values = np.array(list(scores.values()), np.float32) * np.float32(factor)
                row = {"image": len(images) - 1, "noun": i, "word": word, "lemma": lemma, "start": 0, "token": word,
                       "token_id": i, "step": i, "n_tokens": 1, "probability": 0.5, "logit": 1.0, "score": values,
                       "layer": places[:, 0], "expert": places[:, 1], "index": places[:, 2],
                       "activation": np.sign(values)}  # fmt: skip
                for name, value in row.items():
                    getattr(nouns, name).append(value)
        tables = image_table(images), neuron_table(images, nouns, constants)
        write_shard(run, shard, *tables, failures=(), smaller_batches=(), stamps=(), seconds=())
    if words:
        said = {"tokens": [" up"], "suppressed": [" down"]}
        write_words(run, [{"layer": 1, "expert": None, "index": 7, "below": False, **said}])
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMNEURONS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def atlas(run):
    with mmn.Atlas(run) as atlas:
        yield atlas


def test_the_neurons_of_a_word(atlas):
    rows = atlas.word("dogs").to_pylist()  # in the plural, too
    # Three images say dog. L1.u7: 4, 2, and in c.png, which says it twice, the mean of 0 and 3. L2.e3.u5: 1, 0, 3.
    assert [row["neuron"] for row in rows] == ["L1.u7", "L2.e3.u5"]
    assert [row["mean"] for row in rows] == pytest.approx([7.5 / 3, 4 / 3])
    assert [row["n_images"] for row in rows] == [3, 2]
    assert [row["frequency"] for row in rows] == pytest.approx([1, 2 / 3])
    assert [row["own_share"] for row in rows] == pytest.approx([2.5 / 3.5, 1])
    assert [row["tokens"] for row in rows] == [[" up"], None]


def test_a_neuron(atlas):
    page = atlas.neuron("L1.u7")
    assert page.says.to_pylist() == [{"fires": "above", "tokens": [" up"], "suppressed": [" down"]}]
    concepts = page.concepts.to_pylist()
    assert [(row["lemma"], row["n_images"]) for row in concepts] == [("dog", 3), ("cat", 1)]
    assert [row["mean"] for row in concepts] == pytest.approx([2.5, 1])
    best = [(row["image"], row["word"], row["score"], row["rank"]) for row in page.images.to_pylist()]
    assert best == [("a.png", "dog", 4, 0), ("c.png", "dog", 3, 1), ("b.png", "dogs", 2, 0), ("b.png", "cat", 1, 0)]


def test_what_is_negative_has_no_share(atlas):
    (row,) = atlas.word("<b>'x'</b>").to_pylist()
    assert (row["neuron"], row["mean"], row["own_share"]) == ("L0.u2", -1, 0)


def test_an_image(atlas):
    for name in ("b.png", 1, "1"):
        page = atlas.image(name)
        (image,) = page.image.to_pylist()
        assert (image["name"], image["caption"]) == ("b.png", "dogs and cat")
        assert [(row["word"], row["neuron"]) for row in page.nouns.to_pylist()] == [
            ("dogs", "L1.u7"),
            ("cat", "L1.u7"),
            ("cat", "L0.u2"),
        ]


def test_concepts(atlas):
    rows = atlas.concepts().to_pylist()
    assert [(row["lemma"], row["n_images"], row["n_nouns"], row["n_neurons"], row["best"]) for row in rows] == [
        ("dog", 3, 4, 2, "L1.u7"),
        ("<b>'x'</b>", 1, 1, 1, "L0.u2"),
        ("cat", 1, 1, 2, "L0.u2"),
    ]


def test_neurons_that_give_to_the_same_nouns(atlas):
    rows = {row["neuron"]: row for row in atlas.similar("L1.u7").to_pylist()}
    # Means (dog, cat, x): L1.u7 (2.5, 1, 0), L2.e3.u5 (4/3, 0, 0), L0.u2 (0, 3, -1).
    length = np.hypot(2.5, 1)
    assert rows["L2.e3.u5"]["cosine"] == pytest.approx(2.5 / length)
    assert rows["L0.u2"]["cosine"] == pytest.approx(3 / length / np.hypot(3, 1))
    assert (rows["L0.u2"]["best"], rows["L0.u2"]["own_share"]) == ("cat", 1)


def test_neurons_to_edit_or_disturb(atlas):
    assert atlas.concept_neurons("dog") == [Neuron(1, 7), Neuron(2, 5, 3)]
    assert atlas.concept_neurons("dog", own_share=0.9) == [Neuron(2, 5, 3)]


def test_rows_are_those_of_a_finding(atlas, run):
    rows = atlas.sql("SELECT * FROM rows ORDER BY position, noun, rank").to_pylist()
    kept = list(Run(run).rows())
    assert len(rows) == len(kept) == 9
    for row, other in zip(rows, kept, strict=True):
        assert {*row} - {*other} == {"run", "position"}
        for name, value in other.items():
            assert row[name] == (list(value) or None if isinstance(value, tuple) else value), name


def test_two_runs_stand_side_by_side(run, tmp_path):
    with mmn.Atlas([run, make_run(tmp_path / "toy", factor=2)]) as atlas:
        rows = atlas.word("dog", 1).to_pylist()
    assert [(row["run"], row["neuron"], row["mean"]) for row in rows] == [
        ("toy", "L1.u7", 2.5),
        ("toy (2)", "L1.u7", 5),
    ]


@pytest.mark.parametrize(
    "query",
    [
        "COPY top TO 'out.csv'",
        "COPY (SELECT 1) TO '/dev/stdout'",
        "EXPORT DATABASE 'out'",
        "ATTACH 'out.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "FROM read_csv('run.json')",
        "FROM read_text('run.json')",
        "FROM read_blob('run.json')",
        "FROM read_parquet('*.parquet')",
        "FROM glob('*')",
        "FROM 'run.json'",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "RESET enable_external_access",
        "PRAGMA profile_output = 'out'",
        "CREATE PERSISTENT SECRET s (TYPE http)",
        "CREATE TABLE r0.main.stolen AS SELECT 1",
        "DELETE FROM r0.main.top",
        "DROP TABLE r0.main.top",
        "SELECT 1; COPY top TO 'out.csv'",
    ],
)
def test_a_query_reads_and_writes_no_file(atlas, run, query, monkeypatch):
    monkeypatch.chdir(run)
    before = sorted(run.rglob("*"))
    with pytest.raises(SettingError, match="DuckDB refuses"):
        atlas.sql(query)
    assert sorted(run.rglob("*")) == before


def test_a_query_cannot_overwrite_the_index(atlas, monkeypatch):
    (place,) = atlas.sql("SELECT path FROM duckdb_databases() WHERE database_name = 'r0'")["path"].to_pylist()
    before = Path(place).read_bytes()
    with pytest.raises(SettingError):
        atlas.sql(f"COPY top TO '{place}'")
    assert Path(place).read_bytes() == before


def test_a_query_cannot_see_variables_of_the_program(atlas):
    secret = [1]  # noqa: F841 - DuckDB would look for it by its name
    with pytest.raises(SettingError):
        atlas.sql("FROM secret")


def test_no_torch_is_needed(run):
    program = f"""
import sys, mmneurons as mmn
with mmn.Atlas({str(run)!r}) as atlas:
    assert atlas.word("dog")["neuron"][0].as_py() == "L1.u7"
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_grew_or_changed_is_read_anew(tmp_path):
    folder = make_run(tmp_path / "toy", words=False)
    second = folder / "shards" / "000001.json"
    kept = second.read_bytes()
    second.unlink()
    with mmn.Atlas(folder) as atlas:
        assert "<b>" not in str(atlas.concepts().to_pylist())
        assert atlas.word("dog").to_pylist()[0]["tokens"] is None
    second.write_bytes(kept)
    with mmn.Atlas(folder) as atlas:
        assert "<b>" in str(atlas.concepts().to_pylist())


def test_nothing_is_written_into_a_run(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with mmn.Atlas(run) as atlas:
        atlas.concepts()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_damaged_run_is_told(tmp_path):
    folder = make_run(tmp_path / "toy")
    table = folder / "shards" / "000001.neurons.parquet"
    content = table.read_bytes()
    # Cut off: the shard does not count. Of the right length, but no Parquet: it is told.
    table.write_bytes(content[:-5])
    assert list(Run(folder).done) == [0]
    table.write_bytes(b"x" * len(content))
    with pytest.raises(FormatError, match="is damaged"):
        mmn.Atlas(folder)
    (folder / "shards" / "000000.json").unlink()
    table.unlink()
    with pytest.raises(FormatError, match="no whole shard"):
        mmn.Atlas(folder)


def test_a_part_of_a_run_is_told_wherever_it_is_asked(run, tmp_path, capsys, monkeypatch):
    """Its figures are of a part of the images: without a word they would be taken for those of all."""
    folder = make_run(tmp_path / "part")
    (folder / "shards" / "000001.json").unlink()
    told = "part is not whole: 1 of 2 shards are there, and only their 3 images count."
    with mmn.Atlas([run, folder]) as atlas:
        assert [note[: len(told)] for note in atlas.notes] == [told]
        write_site(atlas, tmp_path / "site")
    index, page = ((tmp_path / "site" / name).read_text() for name in ("index.html", "neurons/L1.u7.html"))
    assert "nouns in 7 images." in index  # 4 of the whole run, and 3
    assert told in index
    assert told in page
    shown = Runs([folder])
    assert all(told in text for text in (shown.word(""), shown.word("dog"), shown.neuron("L1.u7")))
    _, _, err = call(capsys, monkeypatch, "atlas", folder, "concepts")
    assert told in err
    _, _, err = call(capsys, monkeypatch, "atlas", run, "concepts")
    assert "not whole" not in err


def test_a_run_leads_to_no_file_outside_of_it(tmp_path):
    """Names in a run are words, not places: those of shards are made of their numbers."""
    folder = make_run(tmp_path / "toy")
    facts = json.loads((folder / "shards" / "000000.json").read_text())
    facts["images"]["file"] = "/etc/passwd"
    (folder / "shards" / "000000.json").write_text(json.dumps(facts))
    assert list(Run(folder).done) == [1]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (("word", "dragon"), "No image says 'dragon'."),
        (("word", "dogg"), "Said are: dog"),
        (("neuron", "L1.u8"), "among the top 2 of no noun"),
        (("neuron", "dog"), "is not the name of a neuron"),
        (("image", "z.png"), "no image z.png"),
        (("sql", "SELEKT"), "DuckDB refuses"),
        (("dragons",), "no question"),
    ],
)
def test_mistakes_are_told_on_the_command_line(run, capsys, monkeypatch, question, said):
    code, out, err = call(capsys, monkeypatch, "atlas", run, *question)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_questions_on_the_command_line(run, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "atlas", run, "word", "dog", "--json", "-")
    assert not code
    assert [row["neuron"] for row in json.loads(out)[""]] == ["L1.u7", "L2.e3.u5"]
    for question in (["neuron", "L1.u7"], ["image", "a.png"], ["concepts"], ["similar", "L1.u7"]):
        code, out, _ = call(capsys, monkeypatch, "atlas", run, *question)
        assert not code
        assert out
    code, out, _ = call(capsys, monkeypatch, "atlas", run, "sql", "SELECT max(score) AS highest FROM top")
    assert [line.strip() for line in out.splitlines()] == ["highest", "4"]


def test_the_site_links_and_escapes(atlas, tmp_path):
    n_pages = write_site(atlas, tmp_path / "site")
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) == n_pages == 1 + 3 + 3
    for name, page in pages.items():
        assert "<b>" not in page
        assert "<script" not in page
        for link in [part.split('"')[0] for part in page.split('href="')[1:]]:
            assert (tmp_path / "site" / name).parent.joinpath(link).resolve().is_file(), (name, link)
    assert "L2.e3.u5" in pages["words/0-dog.html"]
    assert "&lt;b&gt;" in pages["index.html"]
    (tmp_path / "site" / "thesis.tex").touch()
    with pytest.raises(SettingError, match="holds other files"):
        write_site(atlas, tmp_path / "site")
