from dataclasses import dataclass

import pytest

from mmneurons.errors import SettingError
from mmneurons.inspection.shelf import Shelf


@dataclass(frozen=True)
class Found:
    word: str
    shares: dict[int, float]
    rho: float | None = None


RESULT = [Found("dog", {10: 0.25}), Found("cat", {}, 0.1)]
MADE_BY = {"model": "abc", "score": "logit"}


@pytest.fixture
def path(tmp_path):
    shelf = Shelf(tmp_path / "out" / "sensitivity.jsonl", MADE_BY, list[Found])
    shelf.add("a.png", RESULT)
    shelf.add("ü\u2028.png", [])
    return shelf.path


def test_what_was_found_is_read_again(path):
    assert Shelf(path, MADE_BY, list[Found]).found == {"a.png": RESULT, "ü\u2028.png": []}


@pytest.mark.parametrize("lost", [1, 5, 12])
def test_a_line_cut_off_is_done_again(path, lost):
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    shelf = Shelf(path, MADE_BY, list[Found])
    assert list(shelf.found) == ["a.png"]
    shelf.add("ü\u2028.png", [])
    assert path.read_bytes() == whole


def test_another_experiment_is_refused_and_said_how(path):
    with pytest.raises(SettingError, match="score: 'logit' there, 'paper' asked for"):
        Shelf(path, MADE_BY | {"score": "paper"}, list[Found])


@pytest.mark.parametrize("content", ["hello\n", '{"made_by": 3}\n'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(SettingError, match="another experiment"):
        Shelf(tmp_path / "x.jsonl", MADE_BY, list[Found])


def test_a_damaged_line_is_refused(path):
    text = path.read_text().replace('"shares"', '"hares"')
    path.write_text(text)
    with pytest.raises(SettingError, match="damaged"):
        Shelf(path, MADE_BY, list[Found])
