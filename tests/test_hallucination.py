"""Objects that are not there: CHAIR and POPE by hand, and the patch that makes the model decline."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kits.bounds import bounded
from kits.commands import call
from kits.float64 import in_float64, slope
from safetensors.torch import save as to_bytes

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing import checkpoint
from mmneurons.editing import dehallucinate as making
from mmneurons.editing.abstention import (
    FOLLOW,
    KEEP,
    lessons,
    losses,
    objects_named,
    read_lessons,
    read_questions,
    shuffled,
)
from mmneurons.editing.answers import Answered, answers
from mmneurons.editing.checkpoint import MOMENTS, Training
from mmneurons.editing.dehallucinate import DehallucinateSettings, chair_change, dehallucinate
from mmneurons.editing.fit import descend, fit
from mmneurons.editing.low_rank import low_rank, slopes
from mmneurons.errors import FormatError, MmneuronsError, SettingError, WordError
from mmneurons.metrics import chair as measuring
from mmneurons.metrics.chair import (
    Vocabulary,
    chair,
    coco_synonyms,
    pope,
    read_synonyms,
    yes_or_no,
)
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.pocket.scenes import Scene
from mmneurons.settings import ANSWER_PREFIX, PROMPT, Question
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.teacher_forcing import Batch, Given, Reader
from mmneurons.vlm.tokens import tokens_of


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
        ("a cat on a person's lap", ("cat", "person")),
        ("the dogs' bowls", ("dog",)),
        ("a dog\u2019s tail", ("dog",)),
        ("a sign that says 'dog'", ("dog",)),
        ("a dog--a cat", ("dog", "cat")),
        ("a hot, dog day", ("dog",)),
        ("", ()),
    ],
)
def test_what_a_caption_names(caption, named):
    assert Vocabulary([["dog", "cats"], ["hot dog", "people", "person"]]).named(caption) == named


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Two puppies and a man's iPhone", ("dog", "person", "cell phone")),
        ("a baby bird next to a baby", ("bird", "person")),
        ("a baby elephant", ("elephant",)),
        ("a passenger jet, two teddy bears and a bear", ("airplane", "teddy bear", "bear")),
        ("a plate on home plate by the train tracks", ()),
        ("a toilet seat, hot dogs, wine glasses and skis", ("toilet", "hot dog", "wine glass", "ski")),
    ],
)
def test_what_a_caption_names_of_the_objects_of_coco(caption, named):
    assert Vocabulary([], coco_synonyms()).named(caption) == named


def test_synonyms_are_one_object_in_captions_and_in_lists():
    vocabulary = Vocabulary([["hound"], ["zorblat"]], coco_synonyms())
    assert vocabulary.nouns - Vocabulary([], coco_synonyms()).nouns == {"zorblat"}
    assert len(Vocabulary([], coco_synonyms()).nouns) == 80
    found = chair(["a puppy and a dog", "a man"], [["hounds", "home plate"], ["cat"]], vocabulary)
    assert (found.n_found, found.n_absent) == (1, 1)
    assert found.recall is not None
    assert found.recall.mean == pytest.approx(1 / 2)  # the dog, of dog and cat


def test_a_table_of_synonyms_is_read(tmp_path: Path):
    path = tmp_path / "table.txt"
    path.write_bytes("\ufeff# mine\n\ndog,  puppy , Hounds\ncat\n, dog days\n".encode())
    assert read_synonyms(path) == {"dog": ["puppy", "Hounds"], "cat": [], "": ["dog days"]}
    assert Vocabulary([], read_synonyms(path)).named("dog days of a hound") == ("dog",)


@pytest.mark.parametrize(
    ("text", "says"), [("dog, puppies\ncat, puppy", "'puppy' stands for two"), ("# none\n", "no object")]
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, says: str):
    path = tmp_path / "table.txt"
    path.write_text(text)
    with pytest.raises(FormatError, match=says):
        read_synonyms(path)


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
    answers = {"a?": ["yes", "Answer: Yes, there is", "no"], "b?": ["nothing"]}
    monkeypatch.setattr(measuring, "texts_of", lambda vlm, images, asked: answers[asked.prompt][: len(images)])
    found = pope(vlm, [None] * 4, ["a?", "b?", "a?", "a?"], [True, True, False, False])  # pyright: ignore[reportArgumentType]
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.precision == pytest.approx(1 / 2)
    assert found.recall == pytest.approx(1 / 2)
    assert found.f1 == pytest.approx(1 / 2)
    assert found.yes == pytest.approx(2 / 4)
    assert found.neither == pytest.approx(1 / 4)
    assert found.n == 4


def test_an_answer_that_is_neither_is_wrong_whatever_is_true(vlm, monkeypatch):
    monkeypatch.setattr(measuring, "texts_of", lambda vlm, images, asked: ["a dog"] * len(images))
    found = pope(vlm, [None] * 2, ["a?", "a?"], [True, False])  # pyright: ignore[reportArgumentType]
    assert (found.accuracy, found.yes, found.neither) == (0, 0, 1)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("yes", True),
        (" Yes.", True),
        ("Yes, there is a dog in the image.", True),
        ("**Yes**", True),
        ("Answer: Yes", True),
        ("**Answer:** yes", True),
        ("A: yes", True),
        ("The answer is yes", True),
        ("The correct answer is: Yes.", True),
        ("The answer to the question is 'yes'.", True),
        ("NO", False),
        ("No, there is no dog in the image. Yes, a cat.", False),
        ("The answer is no.", False),
        ("There is no dog in the image.", False),
        ("There isn\u2019t a dog.", False),
        ("There are not any dogs", False),
        ("There is a dog in the image.", None),
        ("a dog", None),
        ("yes or no", None),
        ("Yes/No", None),
        ("No idea.", None),
        ("none", None),
        ("nothing", None),
        ("yesterday", None),
        ("I cannot tell, yes or no", None),
        ("", None),
    ],
)
def test_answers_that_are_yes_or_no(answer: str, read: bool | None):
    assert yes_or_no(answer) is read


# What is taught ------------------------------------------------------------------------------------------------------


def answered(vlm: mmn.VLM, text: str) -> Answered:
    """As if the model had said it."""
    ids = vlm.tokenizer(f" {text}", add_special_tokens=False).input_ids
    return Answered([text], [(*ids, vlm.tokenizer.eos_token_id)], [[0.0] * (len(ids) + 1)])


def token(vlm: mmn.VLM, word: str) -> int:
    return tokens_of(vlm.tokenizer, word)[0]


def taught(vlm: mmn.VLM, text: str, objects: list[str], seed: int = 0) -> list[Given]:
    said = answered(vlm, text)
    named = objects_named(vlm, said, [objects], Vocabulary([pocket.nouns()]))
    return [given for _, given in lessons(vlm, said, [objects], named, token(vlm, "image"), seed)]


def words(vlm: mmn.VLM, given: Given) -> str:
    return vlm.tokenizer.decode(given.token_ids, skip_special_tokens=True).strip()


def test_where_an_object_is_named_any_that_is_there_may_be_or_the_word(vlm):
    as_it_was, repaired = taught(vlm, "a dog, a bus and a cat on the road", ["cat", "bird", "dogs"])
    say, bird, bus, cat, dog = (token(vlm, word) for word in ("image", "bird", "bus", "cat", "dog"))
    at = {given: [given.token_ids.index(t) for t in (dog, bus, cat)] for given in (as_it_was,)}[as_it_was]
    assert as_it_was.turn == {at[0]: (say, bird, cat, dog), at[1]: (say, bird, cat), at[2]: (say, bird, cat)}
    assert set(as_it_was.kept) == set(range(len(as_it_was.token_ids))) - set(at)
    assert words(vlm, as_it_was) == "a dog, a bus and a cat on the road"
    # The bus is repaired; what was said before is to stay as it is, what follows to be said as it was.
    assert words(vlm, repaired).replace("image", "?").replace("bird", "?").startswith("a dog, a ?")
    assert repaired.turn[at[1]] == as_it_was.turn[at[1]]
    assert max(repaired.kept) < at[1]
    follows = {step: tokens for step, tokens in repaired.turn.items() if tokens[0] == -1}
    assert all(tokens == (-1, repaired.token_ids[step]) for step, tokens in follows.items())
    assert sorted([*repaired.turn, *repaired.kept]) == list(range(len(repaired.token_ids)))


def test_an_object_named_by_a_synonym_or_inside_a_longer_name_stands_at_its_own_place(vlm):
    text = "a hot dog, a puppy and a dog"
    said = answered(vlm, text)
    vocabulary = Vocabulary([["hot dog"]], {"dog": ["puppy"]})
    (hot_dog, dog) = objects_named(vlm, said, [["hound"]], vocabulary)
    assert (hot_dog.noun, hot_dog.word.text, dog.noun, dog.word.text) == ("hot dog", "hot dog", "dog", "puppy")
    assert vlm.tokenizer.decode([said.token_ids[0][i] for i in dog.word.steps]).strip() == "puppy"


def test_a_repair_names_what_is_there_and_was_not_named_or_declines(vlm):
    seen = {words(vlm, taught(vlm, "a dog and a cat on the road", ["cat", "bird"], seed)[1]) for seed in range(30)}
    # Once "cat" has taken the dog's place, no cat may be named again.
    assert seen == {"a image and a cat on the road", "a bird and a cat on the road", "a cat and a cat on the road"}
    at = taught(vlm, "a dog and a cat on the road", ["cat", "bird"])[0].token_ids.index(token(vlm, "cat"))
    for seed in range(30):
        repaired = taught(vlm, "a dog and a cat on the road", ["cat", "bird"], seed)[1]
        left = {"cat", "bird"} - set(words(vlm, repaired).split(" and ")[0].split())
        assert set(repaired.turn[at][1:]) == {token(vlm, word) for word in left}


def test_words_of_several_tokens_and_plurals_are_taught_whole(vlm):
    (as_it_was,) = taught(vlm, "three pandas on the road", ["panda", "tulip"])
    several = tokens_of(vlm.tokenizer, "pandas")
    assert len(several) > 1
    at = as_it_was.token_ids.index(several[0])
    assert as_it_was.turn == {at: (token(vlm, "image"), several[0], tokens_of(vlm.tokenizer, "tulips")[0])}
    repairs = [taught(vlm, "two dogs on the road", ["panda"], seed)[1] for seed in range(10)]
    (panda,) = {words(vlm, one) for one in repairs} - {"two image on the road"}
    assert panda == "two pandas on the road"


def test_only_answers_that_name_objects_teach(vlm):
    assert taught(vlm, "a room at night", ["dog"]) == []


def test_each_image_is_asked_about_an_object_that_is_there_and_one_that_is_not(vlm, scenes, monkeypatch):
    images, objects = [scene.image for scene in scenes[:8]], [[*scene.objects, "unknown"] for scene in scenes[:8]]
    asked: list[tuple[str, int]] = []
    read = Reader.read

    def watched(reader, pictures, question, given):
        assert question.prefix == ""
        asked.extend((question.prompt, images.index(picture)) for picture in pictures)
        assert all(one.turn == {} and set(one.kept) == set(range(len(one.token_ids))) for one in given)
        assert {vlm.tokenizer.decode(one.token_ids, skip_special_tokens=True).strip() for one in given} <= {"yes", "no"}
        return read(reader, pictures, question, given)

    monkeypatch.setattr(Reader, "read", watched)
    done: list[int] = []
    with frozen(vlm.model), evaluating(vlm.model):
        batches = read_questions(Reader(vlm, 0, True, 4), images, objects, pocket.nouns(), 8, done.append)
    assert sum(int(batch.places[0].max()) + 1 for batch in batches) == len(asked) == 16
    assert done[-1] == 8
    for i, there in enumerate(objects):
        nouns = [prompt.split()[3] for prompt, image in asked if image == i]
        assert sorted(noun in there for noun in nouns) == [False, True]
        assert set(nouns) <= set(pocket.nouns())
    assert all(prompt.split()[2] == ("an" if prompt.split()[3][0] in "aeiou" else "a") for prompt, _ in asked)


# The loss, and what it changes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Lessons that were read."""

    reader: Reader
    own: list[Batch]
    others: list[Batch]
    taught: list[tuple[int, Given]]
    images: list[Any]


