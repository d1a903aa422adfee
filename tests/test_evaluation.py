"""Edits judged: every figure against the same worked out otherwise, on the pocket model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kits.commands import call
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.data.dataset import read_items
from mmneurons.editing import evaluate_edits as evaluating
from mmneurons.editing import known as knowing
from mmneurons.editing.edit import EditSettings, edit
from mmneurons.editing.evaluate import Before, Bench, Evaluation, evaluate, ngram_entropy, size_of, unsearched
from mmneurons.editing.evaluate_edits import cases, evaluate_edits
from mmneurons.editing.known import KnownAnswers, forced
from mmneurons.editing.reference import make_reference
from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.parts import patch_of
from mmneurons.patches.patch import Patch
from mmneurons.report.edit import figures, render_edits, write_edits
from mmneurons.report.pictures import small
from mmneurons.settings import Question
from mmneurons.vlm.asking import ask, texts_of
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.words import says

TEXTS = ("A dog is a kind of animal.", "A dog can bark.", "A car has wheels.", "An apple is red.")


@pytest.fixture(scope="module")
def images() -> dict[str, list]:
    scenes = pocket.edit_set("dog")
    return {
        "edit": [scene.image for scene in scenes.edit],
        "held_out": [scene.image for scene in scenes.held_out[:6]],
        "unrelated": [pocket.scene(660_000_000 + i).image for i in range(8)]
        + [pocket.scene(661_000_000, ["dog"]).image],
    }


@pytest.fixture(scope="module")
def bench(images: dict[str, list]) -> Bench:
    return Bench(images["edit"], images["held_out"], images["unrelated"], TEXTS)


@pytest.fixture(scope="module")
def patch(vlm: mmn.VLM, images: dict[str, list]) -> Patch:
    reference = make_reference(vlm, [pocket.scene(650_000_000 + i).image for i in range(24)])
    return edit(vlm, images["edit"], source="dog", target="cat", reference=reference, settings=EditSettings(top=100))


@pytest.fixture(scope="module")
def judged(vlm: mmn.VLM, bench: Bench, patch: Patch) -> Evaluation:
    return evaluate(vlm, patch, Before(vlm, bench), source="dog", target="cat")


TO_CAT: dict[str, Any] = {"source": "dog", "target": "cat"}


class Nothing:
    """An edit that edits nothing."""

    @contextmanager
    def applied(self, vlm: mmn.VLM) -> Iterator[None]:
        yield


def means(judged: Evaluation, *names: str) -> list[float]:
    return [getattr(judged, name).mean for name in names]


def test_what_edits_nothing_keeps_everything_and_turns_nothing(vlm, bench):
    found = evaluate(vlm, Nothing(), Before(vlm, bench), source="dog", target="cat")
    kept = ("locality", "m_locality", "m_locality_ranked", "t_locality", "t_locality_source", "rest_unchanged")
    assert means(found, *kept) == [1.0] * 6
    assert means(found, "efficacy", "generality", "wordings", "bleed") == [0.0] * 4
    assert found.entropy is not None
    assert found.entropy[0] == found.entropy[1]
    assert found.perplexity is not None
    assert found.perplexity[0] == pytest.approx(found.perplexity[1])
    assert found.n_columns is found.size is None
    assert found.changed == ()


def test_shares_are_those_of_the_answers_themselves(vlm, bench, patch, judged):
    before = {name: vlm.caption(list(getattr(bench, name))) for name in ("edit", "held_out", "unrelated")}
    with patch.applied(vlm):
        after = {name: vlm.caption(list(getattr(bench, name))) for name in before}

    def turned(name: str) -> list[bool]:
        pairs = zip(before[name], after[name], strict=True)
        return [says(b, "cat") and not says(b, "dog") for a, b in pairs if says(a, "dog") or name == "edit"]

    unseen = turned("edit")[3::4]  # those by which the strength was not chosen
    assert judged.efficacy.mean == pytest.approx(sum(unseen) / len(unseen))
    assert judged.generality.mean == pytest.approx(sum(turned("held_out")) / len(turned("held_out")))
    others = [(a, b) for a, b in zip(before["unrelated"], after["unrelated"], strict=True) if not says(a, "dog")]
    assert judged.locality.n == len(others) < len(bench.unrelated)
    assert judged.locality.mean == pytest.approx(sum(a == b for a, b in others) / len(others))
    assert [(pair.before, pair.after) for pair in judged.changed] == [(a, b) for a, b in others if a != b]
    assert [before["held_out"][pair.image] for pair in judged.held_out] == [pair.before for pair in judged.held_out]


def test_a_limit_counts_the_images_that_are_used_and_asks_about_few_more(vlm, bench):
    """The first image shows the source and is not used; what is answered is shared with the next edit."""
    images = [bench.unrelated[-1], *bench.unrelated[:-1]]
    before = Before(vlm, replace(bench, unrelated=images, limit=3))
    found = evaluate(vlm, Nothing(), before, source="dog", target=None)
    assert found.locality is not None
    assert found.m_locality is not None
    assert found.locality.n == found.m_locality.n == 3
    known = before.unrelated
    assert known.without("dog") == [1, 2, 3]
    assert len(known.said.texts) == len(known.images) == len(known.usual_tops()) == 6
    assert before.on(bench).unrelated is known
    assert known.without("platypus") == [0, 1, 2]
    assert len(KnownAnswers(vlm, images, bench.question, 20).without("dog")) == len(images) - 1


def test_forced_logits_are_those_of_the_raw_model(vlm, bench):
    [image] = bench.unrelated[:1]
    inputs = vlm.encode([image], bench.question.prompt, bench.question.prefix)
    answers = vlm.generate(inputs)
    ids = answers.token_ids[0]
    [logits] = forced(vlm, [image], [ids], bench.question)
    sequence = answers.sequences[:, : answers.n_prompt + len(ids)]
    given = dict(inputs) | {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
    with torch.inference_mode():
        raw = vlm.model(**given).logits[0, answers.n_prompt - 1 : -1].float()
    torch.testing.assert_close(logits, raw, atol=1e-4, rtol=1e-4)
    assert logits.argmax(-1).tolist() == list(ids)


def test_answers_of_different_lengths_are_forced_each_as_if_alone(vlm, bench):
    ids = [ids for batch in ask(vlm, bench.unrelated, Question(batch_size=1)) for ids in batch.answers.token_ids]
    assert len(set(map(len, ids))) > 1
    together = list(forced(vlm, bench.unrelated, ids, bench.question))
    alone = [
        next(iter(forced(vlm, [image], [one], bench.question))) for image, one in zip(bench.unrelated, ids, strict=True)
    ]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_texts_that_name_the_source_are_judged_apart(judged):
    assert judged.t_locality_source.n == sum("dog" in text for text in TEXTS)
    assert judged.t_locality.n == len(TEXTS) - judged.t_locality_source.n


def test_a_removal_has_no_target_to_bleed(vlm, bench):
    found = evaluate(vlm, Nothing(), Before(vlm, bench), source="dog", target=None)
    assert found.bleed is None
    assert means(found, "efficacy") == [0.0]
    assert "rest of the answer unchanged" in dict(figures(found))
    assert dict(figures(replace(found, generality=None)))["generality"] == "not measured"


def test_entropy_by_hand():
    # Pairs: a b (twice), b a; triples: a b a, once.
    pairs = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(["a b a", "a b"]) == pytest.approx(pairs / 2)
    assert ngram_entropy([]) == 0


def test_the_size_of_a_patch_by_hand(vlm):
    [ffn] = vlm.anatomy.ffns[-1:]
    whole = ffn.module.weight.detach().float()
    chosen = Columns.of(vlm.anatomy, [Neuron(ffn.layer, 3), Neuron(ffn.layer, 7)])
    # One column moves by half its length, one by twice its length.
    moved = torch.stack([0.5 * whole[:, 3], -2 * whole[:, 7]])
    patch = patch_of(vlm, Deltas(chosen, {len(vlm.anatomy.ffns) - 1: moved}))
    size = size_of(vlm, patch)
    assert (size.mean, size.largest) == pytest.approx((1.25, 2.0), rel=1e-5)
    assert size.of_matrix == pytest.approx(float(moved.norm() / whole.norm()), rel=1e-5)
    with patch.applied(vlm):  # against the columns before any edit
        assert size_of(vlm, patch) == size


@pytest.mark.parametrize("kept", [2**30, 0], ids=["upper blocks", "whole model"])
def test_what_an_edit_changes_is_found_as_if_all_were_generated(vlm, patch, bench, monkeypatch, kept):
    monkeypatch.setattr(knowing, "MOST_KEPT", kept)
    generated = list[int]()

    def counted(vlm, images, question):
        generated.append(len(images))
        return texts_of(vlm, images, question)

    monkeypatch.setattr(knowing, "texts_of", counted)
    images = [*bench.unrelated, *bench.held_out]
    known = KnownAnswers(vlm, images, bench.question)
    edit = 2 * patch
    known.prepare(edit)
    assert (known._read is None) == (kept == 0)
    assert known.texts(known.tops()) == known.said.texts
    with edit.applied(vlm):
        after = vlm.caption(images)
        assert known.texts(known.tops()) == after
        assert [mine[:, 0].tolist() for mine in known.tops()] == [
            logits.argmax(-1).tolist() for logits in forced(vlm, images, known.said.token_ids, bench.question)
        ]
    differ = sum(a != b for a, b in zip(known.said.texts, after, strict=True))
    assert 0 < differ < len(images)
    assert generated == [0, differ]


def test_efficacy_leaves_out_the_images_by_which_the_strength_was_chosen(vlm, patch, bench, judged):
    assert len(patch.provenance["searched"]) == 6
    assert unsearched(patch, bench.edit) == [bench.edit[3], bench.edit[7]]
    assert judged.efficacy.n == 2
    odd = replace(patch, provenance={**patch.provenance, "searched": [[], {}, 3]})  # read from a file
    assert unsearched(odd, bench.edit) == unsearched(Nothing(), bench.edit) == list(bench.edit)


def test_what_says_the_target_already_cannot_bleed(vlm, bench):
    cats = [pocket.scene(662_000_000 + i, ["cat"]).image for i in range(3)]
    found = evaluate(vlm, Nothing(), Before(vlm, replace(bench, unrelated=[*bench.unrelated, *cats])), **TO_CAT)
    said = vlm.caption([*bench.unrelated, *cats])
    assert found.bleed is not None
    assert found.locality is not None
    assert found.bleed.n == sum(not says(text, "dog") and not says(text, "cat") for text in said) < found.locality.n


def test_other_kinds_of_images_and_texts_are_judged_apart(vlm, patch, bench):
    dogs, others = bench.unrelated[-1:], bench.unrelated[:3]
    more = replace(
        bench,
        further={"dogs": dogs, "others": others},
        further_texts={"letters": ["A dog wrote.", "The car is red, is it not?"], "none": ["A dog can bark."]},
    )
    found = evaluate(vlm, patch, Before(vlm, more), **TO_CAT)
    before = vlm.caption(others)
    with patch.applied(vlm):
        after = vlm.caption(others)
    letters, of_others = found.further_texts["letters"], found.further["others"]
    assert letters is not None
    assert of_others is not None
    assert found.further["dogs"] is None  # which say dog
    assert of_others.mean == pytest.approx(sum(map(str.__eq__, before, after)) / 3)
    assert (letters.n, found.further_texts["none"]) == (1, None)
    shown = dict(figures(found))
    assert shown["  others"] == f"{found.further['others']} of 3"
    assert shown["  dogs"] == "not measured"


def sources(vlm: mmn.VLM, folder, patches: dict[str, Patch], **other) -> dict[str, Evaluation]:
    return evaluate_edits(
        vlm,
        cases(patches),
        folder,
        edit=lambda source: read_items(f"pocket:edit/{source}")[:2],
        held_out=lambda source: read_items(f"pocket:held-out/{source}")[:2],
        unrelated=read_items("pocket:locality-500")[:4],
        **other,
    )


def test_patches_judged_before_are_not_judged_again(vlm, patch, tmp_path, monkeypatch):
    first = sources(vlm, tmp_path, {"a": patch})
    calls = []

    def counted(*arguments, **options):
        calls.append(options["source"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluating, "evaluate", counted)
    other = replace(2 * patch, provenance=patch.provenance)
    again = sources(vlm, tmp_path, {"a": patch, "b": other})
    assert calls == ["dog"]
    assert again["a"] == first["a"]
    # Another patch of the same name is another one, and the same of another name is the same.
    assert sources(vlm, tmp_path, {"a": other})["a"] == again["b"] != first["a"]
    assert calls == ["dog"]


def test_other_images_or_texts_are_judged_anew(vlm, patch, tmp_path, monkeypatch):
    calls = []

    def counted(vlm, edit, before, **options):
        calls.append(before.bench)
        return replace(judged_once, n_columns=len(calls))

    judged_once = sources(vlm, tmp_path / "once", {"a": patch})["a"]
    monkeypatch.setattr(evaluating, "evaluate", counted)
    monkeypatch.setattr(evaluating.Before, "on", lambda self, bench: evaluating.Before(self.vlm, bench))
    one, two, three = (read_items("pocket:held-out/dog")[i : i + 1] for i in range(3))
    how = {
        "edit": lambda source: one,
        "held_out": lambda source: two,
        "unrelated": three,
        "texts": ["A car has wheels."],
    }
    others: list[dict] = [{}, *({name: lambda source: three} for name in ("edit", "held_out")), {"unrelated": one}]
    others.append({"texts": ["A bus has wheels."]})  # as many as before
    for n, other in enumerate(others, start=1):
        for _ in range(2):
            found = evaluate_edits(vlm, cases({"a": patch}), tmp_path / "out", **(how | other))
            assert found["a"].n_columns == len(calls) == n


def test_the_command_names_what_cannot_be_read_and_shows_the_pictures_it_judged(
    capsys, monkeypatch, vlm, patch, bench, tmp_path
):
    monkeypatch.chdir(tmp_path)
    patch.save("p.safetensors")
    for name, pictures in (("made", bench.edit[:1]), ("held", bench.held_out[:3]), ("rest", bench.unrelated[:2])):
        Path(name).mkdir()
        for i, picture in enumerate(pictures):
            picture.save(Path(name, f"{i}.png"))
    Path("held", "1.png").write_bytes(Path("held", "1.png").read_bytes()[:200])
    Path("t.txt").write_text("A car has wheels.\n")

    def run() -> tuple[str, str]:
        code, out, err = call(
            capsys, monkeypatch, "evaluate-edit", "p.safetensors", "--out", "out", "--images", "made",
            "--held-out", "held", "--unrelated", "rest", "--texts", "t.txt",
        )  # fmt: skip
        assert code in (None, 0), err
        return out, err

    _, err = run()
    assert "1.png" in err
    assert "cannot be decoded" in err
    [before] = json.loads(Path("out", "edits.json").read_text())["edits"].values()
    Path("held", "1.png").unlink()
    Path("held", "0.png").unlink()
    run()
    [after] = json.loads(Path("out", "edits.json").read_text())["edits"].values()
    assert (before["generality"]["n"], after["generality"]["n"]) == (2, 1)
    page = Path("out", "edits.html").read_text()
    [pair] = after["held_out"]
    assert pair["before"] == before["held_out"][1]["before"]
    assert small(Image.open(Path("held", "2.png"))) in page
    assert small(bench.held_out[0]) not in page


def test_a_patch_that_does_not_say_what_it_edits_is_refused(vlm, patch, tmp_path):
    with pytest.raises(SettingError, match="does not say which word"):
        sources(vlm, tmp_path, {"a": replace(patch, provenance={})})


def test_the_page_shows_what_was_said_before_and_after(vlm, patch, bench, judged, tmp_path):
    class Opened:
        def __init__(self, picture) -> None:
            self.picture = picture

        def image(self):
            return self.picture

    def held_out(source: str) -> list[Opened]:
        return [Opened(image) for image in bench.held_out]

    unrelated = [Opened(image) for image in bench.unrelated]
    page = render_edits({"x/<dog>.safetensors": judged}, held_out, unrelated)
    assert "dog → cat (&lt;dog&gt;.safetensors)" in page
    assert page.count("data:image/webp;base64,") == len(judged.held_out) + len(judged.changed)
    for pair in judged.held_out:
        assert pair.after in page
    write_edits({"a": judged}, tmp_path, held_out, unrelated)
    document = json.loads((tmp_path / "edits.json").read_text())
    assert document["edits"]["a"]["efficacy"]["mean"] == judged.efficacy.mean
