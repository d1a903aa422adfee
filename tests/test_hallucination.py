"""Objects that are not there: CHAIR and POPE by hand, and the patch that makes the model decline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import call

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing.hallucination import LEAD, DehallucinateSettings, Study, dehallucinate, judge
from mmneurons.errors import SettingError, WordError
from mmneurons.inspection.hallucination import Vocabulary, chair, pope
from mmneurons.pocket.scenes import Scene


@pytest.fixture(scope="module")
def vlm() -> mmn.VLM:
    return mmn.load(device="cpu")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """In a style that the model has not seen: it names what is not there."""
    return [pocket.scene(663_000_000 + i, split="style") for i in range(48)]


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a dog and a hot dog", ("dog", "hot dog")),
        ("two dogs, a dog on the grass", ("dog",)),
        ("Hot dogs", ("hot dog",)),
        ("a doghouse", ()),
        ("", ()),
    ],
)
def test_what_a_caption_names(caption, named):
    assert Vocabulary([["dog", "cats"], ["hot dog"]]).named(caption) == named


def test_chair_by_hand():
    captions = ["a dog and a cat", "a cat", "grass"]
    found = chair(captions, [["dog"], ["cats", "bus"], ["dog"]], Vocabulary([["dog", "cat", "bus"]]))
    assert found.chair_i is not None
    assert found.chair_s is not None
    assert found.recall is not None
    assert found.named is not None
    assert (found.n_absent, found.n_found) == (1, 2)
    assert found.chair_i.mean == pytest.approx(1 / 3)  # the cat of the first
    assert found.chair_s.mean == pytest.approx(1 / 3)
    assert found.recall.mean == pytest.approx(2 / 4)  # dog, cat of dog, cat, bus, dog
    assert found.named.mean == pytest.approx(1)


def test_captions_that_name_nothing_have_no_chair():
    found = chair(["grass"], [["dog"]], Vocabulary([["dog"]]))
    assert found.chair_i is None
    assert found.recall is not None
    assert found.recall.mean == 0


def test_pope_by_hand(vlm, monkeypatch):
    answers = {"a?": ["yes", "Yes, there is", "no"], "b?": ["nothing"]}
    monkeypatch.setattr(vlm, "caption", lambda images, question, *_, **__: answers[question][: len(images)])
    found = pope(vlm, [None] * 4, ["a?", "b?", "a?", "a?"], [True, True, False, False])  # pyright: ignore[reportArgumentType]
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.precision == pytest.approx(1 / 2)
    assert found.recall == pytest.approx(1 / 2)
    assert found.f1 == pytest.approx(1 / 2)
    assert found.yes == pytest.approx(2 / 4)
    assert found.n == 4


def study(inputs: torch.Tensor, gap: torch.Tensor, absent: torch.Tensor, ridge: float = 1e-6) -> Study:
    """Of made-up steps, all of them nouns of these images, answer after answer."""
    n, nothing = len(gap), torch.empty(0)
    return Study(nothing, None, {}, inputs, gap, absent, torch.ones(n), torch.arange(n) % 5, n, ridge)  # pyright: ignore[reportArgumentType]


def test_the_regression_lifts_the_word_over_absent_objects_alone():
    absent = torch.tensor([True, False] * 10)
    gap = torch.linspace(3, 8, 20)
    inputs = torch.stack([absent.float(), torch.ones(20)], 1)
    found = study(inputs, gap, absent)
    lift = inputs @ found.solve(found.every)
    assert bool((lift > gap)[absent].all())
    assert not bool((lift > gap)[~absent].any())
    # Steps far on their side do not pull: the lift of present ones stays at what the nearest needs, or below.
    assert float(lift[~absent].max()) <= float(gap[~absent].min()) - LEAD + 1
    assert found.strength(keep=1.0) is not None


def test_where_no_column_tells_them_apart_no_strength_is_good_enough():
    absent = torch.tensor([True, False] * 10)
    found = study(torch.ones(20, 1), torch.full((20,), 5.0), absent)
    assert found.strength(keep=1.0) is None


@pytest.mark.slow
def test_fewer_absent_objects_are_named_and_the_model_is_left_as_it_was(vlm, scenes):
    images, objects = [scene.image for scene in scenes], [scene.objects for scene in scenes]
    vocabulary = Vocabulary([pocket.nouns()])
    usual = vlm.caption(images, batch_size=16)
    before = chair(usual, objects, vocabulary)
    reference = mmn.make_reference(vlm, [scene.image for scene in pocket.edit_set("dog").held_out[:16]])
    settings = DehallucinateSettings(say="image", keep=0.9, top=200, batch_size=16)
    patch = dehallucinate(vlm, images, objects, vocabulary=vocabulary, reference=reference, settings=settings)
    assert vlm.caption(images, batch_size=16) == usual
    with patch.applied(vlm):
        after = chair(said := vlm.caption(images, batch_size=16), objects, vocabulary)
    assert after.n_absent < 0.8 * before.n_absent
    assert after.n_found >= 0.8 * before.n_found
    assert any("image" in text for text in said)
    assert {neuron.layer for neuron in patch.neurons} == {len(vlm.anatomy.blocks) - 1}
    search = patch.provenance["search"]
    assert before.chair_i is not None
    assert after.chair_i is not None
    assert search["before"]["chair_i"] == pytest.approx(before.chair_i.mean)
    assert search["after"]["chair_i"] == pytest.approx(after.chair_i.mean)
    judged = judge(vlm, patch, images, objects, vocabulary)
    assert judged.after == after
    assert judged.rival.n_absent + judged.rival.n_found == after.n_absent + after.n_found  # as many are deleted


@pytest.mark.parametrize(
    ("objects", "settings", "error", "says"),
    [
        ([["dog"]], {}, SettingError, "1 lists"),
        (None, {"say": "thing"}, WordError, "3 tokens, and one must do"),
        (None, {"keep": 0.0}, SettingError, "keep lies in"),
        ("said", {}, SettingError, "are present"),
        ("others", {}, SettingError, "none is named"),
    ],
)
def test_what_cannot_be_done_is_refused(vlm, scenes, objects, settings, error, says):
    images = [scene.image for scene in scenes[:3]]
    if objects == "said":
        everything = pocket.nouns()
        objects = [Vocabulary([everything]).named(text) for text in vlm.caption(images)]
    elif objects == "others":
        objects = [["zebra"]] * 3
    elif objects is None:
        objects = [scene.objects for scene in scenes[:3]]
    with pytest.raises(error, match=says):
        dehallucinate(vlm, images, objects, settings=DehallucinateSettings(**{"say": "image"} | settings))


@pytest.mark.slow
def test_from_a_manifest_to_a_patch_and_its_figures(capsys, monkeypatch, tmp_path: Path, scenes):
    monkeypatch.chdir(tmp_path)
    entries = []
    for i, scene in enumerate(scenes):
        scene.image.save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "objects": list(scene.objects)})
    Path("list.json").write_text(json.dumps(entries))
    code, out, err = call(
        capsys, monkeypatch, "dehallucinate", "--images", "list.json", "--keep", 0.8, "--top", 200,
        "--reference", "0.png", "--out", "p.safetensors", "--json", "figures.json",
    )  # fmt: skip
    assert code == 0, err
    assert "on 24 images that the patch was not made with" in out
    assert mmn.load_patch("p.safetensors").provenance["settings"]["say"] == "image"
    figures = json.loads(Path("figures.json").read_text())
    assert figures["n_images"] == 24
    assert set(figures) == {"before", "after", "rival", "n_images"}
    code, out, err = call(capsys, monkeypatch, "patch", "show", "p.safetensors", "--top", 2)
    assert code == 0, err
    assert "image" in out

    code, out, err = call(
        capsys, monkeypatch, "dehallucinate", "--images", "list.json", "--keep", 0.8, "--top", 200,
        "--reference", "0.png", "--out", "again.safetensors", "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out) == figures  # nothing else is on stdout

    code, out, err = call(capsys, monkeypatch, "dehallucinate", "--images", "0.png")
    assert code == 2
    assert "Nobody says what is truly in 0.png." in err
