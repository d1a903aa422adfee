import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.bounds import bounded
from PIL import Image

from mmneurons.data.content import image_hash, key_of, truth_hash
from mmneurons.data.dataset import Item
from mmneurons.data.store import Store, one_writer
from mmneurons.errors import FormatError, MmneuronsError, ModelError, SettingError


@dataclass(frozen=True)
class Found:
    word: str
    shares: dict[int, float]
    rho: float | None = None


RESULT = [Found("dog", {10: 0.25}), Found("cat", {}, 0.1)]
MADE_BY = {"model": "abc", "score": "logit"}


@pytest.fixture
def path(tmp_path):
    return kept_in(tmp_path / "sensitivity.jsonl")


def kept_in(path: Path) -> Path:
    store = Store(path, MADE_BY, list[Found])
    store.add("a", "a.png", RESULT)
    store.add("b", "ü\u2028.png", [])
    return path


def test_what_was_found_is_read_again(path):
    assert Store(path, MADE_BY, list[Found]).found == {"a": RESULT, "b": []}


@pytest.mark.parametrize("lost", [1, 5, 12])
def test_a_line_cut_off_is_done_again(path, lost):
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    store = Store(path, MADE_BY, list[Found])
    assert list(store.found) == ["a"]
    store.add("b", "ü\u2028.png", [])
    assert path.read_bytes() == whole


def test_a_first_line_cut_off_is_written_to_its_end(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:9])
    kept_in(path)
    assert path.read_bytes() == whole


def test_another_experiment_is_refused_and_said_how(path):
    with pytest.raises(SettingError, match="score: 'logit' there, 'paper' asked for"):
        Store(path, MADE_BY | {"score": "paper"}, list[Found])


@pytest.mark.parametrize(
    "content", ["hello", "hello\n", '{"made_by": 3}\n', '[1,{"made_by":3}]\n', "[" * 100_000 + "\n"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(FormatError, match="no results of an experiment"):
        Store(tmp_path / "x.jsonl", MADE_BY, list[Found])
    assert (tmp_path / "x.jsonl").read_text() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(FormatError, match="device or a pipe"):
        Store(tmp_path / "x.jsonl", MADE_BY, list[Found])


@given(st.data())
@settings(max_examples=50)
def test_whatever_was_changed_nothing_else_is_read(tmp_path_factory, data):
    """Any bytes give what was written, or less of it, or our error."""
    path = kept_in(tmp_path_factory.mktemp("store") / "x.jsonl")
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 8)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:])
    with bounded():
        try:
            found = Store(path, MADE_BY, list[Found]).found
        except MmneuronsError:
            return
    assert all({"a": RESULT, "b": []}[key] == result for key, result in found.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_kept(path, value):
    before, store = path.read_bytes(), Store(path, MADE_BY, list[Found])
    for result in ([Found("dog", {10: value})], [Found("dog", {}, value)]):
        with pytest.raises(ModelError, match=r"c\.png is no number"):
            store.add("c", "c.png", result)
    assert path.read_bytes() == before


def test_a_name_that_is_no_utf_8_is_kept(path):
    Store(path, MADE_BY, list[Found]).add("c", "caf\udce9.png", [])
    assert list(Store(path, MADE_BY, list[Found]).found) == ["a", "b", "c"]


def test_one_run_at_a_time_writes_in_a_folder(tmp_path):
    lock, refused = tmp_path / "out" / ".lock", []

    def another() -> None:
        try:
            with one_writer(tmp_path / "out", lock):
                pass
        except SettingError as error:
            refused.append(error.what)

    with one_writer(tmp_path / "out", lock):
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
    assert refused == [f"Another run writes in {tmp_path / 'out'}."]
    another()
    assert len(refused) == 1


def test_a_killed_run_leaves_its_folder_free(tmp_path):
    program = f"""
from pathlib import Path
from mmneurons.data.store import one_writer
with one_writer(Path("out"), Path({str(tmp_path / ".lock")!r})):
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(SettingError, match="Another run writes in out"),
            one_writer(Path("out"), tmp_path / ".lock"),
        ):
            pass
        other.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        other.wait()
    with one_writer(Path("out"), tmp_path / ".lock"):
        pass


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="Cannot write"), one_writer(tmp_path / "file", tmp_path / "file" / ".lock"):
        pass


def test_every_pixel_and_every_word_of_the_truth_counts():
    pixels = np.zeros((4, 6, 3), np.uint8)
    image = Image.fromarray(pixels)
    mask = np.eye(4, 6, dtype=bool)
    assert image_hash(image) == image_hash(image.copy()) != image_hash(image.resize((4, 6)))
    pixels[3, 5, 2] = 1
    items = [Item("a", image), *(Item("a", image, ("dog",), (m,)) for m in (mask, ~mask)), Item("a", image, ("cat",))]
    hashes = {image_hash(image), image_hash(Image.fromarray(pixels)), *map(truth_hash, items)}
    assert len(hashes) == 6
    assert truth_hash(items[1]) == truth_hash(Item("b", Image.fromarray(pixels), ("dog",), (mask.copy(),)))
    assert key_of("ab", "c") != key_of("a", "bc")
