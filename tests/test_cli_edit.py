"""`edit`, `evaluate-edit`, `patch show`, `export`: from images in files to a checkpoint that says the other word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kits.commands import call
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.cli.sources import lines_of, tell_default_reference
from mmneurons.editing.evaluate_edits import cases
from mmneurons.errors import SettingError
from mmneurons.patches.patch import Patch
from mmneurons.words import says


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of dogs, a folder of others, texts."""
    for i, scene in enumerate(pocket.edit_set("dog").edit[:3]):
        scene.image.save(tmp_path / f"dog{i}.png")
    (tmp_path / "others").mkdir()
    for i in range(10):
        pocket.scene(662_000_000 + i).image.save(tmp_path / "others" / f"{i}.png")
    (tmp_path / "texts.txt").write_text("A dog can bark.\n\nA car has wheels.\n", encoding="utf-8")
    return tmp_path


def test_from_images_to_an_edited_checkpoint(capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    code, out, err = call(
        capsys, monkeypatch, "edit", "--images", "dog0.png", "dog1.png", "dog2.png", "--from", "dog", "--to", "cat",
        "--reference", "others", "--texts", "texts.txt", "--out", "p.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "dog -> cat: 1000 columns, strength" in out
    assert "turned 100% of the answers that said dog" in out
    patch = mmn.Patch.load("p.safetensors")
    assert patch.provenance["images"] == 3
    assert patch.provenance["reference"]["images"] == 10
    assert patch.provenance["reference"]["texts"] == 2

    Image.new("RGB", (1, 60_000)).save("others/line.png")  # which the model's processor refuses
    code, out, err = call(
        capsys, monkeypatch, "evaluate-edit", "p.safetensors", "--images", "dog0.png", "--held-out", "dog1.png",
        "--unrelated", "others", "--texts", "texts.txt", "--limit", 2, "--out", "judged",
    )  # fmt: skip
    assert code == 0, err
    assert "1 of 11 images could not be used" in err
    assert "line.png: A picture of 1 x 60000 pixels is too long and thin" in " ".join(err.split())
    assert "efficacy                           not measured" in out
    assert "of 2" in next(line for line in out.splitlines() if line.strip().startswith("locality"))
    assert json.loads(Path("judged/edits.json").read_text())["edits"]["p.safetensors"]["source"] == "dog"
    assert "dog → cat" in Path("judged/edits.html").read_text(encoding="utf-8")

    code, out, err = call(capsys, monkeypatch, "patch", "show", "p.safetensors", "--top", 3)
    assert code == 0, err
    assert str(patch.neurons[0])[:2] in out
    assert "cat" in out
    for options, listed in ((), 10), (("--all",), 1000):
        code, out, err = call(capsys, monkeypatch, "patch", "show", "p.safetensors", "--no-words", *options)
        assert code == 0, err
        assert sum(line.startswith("L") for line in out.splitlines()) == listed
        assert ("and 990 more" in out) == (listed == 10)

    code, out, err = call(capsys, monkeypatch, "find", "dog2.png", "--patch", "p.safetensors", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert says(found["findings"][0]["caption"], "cat")
    assert found["provenance"]["model"]["patches"] == [patch.hash]
    code, _, err = call(capsys, monkeypatch, "find", "dog2.png", "--patch", "p.safetensors", "--json", "p.safetensors")
    assert (code, mmn.Patch.load("p.safetensors").hash) == (2, patch.hash), err
    code, out, err = call(capsys, monkeypatch, "caption", "dog2.png", "--patch", "gone.safetensors")
    assert (code, "gone.safetensors" in err) == (2, True)

    code, out, err = call(capsys, monkeypatch, "export", "p.safetensors", "--out", "edited")
    assert code == 0, err
    said = mmn.load("edited").caption("dog2.png")
    assert says(said, "cat")
    assert not says(said, "dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Say which word"),
        (("--from", "dog"), "Say which word"),
        (("--from", " ", "--to", "cat"), "Say which word"),
        (("--remove", " "), "Say which word"),
        (("--from", "dog", "--to", "cat", "--remove", "dog"), "Say which word"),
        (("--from", "dog", "--to", "Dogs"), "the same word"),
        (("--from", "dog", "--to", "cat", "--out", "p.bin"), "--out p.safetensors"),
        (("--from", "dog", "--to", "cat", "--out", "nowhere/p.safetensors"), "mkdir -p nowhere"),
        (("--from", "rocket", "--to", "cat", "--images", "dog0.png"), "says 'rocket' of none"),
        (("--from", "dog", "--to", "cat", "--images", "gone.png"), "gone.png"),
        (("--from", "dog", "--to", "cat", "--images", "dog0.png", "--evaluate", "x", "--held-out", "gone.png"), "gone"),
        (
            ("--from", "dog", "--to", "cat", "--images", "dog0.png", "--texts", "gone.txt"),
            "no file 'gone.txt'",
        ),
    ],
)
def test_what_cannot_be_done_is_told_and_leaves_nothing(capsys, monkeypatch, folder, arguments, message):
    monkeypatch.chdir(folder)
    given = arguments if "--reference" in arguments else (*arguments, "--reference", "others")
    code, _, err = call(capsys, monkeypatch, "edit", *given)
    assert code == 2
    assert message in err
    assert not list(folder.rglob("*.safetensors"))


def test_what_to_judge_on_is_read_before_a_model_is_loaded(capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    Patch(8, (), provenance={}).save("unnamed.safetensors")
    Path("texts.txt").write_bytes(b"\xef\xbb\xbfa dog\n")
    assert lines_of(Path("texts.txt")) == ["a dog"]
    monkeypatch.setattr("mmneurons.vlm.load.load", lambda *_, **__: pytest.fail("loaded"))
    made_for = {"source": "dog", "settings": {"prompts": ["What?"], "answer_prefix": "", "max_new_tokens": 9}}
    Patch(8, (), provenance=made_for).save("dog.safetensors")
    for arguments, message in (
        (("unnamed.safetensors",), "does not say which word"),
        (("dog.safetensors", "--held-out", "gone.png"), "gone.png"),
        (("dog.safetensors", "--unrelated", "gone.png"), "gone.png"),
        (("dog.safetensors", "--texts", "/dev/zero"), "device"),
    ):
        code, _, err = call(capsys, monkeypatch, "evaluate-edit", *arguments, "--out", "made")
        assert (code, message in err) == (2, True), err


@pytest.mark.parametrize("command", [("patch", "show"), ("export",), ("evaluate-edit",)])
def test_a_file_that_is_no_patch_is_refused(capsys, monkeypatch, folder, command):
    monkeypatch.chdir(folder)
    extra = () if command[0] == "patch" else ("--out", "made")
    code, _, err = call(capsys, monkeypatch, *command, "dog0.png", *extra)
    assert code == 2
    assert "dog0.png is no patch" in err
    assert not Path("made").exists()


def test_the_pocket_sets_of_a_plural_are_those_of_its_noun(capsys, monkeypatch, tmp_path):
    asked: list[str] = []

    def none(vlm: object, given: object, name: str, option: str | None) -> list[object]:
        asked.append(name)
        raise SettingError("No more is needed.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmneurons.cli.edit.or_pocket", none)
    assert call(capsys, monkeypatch, "edit", "--from", "dogs", "--to", "cat")[0] == 2
    assert asked == ["edit/dog"]


@pytest.mark.slow
def test_a_patch_of_another_method_is_written_and_judged_like_any_other(capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    words = ("--method", "rome", "--from", "dog", "--to", "cat", "--images", "dog0.png", "--reference", "others")
    code, out, err = call(capsys, monkeypatch, "edit", *words, "--out", "rome.safetensors")
    assert code == 0, err
    assert "dog -> cat: 1024 columns" in out
    patch = Patch.load("rome.safetensors")
    assert patch.provenance["settings"]["method"] == "rome"
    assert cases({"rome": patch})["rome"].target == "cat"
    code, _, err = call(capsys, monkeypatch, "edit", "--method", "lora", "--from", "dog", "--to", "cat")
    assert code == 2
    assert "'lora' is not one of" in err


def test_an_edit_that_holds_no_images_says_that_other_answers_will_change(capsys, vlm, random_vlm):
    tell_default_reference(vlm)
    assert "--reference" not in capsys.readouterr().err
    tell_default_reference(random_vlm)
    assert "--reference FOLDER" in " ".join(capsys.readouterr().err.split())
