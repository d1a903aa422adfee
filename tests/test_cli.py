import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import pytest
from kits.commands import call, run
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.cli import options
from mmneurons.settings import ANSWER_PREFIX


@pytest.fixture
def sample():
    return pocket.samples()[0].path


def test_help_names_the_prefix_of_the_default_prompt(capsys, monkeypatch):
    _, out, _ = call(capsys, monkeypatch, "find", "--help")
    assert f"Default: '{ANSWER_PREFIX}' with the default prompt" in " ".join(out.split())


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    assert call(capsys, monkeypatch, "--version") == (0, f"{mmn.__version__}\n", "")
    assert mmn.__version__ == metadata.version("mmneurons")


def test_find_writes_all_that_was_asked_for(tmp_path, sample):
    done = run("find", sample, "--json", "f.json", "--report", "r.html", "--top", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "f.json").read_text())
    found = document["findings"][0]
    assert found["caption"] in done.stdout
    for noun in found["nouns"]:
        for neuron in noun["neurons"]:
            assert f"L{neuron['layer']}.u{neuron['index']}" in done.stdout
            assert [len(rows) for rows in neuron["maps"]] == [8]
            assert "lost_without_image" in neuron
    assert found["caption"].split()[1] in (tmp_path / "r.html").read_text()
    assert "Traceback" not in done.stderr


def test_json_on_stdout_is_nothing_but_json(capsys, monkeypatch, sample):
    code, out, _ = call(capsys, monkeypatch, "find", sample, "--json", "-")
    assert code == 0
    assert json.loads(out)["findings"][0]["images"] == [str(sample)]


def test_an_answer_that_is_given_is_scored(capsys, monkeypatch, sample):
    code, out, _ = call(capsys, monkeypatch, "find", sample, "--caption", "a banana", "--json", "-", "--no-maps")
    assert code == 0
    assert json.loads(out)["findings"][0]["caption"] == "a banana"
    code, _, err = call(capsys, monkeypatch, "find", sample, "--caption", "a dog", "--caption", "a cat")
    assert code == 2
    assert "1 prompts, 2 answers" in err


def test_a_processor_that_lies_apart(capsys, monkeypatch, tmp_path, sample):
    model, processor = tmp_path / "model", tmp_path / "processor"
    for folder in (model, processor):
        shutil.copytree(pocket.folder(), folder)
    (processor / "config.json").unlink()
    (model / "tokenizer.json").unlink()
    usual = call(capsys, monkeypatch, "caption", sample)[1]
    code, _, err = call(capsys, monkeypatch, "caption", sample, "--model", model, "--dtype", "float32")
    assert (code, "Cannot load the processor" in err) == (2, True)
    code, out, err = call(
        capsys, monkeypatch, "caption", sample, "--model", model, "--dtype", "float32", "--processor", processor
    )
    assert (code, out) == (0, usual), err


def test_without_an_image_a_sample_is_used_and_said(capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "caption")
    assert code == 0
    assert "sample" in err
    assert "An image of" in out


def test_samples_are_listed_with_their_truth(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "samples")
    assert code == 0
    own = [line for line in out.splitlines() if not line.startswith("photo:")]  # where scikit-image is installed
    assert len(own) == len(pocket.samples()) >= 24
    assert all(sample.caption in out for sample in pocket.samples())


def test_doctor_passes_and_its_json_says_so(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "doctor", "--json", "-")
    report = json.loads(out)
    assert code == 0
    assert report["passed"]
    assert all(check["passed"] for check in report["checks"])
    code, out, _ = call(capsys, monkeypatch, "doctor")
    assert out.count("PASS") == len(report["checks"])


def test_doctor_fails_with_code_1(capsys, monkeypatch):
    monkeypatch.setattr("mmneurons.vlm.doctor.tolerance", lambda vlm: 0.0)
    code, out, _ = call(capsys, monkeypatch, "doctor")
    assert code == 1
    assert "FAIL" in out


