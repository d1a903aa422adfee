"""A sweep: the rows of find, whatever stops it on the way; images that cannot be used; runs that must not mix."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kits.commands import call
from kits.processor_zoo import picture, processor
from kits.tiny_models import tiny_model
from kits.zoo import FAMILIES, Row, randomise
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.data import run_writer
from mmneurons.data.dataset import Item
from mmneurons.data.run import Run
from mmneurons.data.store import LOCK, one_writer
from mmneurons.errors import FormatError, ModelError, SettingError
from mmneurons.finding.batch import score_batch
from mmneurons.finding.numbers import top_numbers
from mmneurons.finding.scoring import describe
from mmneurons.settings import FindSettings, SweepSettings
from mmneurons.sweeping import asking, batch_size, reading
from mmneurons.sweeping.batch_size import tried_on, with_best_batch_size

pytest.importorskip("pyarrow")
HOW: dict[str, Any] = {"shard_size": 3, "batch_size": 2, "top": 7, "max_new_tokens": 12}
N_IMAGES = 8
SIDES = {"s": 16, "l": 120}
"""Of small and large pictures; the processor of Qwen2.5-VL makes more image tokens of the large ones."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven samples, and a file that is no image in the midst of them."""
    folder = tmp_path_factory.mktemp("images")
    for i, sample in enumerate(pocket.samples()[: N_IMAGES - 1]):
        shutil.copy(sample.path, folder / f"{i}.png")
    (folder / "3b.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(vlm, images, tmp_path_factory) -> Run:
    """A sweep that nothing stopped."""
    return mmn.sweep(vlm, images, tmp_path_factory.mktemp("whole") / "run", **HOW)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(whole.folder, tmp_path / "run"))


@pytest.fixture
def copied_images(images, tmp_path) -> Path:
    """The same images, to be changed, with the times that they had."""
    return Path(shutil.copytree(images, tmp_path / "images", copy_function=shutil.copy2))


def contents(run: Run | Path) -> dict[str, str]:
    """The bytes of everything that does not tell of time."""
    folder = run if isinstance(run, Path) else run.folder
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in (".parquet", ".jsonl")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_rows_are_those_of_find(vlm, whole):
    names = [row["name"] for row in whole.images().to_pylist()]
    findings = mmn.find(vlm, names, top=7, batch_size=1, max_new_tokens=12)
    rows, wanted = list(whole.rows()), [row for finding in findings for row in finding.rows()]
    assert len(rows) == len(wanted) > 0
    for row, other in zip(rows, wanted, strict=True):
        assert set(row) == set(other)
        for name, value in other.items():
            assert row[name] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), name
    assert [row["caption"] for row in whole.images().to_pylist()] == [finding.caption for finding in findings]


@pytest.mark.parametrize("options", [{"score": "paper", "says": "raw"}, {"baseline": "blank", "against": "cat"}])
def test_numbers_are_those_of_find_bit_for_bit_in_the_same_batch(vlm, images, tmp_path, options):
    paths = [str(images / f"{i}.png") for i in range(3)]
    run = mmn.sweep(vlm, [Item(path, Path(path)) for path in paths], tmp_path / "run", top=5, **options)
    findings = mmn.find(vlm, paths, top=5, **options)
    assert list(run.rows()) == [row for finding in findings for row in finding.rows()]


@pytest.mark.parametrize("name", ["aria", "qwen3_5_moe"])
def test_numbers_of_experts_are_those_that_find_describes(name):
    """Aria has a dense FFN and experts in one block."""
    family = {family.name: family for family in FAMILIES}[name]
    model = mmn.load(randomise(family.build()))
    inputs = family.inputs(model.model, [Row(3, 5), Row(4, 6)])
    token_ids = tuple({token for row in model.generate(inputs, 4).token_ids for token in row})
    choices = FindSettings("", "", 4, top=40, token_ids=token_ids)
    batch = score_batch(model, inputs, [[], []], None, choices)
    assert batch.scored is not None
    described, numbers = describe(model, batch.scored), top_numbers(batch.scored)
    assert numbers.expert.max() > 0
    for i, noun in enumerate(described):
        for rank, found in enumerate(noun.neurons):
            neuron, expert = found.neuron, -1 if found.neuron.expert is None else found.neuron.expert
            mine = (numbers.layer[i, rank], numbers.expert[i, rank], numbers.index[i, rank])
            assert mine == (neuron.layer, expert, neuron.index)
            assert (numbers.score[i, rank], numbers.activation[i, rank]) == (found.score, found.activation)