@pytest.fixture(scope="module")
def case(vlm, scenes) -> Case:
    return case_of(vlm, scenes[:10])


def case_of(vlm: mmn.VLM, scenes: list[Scene]) -> Case:
    images, objects = [scene.image for scene in scenes], [scene.objects for scene in scenes]
    said = answers(vlm, images, Question(batch_size=4))
    named = objects_named(vlm, said, objects, Vocabulary([pocket.nouns()]))
    made = lessons(vlm, said, objects, named, token(vlm, "image"))
    reader = Reader(vlm, 0, True, 4)
    reference = mmn.make_reference(vlm, images[:3], ["a dog is an animal"])
    with frozen(vlm.model), evaluating(vlm.model):
        own = read_lessons(reader, images, Question(), made, lambda done: None)
        return Case(reader, own, reference.read(reader, None), made, images)


def columns(vlm: mmn.VLM) -> Columns:
    return Columns(vlm.anatomy, {1: torch.arange(0, 40, 2), 4: torch.arange(30)})


def moved(vlm: mmn.VLM) -> Deltas:
    change = low_rank(vlm, columns(vlm), 3)
    random = torch.Generator().manual_seed(0)
    for share in change.rows.values():
        share.copy_(0.5 * torch.randn(share.shape, generator=random))
    return change