def test_a_photograph_is_answered_with_a_warning(capsys, monkeypatch, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(tmp_path / "p.jpg")
    for command in ("caption", "find"):
        code, out, err = call(capsys, monkeypatch, command, tmp_path / "p.jpg")
        assert code == 0
        assert "knows only its own" in out + err


def bad_files(folder):
    good = folder / "good.png"
    Image.new("RGB", (60, 40), "red").save(good)
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    (folder / "folder").mkdir()
    return ["missing.png", "text.png", "empty.png", "cut.png", "folder"]


def test_what_is_no_image_is_told_before_a_model_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("mmneurons.vlm.load.load", lambda *_, **__: pytest.fail("loaded"))
    for name in bad_files(tmp_path):
        for command in ("find", "caption", "doctor"):
            code, _, err = call(capsys, monkeypatch, command, tmp_path / name)
            assert code == 2, name
            assert name in err
            assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--word", "submarine"], "submarine"),
        (["--score", "best"], "logprob"),
        (["--model", "/no/such/folder"], "Cannot load"),
        (["--dtype", "int4"], "int4"),
        (["--json", "/no/such/folder/f.json"], "mkdir -p"),
        (["--report", "/no/such/folder/r.html"], "mkdir -p"),
        (["--json", "."], "It is a folder"),
        (["--decoder", "nothing"], "nothing"),
        (["--against", "\udcff"], "no token of its own"),
    ],
)
def test_a_users_mistake_ends_with_code_2_and_one_message(capsys, monkeypatch, sample, arguments, message):
    code, out, err = call(capsys, monkeypatch, "find", sample, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_help_is_quick_because_it_needs_no_torch():
    code = "import sys, mmneurons.cli; assert not {'torch', 'transformers', 'jinja2', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run("--help").returncode == 0


AT_WORK = """
import signal, sys
from mmneurons import cli
from mmneurons.vlm.vlm import VLM

# Who runs the tests in the background has Ctrl-C ignored, in all that they start: so here, but where it is sent.
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv.pop(1) == "ignored" else signal.default_int_handler)
usual = VLM.generate


def generate(*given, **options):
    print("at work", flush=True)
    return usual(*given, **options)


VLM.generate = generate
cli.main()
"""
"""The command line; it says when the model is first asked: before, what is imported may swallow a signal."""


@pytest.mark.parametrize(
    ("number", "code", "command", "said"),
    [
        (signal.SIGINT, 130, ["find", *["SAMPLE"] * 1000, "--report", "r.html"], "stopped"),
        (signal.SIGTERM, 143, ["find", *["SAMPLE"] * 1000, "--report", "r.html"], "stopped"),
        (signal.SIGINT, 130, ["inspect", "finders", "--images", "pocket:find-500", "--out", "kept"], options.GOES_ON),
    ],
    ids=["ctrl-c", "terminated", "a command that goes on"],
)
def test_a_stop_ends_without_a_traceback(tmp_path, sample, number, code, command, said):
    filled = [str(sample) if word == "SAMPLE" else word for word in command]
    ctrl_c = "heard" if number == signal.SIGINT else "ignored"
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", AT_WORK, ctrl_c, *filled], **pipes, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=400)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.strip().endswith(said)
    assert not (tmp_path / "r.html").exists()


def test_an_output_is_no_input(capsys, monkeypatch, tmp_path, sample):
    monkeypatch.setattr("mmneurons.vlm.load.load", lambda *_, **__: pytest.fail("loaded"))
    picture = tmp_path / "a.png"
    picture.write_bytes(sample.read_bytes())
    other = tmp_path / "other.jpg"  # as a shell makes it of `--report *.jpg`
    other.write_bytes(b"a photograph")
    named = tmp_path / "named.json"
    named.write_bytes(sample.read_bytes())
    for option, name, said in (
        ("--json", named, "would be overwritten"),
        ("--json", picture, "ends in .json"),
        ("--report", other, "ends in .html"),
        ("--report", tmp_path / "page", "ends in .html"),
        ("--json", sample, "ends in .json"),
    ):
        code, _, err = call(capsys, monkeypatch, "find", picture, named, option, name)
        assert code == 2
        assert said in err
    assert other.read_bytes() == b"a photograph"
    assert named.read_bytes() == sample.read_bytes()
    code, _, err = call(capsys, monkeypatch, "inspect", "--images", tmp_path, "--out", tmp_path)
    assert (code, "holds the images" in err) == (2, True)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, "inspect", "--images", "nothing", "--out", ".")
    assert (code, "holds the images" in err) == (2, False)
    weights = pocket.folder() / "model.safetensors"
    code, _, err = call(capsys, monkeypatch, "edit", "--from", "dog", "--to", "cat", "--out", weights)
    assert (code, "is no patch" in err) == (2, True)
    assert picture.read_bytes() == sample.read_bytes()


