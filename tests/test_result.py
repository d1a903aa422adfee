import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.bounds import bounded
from rich.console import Console

import mmneurons as mmn
from mmneurons.errors import FormatError, MissingFileError, WordError
from mmneurons.finding import result
from mmneurons.finding.result import Finding, NeuronFinding, NounFinding, Parts
from mmneurons.neurons import Neuron
from mmneurons.report.page import render
from mmneurons.report.terminal import show

# What a model can give: any text, finite float32.
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
grids = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n).map(tuple), min_size=1, max_size=3).map(tuple)
)
neurons = st.builds(
    NeuronFinding,
    st.builds(Neuron, st.integers(0, 99), st.integers(0, 9999), st.none() | st.integers(0, 9)),
    numbers,
    numbers,
    st.lists(text, max_size=3).map(tuple),
    st.lists(text, max_size=3).map(tuple),
    st.lists(grids, max_size=2).map(tuple),
    st.none() | numbers,
    st.none() | numbers,
)
nouns = st.builds(
    NounFinding,
    word=text,
    lemma=text,
    start=st.integers(0, 50),
    token=text,
    token_id=st.integers(0, 10**6),
    step=st.integers(0, 50),
    n_tokens=st.integers(1, 5),
    probability=numbers,
    logit=numbers,
    parts=st.builds(Parts, *[numbers] * 6),
    neurons=st.lists(neurons, max_size=2).map(tuple),
    layers=st.dictionaries(st.sampled_from([10, 100]), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
    regions=st.dictionaries(st.sampled_from([1, 10]), st.lists(grids, max_size=2).map(tuple)),
)
findings = st.builds(
    Finding,
    images=st.lists(text, max_size=3).map(tuple),
    prompt=text,
    answer_prefix=text,
    caption=text,
    token_ids=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    score=st.sampled_from(["logit", "logprob", "paper"]),
    against=st.none() | text,
    nouns=st.lists(nouns, max_size=2).map(tuple),
    notes=st.lists(text, max_size=2).map(tuple),
    says=st.sampled_from(["standardised", "raw"]),
    baseline=st.sampled_from(["zero", "blank", "reference"]),
)


def assert_close(one, other):
    """Equal, numbers to seven digits."""
    if isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-6)
    elif dataclasses.is_dataclass(one):
        for f in dataclasses.fields(one):
            assert_close(getattr(one, f.name), getattr(other, f.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    else:
        assert one == other


@given(st.lists(findings, max_size=2))
def test_json_reads_back(written):
    text = result.to_json(written)
    read = result.from_json(text)
    assert_close(written, read)
    assert result.to_json(read) == text


def test_two_pictures_in_one_prompt_and_words_alone_read_back(vlm, sample_paths):
    [pair] = mmn.find(vlm, [sample_paths[:2]], maps=True)
    assert pair.images == tuple(sample_paths[:2])
    assert len(pair.views) == 2
    for noun in pair.nouns:
        assert {len(neuron.maps) for neuron in noun.neurons} == {len(noun.regions[10])} == {2}
        assert noun.regions[1] == noun.neurons[0].maps
    words = mmn.find(vlm, None, prompt="Describe the image in few words.")
    assert words.images == words.views == ()
    assert words.nouns
    for finding in (pair, words):
        text = result.to_json(finding)
        [read] = result.from_json(text)
        assert_close(dataclasses.replace(finding, views=()), read)
        assert result.to_json(read) == text
        written = json.loads(text)["findings"][0]
        assert written["images"] == list(finding.images)
        assert ("maps" in written["nouns"][0]["neurons"][0]) == bool(finding.images)


def test_the_same_run_gives_the_same_bytes(vlm, sample_paths):
    runs = [result.to_json(mmn.find(vlm, sample_paths[:3], maps=True, blank=True)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_form_that_the_issue_fixes(vlm, sample_paths):
    document = json.loads(result.to_json(mmn.find(vlm, sample_paths[:1])))
    assert document["schema"] == 4
    assert document["provenance"]["model"]["id"] == "pocket"
    found = document["findings"][0]
    assert {"images", "prompt", "answer_prefix", "caption", "token_ids", "choices", "nouns"} <= found.keys()
    assert found["choices"] == {"score": "logit", "against": None, "says": "standardised", "baseline": "zero"}
    noun = found["nouns"][0]
    assert {"word", "lemma", "token", "token_id", "step", "probability", "neurons"} <= noun.keys()
    assert found["token_ids"][noun["step"]] == noun["token_id"]
    assert {"layer", "index", "score", "activation", "tokens"} <= noun["neurons"][0].keys()
    assert "expert" not in noun["neurons"][0]


def test_provenance_says_what_made_it(vlm, sample_paths):
    made_by = mmn.find(vlm, sample_paths[0], score="logprob", top=3).provenance
    assert made_by["model"].keys() == {"id", "revision", "class", "weights_hash", "dtype", "device", "w_out_class"}
    assert made_by["packages"].keys() >= {"mmneurons", "torch", "transformers"}
    assert (made_by["settings"]["score"], made_by["settings"]["top"]) == ("logprob", 3)


def test_a_noun_that_is_not_there_is_refused_with_those_that_are(vlm, sample_paths):
    finding = mmn.find(vlm, sample_paths[0])
    with pytest.raises(WordError, match=f"It has: {finding.nouns[0].word}, "):
        finding.noun("zebra")
    with pytest.raises(WordError, match="It has: no nouns"):
        dataclasses.replace(finding, nouns=()).noun("zebra")


def test_what_a_notebook_shows_is_one_short_line(vlm, sample_paths):
    finding = mmn.find(vlm, sample_paths[0], maps=True)
    long = dataclasses.replace(finding, caption="a dog\nand " * 500, nouns=finding.nouns * 100, images=("x" * 999,) * 9)
    noun = finding.nouns[0]
    card, word = mmn.explain_neuron(vlm, "L1.u2"), mmn.neurons_for(vlm, "dog")
    for one in (vlm, finding, long, noun, noun.neurons[0], card, word):
        assert len(repr(one)) < 250, repr(one)
        assert "\n" not in repr(one)
    assert noun.word in repr(finding)
    assert finding.caption in repr(finding)
    assert str(noun.neurons[0].neuron) in repr(noun)
    assert "L1.u2" in repr(card)


def test_saved_whole_or_not_at_all(tmp_path, vlm, sample_paths, monkeypatch):
    path = tmp_path / "finding.json"
    path.write_text("before")
    found = mmn.find(vlm, sample_paths[0])
    broken = dataclasses.replace(found, caption=float("nan"))  # JSON has no such number
    with pytest.raises(ValueError, match="JSON"):
        result.save([broken], path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    result.save([found], path)
    assert result.load(path)[0].caption == found.caption


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 3}', '{"schema": 4, "provenance": {}, "findings": [{}]}', "3"]
)
def test_a_damaged_file_is_refused(text):
    with pytest.raises(FormatError):
        result.from_json(text)


DEEP = json.loads("[" * 400 + "]" * 400)
anything = st.none() | st.booleans() | st.integers() | st.floats() | text | st.just({}) | st.just([]) | st.just([[]])


def places(value, path=()):
    """The path to everything in a document."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


@settings(max_examples=40)
@given(st.lists(findings, min_size=1, max_size=1), st.data())
def test_whatever_is_in_a_file_it_is_refused_or_can_be_shown(written, data):
    document = json.loads(result.to_json(written))
    *way, last = data.draw(st.sampled_from([path for path in places(document) if path]))
    holder = document
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(anything | st.just(10**400) | st.just(DEEP))
    with bounded():
        try:
            read = result.from_json(json.dumps(document))
        except FormatError:
            return
        assert_close(result.from_json(result.to_json(read)), read)  # numbers of more than seven digits are rounded
        assert render(read).startswith("<!DOCTYPE html>")
        for finding in read:
            show(finding, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "change",
    [
        {"caption": 5},
        {"caption": "\ud800"},
        {"token_ids": [-3]},
        {"choices": {"score": "NaN", "against": None}},
        {"nouns": [{}]},
        {"notes": "a note"},
        {"more": 1},
    ],
)
def test_what_has_another_type_is_refused(vlm, sample_paths, change):
    document = json.loads(result.to_json(mmn.find(vlm, sample_paths[0])))
    document["findings"][0] |= change
    with pytest.raises(FormatError, match="damaged"):
        result.from_json(json.dumps(document))


def test_what_json_allows_and_findings_do_not_is_refused():
    for told in ('"score": NaN', '"layer": -3', '"index": 1.5'):
        with pytest.raises(FormatError):
            result.from_json('{"schema": 4, "provenance": {}, "findings": [{' + told + "}]}")
    for facts in ("[" * 10**5 + "]" * 10**5, "9" * 400, "[" * 300 + "]" * 300):
        with pytest.raises(FormatError):
            result.from_json('{"schema": 4, "findings": [], "provenance": {"a": ' + facts + "}}")


def test_a_missing_file_of_findings_is_told(tmp_path):
    (tmp_path / "found.json").write_text("{}")
    (tmp_path / "found.png").write_bytes(b"")
    with pytest.raises(
        MissingFileError, match=r"(?s)There is no file .*fuond\.json.*like it.*'found\.json'.*Give .*found\.json"
    ):
        result.load(tmp_path / "fuond.json")
    with pytest.raises(MissingFileError, match=r"(?s)There is no file .*There is no folder .*nowhere' either"):
        result.load(tmp_path / "nowhere" / "found.json")


def test_findings_of_different_runs_make_no_file(vlm, sample_paths):
    one, other = mmn.find(vlm, sample_paths[0]), mmn.find(vlm, sample_paths[0], top=3)
    with pytest.raises(FormatError, match="different runs"):
        result.to_json([one, other])


def test_a_file_is_read_without_torch(tmp_path, vlm, sample_paths):
    path = tmp_path / "finding.json"
    result.save([mmn.find(vlm, sample_paths[0])], path)
    code = (
        f"import sys, mmneurons; mmneurons.load_findings({str(path)!r})[0].caption; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
