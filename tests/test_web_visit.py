"""What the app does for a visitor, without a browser: sessions apart, limits, edits and their undo."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.errors import FormatError, ImageError, SettingError
from mmneurons.patches.ledger import ledger_of
from mmneurons.settings import Question
from mmneurons.vlm.age import weights_hash
from mmneurons.vlm.hooks.interventions import intervene
from mmneurons.web import visit
from mmneurons.web.atlas import Runs
from mmneurons.web.launch import scenes, scenes_of, serving
from mmneurons.web.limits import Limits, StoppedError
from mmneurons.web.neuron import MOST, stand_in
from mmneurons.web.pool import Pool
from mmneurons.web.session import Session
from mmneurons.web.visit import Asked, Server, saved_patches, stack_of, switch


@pytest.fixture(scope="module")
def server(vlm) -> Server:
    return Server({"pocket": vlm}, {"pocket": Pool(vlm, scenes()[:10], lambda word: scenes_of(word)[:6])})


@pytest.fixture(scope="module")
def picture() -> str:
    return str(pocket.samples()[0].path)


@pytest.fixture(scope="module")
def edited(server, picture) -> Session:
    """A session in which the first noun of the sample was edited."""
    session = Session()
    noun = server.find(session, None, Asked(picture)).nouns[0].lemma
    target = "cat" if noun != "cat" else "dog"
    *_, outcome = server.edit(session, None, noun, target, False)
    assert outcome.judged
    return session


def test_find_is_that_of_the_library_under_a_name_without_a_folder(server, vlm, picture):
    finding = server.find(Session(), None, Asked(picture))
    plain = mmn.find(vlm, picture, maps=True)
    assert finding.nouns == plain.nouns
    assert finding.images == (picture.rpartition("/")[2],)


def test_two_visitors_with_different_patches_at_once(server, vlm, picture, edited):
    """Threads that ask in turns and at once get the answers of their own patches, and the model is left as it was."""
    before = weights_hash(vlm.model)
    other = Session()
    plain = server.find(other, None, Asked(picture)).caption
    mine = server.find(edited, None, Asked(picture)).caption
    assert plain != mine
    said: dict[str, set[str]] = {"plain": set(), "mine": set()}

    def ask(name: str, session: Session) -> None:
        for _ in range(4):
            said[name].add(server.find(session, None, Asked(picture)).caption)

    threads = [threading.Thread(target=ask, args=pair) for pair in (("plain", other), ("mine", edited))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {"plain": {plain}, "mine": {mine}}
    assert ledger_of(vlm).active == ()
    assert weights_hash(vlm.model) == before


def test_a_patch_is_switched_off_undone_downloaded_and_uploaded(server, picture, edited, tmp_path):
    mine = server.find(edited, None, Asked(picture)).caption
    plain = server.find(Session(), None, Asked(picture)).caption
    (_, on), session = stack_of(edited), Session()
    (path,) = saved_patches(edited, tmp_path)
    server.upload(session, None, path)
    assert server.find(session, None, Asked(picture)).caption == mine
    switch(session, [])
    assert server.find(session, None, Asked(picture)).caption == plain
    switch(session, [*on, "no such patch"])
    assert stack_of(session)[1] == on
    assert session.undo().hash == on[0]
    assert server.find(session, None, Asked(picture)).caption == plain
    with pytest.raises(SettingError, match="nothing to undo"):
        session.undo()


def test_strips_hold_no_picture_twice_and_are_what_they_say(server):
    pool = server.pools["pocket"]
    parts = pool.split("dog")
    numbers = [[image.tobytes() for image in part] for part in parts]
    together = [content for part in numbers for content in part]
    assert len(set(together)) == len(together)
    assert all(parts)


def test_a_hostile_patch_is_refused(server, edited, tmp_path):
    (path,) = saved_patches(edited, tmp_path)
    bad = tmp_path / "bad.safetensors"
    tensors = load_file(path)
    save_file(tensors, bad, metadata={"mmneurons_patch": json.dumps({"schema": 2, "hidden": -1})})
    session = Session()
    with pytest.raises(FormatError):
        server.upload(session, None, str(bad))
    bad.write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError):
        server.upload(session, None, str(bad))
    assert session.patches == []


def test_a_huge_or_broken_picture_is_a_message(server, tmp_path):
    huge = tmp_path / "<img src=x onerror=alert(1)>.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    with pytest.raises(ImageError, match="too large") as error:
        server.find(Session(), None, Asked(str(huge)))
    assert str(tmp_path) not in str(error.value)
    huge.write_bytes(b"no picture")
    with pytest.raises(ImageError) as error:
        server.find(Session(), None, Asked(str(huge)))
    assert str(tmp_path) not in str(error.value)


def test_time_is_limited_and_stopping_leaves_nothing(server, vlm, picture):
    slow = Server(server.models, server.pools, Limits(seconds=0))
    with pytest.raises(SettingError, match="longer than 0 seconds"):
        slow.find(Session(), None, Asked(picture))
    session = Session()
    noun = server.find(session, None, Asked(picture)).nouns[0].lemma

    def stop(stage: str, done: float, total: int) -> None:
        session.stop.set()

    with pytest.raises(StoppedError):
        list(server.edit(session, None, noun, "cat", False, stop))
    assert session.patches == []
    assert ledger_of(vlm).active == ()
    assert server.find(session, None, Asked(picture)).caption


def test_a_move_of_the_slider_gives_the_caption_of_its_neuron_then_that_of_a_random_one(server, vlm, picture):
    session = Session()
    top = server.find(session, None, Asked(picture)).nouns[0].neurons[0].neuron
    other = stand_in(vlm, session.shown[-1].image, Question(), top)
    assert other != top
    assert other.layer == top.layer
    said = []
    for neuron in (top, other):
        with intervene(vlm, [neuron], scale=0):
            said.append((f"<dt>{neuron}", vlm.caption(picture)))
    own, both = server.scale(session, None, str(top), 0)
    assert said[0][0] in own
    assert str(other) not in own
    for name, caption in said:
        assert caption in both.partition(name)[2].partition("</dd>")[0]
    with pytest.raises(SettingError, match="0 to 3"):
        list(server.scale(session, None, str(top), 4))


def test_the_random_neuron_is_drawn_once_for_a_picture_a_neuron_and_patches(server, picture, edited, monkeypatch):
    session = Session()
    names = [str(one.neuron) for one in server.find(session, None, Asked(picture)).nouns[0].neurons[:2]]
    drawn = []
    monkeypatch.setattr(visit, "stand_in", lambda *given: drawn.append(given) or stand_in(*given))

    def slide(name: str) -> int:
        list(server.scale(session, None, name, 2))
        return len(drawn)

    assert [slide(name) for name in (names[0], names[0], names[1])] == [1, 1, 2]
    session.add("pocket", edited.patches[0][1], server.limits)
    assert slide(names[1]) == 3
    server.find(session, None, Asked(str(pocket.samples()[1].path)))
    assert slide(names[1]) == 4


def test_a_neuron_page_names_the_neuron_and_the_strongest_picture_first(server, vlm, picture):
    session = Session()
    server.find(session, None, Asked(picture))
    page = server.neuron(session, None, "L1.u17")
    assert "L1.u17" in page
    assert page.count("<img") == MOST
    with pytest.raises(SettingError):
        server.neuron(session, None, "L99.u0")
    with pytest.raises(SettingError):
        server.neuron(session, None, "<script>")


@pytest.fixture(scope="module")
def run(vlm, sample_paths, tmp_path_factory) -> Path:
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("swept")
    for path in sample_paths[:3]:
        shutil.copy(path, folder)
    return mmn.sweep(vlm, folder, folder.parent / "run", top=3).folder


def test_a_run_is_a_table_of_nouns_of_neurons_and_on_their_pages(server, vlm, run):
    with_run = dataclasses.replace(server, runs=Runs([run]))
    atlas = mmn.Atlas(run)
    noun = atlas.concepts()["lemma"][0].as_py()
    assert f">{noun}<" in with_run.word("")
    best = atlas.word(noun)["neuron"][0].as_py()
    assert f'href="?neuron={best}"' in with_run.word(noun)
    assert "Gave most on" in with_run.neuron(Session(), None, best)
    silent = next(f"L1.u{i}" for i in range(1000) if f"L1.u{i}" not in atlas.sql("FROM neurons")["neuron"].to_pylist())
    assert "Gave most on" not in with_run.neuron(Session(), None, silent)
    with pytest.raises(SettingError, match="No image says 'nothing'"):
        with_run.word("nothing")
    with pytest.raises(SettingError, match="has no run"):
        server.word(noun)


def test_a_run_of_another_model_is_refused(random_vlm, run):
    with pytest.raises(SettingError, match="of another model"):
        serving(random_vlm, (), Limits(), [run])


def test_no_model_is_loaded_for_a_visitor(server):
    with pytest.raises(SettingError, match="does not have that model"):
        server.find(Session(), "someone/else", Asked("x.png"))


def test_every_page_has_a_session_of_its_own():
    session = Session()
    assert copy.deepcopy(session) is not session
    assert copy.deepcopy(session).shown is not session.shown


@pytest.mark.slow
@pytest.mark.skipif("MMNEURONS_REQUIRE_APP" not in os.environ, reason="takes a minute")
def test_many_requests_leave_no_tensor_behind(server, picture):
    import gc

    session = Session()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())  # `isinstance` wakes lazy objects

    for _ in range(3):
        server.find(session, None, Asked(picture))
    before = tensors()
    for _ in range(30):
        server.find(session, None, Asked(picture))
    assert tensors() == before