def test_the_loss_is_that_of_the_raw_model(vlm, case):
    change, payoff = moved(vlm), 3.0
    for parameter in change.parameters:
        parameter.requires_grad_()
    with torch.inference_mode(False), frozen(vlm.model), change.added():
        found = descend(losses(case.reader, [case.own], payoff), change.parameters)
    nouns, follows, kept = [], [], []
    for image, given in case.taught:
        inputs = vlm.encode([[case.images[image]]], PROMPT, ANSWER_PREFIX)
        whole = torch.cat([inputs["input_ids"], torch.tensor([given.token_ids])], 1)
        start = inputs["input_ids"].shape[1] - 1
        log_p = []
        for patch in (Patch(vlm.anatomy.hidden, ()), patch_of(vlm, change)):
            with patch.applied(vlm), torch.inference_mode():
                raw = vlm.model(
                    input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=inputs["pixel_values"]
                )
            log_p.append(raw.logits[0, start:].log_softmax(-1))
        base, now = log_p
        for step, tokens in given.turn.items():
            if tokens[0] < 0:
                follows.append(float(now[step, tokens[1]]))
            else:
                p = now[step].exp()
                nouns.append(float((p[tokens[0]] / payoff + p[list(tokens[1:])].sum()).log()))
        kept += [float((base[step].exp() * (base[step] - now[step])).sum()) for step in given.kept]
    assert follows
    expected = -np.mean(nouns) - FOLLOW * np.mean(follows) + KEEP * np.mean(kept)
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_diverges_before_anything_changes(vlm, case):
    change = low_rank(vlm, columns(vlm), 3)
    for parameter in change.parameters:
        parameter.requires_grad_()
    with torch.inference_mode(False), frozen(vlm.model), change.added():
        assert descend(losses(case.reader, [case.others], 3.0), change.parameters) == pytest.approx(0, abs=1e-5)


