"""Grounded or not: internal confidence is what norm and head read at image tokens; calibrations hold for one model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_patch import a_patch
from typer.testing import CliRunner

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.cli import app
from mmneurons.errors import FormatError, SettingError
from mmneurons.finding.calibration import FEWEST, fit, threshold_for
from mmneurons.finding.result import from_json, to_json
from mmneurons.metrics.grounding import named_objects

IMAGE = pocket.scene(3, ["dog", "car"]).image


def test_internal_confidence_is_what_the_head_reads_at_image_tokens(vlm):
    """By hand on the raw model: hidden states of every block, final norm, head, softmax, the largest."""
    finding = mmn.find(vlm, IMAGE, grounded=True)
    inputs = vlm.encode([IMAGE], finding.prompt, finding.answer_prefix)
    kept = list[torch.Tensor]()
    layers = vlm.model.model.language_model.layers
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: kept.append(out if torch.is_tensor(out) else out[0]))
        for m in layers
    ]
    with torch.no_grad():
        vlm.model(**inputs)
    for hook in hooks:
        hook.remove()
    patches = inputs["input_ids"][0] == vlm.model.config.image_token_id
    side = int(patches.sum()) ** 0.5
    for noun in finding.nouns:
        with torch.no_grad():
            read = [vlm.model.lm_head(vlm.model.model.language_model.norm(x[0, patches])).softmax(-1) for x in kept]
        said = torch.stack(read)[..., noun.token_id]
        layer, patch = divmod(int(said.argmax()), said.shape[1])
        assert noun.grounded is not None
        assert noun.grounded.confidence == pytest.approx(float(said.max()), rel=1e-4)
        assert (noun.grounded.layer, noun.grounded.row, noun.grounded.column) == (layer, patch // side, patch % side)


def test_objects_that_are_there_are_seen_and_others_are_not(vlm):
    (checked,) = mmn.check(vlm, IMAGE, caption="a dog and a violin")
    assert checked.calibrated
    by_word = {noun.word: noun.grounded for noun in checked.nouns}
    assert by_word["dog"].seen
    assert by_word["violin"].seen is False
    assert [noun.word for noun in checked.unseen] == ["violin"]
    assert by_word["dog"].confidence > by_word["violin"].confidence
    assert {row["word"]: row["seen"] for row in checked.rows()} == {"dog": True, "violin": False}


@pytest.mark.parametrize(
    "caption",
    [
        "two dogs and some cars",
        "Dog near car",
        "DOG. CAR.",
        "a violin is not here, but far behind it some dog and a car",
    ],
)
def test_captions_of_others_are_judged_by_what_is_seen(vlm, caption):
    """Plurals, capitals, places where the model would never say the word: how likely it is there says nothing."""
    (checked,) = mmn.check(vlm, IMAGE, caption=caption)
    seen = {noun.lemma: noun.grounded.seen for noun in checked.nouns if noun.lemma in ("dog", "car", "violin")}
    assert seen == {lemma: lemma != "violin" for lemma in seen}
    assert len(seen) >= 2
    assert any("given this answer" in note for note in checked.notes)


def test_a_photograph_is_not_for_the_pocket_model(vlm):
    (checked,) = mmn.check(vlm, IMAGE.resize((300, 200)), caption="a dog")
    assert any("knows only its own" in note for note in checked.notes)


def test_a_calibration_is_not_for_a_patched_model(vlm):
    made = mmn.Calibration.load(pocket.folder() / "calibration.json")
    with a_patch(vlm, {4: [7]}).applied(vlm):
        (checked,) = mmn.check(vlm, IMAGE, caption="a dog")
        assert checked.nouns[0].grounded.seen is None
        with pytest.raises(SettingError, match=r"and no patches; this model has .* and [0-9a-f]{12} patches"):
            mmn.check(vlm, IMAGE, caption="a dog", calibration=made)
    assert mmn.check(vlm, IMAGE, caption="a dog", calibration=made)[0].calibrated


def test_rows_of_a_batch_are_checked_as_alone(vlm):
    other = pocket.scene(5, ["cat", "tree"]).image
    captions = ["a dog, a car and a violin", "cat"]
    together = mmn.check(vlm, [IMAGE, other], caption=captions)
    for checked, image, caption in zip(together, (IMAGE, other), captions, strict=True):
        (alone,) = mmn.check(vlm, image, caption=caption)
        assert [noun.word for noun in alone.nouns] == [noun.word for noun in checked.nouns]
        for one, two in zip(alone.nouns, checked.nouns, strict=True):
            assert two.grounded.confidence == pytest.approx(one.grounded.confidence, rel=1e-4)
            assert (two.grounded.layer, two.grounded.row, two.grounded.column) == (
                one.grounded.layer,
                one.grounded.row,
                one.grounded.column,
            )


def test_places_are_not_judged(vlm):
    finding = mmn.find(vlm, IMAGE, grounded=True)
    places = [noun for noun in finding.nouns if noun.lemma not in {*pocket.nouns()}]
    assert places
    assert all(noun.grounded is not None and noun.grounded.seen is None for noun in places)


def test_a_part_of_a_longer_word_is_not_judged(vlm):
    """A hot dog is no dog, which would be missed in the picture; alone, the dog is one."""
    shipped = mmn.Calibration.load(pocket.folder() / "calibration.json")
    longer = replace(shipped, words=(*shipped.words, "hot violin", "hot dog"))
    caption = "a hot violin, a violin, some Hot Dogs and dogs"
    for checked in mmn.check(vlm, [IMAGE, IMAGE], caption=["a car", caption], calibration=longer)[1:]:
        assert [(noun.word, noun.grounded.seen) for noun in checked.nouns if noun.lemma in ("dog", "violin")] == [
            ("violin", None),
            ("violin", False),
            ("Dogs", None),
            ("dogs", True),
        ]
    found = mmn.find(vlm, IMAGE, caption="a hot dog and a dog", grounded=True, calibration=longer)
    assert [noun.grounded.seen for noun in found.nouns if noun.grounded and noun.lemma == "dog"] == [None, True]


def test_check_says_of_the_models_own_caption_what_find_says(vlm):
    finding, (checked,) = mmn.find(vlm, IMAGE, grounded=True), mmn.check(vlm, IMAGE)
    assert [(n.word, n.grounded) for n in checked.nouns] == [(n.word, n.grounded) for n in finding.nouns]


def test_a_finding_keeps_it(vlm):
    finding = mmn.find(vlm, IMAGE, grounded=True)
    (again,) = from_json(to_json(finding))
    for one, other in zip(finding.nouns, again.nouns, strict=True):
        assert one.grounded is not None
        assert other.grounded is not None
        assert other.grounded.confidence == pytest.approx(one.grounded.confidence, rel=1e-6)
        assert other.grounded.seen == one.grounded.seen
    assert {row["internal_confidence"] for row in again.rows()} == {
        n.grounded.confidence for n in again.nouns if n.grounded
    }


def test_a_calibration_of_another_model_is_refused(vlm, random_vlm):
    made = mmn.Calibration.load(pocket.folder() / "calibration.json")
    with pytest.raises(SettingError, match="another model"):
        mmn.check(random_vlm, IMAGE, caption="a dog", calibration=made)
    with pytest.raises(SettingError, match="another model"):  # wherever it is given, before anything is asked
        mmn.find(random_vlm, IMAGE, caption="a dog", calibration=made)
    (raw,) = mmn.check(random_vlm, IMAGE, caption="a dog")
    assert not raw.calibrated
    assert raw.nouns[0].grounded.seen is None
    assert raw.nouns[0].grounded.confidence > 0


@pytest.mark.parametrize("verb", [mmn.find, mmn.check])
def test_the_name_of_a_file_is_no_calibration(vlm, verb):
    with pytest.raises(SettingError, match=r"calibration='made.json'(?s:.*)Calibration\.load"):
        verb(vlm, IMAGE, caption="a dog", calibration="made.json")


def test_a_calibration_is_read_as_it_was_written_and_damage_is_told(tmp_path):
    made = mmn.Calibration.load(pocket.folder() / "calibration.json")
    made.save(tmp_path / "one.json")
    assert mmn.Calibration.load(tmp_path / "one.json") == made
    replace(made, slope=float("1e300")).save(tmp_path / "steep.json")
    with pytest.raises(FormatError, match="slope"):
        mmn.Calibration.load(tmp_path / "steep.json")
    (tmp_path / "none.json").write_text('{"schema": 1}')
    with pytest.raises(FormatError):
        mmn.Calibration.load(tmp_path / "none.json")
    # What would turn every verdict round, or call all seen or all unseen.
    unsound = [("slope", -1.0), ("slope", 0.0), ("threshold", 7.0), ("threshold", -5.0), ("recall_lost", 2.0)]
    for field, value in unsound:
        replace(made, **{field: value}).save(tmp_path / "unsound.json")
        with pytest.raises(FormatError, match=field):
            mmn.Calibration.load(tmp_path / "unsound.json")
    later = json.loads((tmp_path / "one.json").read_text()) | {"schema": 2, "curve": "isotonic"}
    (tmp_path / "later.json").write_text(json.dumps(later))
    with pytest.raises(FormatError, match=r"reads calibrations of schema 1(?s:.*)says schema 2"):
        mmn.Calibration.load(tmp_path / "later.json")


def test_a_curve_finds_the_odds_that_made_the_labels():
    random = np.random.default_rng(0)
    x = random.normal(size=(20000, 2))
    y = random.random(20000) < 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1] + 0.5)))
    coefficients, intercept = fit(3 * x + 1, y)
    assert 3 * coefficients == pytest.approx([2, -1], abs=0.1)
    assert intercept + coefficients.sum() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(SettingError, match="are there"):
        fit(x, np.ones(20000, dtype=bool))


def test_a_threshold_costs_no_more_of_the_true_objects_than_asked():
    scores, present = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.05]), np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    assert threshold_for(scores, present, 0.0) == 0.1
    assert threshold_for(scores, present, 0.2) == 0.2
    assert threshold_for(scores, present, 0.39) == 0.2


def one_of_two(vlm, *, most_said: bool = True) -> tuple[str]:
    """Of the two objects that the model names in the picture, the one that image tokens say more, or less."""
    nouns = [n for n in mmn.check(vlm, IMAGE)[0].nouns if n.lemma in ("dog", "car")]
    assert len(nouns) == 2
    return ((max if most_said else min)(nouns, key=lambda n: n.grounded.confidence).lemma,)


def test_what_calibrate_makes_is_of_this_model_and_holds_to_the_recall_asked_for(vlm):
    items = [mmn.Item(str(i), IMAGE, objects=one_of_two(vlm)) for i in range(FEWEST)]
    vocabulary = mmn.Vocabulary([pocket.nouns()], {"car": ("automobile",)})
    made = mmn.calibrate(vlm, items, vocabulary, recall_lost=0.0)
    assert made.fits(vlm.facts)
    assert (made.made_by["objects named"], made.made_by["of them there"]) == (2 * FEWEST, FEWEST)
    assert made.recall_lost == 0
    assert made.slope > 0
    assert made.judges("automobile")
    assert not made.judges("sky")
    with pytest.raises(SettingError, match="is a share"):
        mmn.calibrate(vlm, items, vocabulary, recall_lost=1.0)


def test_no_calibration_is_made_of_too_little_or_of_what_tells_nothing(vlm):
    vocabulary = mmn.Vocabulary([pocket.nouns()])
    right, wrong = one_of_two(vlm), one_of_two(vlm, most_said=False)
    few = [mmn.Item(str(i), IMAGE, objects=right) for i in range(FEWEST - 1)]
    with pytest.raises(
        SettingError, match=f"needs {FEWEST} objects(?s:.*)Of {2 * FEWEST - 2} objects named, {FEWEST - 1}"
    ):
        mmn.calibrate(vlm, few, vocabulary)
    # Given are the objects that image tokens say less: the curve would call unseen what is seen, and the reverse.
    with pytest.raises(SettingError, match="does not tell what is in these pictures"):
        mmn.calibrate(vlm, [mmn.Item(str(i), IMAGE, objects=wrong) for i in range(FEWEST)], vocabulary)
    # No caption names an object of the vocabulary.
    with pytest.raises(SettingError, match="Of 0 objects named, 0 are there"):
        mmn.calibrate(vlm, few[:1], mmn.Vocabulary([["violin"]]))


def test_a_caption_without_a_noun_has_nothing_to_check(vlm):
    (checked,) = mmn.check(vlm, IMAGE, caption="very quickly and then")
    assert (checked.nouns, checked.unseen, checked.rows()) == ((), (), [])
    assert any("no noun" in note for note in checked.notes)


def test_named_objects_are_judged_by_the_truth(vlm):
    items = [mmn.Item("there", IMAGE, objects=("dog", "car")), mmn.Item("not", IMAGE, objects=("violin",))]
    found = named_objects(vlm, items, mmn.Vocabulary([pocket.nouns()]))
    assert {(one.image, one.noun, one.present) for one in found} == {
        ("there", "dog", True),
        ("there", "car", True),
        ("not", "dog", False),
        ("not", "car", False),
    }


def test_the_command_names_what_is_not_seen(tmp_path):
    IMAGE.save(tmp_path / "scene.png")
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "scene.png"), "--caption", "a dog and a violin"])
    assert shown.exit_code == 0, shown.output
    assert "not seen in the picture" in shown.output


def test_the_command_makes_a_calibration_that_check_takes(vlm, tmp_path):
    """The same picture again and again, once with both of its objects, else with one: the other is then not there."""
    IMAGE.save(tmp_path / "0.png")
    entries: list[dict[str, object]] = [{"image": "0.png", "objects": ["dog", "car"]}]
    for i in range(1, FEWEST + 1):
        IMAGE.save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "objects": one_of_two(vlm)})
    (tmp_path / "images.json").write_text(json.dumps(entries))
    made = str(tmp_path / "made.json")
    told = CliRunner().invoke(app, ["calibrate", "--images", str(tmp_path / "images.json"), "--out", made])
    assert told.exit_code == 0, told.output
    shown = CliRunner().invoke(app, ["check", str(tmp_path / "0.png"), "--calibration", made, "--json", "-"])
    assert shown.exit_code == 0, shown.output
    assert {row["word"] for row in json.loads(shown.stdout) if row["grounded"] is not None} >= {"dog", "car"}
