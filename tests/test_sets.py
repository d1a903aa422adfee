import json
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from mmneurons import pocket
from mmneurons.errors import MmneuronsError, SettingError
from mmneurons.pocket import sets, world
from mmneurons.pocket.scenes import sprites

NAMES = ("find-500", "locality-500", "pope-500", "hallucination-500", "hallucination-8000", "reference-400")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "hallucination-8000" else []) for name in NAMES]
)
def test_a_set_has_as_many_scenes_as_it_says_and_comes_out_as_it_was_defined(name):
    scenes = pocket.evaluation_set(name)
    assert len(scenes) == len(scenes.groups) == int(name.split("-")[1])
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


def test_find_shows_every_noun_as_often_as_the_others():
    counts = Counter(noun for scene in pocket.evaluation_set("find-500") for noun in scene.objects)
    assert set(counts) == set(pocket.nouns())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_other_style_has_as_many_icons_as_the_docs_say():
    icons = Counter(noun for noun, drawings in sprites().items() for d in drawings if d.split == "style")
    assert (icons.total(), len(icons), sum(n > 1 for n in icons.values()), max(icons.values())) == (115, 73, 27, 5)


def test_hard_scenes_are_hard_for_the_reason_they_give():
    scenes = pocket.evaluation_set("hallucination-500")
    assert Counter(scenes.groups) == dict.fromkeys(("hidden", "small", "rare together", "other style"), 125)
    area = {
        group: np.mean(
            [scene.masks.sum((1, 2)).max() for scene, g in zip(scenes, scenes.groups, strict=True) if g == group]
        )
        for group in ("small", "rare together")
    }
    assert area["small"] < 0.6 * area["rare together"]
    for scene, group in zip(scenes, scenes.groups, strict=True):
        homes = [set(world.places_of(noun)) for noun in scene.objects]
        if group == "rare together":
            assert not homes[0] & homes[1]
            assert scene.background not in homes[0] | homes[1]


def test_pixels_that_differ_are_refused(monkeypatch):
    scenes = list(pocket.evaluation_set("find-500"))
    monkeypatch.setattr(sets, "hashes", lambda: {"find-500": sets.digest(scenes[::-1])})
    with pytest.raises(MmneuronsError, match="come out otherwise"):
        sets.evaluation_set.__wrapped__("find-500")


def test_the_digest_sees_captions_pixels_and_masks():
    (scene,) = [pocket.scene(1, ["dog"], background="at night")]
    others = [pocket.scene(2, ["dog"], background="at night"), pocket.scene(1, ["cat"], background="at night")]
    assert len({sets.digest([s]) for s in (scene, *others)}) == 3
    assert set(json.loads(resources.files(pocket).joinpath("data/sets.json").read_text())) == {
        *NAMES,
        *(f"edit/{noun}" for noun in world.FREQUENCY),
    }


def test_edit_pairs_can_all_be_made_at_once():
    sources = [pair.source for pair in pocket.EDIT_PAIRS]
    assert len(sources) == len(set(sources)) == 30
    assert not set(sources) & {pair.target for pair in pocket.EDIT_PAIRS}
    for pair in pocket.EDIT_PAIRS:
        assert pair.near == (world.kind_of(pair.source) == world.kind_of(pair.target))
    assert sum(pair.near for pair in pocket.EDIT_PAIRS) == 15


@pytest.mark.parametrize("source", ["dog", "bell", "candle"])
def test_edit_scenes_show_the_source_and_never_the_target(source):
    scenes = pocket.edit_set(source)
    assert (len(scenes.edit), len(scenes.held_out)) == (8, 40)
    targets = {pair.target for pair in pocket.EDIT_PAIRS if pair.source == source}
    for scene in (*scenes.edit, *scenes.held_out):
        assert source in scene.objects
        assert not targets & set(scene.objects)
    assert len({scene.image.tobytes() for scene in (*scenes.edit, *scenes.held_out)}) == 48


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_pope_asks_as_often_for_yes_as_for_no(negatives):
    questions = pocket.pope(negatives)
    assert len({id(question.scene) for question in questions}) == 500
    assert sum(question.answer for question in questions) * 2 == len(questions)
    for question in questions:
        assert (question.noun in question.scene.objects) == question.answer
        if not question.answer and negatives == "popular":
            assert question.noun in world.FREQUENCY[:20]
    assert pocket.pope("random")[0].text.startswith("Is there a")


def test_adversarial_nouns_are_seen_together_more_often_than_random_ones():
    def together(negatives):
        return np.mean(
            [
                max(bool(set(world.places_of(q.noun)) & set(world.places_of(noun))) for noun in q.scene.objects)
                for q in pocket.pope(negatives)
                if not q.answer
            ]
        )

    assert together("adversarial") > 0.95 > together("random")


@pytest.mark.parametrize(
    "call", [lambda: pocket.evaluation_set("x"), lambda: pocket.edit_set("dodo"), lambda: pocket.pope("x")]
)
def test_what_is_not_there_is_refused(call):
    with pytest.raises(SettingError):
        call()


def test_every_noun_has_one_kind_a_place_and_a_rank():
    nouns = set(pocket.nouns())
    assert set(world.FREQUENCY) == nouns
    assert sorted(noun for kind in world.KINDS.values() for noun in kind) == sorted(nouns)
    assert {noun for place in world.PLACES.values() for noun in place} == nouns
    assert set(world.PLACES) == set(pocket.BACKGROUNDS)


def test_scenes_are_composed_as_often_and_together_as_the_table_says():
    random = np.random.default_rng(0)
    singles = Counter(world.compose(random, 1)[0][0] for _ in range(20_000))
    for noun, share in world.frequency().items():
        assert abs(singles[noun] - 20_000 * share) < 5 * np.sqrt(20_000 * share)
    pairs = [world.compose(random, 2) for _ in range(20_000)]
    assert all(len(set(objects)) == 2 for objects, _ in pairs)
    with_dog = Counter(noun for objects, _ in pairs if "dog" in objects for noun in objects if noun != "dog")
    assert len({noun for noun, _ in with_dog.most_common(8)} & set(world.companions("dog")[:12])) >= 6
    at_home = np.mean(
        [place in world.places_of(objects[0]) or place in world.places_of(objects[1]) for objects, place in pairs]
    )
    assert at_home > world.AT_HOME