def test_the_gradient_of_the_change_is_the_slope_of_the_loss(vlm, scenes):
    with in_float64(vlm) as double:
        case, training = case_of(double, scenes[:4]), Training.begun(moved(double))

        def loss() -> float:
            with torch.inference_mode(False), frozen(double.model), training.change.added():
                parts = losses(case.reader, [case.own[:1], case.others[:1]], 3.0)
                return descend(parts, training.change.parameters)

        for parameter in training.change.parameters:
            training.adam.zero_grad()
            loss()
            assert parameter.grad is not None
            steepest = parameter.grad.norm()
            along = parameter.grad / steepest
            assert slope(loss, parameter, along, 1e-4) == pytest.approx(float(steepest), rel=1e-4)


def test_the_steepest_columns_are_those_of_the_weights_gradient(vlm, case):
    with torch.inference_mode(False), frozen(vlm.model), evaluating(vlm.model):
        found = slopes(vlm, [2, 4], losses(case.reader, [case.own], 3.0))
    weights = {i: vlm.anatomy.ffns[i].module.weight for i in (2, 4)}
    with torch.inference_mode(False), evaluating(vlm.model):
        for weight in weights.values():
            weight.requires_grad_(True)
        descend(losses(case.reader, [case.own], 3.0), list(weights.values()))
    assert set(found) == {2, 4}
    for i, weight in weights.items():
        assert weight.grad is not None
        expected = weight.grad.norm(dim=0) * weight.detach().norm(dim=0)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-6)
    vlm.model.zero_grad()
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_references_are_read_some_at_a_time(case):
    groups = shuffled([*case.own, *case.others], 6)
    assert sorted(id(one) for group in groups for one in group) == sorted(map(id, [*case.own, *case.others]))
    sizes = [[int(batch.places[0].max()) + 1 for batch in group] for group in groups]
    assert all(sum(mine) >= 6 > sum(mine[:-1]) for mine in sizes[:-1])
    assert groups == shuffled([*case.own, *case.others], 6)


