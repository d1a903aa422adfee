"""Several threads with one model, and Ctrl-C at any moment: no wrong answer, and the model is as it was."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import mmneurons as mmn
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.vlm.columns import column_hashes
from mmneurons.vlm.context import evaluating, frozen, greedy
from mmneurons.vlm.hooks.interventions import shuffled
from mmneurons.vlm.locking import restored, uninterrupted

N_TRIES = 40


def columns(vlm):
    return [block.mlp.down_proj.weight for block in vlm.model.model.language_model.layers]


def a_patch(vlm, indices, seed=0) -> Patch:
    """Random changes of these columns of the first block."""
    chosen = torch.tensor(indices)
    change = torch.randn(len(chosen), vlm.anatomy.hidden, generator=torch.Generator().manual_seed(seed))
    hashes = column_hashes(columns(vlm)[0].detach()[:, chosen].T)
    return Patch(vlm.anatomy.hidden, (PatchPart(0, None, chosen, hashes, change),))


def state(vlm):
    """All that must be as it was: weights bit for bit, ledger, hooks, modes, settings of generation."""
    model = vlm.model
    return {
        "weights": [hash(weight.detach().numpy().tobytes()) for weight in columns(vlm)],
        "patches": [patch.hash for patch in ledger_of(vlm).active],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "training": [module.training for module in model.modules()],
        "asking": [parameter.requires_grad for parameter in model.parameters()],
        "generation": id(model.generation_config),
        "padding": vlm.tokenizer.padding_side,
    }


@contextmanager
def in_threads(*functions):
    """Functions running over and over in threads of their own; what they raise is raised here."""
    stop = threading.Event()

    def over_and_over(function):
        while not stop.is_set():
            function()

    with ThreadPoolExecutor(len(functions)) as pool:
        running = [pool.submit(over_and_over, function) for function in functions]
        try:
            yield
        finally:
            stop.set()
    for one in running:
        one.result()


def test_two_threads_that_share_a_model_get_their_own_captions(vlm, sample_paths):
    asked = [(path, limit) for path in sample_paths[:3] for limit in (3, 12)]
    alone = [vlm.caption(path, max_new_tokens=limit) for path, limit in asked]
    before = state(vlm)
    again = mmn.load(vlm.model, processor=vlm.processor)  # another VLM of the same model has the same lock
    with ThreadPoolExecutor(3) as pool:
        for one in (vlm, again):
            told = [pool.submit(one.caption, path, max_new_tokens=limit) for path, limit in asked * 2]
            assert [each.result() for each in told] == alone * 2
    assert state(vlm) == before


def test_patches_of_several_threads_leave_nothing_behind(random_vlm):
    before = state(random_vlm)
    patches = [a_patch(random_vlm, [1, 2, 3, 10 + i], seed=i) for i in range(3)]
    edited = []
    for patch in patches:
        with patch.applied(random_vlm):
            edited.append(state(random_vlm))

    def put_on(i):
        for _ in range(30):
            with patches[i].applied(random_vlm):
                assert state(random_vlm) == edited[i]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(put_on, range(3)))
    assert state(random_vlm) == before


def test_what_one_thread_does_to_a_model_others_do_not_see(random_vlm):
    image = mmn.pocket.scene(3, ["dog", "car"]).image
    inputs = random_vlm.encode([[image]])
    usual = random_vlm.generate(inputs, 4)
    patch = 3 * a_patch(random_vlm, range(80))

    def ask():
        torch.testing.assert_close(random_vlm.generate(inputs, 4).logits, usual.logits, rtol=0, atol=0)

    with in_threads(ask):
        for _ in range(5):
            with patch.applied(random_vlm):
                assert not torch.equal(random_vlm.generate(inputs, 4).logits, usual.logits)
            with mmn.intervene(random_vlm, ["L0.u1", "L1.u2"], scale=50):
                assert not torch.equal(random_vlm.generate(inputs, 4).logits, usual.logits)


def caption(vlm):
    vlm.generate(vlm.given_inputs, 2)


def settle(vlm):
    with greedy(vlm.model, vlm.tokenizer, 3), frozen(vlm.model), evaluating(vlm.model):
        pass


def watch(vlm):
    with (
        mmn.record(vlm.anatomy),
        mmn.intervene(vlm, ["L0.u1", "L2.u3"], scale=0),
        shuffled(vlm, torch.tensor([[1, 2, 3]])),
    ):
        pass


def edit(vlm):
    with a_patch(vlm, range(40)).applied(vlm):
        pass


def edit_twice(vlm):
    one, other = a_patch(vlm, range(40)), a_patch(vlm, range(30, 50), seed=1)
    with one.applied(vlm), other.applied(vlm):
        pass


def until_interrupted(sender, doing, vlm):
    sender.start()
    for _ in range(10**6):
        doing(vlm)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests run in the background."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize("doing", [edit, edit_twice, watch, settle, caption])
def test_ctrl_c_at_any_moment_leaves_the_model_as_it_was(random_vlm, interruptible, doing):
    random_vlm.given_inputs = random_vlm.encode([[mmn.pocket.scene(3, ["dog"]).image]])
    caption(random_vlm)  # transformers sets hooks of its own at the first pass
    doing(random_vlm)  # and some things are imported when they are first used
    random_vlm.model.model.vision_tower.train()
    before = state(random_vlm)
    trace = random.Random(0)
    for _ in range(N_TRIES):
        delay = trace.uniform(0, 0.02)
        sender = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            until_interrupted(sender, doing, random_vlm)
        sender.join()
        assert state(random_vlm) == before
    random_vlm.model.eval()


def test_a_signal_at_any_moment_leaves_states_and_handlers_as_they_were():
    """Thousands of signals within microseconds: none is lost, none falls between two steps of a way in or out."""

    class Alarm(BaseException):
        """What the handler raises."""

    def handle(number, frame):
        raise Alarm

    on, trace = [], random.Random(0)

    @restored
    def state():
        on.append(1)
        try:
            yield
        finally:
            on.pop()

    def over_and_over():
        signal.setitimer(signal.ITIMER_REAL, trace.uniform(1e-6, 2e-4))
        while True:
            with state(), state():
                pass

    usual = signal.signal(signal.SIGALRM, handle)
    try:
        for _ in range(4000):
            with pytest.raises(Alarm):
                over_and_over()
            assert not on
            assert signal.getsignal(signal.SIGALRM) is handle
    finally:
        signal.signal(signal.SIGALRM, usual)


def test_ctrl_c_while_a_state_is_put_on_takes_it_back_and_is_raised(interruptible):
    told = []

    @restored
    def on():
        told.append("on")
        try:
            signal.raise_signal(signal.SIGINT)
            told.append("is on")
            yield
        finally:
            told.append("off")

    with pytest.raises(KeyboardInterrupt), on():
        told.append("inside")
    assert told == ["on", "is on", "off"]


def test_ctrl_c_while_a_state_is_taken_back_waits(interruptible):
    told = []

    @restored
    def on():
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGINT)
            told.append("off")

    with pytest.raises(KeyboardInterrupt), on():
        told.append("inside")
    assert told == ["inside", "off"]


def test_a_handler_that_goes_on_is_called_once_and_the_state_stays_on():
    calls = []
    usual = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
    try:

        @restored
        def on():
            signal.raise_signal(signal.SIGINT)
            yield "value"

        with on() as value, uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert (value, calls) == ("value", [signal.SIGINT])
        assert calls == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, usual)


def test_ctrl_c_ends_the_wait_for_a_model_that_another_thread_has(random_vlm, interruptible):
    has, go = threading.Event(), threading.Event()

    def keep():
        with random_vlm.alone():
            has.set()
            go.wait(60)

    keeper = threading.Thread(target=keep)
    keeper.start()
    has.wait(60)
    sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        until_interrupted(sender, edit, random_vlm)
    assert time.monotonic() - began < 30
    go.set()
    keeper.join()
    assert ledger_of(random_vlm).active == ()
    with random_vlm.alone():
        pass