def test_a_terminal_of_another_encoding_and_a_closed_one_cost_no_file(capsys, monkeypatch, tmp_path, sample):
    name = os.fsdecode("caf\u00e9 \u72d7 ".encode() + b"\xe9.png")
    (tmp_path / name).write_bytes(sample.read_bytes())
    monkeypatch.chdir(tmp_path)

    def printed(*arguments: str) -> bytes:
        with io.BytesIO() as written, monkeypatch.context() as terminal:
            terminal.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
            code, _, err = call(capsys, terminal, *arguments)
            assert code == 0, err
            sys.stdout.flush()
            return written.getvalue()

    document = json.loads(printed("find", name, "--json", "-").decode("utf-8"))
    assert document["findings"][0]["images"] == ["caf\u00e9 \u72d7 ?.png"]
    assert "caf\u00e9 ? ?.png" in printed("find", name, "--json", "f.json").decode("cp1252")
    command = [sys.executable, "-m", "mmneurons", "find", name, "--json", "g.json", "--report", "g.html"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=400)
    assert "Traceback" not in err
    captions = [json.loads((tmp_path / name).read_bytes())["findings"][0]["caption"] for name in ("f.json", "g.json")]
    assert captions[0] == captions[1]
    assert (tmp_path / "g.html").exists()


def test_what_a_terminal_would_obey_is_shown(capsys, monkeypatch, tmp_path, sample):
    (tmp_path / "a\x1b]0;title\x07.png").write_bytes(sample.read_bytes())
    (tmp_path / "b\x1b[2J.png").write_bytes(b"none")
    monkeypatch.chdir(tmp_path)
    _, out, _ = call(capsys, monkeypatch, "caption", "a\x1b]0;title\x07.png")
    assert out.startswith("a\u241b]0;title\u2407.png: An image of")
    _, _, err = call(capsys, monkeypatch, "find", "b\x1b[2J.png")
    assert "\x1b" not in err


def test_what_was_found_is_shown_where_the_disk_is_full(capsys, monkeypatch, sample):
    code, out, err = call(capsys, monkeypatch, "find", sample, "--report", "/dev/full")
    assert code == 2
    assert "An image of" in out
    assert "No space left" in err


def test_a_neuron_is_shown_and_its_json_says_the_same(vlm, capsys, monkeypatch):
    said = mmn.explain_neuron(vlm, "L0.u945", n_tokens=3).tokens
    code, out, _ = call(capsys, monkeypatch, "neuron", "L0.u945", "--tokens", 3, "--neighbours", 2)
    assert (code, all(word.strip() in out for word in said), len(re.findall(r"L\d.u\d+", out)) >= 3) == (0, True, True)
    code, out, _ = call(capsys, monkeypatch, "neuron", "L0.u945", "--json", "-")
    assert (code, json.loads(out)["neuron"], len(json.loads(out)["tokens"])) == (0, "L0.u945", 10)


def test_the_neurons_of_a_word_are_shown(capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "word", "dog", "--top", 2, "--json", "-")
    names = [entry["neuron"] for entry in json.loads(out)["neurons"]]
    assert (code, len(names)) == (0, 2)
    code, out, _ = call(capsys, monkeypatch, "word", "dog", "--top", 2)
    assert code == 0
    assert all(name in out for name in names)


def test_several_images_in_one_prompt_and_none(capsys, monkeypatch, sample):
    other = pocket.samples()[1].path
    code, out, _ = call(capsys, monkeypatch, "find", sample, other, "--together", "--json", "-", "--word", "a")
    (finding,) = json.loads(out)["findings"]
    assert (code, finding["images"]) == (0, [str(sample), str(other)])
    arguments = ("find", "--no-image", "--prompt", "What is this?", "--json", "-", "--max-new-tokens", 3)
    code, out, _ = call(capsys, monkeypatch, *arguments)
    (finding,) = json.loads(out)["findings"]
    assert (code, finding["images"], finding["answer_prefix"]) == (0, [], "")