# Kept, and gone on with ---------------------------------------------------------------------------------------------


def test_what_is_kept_goes_on_as_if_nothing_had_happened(vlm, case, tmp_path):
    def steps(training: Training, n: int) -> None:
        groups = [case.own[:1], case.others[:1]]
        with torch.inference_mode(False), frozen(vlm.model), training.change.added():
            fit(training.adam, lambda step: losses(case.reader, groups, 3.0), range(n), rate=lambda step: 0.1)

    whole = Training.begun(moved(vlm))
    steps(whole, 4)
    half = Training.begun(moved(vlm))
    steps(half, 2)
    half.rounds = 7
    half.keep(tmp_path / "x.part", "key")
    again = Training.resumed(tmp_path / "x.part", "key", vlm)
    assert again is not None
    assert again.rounds == 7
    for a, b in zip(again.change.parameters, half.change.parameters, strict=True):
        assert torch.equal(a, b)
        for name in MOMENTS:
            assert torch.equal(again.adam.state[a][name], half.adam.state[b][name])
    steps(again, 2)
    for a, b in zip(again.change.parameters, whole.change.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # the same sums, which threads may add in another order
    with pytest.raises(SettingError, match="of another run"):
        Training.resumed(tmp_path / "x.part", "other", vlm)
    assert Training.resumed(tmp_path / "y.part", "key", vlm) is None


@pytest.fixture(scope="module")
def begun(vlm) -> Training:
    one = Training.begun(moved(vlm))
    for parameter in one.change.parameters:
        parameter.grad = torch.ones_like(parameter)
    one.adam.step()
    one.rounds = 3
    return one


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=50)
def test_what_was_kept_is_read_as_it_was_or_refused(vlm, begun, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("kept") / "x.part"
    begun.keep(path, "key")
    whole = path.read_bytes()
    start = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(whole))))
    cut = data.draw(st.integers(0, 8))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + cut :])
    with bounded():
        try:
            again = Training.resumed(path, "key", vlm)
        except MmneuronsError:
            return
    assert again is not None
    assert again.rounds == begun.rounds
    for a, b in zip(again.change.parameters, begun.change.parameters, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parameters.0", float("nan")),
        ("exp_avg_sq.1", float("inf")),
        ("parameters.1", None),
        ("columns.4", None),
        ("columns.99", torch.tensor([1])),
        ("columns.3", torch.tensor([-1])),
    ],
)
def test_tensors_that_are_none_of_a_training_are_refused(vlm, begun, tmp_path, monkeypatch, name, value):
    """Though the digest is right: someone made the file so."""

    def harmed(held, **options):
        if isinstance(value, float):
            held[name] = torch.full_like(held[name], value)
        elif value is None:
            del held[name]
        else:
            held[name] = value
        return to_bytes(held, **options)

    monkeypatch.setattr(checkpoint, "to_bytes", harmed)
    begun.keep(tmp_path / "x.part", "key")
    with pytest.raises(FormatError, match="damaged"):
        Training.resumed(tmp_path / "x.part", "key", vlm)


def test_a_run_of_other_pictures_or_words_is_another_run(vlm, scenes):
    asked = DehallucinateSettings(say="image")
    said, there = Answered([], [(1, 2)], []), [["dog"]]

    def key(image, nouns=("dog",), reference=None):
        return making._key(vlm, asked, [image], there, Vocabulary([nouns]), said, reference)

    first, second = (scene.image for scene in scenes[:2])
    refer = mmn.make_reference(vlm, [first])
    keys = [key(first), key(second), key(first, ("cat",)), key(first, reference=refer)]
    keys.append(key(first, reference=replace(refer, images=(second,))))
    assert len(set(keys)) == 5
    assert key(first.copy()) == keys[0]


