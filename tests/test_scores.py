"""Scores that look into later blocks are, on every family, what autograd of the raw model gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from test_families import N_TOKENS, Case, case, first_row, n_positions, replay_of
from torch import Tensor, nn

import mmneurons as mmn
from mmneurons.errors import ModelError
from mmneurons.finding.result import NounFinding
from mmneurons.vlm import backward
from mmneurons.vlm.hooks.interventions import intervene
from mmneurons.vlm.weights import dense

LIMIT = 2e-4
"""Of the largest score of a word, in float32."""
FAMILIES = ("llava", "gemma3", "qwen3_vl", "llama4", "qwen3_5_moe", "blip-2 (opt)", "mllama", "florence2", "paligemma")
"""One for each kind of block: all of them would take minutes."""
NOT_FOLLOWED = {"llama4": "experts", "qwen3_5_moe": "experts", "florence2": "residual stream"}
"""Families whose FFNs are not followed, and the beginning of the reason."""
ON_CACHE = ("llava", "qwen3_vl", "blip-2 (opt)")
"""Families whose predicting positions are run alone, on the cache; of others prompt and answer may be read again."""


@contextmanager
def raised(one: Case, position: int, *, held: bool) -> Iterator[list[Tensor]]:
    """Per FFN zeros, added to what it writes at one position; `held`: what mixers and side paths write stays so."""
    anatomy, added, hooks = one.anatomy, [], []

    def add(zeros: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
        whole = output if isinstance(output, Tensor) else output[0]
        rows = whole.reshape(-1, length[0], whole.shape[-1])  # one prompt; of every expert a copy, the first counts
        padded = torch.nn.functional.pad(
            zeros[None, None], (0, 0, position % length[0], -1 - position, 0, len(rows) - 1)
        )
        changed = (rows + padded).view(whole.shape)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def hold(module: nn.Module, args: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

    def measure(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        length[0] = (args[0] if args else kwargs["hidden_states"]).shape[1]

    length = [0]
    hooks.append(anatomy.blocks[0].module.register_forward_pre_hook(measure, with_kwargs=True))
    for ffn in anatomy.ffns:
        added.append(torch.zeros(anatomy.hidden, requires_grad=True))
        hooks.append(ffn.module.register_forward_hook(partial(add, added[-1])))
    if held:
        hooks += [source.module.register_forward_hook(hold) for source in anatomy.sources]
    try:
        yield added
    finally:
        for hook in hooks:
            hook.remove()


def slopes(one: Case, step: int, *, held: bool = False) -> list[Tensor]:
    """Per FFN d log p / d what it writes where a token was predicted, by autograd of the raw model."""
    with raised(one, step - N_TOKENS - 1, held=held) as added, torch.enable_grad():
        read = one.vlm.extended(one.alone[0], one.answers[0])
        read = {name: part.clone() if isinstance(part, Tensor) else part for name, part in read.items()}
        logits = one.model(**read).logits[0, step - N_TOKENS - 1]
        said = logits.double().log_softmax(-1)[one.raw[0][step]]
        found = torch.autograd.grad(said, added, allow_unused=True)
    return [torch.zeros(one.anatomy.hidden) if slope is None else slope for slope in found]


def assert_scores(one: Case, noun: NounFinding, expected: list[Tensor]) -> None:
    """A neuron's score is its activation times column . slope; a gate behind `w_out` is in both."""
    anatomy, scores = one.anatomy, []  # looked at once: each look is at every parameter
    places = {(ffn.layer, ffn.n_experts is None): i for i, ffn in enumerate(anatomy.ffns)}
    assert len(places) == len(anatomy.ffns)
    along = cache(lambda i, expert: dense(anatomy.ffns[i].module, expert).float().T @ expected[i])
    for found in noun.neurons:
        i = places[found.neuron.layer, found.neuron.expert is None]
        factor = 1.0
        if anatomy.ffns[i].gate is not None:
            factor = float(one.recordings[0].factors[i][noun.step][0, -1].sigmoid())
        slope = float(along(i, found.neuron.expert)[found.neuron.index])
        scores.append((found.score, found.activation / factor * slope))
    ours, theirs = torch.tensor(scores).unbind(1)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LIMIT * float(theirs.abs().max()))