def test_a_bad_image_is_recorded_and_the_others_are_not(whole):
    lines = (whole.folder / "failures.jsonl").read_text().splitlines()
    (failure,) = map(json.loads, lines)
    assert (failure["position"], Path(failure["name"]).name) == (4, "3b.png")
    assert "cannot be read as an image" in failure["reason"]
    assert [row["position"] for row in whole.images().to_pylist()] == [0, 1, 2, 3, 5, 6, 7]
    assert whole.is_complete


def test_images_are_told_by_their_content(whole, images):
    for row in whole.images().to_pylist():
        assert row["content"] == hashlib.sha256(Path(row["name"]).read_bytes()).hexdigest()
        assert Path(row["name"]).parent == images


def test_a_sweep_that_fails_at_any_write_goes_on_to_the_same_run(vlm, images, whole, tmp_path, monkeypatch):
    real, folder = run_writer.write_whole, tmp_path / "run"
    for n in range(100):
        left = [n % 4 + 1]  # each try gets a little further than the one before

        def failing(path, content, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(run_writer, "write_whole", failing)
        try:
            mmn.sweep(vlm, images, folder, **HOW)
            break
        except KeyboardInterrupt:
            continue
    assert contents(folder) == contents(whole)
    assert Run(folder).facts == whole.facts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_sweep_that_is_killed_goes_on_to_the_same_run(vlm, images, whole, tmp_path):
    begun, folder = threading.Event(), tmp_path / "run"
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:

        def told(stage: str, done: float, total: int) -> None:
            os.write(write_end, b".")

        try:
            mmn.sweep(vlm, images, folder, progress=told, **HOW)
        finally:
            os._exit(0)
    os.read(read_end, 1)
    os.read(read_end, 1)  # two batches: one shard is whole, or being written
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun.set()
    assert not Run(folder).is_complete
    mmn.sweep(vlm, images, folder, **HOW)
    assert contents(folder) == contents(whole)


def test_what_is_there_is_not_made_again(vlm, images, copy, monkeypatch):
    monkeypatch.setattr(vlm.__class__, "generate", lambda *_: pytest.fail("asked again"))
    told = []
    mmn.sweep(vlm, images, copy, progress=lambda *one: told.append(one), **HOW)
    assert told == [("kept from before", N_IMAGES, N_IMAGES)]


@pytest.mark.parametrize("kind", ["images.parquet", "neurons.parquet", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_shard_is_made_anew(vlm, images, whole, copy, kind, damage, monkeypatch):
    file = copy / "shards" / f"000001.{kind}"
    content = file.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "changed": content[:-9] + b"x" + content[-8:]}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    asked = []
    real = asking.score_batch
    monkeypatch.setattr(asking, "score_batch", lambda *given: asked.append(len(given[2])) or real(*given))
    mmn.sweep(vlm, images, copy, **HOW)
    assert asked == [2]  # shard 1: images 3 and 5; image 4 is none
    assert contents(copy) == contents(whole)


def test_a_damaged_table_of_what_neurons_say_is_made_anew(vlm, images, whole, copy):
    """Readers of the run say to give the command again, and it must help."""
    words = copy / "words.parquet"
    words.write_bytes(words.read_bytes()[:-20])
    assert not Run(copy).is_complete
    mmn.sweep(vlm, images, copy, **HOW)
    assert contents(copy) == contents(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top": 8}, "settings.top: 7 there, 8 asked for"),
        ({"score": "logprob"}, "settings.score: 'logit' there, 'logprob' asked for"),
        ({"shard_size": 4}, "shard_size: 3 there, 4 asked for"),
        ({"batch_size": 1}, "settings.batch_size: 2 there, 1 asked for"),
    ],
)
def test_other_choices_do_not_mix(vlm, images, copy, options, said):
    before = contents(copy)
    with pytest.raises(SettingError, match="made otherwise") as error:
        mmn.sweep(vlm, images, copy, **HOW | options)
    assert said in str(error.value)
    assert contents(copy) == before


def test_another_model_does_not_mix(random_vlm, images, copy):
    with pytest.raises(SettingError, match="made otherwise") as error:
        mmn.sweep(random_vlm, images, copy, **HOW)
    assert "model.weights_hash" in str(error.value)


def test_other_images_do_not_mix_and_no_model_is_loaded_to_say_so(images, copied_images, copy):
    with pytest.raises(SettingError, match="of other images") as error:
        mmn.sweep(lambda: pytest.fail("loaded"), copied_images, copy, **HOW)
    assert "8 of its images are not in the list now, and 8 are new; first:" in str(error.value)


def test_a_changed_image_does_not_mix(vlm, copied_images, tmp_path):
    run = mmn.sweep(vlm, copied_images, tmp_path / "run", **HOW)
    before = contents(run)
    # Touched, it is the same image.
    (copied_images / "5.png").touch()
    assert contents(mmn.sweep(vlm, copied_images, tmp_path / "run", **HOW)) == before
    shutil.copy(copied_images / "0.png", copied_images / "5.png")
    with pytest.raises(SettingError, match=r"5\.png has changed"):
        mmn.sweep(vlm, copied_images, tmp_path / "run", **HOW)
    assert contents(run) == before


def test_a_mended_image_is_taken_up(vlm, copied_images, tmp_path):
    mmn.sweep(vlm, copied_images, tmp_path / "run", **HOW)
    shutil.copy(pocket.samples()[9].path, copied_images / "3b.png")
    run = mmn.sweep(vlm, copied_images, tmp_path / "run", **HOW)
    assert run.failures == []
    assert (run.folder / "failures.jsonl").read_text() == ""
    assert [row["position"] for row in run.images().to_pylist()] == list(range(N_IMAGES))


def test_a_second_process_is_refused(vlm, images, copy):
    refused = []

    def second() -> None:
        try:
            mmn.sweep(vlm, images, copy, **HOW)
        except SettingError as error:
            refused.append(error.what)

    with one_writer(copy, copy / LOCK):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == [f"Another run writes in {copy}."]


def test_a_folder_with_other_things_is_refused(vlm, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SettingError, match="holds other files, but no run"):
        mmn.sweep(vlm, images, tmp_path, **HOW)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["thesis.tex"]


def test_a_full_disk_is_told_and_leaves_what_was_written(vlm, images, whole, tmp_path, monkeypatch):
    import mmneurons.files

    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "000001" in str(max(path.parent.iterdir(), default="")) or len(list(path.parent.iterdir())) > 4:
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(mmneurons.files.Path, "write_bytes", full)
    with pytest.raises(SettingError, match="Cannot write") as error:
        mmn.sweep(vlm, images, tmp_path / "run", **HOW)
    assert "No space left on device" in str(error.value)
    monkeypatch.undo()
    left = Run(tmp_path / "run")
    assert list(left.done) == [0]
    assert left.images().num_rows == 3
    assert not list(left.folder.rglob("*.tmp"))
    mmn.sweep(vlm, images, tmp_path / "run", **HOW)
    assert contents(left) == contents(whole)


def test_too_little_memory_halves_the_batch_and_says_so(vlm, images, tmp_path, monkeypatch):
    real = asking.score_batch

    def small(model, inputs, rows, captions, choices):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return real(model, inputs, rows, captions, choices)

    monkeypatch.setattr(asking, "score_batch", small)
    how: dict[str, Any] = HOW | {"shard_size": 8, "batch_size": 4}
    run = mmn.sweep(vlm, images, tmp_path / "run", **how)
    assert run.done[0].smaller_batches == ("0-3", "5-7")
    assert [row["position"] for row in run.images().to_pylist()] == [0, 1, 2, 3, 5, 6, 7]
    monkeypatch.setattr(asking, "score_batch", lambda *_: (_ for _ in ()).throw(MemoryError("can't allocate memory")))
    with pytest.raises(ModelError, match="not enough memory for a single image"):
        mmn.sweep(vlm, images, tmp_path / "other", **how)


def test_images_of_like_length_share_a_batch_and_rows_keep_their_order(tmp_path, monkeypatch):
    """Batches of 2 are the same whether small and large pictures alternate or not."""
    model = mmn.load(tiny_model("qwen2_5_vl"), processor=processor("qwen2_5_vl"))
    padded, real = [], asking.score_batch

    def looking(vlm, inputs, *more):
        padded.append(not inputs["attention_mask"].bool().all())
        return real(vlm, inputs, *more)

    monkeypatch.setattr(asking, "score_batch", looking)
    items = {f"{kind}{i}": Item(f"{kind}{i}", picture(i, side, side)) for kind, side in SIDES.items() for i in range(2)}
    how: dict[str, Any] = HOW | {"shard_size": 4, "token_ids": tuple(range(len(model.tokenizer)))}
    runs = {}
    for name, order in (("alternating", ["s0", "l0", "s1", "l1"]), ("sorted", ["s0", "s1", "l0", "l1"])):
        runs[name] = mmn.sweep(model, [items[image] for image in order], tmp_path / name, **how)
        assert [row["name"] for row in runs[name].images().to_pylist()] == order
        assert list(dict.fromkeys(row["images"] for row in runs[name].rows())) == [(image,) for image in order]
    assert padded == [False] * 4
    first, second = (sorted(map(str, run.rows())) for run in runs.values())
    assert first == second


def test_batches_are_named_by_the_positions_of_their_images():
    assert asking._spans([7, 0, 2, 1, 9, 8]) == "0-2, 7-9"
    assert asking._spans([4]) == "4"


def slow(monkeypatch, *, fixed: float, most: int) -> list[int]:
    """Let a batch take `fixed` seconds and one for each image, and memory be too small for more than `most` images.

    Returns:
        How many images the model is asked about, batch by batch.
    """
    real, asked, clock = asking.score_batch, list[int](), [0.0]

    def score(model, inputs, rows, captions, choices):
        asked.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        clock[0] += fixed + len(rows)
        return real(model, inputs, rows, captions, choices)

    monkeypatch.setattr(asking, "score_batch", score)
    monkeypatch.setattr(asking, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return asked


@pytest.mark.parametrize(
    ("fixed", "most", "tried", "best"),
    [
        (1, 99, [1, 4, 8, 16], 8),  # images a second: 0.8, 0.89, 0.94
        (9, 99, [1, 4, 8, 16, 32], 32),  # the largest that this data set can be tried on
        (9, 8, [1, 4, 8, 16, 8, 8], 8),
        (9, 2, [1, 4, 2, 2], 2),
    ],
)
def test_the_batch_size_is_as_large_as_memory_and_speed_allow(vlm, images, monkeypatch, fixed, most, tried, best):
    asked = slow(monkeypatch, fixed=fixed, most=most)
    items = [Item(f"{i}", images / f"{i % 7}.png") for i in range(300)]
    items[1] = Item("bad", images / "3b.png")
    settings = SweepSettings(batch_size="auto", max_new_tokens=2)
    found, _ = with_best_batch_size(vlm, tried_on(items, settings), settings)
    assert (asked, found.batch_size) == (tried, best)


def refuse_tiny(vlm, monkeypatch) -> None:
    """Let the model refuse pictures of 5 x 5 pixels."""
    real = vlm.__class__.encode

    def refusing(self, pictures, *more):
        if any(picture.size == (5, 5) for (picture,) in pictures):
            raise ModelError("The model's own code fails on this prompt.")
        return real(self, pictures, *more)

    monkeypatch.setattr(vlm.__class__, "encode", refusing)


def test_an_image_that_the_model_refuses_does_not_make_batches_small(vlm, images, monkeypatch):
    slow(monkeypatch, fixed=9, most=99)
    refuse_tiny(vlm, monkeypatch)
    items = [Item(f"{i}", images / f"{i % 7}.png") for i in range(20)]
    items[2] = Item("tiny", Image.new("RGB", (5, 5)))
    found, _ = with_best_batch_size(vlm, items, SweepSettings(batch_size="auto", max_new_tokens=2))
    assert found.batch_size == 16


def test_a_sweep_goes_on_with_the_batch_size_that_was_found(vlm, images, tmp_path, monkeypatch):
    """Whatever would be found now; and the run is that of the same number given."""
    how: dict[str, Any] = HOW | {"batch_size": "auto", "shard_size": 8, "max_new_tokens": 4}
    monkeypatch.setattr(batch_size, "SHARE", 1)
    items = [Item(f"{i}", images / f"{i % 3}.png") for i in range(16)]
    notes = list[str]()

    def stop(stage: str, done: float, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        slow(patched, fixed=9, most=5)
        with pytest.raises(KeyboardInterrupt):
            mmn.sweep(vlm, items, tmp_path / "run", tell=notes.append, progress=stop, **how)
    assert list(Run(tmp_path / "run").done) == [0]
    run = mmn.sweep(vlm, items, tmp_path / "run", tell=notes.append, **how)
    assert run.settings["batch_size"] == 4
    assert notes == [
        "batch size 4; images a second on the first images: 0.308 with 4",
        f"batch size 4, which {run.folder} was begun with",
    ]
    how["batch_size"] = 4
    assert contents(run) == contents(mmn.sweep(vlm, items, tmp_path / "other", **how))


def test_an_image_that_the_model_refuses_is_recorded(vlm, images, tmp_path, monkeypatch):
    refuse_tiny(vlm, monkeypatch)
    items = [Item(f"{i}", Image.open(images / f"{i}.png")) for i in range(3)]
    items.insert(1, Item("tiny", Image.new("RGB", (5, 5))))
    run = mmn.sweep(vlm, items, tmp_path / "run", **HOW)
    assert [(one.position, one.name) for one in run.failures] == [(1, "tiny")]
    assert run.images().num_rows == 3
    # If the model takes none, the images are not to blame.
    monkeypatch.setattr(vlm.__class__, "encode", lambda *_: (_ for _ in ()).throw(ModelError("never")))
    with pytest.raises(ModelError, match="refuses every image"):
        mmn.sweep(vlm, items * 3, tmp_path / "none", **HOW)


def test_given_captions_are_scored_and_the_rest_answered(vlm, images, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text(f"image,caption\n{images / '0.png'},a dog in the snow\n{images / '1.png'},\n")
    run = mmn.sweep(vlm, table, tmp_path / "run", given=True, **HOW)
    first, second = run.images().to_pylist()
    assert (first["caption"], first["given"], second["given"]) == ("a dog in the snow", True, False)
    assert "The model was given this answer to read; it did not choose it." in first["notes"]
    assert second["caption"] == vlm.caption(images / "1.png", max_new_tokens=12)
    lemmas = [row["lemma"] for row in run.rows() if row["rank"] == 0 and row["images"] == (first["name"],)]
    assert lemmas == ["dog", "snow"]


def test_truth_is_carried_along(vlm, tmp_path):
    run = mmn.sweep(vlm, "pocket:find-500", tmp_path / "run", limit=2, shuffle_seed=3, **HOW)
    scenes = pocket.evaluation_set("find-500")
    for row in run.images().to_pylist():
        scene = scenes[int(row["name"].partition("/")[2])]
        assert tuple(row["objects"]) == scene.objects
    assert [row["name"] for row in run.images().to_pylist()] != ["find-500/0", "find-500/1"]


def test_a_run_of_another_schema_is_refused(copy, tmp_path):
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(facts | {"schema": 2}))
    with pytest.raises(FormatError, match="schema 1"):
        Run(copy)
    with pytest.raises(FormatError, match="is no run"):
        Run(tmp_path)


def test_readers_stop_when_the_sweep_does(images):
    items = [Item(str(i), images / f"{i}.png") for i in range(3)] * 20
    found = reading.read_ahead(items, reading.portions([(0, range(60))], 2), None, 2)
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmneurons-read")]


def test_the_same_from_the_command_line(images, tmp_path, monkeypatch, capsys):
    command = ("sweep", images, "--out", tmp_path / "run", "--limit", 5, "--top", 7, "--max-new-tokens", 12)
    code, out, err = call(capsys, monkeypatch, *command, "--device", "cpu")
    assert not code
    assert f"{tmp_path / 'run'}: 4 images, " in out
    assert "1 of 5 images could not be used:" in err
    assert "cannot be read as an image" in err


def documented(heading: str) -> dict[str, str]:
    """Columns and types that the page of formats lists under a heading; "or null" is left out."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return {name: kind.removesuffix(" or null") for name, kind in re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.M)}


def test_tables_have_the_columns_and_types_of_the_format(whole):
    def kinds(table) -> dict[str, str]:
        texts = {field.name: str(field.type).replace("element: ", "") for field in table.schema}
        return {name: text.replace("bool", "boolean") for name, text in texts.items()}

    assert kinds(whole.images()) == documented("Images of a run")
    assert kinds(whole.words()) == documented("Words of a run")
    narrow = {"int64": "int32", "double": "float"}
    rows = {name: narrow.get(kind, kind) for name, kind in documented("As a flat table").items()}
    for name in ("neuron", "tokens", "suppressed"):
        del rows[name]
    assert list(kinds(whole.neurons())) == ["position", *rows]
    assert kinds(whole.neurons()) == {"position": "int64", **rows}