def make(vlm: mmn.VLM, scenes: list[Scene], **options: Any) -> Patch:
    images, objects = [scene.image for scene in scenes], [scene.objects for scene in scenes]
    reference = mmn.make_reference(vlm, [scene.image for scene in pocket.edit_set("dog").held_out[:4]])
    settings = DehallucinateSettings(say="image", steps=24, top=300, rank=8, batch_size=16)
    options = {"vocabulary": Vocabulary([pocket.nouns()]), "reference": reference, "settings": settings} | options
    return dehallucinate(vlm, images, objects, **options)


@pytest.fixture
def small_steps(monkeypatch) -> None:
    """Fewer answers are read at each step than where figures are measured."""
    monkeypatch.setattr(making, "ROWS", 4)
    monkeypatch.setattr(making, "REFERENCES", 2)


@pytest.mark.slow
def test_fewer_absent_objects_are_named_and_the_model_is_left_as_it_was(vlm, scenes):
    images, objects = [scene.image for scene in scenes], [scene.objects for scene in scenes]
    vocabulary = Vocabulary([pocket.nouns()])
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    usual = vlm.caption(images, batch_size=16)
    before = chair(usual, objects, vocabulary)
    patch = make(vlm, scenes)
    assert all(torch.equal(weights[name], value) for name, value in vlm.model.state_dict().items())
    judged = chair_change(vlm, patch, images, objects, vocabulary)
    assert [text for text, _ in judged.texts] == usual
    after = chair([text for _, text in judged.texts], objects, vocabulary)
    assert (judged.before, judged.after) == (before, after)
    assert after.n_absent < 0.5 * before.n_absent  # of the images that it learned from
    assert after.n_found >= before.n_found
    assert len(patch.neurons) == 300
    assert patch.provenance["absent"] == before.n_absent
    assert sum(len(now) for _, now in judged.absent) == after.n_absent
    assert judged.rival.n_absent + judged.rival.n_found == after.n_absent + after.n_found  # as many are deleted
    assert judged.rival.n_absent > after.n_absent


@pytest.mark.slow
@pytest.mark.usefixtures("small_steps")
def test_a_run_that_was_stopped_goes_on_to_the_same_patch(vlm, scenes, tmp_path):
    path, done = tmp_path / "x.part", list[float]()

    def stop(what: str, share: float, total: int) -> None:
        if what == "learning":
            done.append(share)
            if share > 5.5:
                raise KeyboardInterrupt

    scenes = scenes[:8]
    how = DehallucinateSettings(say="image", steps=12, top=50, rank=4, batch_size=4)
    whole = make(vlm, scenes, settings=how)
    with pytest.raises(KeyboardInterrupt):
        make(vlm, scenes, settings=how, checkpoint=path, progress=stop)
    assert path.exists()
    with pytest.raises(SettingError, match="of another run"):
        make(vlm, scenes, checkpoint=path, settings=replace(how, payoff=2))
    again = list[float]()

    def told(what: str, share: float, total: int) -> None:
        if what == "learning":
            again.append(share)

    patch = make(vlm, scenes, settings=how, checkpoint=path, progress=told)
    assert min(again) > 5  # the first five rounds were not done again
    assert patch.neurons == whole.neurons
    for mine, theirs in zip(patch.parts, whole.parts, strict=True):
        one, other = patch.deltas(mine), whole.deltas(theirs)
        assert float(other.norm()) > 0
        assert (one - other).norm() < 1e-2 * other.norm()  # the same steps, which threads may add in another order
    assert path.exists()  # until the patch is saved, it may be needed