def watched_ways(monkeypatch) -> list[tuple[str, bool]]:
    """Note which way a gradient is had, and whether it said what was said."""
    ways: list[tuple[str, bool]] = []

    def watched(way: str, *given: Any) -> Any:
        found = usual[way](*given)
        ways.append((way, found is not None))
        return found

    usual = {way: getattr(backward, way) for way in ("on_cache", "on_whole")}
    for way in usual:
        monkeypatch.setattr(backward, way, partial(watched, way))
    return ways


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_is_that_of_the_raw_model(name, monkeypatch):
    one, ways = case(name), watched_ways(monkeypatch)
    found = first_row(one, one.alone[0], score="gradient", top=10**6)
    for noun in found.nouns:
        assert_scores(one, noun, slopes(one, noun.step))
    assert ways[-1][1]
    assert name not in ON_CACHE or ways == [("on_cache", True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_followed_is_the_gradient_with_all_but_ffns_held(name):
    one = case(name)
    if name in NOT_FOLLOWED:
        with pytest.raises(ModelError, match=NOT_FOLLOWED[name]):
            first_row(one, one.alone[0], score="followed")
        return
    found = first_row(one, one.alone[0], score="followed", top=10**6)
    for noun in found.nouns:
        assert_scores(one, noun, slopes(one, noun.step, held=True))


BOTH_WAYS = ("paligemma", "paligemma (2)")
"""Families whose prompts are read in both directions: what is written at the last position is seen by the others."""


@pytest.mark.parametrize("name", BOTH_WAYS)
@torch.inference_mode()
def test_silence_where_a_prompt_is_read_in_both_directions_is_that_of_the_raw_model(name):
    """The prompt's last position predicts the first token; the others see it, and it sees them again."""
    one = case(name)
    replay = replay_of(one, 0)
    starts = replay.slot_starts.tolist()
    sets = [torch.tensor(slots) for slots in (*([start, start + 3] for start in starts), [s + 1 for s in starts])]
    given = one.vlm.extended(one.alone[0], one.answers[0])
    place = n_positions(one, given) - N_TOKENS - 1
    for logits, slots in zip(replay.without(sets), sets, strict=True):
        neurons = [replay.neuron(int(slot)) for slot in slots]
        with intervene(one.vlm, neurons, scale=0, positions=[place]):
            expected = one.model(**given).logits[0, place].float()
        assert (expected - replay.base).abs().max() > 1e-3
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("step", [0, N_TOKENS - 1])
def test_the_gradient_finder_goes_through_the_positions_that_see_the_word(name, step):
    """By autograd of the raw model; with what mixers write held, which others see, the first token's is another."""
    one = case(name)
    replay, raw = replay_of(one, step), slopes(one, step)
    found = replay.gradients().split([len(part) for part in replay.activations])
    for ours, ffn, slope in zip(found, one.anatomy.ffns, raw, strict=True):
        expected = dense(ffn.module).float().T @ slope
        torch.testing.assert_close(ours, expected, rtol=0, atol=LIMIT * float(expected.abs().max()))
    alone = slopes(one, step, held=True)
    assert (alone[0] - raw[0]).abs().max() > 1e-2 * raw[0].abs().max()


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
@pytest.mark.parametrize("score", ["gradient", "followed"])
def test_a_row_of_a_batch_is_scored_as_it_is_alone(name, score, monkeypatch):
    """Rows of other lengths stand beside it, padded; each is asked about all its tokens, whose places differ."""
    one, ways = case(name), watched_ways(monkeypatch)
    together: Any = mmn.find(
        one.vlm,
        inputs=one.batch,
        token_ids=[*{t for row in one.raw for t in row}],
        max_new_tokens=N_TOKENS,
        score=score,
        top=10**6,
    )
    assert score == "followed" or ways[-1] == ("on_cache" if name == "llava" else "on_whole", True)
    for row, found in enumerate(together):
        alone: Any = mmn.find(
            one.vlm, inputs=one.alone[row], token_ids=one.raw[row], max_new_tokens=N_TOKENS, score=score, top=10**6
        )
        by_step = {noun.step: noun for noun in found.nouns}
        assert {*by_step} >= {*range(N_TOKENS)} - {s for s in range(N_TOKENS) if one.raw[row][s] in one.raw[row][:s]}
        for noun in alone[0].nouns:
            ours = {neuron.neuron: neuron.score for neuron in by_step[noun.step].neurons}
            theirs = {neuron.neuron: neuron.score for neuron in noun.neurons}
            assert ours.keys() == theirs.keys()
            largest = max(map(abs, theirs.values()))
            assert max(abs(ours[n] - theirs[n]) for n in theirs) < LIMIT * largest


def test_a_gradient_in_half_precision_is_that_of_full(vlm):
    """The model is sure of its words: the slope of log p is so small that float16 would lose most of it on its way."""
    image = mmn.pocket.scene(3, ["dog", "car"]).image
    whole, half = (
        mmn.find(one, image, words=["car"], score="gradient", top=10**6) for one in (vlm, mmn.load(dtype="float16"))
    )
    (noun,), (again,) = whole.nouns, half.nouns
    assert noun.probability > 0.999
    ours, theirs = ({found.neuron: found.score for found in one.neurons} for one in (again, noun))
    largest = max(map(abs, theirs.values()))
    assert max(abs(ours[neuron] - theirs[neuron]) for neuron in theirs) < 1e-2 * largest


@pytest.mark.parametrize("score", ["gradient", "logprob"])
def test_a_score_while_neurons_are_changed_is_that_of_the_model_so_changed(vlm, score):
    """Silent columns in the weights are what an intervention is to do."""
    image = mmn.pocket.scene(3, ["dog", "car"]).image
    first = mmn.find(vlm, image, score=score, top=3).nouns[0]
    silent = [found.neuron for found in first.neurons]
    with mmn.intervene(vlm, silent, scale=0):
        ours = mmn.find(vlm, image, words=[first.word], score=score, top=50)
        with pytest.raises(ModelError, match="an intervention changes"):
            mmn.find(vlm, image, words=[first.word], score="followed")
    model = copy.deepcopy(vlm.model)
    with torch.no_grad():
        for neuron in silent:
            model.model.language_model.layers[neuron.layer].mlp.down_proj.weight[:, neuron.index] = 0
    raw = mmn.find(mmn.load(model, processor=vlm.processor), image, words=[first.word], score=score, top=50)
    ours, theirs = ({n.neuron: n.score for n in found.nouns[0].neurons} for found in (ours, raw))
    largest = max(theirs.values())
    for neuron in {*theirs} & {*ours}:
        assert ours[neuron] == pytest.approx(theirs[neuron], abs=LIMIT * largest)
    assert len({*theirs} & {*ours}) > 45
