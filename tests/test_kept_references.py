"""References that are kept on disk: used again where all is the same, and never where anything differs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import make_random_vlm

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing import kept_references, reference
from mmneurons.editing.answers import TracedSteps
from mmneurons.editing.kept_references import PARTS
from mmneurons.editing.reference import Reference

TEXTS = ("a dog is an animal", "a house has a roof and a door")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where references are kept; told to keep small ones."""
    monkeypatch.setenv("MMNEURONS_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_references, "LARGEST", 2**24)
    return tmp_path / "references"


@pytest.fixture
def answered(monkeypatch) -> list[str]:
    """What the model is asked for a reference: names of functions, in order."""
    calls = list[str]()
    for name in ("trace_answers", "trace_texts"):
        really = getattr(reference, name)

        def counted(*args, name=name, really=really, **options):
            calls.append(name)
            return really(*args, **options)

        monkeypatch.setattr(reference, name, counted)
    return calls


@pytest.fixture(scope="module")
def own(vlm):
    """A model of this file's own, whose weights may change."""
    return make_random_vlm(vlm)


@pytest.fixture(scope="module")
def images():
    return [pocket.scene(650_000_000 + i).image for i in range(3)]


def same(one: Reference, other: Reference) -> bool:
    """Whether references are the same to the bit."""

    def tensors(steps: TracedSteps) -> list[torch.Tensor]:
        return [*steps.activations, *steps.norms, *(getattr(steps, name) for name in PARTS)]

    pairs = [*zip(tensors(one.steps), tensors(other.steps), strict=True)]
    pairs += [(one.seconds, other.seconds), (one.text_counts, other.text_counts)]
    said = [made.answers and (made.answers.texts, made.answers.token_ids) for made in (one, other)]
    alike = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return alike and said[0] == said[1] and one.texts == other.texts and one.facts == other.facts


@pytest.mark.parametrize(("n", "texts"), [(3, TEXTS), (3, ()), (0, TEXTS)])
def test_the_second_time_it_comes_from_disk_bit_for_bit(own, images, folder, answered, n, texts):
    first = mmn.make_reference(own, images[:n], texts)
    asked = len(answered)
    second = mmn.make_reference(own, images[:n], texts)
    assert len(answered) == asked == (n > 0) + (len(texts) > 0)
    assert same(first, second)
    assert len(list(folder.iterdir())) == 1


def test_whatever_makes_another_reference_makes_it_anew(own, images, folder, answered):
    mmn.make_reference(own, images, max_new_tokens=4)
    others = [
        lambda: mmn.make_reference(own, images[1:], max_new_tokens=4),
        lambda: mmn.make_reference(own, [images[1], images[0], images[2]], max_new_tokens=4),
        lambda: mmn.make_reference(own, images, max_new_tokens=5),
        lambda: mmn.make_reference(own, images, prompt="What is this?", max_new_tokens=4),
        lambda: mmn.make_reference(own, images, answer_prefix="", max_new_tokens=4),
        lambda: mmn.make_reference(own, images, TEXTS[:1], max_new_tokens=4),
    ]
    for make in others:
        before = len(answered)
        make()
        assert len(answered) > before
    mmn.make_reference(own, images, max_new_tokens=4)
    with torch.no_grad():
        own.anatomy.ffns[0].module.weight[0, 0] += 1
    before = len(answered)
    mmn.make_reference(own, images, max_new_tokens=4)
    assert len(answered) > before


def test_a_model_that_runs_otherwise_with_the_same_weights_is_asked_again(own, images, folder, answered):
    """A hook of the user's own leaves no trace in any hash."""
    mmn.make_reference(own, images, TEXTS)
    before = len(answered)
    hook = own.anatomy.blocks[0].module.register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        changed = mmn.make_reference(own, images, TEXTS)
    finally:
        hook.remove()
    assert len(answered) == before + 2
    assert not same(changed, mmn.make_reference(own, images, TEXTS))


def test_with_patches_applied_nothing_is_taken_or_kept(own, images, folder, answered, tmp_path):
    anatomy = own.anatomy
    patch = mmn.edit(
        own,
        images[:1],
        source=own.caption(images[:1], max_new_tokens=3)[0].split()[0],
        neurons=[mmn.Neuron(len(anatomy.blocks) - 1, i) for i in range(20)],
        reference="own",
        max_new_tokens=3,
    )
    mmn.make_reference(own, images)
    before, files = len(answered), [*folder.iterdir()]
    with patch.applied(own):
        mmn.make_reference(own, images)
        mmn.make_reference(own, images[1:])
    assert len(answered) == before + 2
    assert [*folder.iterdir()] == files


@pytest.mark.parametrize("content", [b"", b"no tensors", "half"])
def test_a_damaged_file_is_made_anew(own, images, folder, answered, content):
    first = mmn.make_reference(own, images, TEXTS)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-200] if content == "half" else content)
    before = len(answered)
    assert same(mmn.make_reference(own, images, TEXTS), first)
    assert len(answered) == before + 2
    mmn.make_reference(own, images, TEXTS)
    assert len(answered) == before + 2


def test_the_last_used_are_kept_and_large_ones_are_not(own, images, folder, monkeypatch):
    monkeypatch.setattr(kept_references, "KEPT", 2)

    def kept_after(n: int) -> set[Path]:
        """The files after a reference of one image was made, all a little older."""
        mmn.make_reference(own, images[n : n + 1])
        for file in folder.iterdir():
            os.utime(file, (file.stat().st_mtime - 10, file.stat().st_mtime - 10))
        return {*folder.iterdir()}

    first = kept_after(0)
    second = kept_after(1) - first
    assert kept_after(0) == first | second  # used again: it is the newest now
    third = kept_after(2) - first
    assert {*folder.iterdir()} == first | third
    assert not second & third
    monkeypatch.setattr(kept_references, "LARGEST", 1000)
    mmn.make_reference(own, images[:2])
    assert {*folder.iterdir()} == first | third


def test_one_that_may_only_be_read_is_used(own, images, folder, answered, monkeypatch):
    first = mmn.make_reference(own, images, TEXTS)
    before = len(answered)

    def refused(path: Path) -> None:
        raise PermissionError(f"no right to write {path}")

    monkeypatch.setattr(os, "utime", refused)
    assert same(mmn.make_reference(own, images, TEXTS), first)
    assert len(answered) == before


def test_where_nothing_can_be_kept_it_is_made_all_the_same(own, images, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("MMNEURONS_CACHE", str(blocked))
    monkeypatch.setattr(kept_references, "LARGEST", 2**24)
    assert len(mmn.make_reference(own, images, TEXTS).steps)