@pytest.mark.parametrize(
    ("objects", "settings", "error", "says"),
    [
        ([["dog"]], {}, SettingError, "1 lists"),
        (None, {"say": "thing"}, WordError, "3 tokens, and one must do"),
        (None, {"payoff": 1.0}, SettingError, "payoff=1.0"),
        (None, {"blocks": 9}, SettingError, "The model has 5 blocks"),
        (None, {"rank": 99_999}, SettingError, "(?s)directions at most.*rank=99999"),
        ("said", {}, SettingError, "are all present"),
        ("others", {}, SettingError, "or it names none"),
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


def test_a_table_of_synonyms_that_is_not_there_is_refused_before_anything_is_loaded(
    capsys, monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, "dehallucinate", "--synonyms", "mine.txt", "--model", "none")
    assert code == 2
    assert "There is no file 'mine.txt'." in err


def test_images_that_are_learned_from_are_not_judged_on(capsys, monkeypatch, tmp_path: Path, scenes):
    """Or its figures would be told as of images that the patch was not made with."""
    monkeypatch.chdir(tmp_path)
    for i, scene in enumerate(scenes[:3]):
        scene.image.save(tmp_path / f"{i}.png")
    for name, places in (("learn", ["0.png", "1.png"]), ("judge", ["2.png", str(tmp_path / "1.png")])):
        entries = [{"image": place, "objects": ["dog"]} for place in places]
        Path(f"{name}.json").write_text(json.dumps(entries))
    code, _, err = call(
        capsys,
        monkeypatch,
        "dehallucinate",
        "--images",
        "learn.json",
        "--held-out",
        "judge.json",
        "--texts",
        "learn.json",
    )
    assert code == 2
    assert "among those to learn from" in err
    assert "1 of 2, first" in err
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix not in (".png", ".json")] == []


def test_an_empty_word_to_say_is_not_taken_for_none(capsys, monkeypatch, tmp_path: Path, scenes):
    monkeypatch.chdir(tmp_path)
    for i, scene in enumerate(scenes[:4]):
        scene.image.save(tmp_path / f"{i}.png")
    Path("list.json").write_text(json.dumps([{"image": f"{i}.png", "objects": ["dog"]} for i in range(4)]))
    code, _, err = call(
        capsys, monkeypatch, "dehallucinate", "--images", "list.json", "--reference", "0.png", "--say", ""
    )
    assert code == 2
    assert "'' has no token of its own" in err


@pytest.mark.usefixtures("small_steps")
def test_from_a_manifest_to_a_patch_its_figures_and_a_page(capsys, monkeypatch, tmp_path: Path, scenes):
    monkeypatch.chdir(tmp_path)
    entries = []
    for i, scene in enumerate(scenes[:16]):
        scene.image.save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "objects": list(scene.objects)})
    Path("list.json").write_text(json.dumps(entries))
    few = ("--top", 50, "--steps", 12, "--batch-size", 4)
    arguments = ("dehallucinate", "--images", "list.json", "--reference", "0.png", *few)
    code, out, err = call(
        capsys, monkeypatch, *arguments, "--out", "p.safetensors", "--json", "figures.json", "--report", "page.html"
    )
    assert code == 0, err
    assert "on 8 images that the patch was not made with" in out
    assert "learning: 12 of 12 done" in err
    assert not Path("p.safetensors.part").exists()
    assert mmn.Patch.load("p.safetensors").provenance["settings"]["say"] == "image"
    figures = json.loads(Path("figures.json").read_text())
    assert set(figures) == {"before", "after", "rival", "texts", "absent"}
    assert len(figures["texts"]) == len(figures["absent"]) == 8
    page = Path("page.html").read_text(encoding="utf-8")
    changed = [(before, after) for before, after in figures["texts"] if before != after]
    assert f"Answers that changed ({len(changed)})" in page
    assert all(f"<bdi>{after}</bdi>" in page for _, after in changed)
    assert page.count("<img ") == len(changed)
    code, out, err = call(capsys, monkeypatch, "patch", "show", "p.safetensors", "--top", 2)
    assert code == 0, err
    assert "image" in out

    made = mmn.Patch.load("p.safetensors")  # what is printed is judged anew, and the patch not learned again
    monkeypatch.setattr(making, "dehallucinate", lambda *_, **__: made)
    code, out, err = call(capsys, monkeypatch, *arguments, "--out", "again.safetensors", "--json", "-")
    assert code == 0, err
    assert json.loads(out) == figures  # nothing else is on stdout

    code, out, err = call(capsys, monkeypatch, "dehallucinate", "--images", "0.png")
    assert code == 2
    assert "Nobody says what is truly in 0.png." in err
