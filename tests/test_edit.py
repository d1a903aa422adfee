"""Edits: the closed forms by hand, what they promise against the bare model, and what they do to what is generated."""

from __future__ import annotations

import ast
import copy
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from kits.float64 import in_float64
from kits.zoo import randomise
from torch import Tensor, nn

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.baselines.output_layer import HeadChange
from mmneurons.data.images import open_image
from mmneurons.editing import request, strength
from mmneurons.editing.answers import TracedAnswers, likeliest_tokens, occurrences, trace_answers, trace_given
from mmneurons.editing.closed_form import flip_risk, select_columns, solve, unit_patch
from mmneurons.editing.edit import EditSettings, edit
from mmneurons.editing.reference import make_reference, sentences
from mmneurons.editing.request import EditRequest, TokenGoal, prompt_hash, token_goals
from mmneurons.editing.strength import ALLOWED_FLIPS, MARGINS, Kept, find_strength
from mmneurons.errors import MmneuronsError, SettingError, WordError
from mmneurons.maths.edits import selective, smallest
from mmneurons.neurons import Neuron
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.settings import ANSWER_PREFIX, PROMPT, Question
from mmneurons.vlm.asking import texts_of
from mmneurons.vlm.columns import HASH_BYTES, Columns, column_hashes
from mmneurons.vlm.context import placeholder_ids
from mmneurons.vlm.prompts import WORDINGS
from mmneurons.vlm.provenance import weights_hash
from mmneurons.vlm.teacher_forcing import Reader
from mmneurons.vlm.tokens import tokens_of
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says

IMAGE = pocket.scene(3, ["dog", "car"]).image
QUICK: dict[str, Any] = {"source": "dog", "target": "cat"}
ALONE: dict[str, Any] = {**QUICK, "reference": "own"}
"""No more is held as it is than the other words of the same answers."""


@cache
def edit_images(noun: str) -> list:
    return [scene.image for scene in pocket.edit_set(noun).edit]


@cache
def held_out(noun: str) -> list:
    return [scene.image for scene in pocket.edit_set(noun).held_out[:16]]


@cache
def unrelated() -> list:
    """Others than the reference, without dogs and cars."""
    scenes = (pocket.scene(660_000_000 + i) for i in range(60))
    return [scene.image for scene in scenes if not {"dog", "car"} & set(scene.objects)][:30]


@pytest.fixture(scope="module")
def reference(vlm):
    return make_reference(vlm, [pocket.scene(650_000_000 + i).image for i in range(60)])


@pytest.fixture(scope="module")
def to_cat(vlm, reference):
    """Dog -> cat with a reference."""
    return edit(vlm, edit_images("dog"), reference=reference, **QUICK)


@pytest.fixture(scope="module")
def to_bus(vlm):
    return edit(vlm, edit_images("car")[:4], source="car", target="bus", reference="own")


@pytest.fixture(autouse=True)
def unchanged(vlm):
    """No test leaves a patch behind."""
    yield
    assert ledger_of(vlm).active == ()


def share(texts: list[str], said: str | None, gone: str) -> float:
    return sum(not says(text, gone) and (said is None or says(text, said)) for text in texts) / len(texts)


# The closed forms


def test_the_closed_forms_by_hand():
    wanted = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(smallest(wanted), torch.tensor([0.5, 0.5]))
    # M = diag(1, 0), r = 0.1 * 2 / 1 * 0.5: (M + r)^-1 wanted = (1 / 1.1, 10), and wanted . c = 1.
    told = selective(wanted, torch.tensor([[1.0, 0.0]]), torch.ones(1), 0.1)
    torch.testing.assert_close(told, torch.tensor([1 / 12, 11 / 12]))
    # The mean over steps counts, not the sum; of twice as many, half the ridge for each column.
    torch.testing.assert_close(selective(wanted, torch.tensor([[1.0, 0.0]] * 2), torch.ones(2), 0.2), told)
    # M = diag(3/4, 1/4), r = 0.5 * 2 / 2 * 0.5: (1, 2), whatever the weights sum to.
    told = selective(wanted, torch.eye(2), torch.tensor([6.0, 2.0]), 0.5)
    torch.testing.assert_close(told, torch.tensor([1 / 3, 2 / 3]))
    # Columns of lengths 1 and 1/2: in these, wanted is (1, 1/2), M = diag(4, 0), r = 1/4 * 2 / 1 * 2 = 1, and
    # (1/5, 1/2) / 0.45 = (4/9, 10/9) of their lengths.
    told = selective(torch.ones(2), torch.tensor([[2.0, 0.0]]), torch.ones(1), 0.25, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(told, torch.tensor([4 / 9, 5 / 9]))
    # A column of no length has no share that it could change by.
    told = selective(torch.ones(2), torch.tensor([[2.0, 0.0]]), torch.ones(1), 0.25, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(told, torch.tensor([1.0, 0.0]))


NUMBERS = st.floats(-3, 3, width=16)


@st.composite
def problems(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    wanted = torch.tensor(draw(st.lists(NUMBERS, min_size=n, max_size=n)))
    weights = torch.tensor(draw(st.lists(st.floats(0.125, 4, width=16), min_size=m, max_size=m)))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=m, max_size=m))
    if wanted.abs().max() < 0.1:
        wanted[0] = 1.0
    return wanted, torch.tensor(rows), weights


@given(problems(), st.floats(0.01, 10), st.integers(0, 2**31))
def test_selective_does_one_where_it_should_and_least_elsewhere(problem, ridge, seed):
    wanted, rows, weights = problem
    c = selective(wanted, rows, weights, ridge)
    assert float(wanted @ c) == pytest.approx(1, abs=1e-4)
    assert float(wanted @ smallest(wanted)) == pytest.approx(1, abs=1e-4)
    shares = weights / weights.sum()
    r = ridge * len(wanted) / len(rows) * float((shares[:, None] * rows.pow(2)).sum(0).mean())

    def cost(c: Tensor) -> float:
        return float((shares * (rows @ c).pow(2)).sum() + r * c.pow(2).sum())

    other = torch.randn(len(wanted), generator=torch.Generator().manual_seed(seed))
    other += smallest(wanted) * (1 - wanted @ other)  # does 1 too
    for nearby in (other, c + 0.1 * (other - c), smallest(wanted)):
        assert cost(c) <= cost(nearby) * (1 + 1e-4) + 1e-7


@given(problems())
def test_a_huge_ridge_gives_the_smallest_change_and_a_tiny_one_minds_the_reference(problem):
    wanted, rows, _ = problem
    alike = torch.ones(len(rows))
    if bool(rows.any()):
        torch.testing.assert_close(selective(wanted, rows, alike, 1e8), smallest(wanted), rtol=1e-3, atol=1e-4)
    tiny, small = (float((rows @ selective(wanted, rows, alike, ridge)).pow(2).mean()) for ridge in (1e-3, 1.0))
    assert tiny <= small * (1 + 1e-4) + 1e-6


# What was recorded, against bare hooks


def test_steps_are_what_bare_hooks_see(vlm):
    images = [*edit_images("dog")[:4], IMAGE]
    said = trace_answers(vlm, images, Question(batch_size=3))
    assert len({len(ids) for ids in said.token_ids}) > 1  # rows end at different steps
    assert said.steps.token_ids.tolist() == [token for ids in said.token_ids for token in ids]
    assert said.steps.answer_ids.tolist() == [i for i, ids in enumerate(said.token_ids) for _ in ids]
    torch.testing.assert_close(vlm.anatomy.logits(said.steps.residual).max(-1).values, said.steps.logits)
    for start in (0, 3):
        rows = images[start : start + 3]
        seen = [[] for _ in vlm.anatomy.ffns]
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, mine=mine: mine.append(args[0][:, -1]))
            for layer, mine in zip(vlm.model.model.language_model.layers, seen, strict=True)
        ]
        try:
            made = vlm.model.generate(**vlm.encode(rows, PROMPT, ANSWER_PREFIX), do_sample=False, max_new_tokens=32)
        finally:
            for hook in hooks:
                hook.remove()
        for i in range(len(rows)):
            ids = said.token_ids[start + i]
            answer = made[i, made.shape[1] - len(seen[0]) :]
            assert answer[: len(ids)].tolist() == list(ids)
            for step in range(len(ids)):
                row = said.row(start + i, step)
                for mine, ours in zip(seen, said.steps.activations, strict=True):
                    torch.testing.assert_close(ours[row], mine[step][i], rtol=1e-4, atol=1e-5)


def continued(vlm: VLM, image: Any, ids: tuple[int, ...] | list[int]) -> Tensor:
    """The bare model's logits behind a prompt and the beginning of an answer."""
    with torch.no_grad():
        return vlm.model(**appended(vlm, image, ids)).logits[0, -1]


def appended(vlm: VLM, image: Any, ids: tuple[int, ...] | list[int]) -> dict[str, Tensor]:
    """The bare model's inputs for that."""
    inputs = dict(vlm.encode([image], PROMPT, ANSWER_PREFIX))
    added = torch.tensor([list(ids)], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def test_forced_steps_are_those_of_the_bare_model(vlm):
    ids = tokens_of(vlm.tokenizer, "trumpet")
    forced = trace_given(vlm, IMAGE, ids)
    assert len(forced) == len(ids) + 1
    for step in range(len(ids) + 1):
        expected = continued(vlm, IMAGE, ids[:step])
        torch.testing.assert_close(forced.logits[step], expected.max(), rtol=1e-4, atol=1e-4)
        assert int(forced.token_ids[step]) == int(expected.argmax())


# The effect that a move promises, against the bare model with the patch applied


@contextmanager
def norms_held(*norms: nn.Module):
    """From the second pass on, norms divide by what they divided by in the first: what is to first order, is exact."""
    before: dict[nn.Module, Tensor] = {}

    def divisor(module: nn.Module, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        eps = next(float(getattr(module, name)) for name in ("variance_epsilon", "eps") if hasattr(module, name))
        return (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        now = divisor(module, args[0])
        then = before.setdefault(module, now.detach())
        bias = getattr(module, "bias", None)
        bias = torch.zeros(()) if bias is None else bias
        return (output - bias) * (now / then) + bias

    hooks = [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def true_effect(vlm: VLM, patch: Patch, goal: TokenGoal, image: Any, begun: tuple[int, ...]) -> float:
    """What a patch does to logit(wanted) - logit(said), the norms behind the last block held."""
    held = [vlm.anatomy.norm_module, *(site.module for site in vlm.anatomy.norms if f".{last(vlm)}." in site.name)]

    def difference() -> float:
        logits = continued(vlm, image, begun)
        return float(logits[goal.wanted] - logits[goal.said])

    with norms_held(*held):
        before = difference()
        with patch.applied(vlm):
            return difference() - before


def gradient(vlm: VLM, goal: TokenGoal, image: Any, begun: tuple[int, ...]) -> Tensor:
    """Of logit(wanted) - logit(said) by the last block's `w_out`, norms held; by autograd."""
    held = [vlm.anatomy.norm_module, *(site.module for site in vlm.anatomy.norms if f".{last(vlm)}." in site.name)]
    weight: Any = vlm.anatomy.ffns[-1].module.weight
    inputs = appended(vlm, image, begun)
    with norms_held(*held):
        logits = vlm.model(**inputs).logits[0, -1]
    return torch.autograd.grad(logits[goal.wanted] - logits[goal.said], weight)[0]


def last(vlm: VLM) -> int:
    return len(vlm.anatomy.blocks) - 1


@pytest.mark.parametrize("method", ["selective", "closed_form"])
def test_the_effect_is_that_on_the_logits_and_one_in_the_mean(vlm, method):
    images = edit_images("dog")[:4]
    said = trace_answers(vlm, images)
    found = occurrences(vlm, said, "dog")
    asked = EditRequest(images, Question(), said, found)
    (goal,) = token_goals(vlm, [asked], "cat")
    columns = select_columns(vlm, [goal], 50, blocks=1)
    rest = torch.ones(len(said.steps), dtype=torch.bool)
    rest[[said.row(answer, word.steps[0]) for answer, word in found]] = False
    (update,) = solve(vlm, columns, [goal], [said.steps.at(rest)], 0.1 if method == "selective" else None)
    effect = update.effect(goal.steps)
    assert float(effect.mean()) == pytest.approx(1, abs=1e-4)
    assert len(columns.neurons) == 50
    patch = 3 * unit_patch(vlm, columns, [update])
    for (answer, word), promised in zip(found, effect.tolist(), strict=True):
        begun = said.token_ids[answer][: word.steps[0]]
        assert true_effect(vlm, patch, goal, images[answer], begun) == pytest.approx(3 * promised, rel=1e-3, abs=1e-3)


SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "more"),
    [(hf.Gemma2Config, {}), (hf.PhiConfig, {}), (hf.Qwen3MoeConfig, EXPERTS)],
    ids=["norm after the FFN", "LayerNorm", "fused experts"],
)
def test_the_effect_in_other_families(vlm, config, more):
    tokens = {"vocab_size": len(vlm.tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    llava = hf.LlavaConfig(
        vision_config=copy.deepcopy(vlm.model.config.vision_config),
        text_config=config(**SIZES, **tokens, **more),
        image_token_id=vlm.model.config.image_token_id,  # pyright: ignore[reportCallIssue]
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    raw: Any = randomise(hf.LlavaForConditionalGeneration(llava).eval())
    if more:
        raw.set_experts_implementation("eager")  # the grouped kernel knows no float64
    with in_float64(mmn.load(raw, processor=vlm.processor)) as other:
        before = weights_hash(other.model)
        said = trace_answers(other, [IMAGE, edit_images("dog")[0]], Question(max_new_tokens=4))
        goal = TokenGoal(said.token_ids[0][2], 99, said.steps.at(torch.tensor([2])))
        columns = select_columns(other, [goal], 20, blocks=1)
        kept = [said.steps.at(torch.tensor([0, 1, 4, 5]))]
        (update,), (steepest,) = (solve(other, columns, [goal], kept, ridge) for ridge in (0.1, None))
        assert float(update.effect(goal.steps).mean()) == pytest.approx(1)
        if more:
            assert {neuron.expert for neuron in columns.neurons} <= set(range(4))
            assert len({neuron.expert for neuron in columns.neurons}) == 2  # those that the router asked
        else:  # columns of the smallest change move along the steepest direction: that of the gradient
            slope = gradient(other, goal, IMAGE, said.token_ids[0][:2])[:, columns.indices[1]].T
            unit = unit_patch(other, columns, [steepest])
            cosine = torch.cosine_similarity(slope, unit.deltas(unit.parts[0])).abs()
            assert cosine[slope.norm(dim=1) > 0].min() > 0.999
        patch = 0.01 * unit_patch(other, columns, [update])
        for step in (2, 3):
            promised = 0.01 * float(update.effect(said.steps.at(torch.tensor([step]))))
            told = true_effect(other, patch, goal, IMAGE, said.token_ids[0][:step])
            assert told == pytest.approx(promised, rel=1e-5)
        assert weights_hash(other.model) == before


def test_a_selective_edit_moves_along_what_spares_other_tokens(vlm):
    """For what it does to what is wanted, it does less to the logits of all tokens than the steepest direction."""
    said = trace_answers(vlm, edit_images("dog")[:2])
    found = occurrences(vlm, said, "dog")
    (goal,) = token_goals(vlm, [EditRequest(edit_images("dog")[:2], Question(), said, found)], "cat")
    columns, layer = select_columns(vlm, [goal], 50, blocks=1), last(vlm)
    row = goal.row(vlm.anatomy.unembed)
    reads = goal.steps.at(torch.zeros(vlm.n_tokens, dtype=torch.long)).directions(vlm.anatomy.unembed[: vlm.n_tokens])
    size = []
    for ridge in (0.1, None):
        (update,) = solve(vlm, columns, [goal], [said.steps], ridge)
        adds = reads.at(vlm.anatomy.ffns[layer].path) @ update.along[layer]
        size.append(float(adds.norm() / (adds[goal.wanted] - adds[goal.said])))
        assert float(goal.steps.directions(row.expand(len(goal.steps), -1)).at(None)[0] @ update.along[layer]) > 0
    assert size[0] < 0.8 * size[1]


# Which columns


def test_the_ridge_charges_each_column_for_the_share_of_its_length_that_it_changes(vlm):
    said = trace_answers(vlm, edit_images("dog")[:2])
    goal = TokenGoal(int(said.steps.token_ids[2]), tokens_of(vlm.tokenizer, "cat")[0], said.steps.at(torch.tensor([2])))
    columns = select_columns(vlm, [goal], 60, blocks=1)
    (update,) = solve(vlm, columns, [goal], [said.steps], 1e9)
    [part] = (patch := unit_patch(vlm, columns, [update])).parts
    lengths = vlm.anatomy.ffns[-1].module.weight.detach().float()[:, part.indices].norm(dim=0)
    assert lengths.max() > 1.5 * lengths.min()
    # Of all changes that do the same at one step, the smallest in shares of the lengths: share_i ~ length_i * |a_i|.
    shares = patch.deltas(part).norm(dim=1) / lengths
    ratios = shares / (lengths * goal.steps.activations[-1][0, part.indices].float().abs())
    torch.testing.assert_close(ratios / ratios.mean(), torch.ones(60), rtol=1e-3, atol=1e-3)


def test_the_writers_are_those_that_find_names(vlm):
    """Top columns by mean contribution of the one answer are those of `find` for that word."""
    image = edit_images("dog")[0]
    said = trace_answers(vlm, [image])
    ((answer, word),) = occurrences(vlm, said, "dog")
    goal = TokenGoal(
        said.token_ids[answer][word.steps[0]], None, said.steps.at(torch.tensor([said.row(0, word.steps[0])]))
    )
    found: Any = mmn.find(vlm, image, words="dog", top=30)
    assert set(select_columns(vlm, [goal], 30, "all").neurons) == {n.neuron for n in found.nouns[0].neurons}
    assert {neuron.layer for neuron in select_columns(vlm, [goal], 30, 2).neurons} <= {last(vlm) - 1, last(vlm)}


def test_a_patch_is_the_moves_together(vlm):
    """Two goals on the same columns: what is added is the sum of both, each along its own direction."""
    said = trace_answers(vlm, [IMAGE])
    goals = [
        TokenGoal(int(said.steps.token_ids[i]), wanted, said.steps.at(torch.tensor([i])))
        for i, wanted in ((0, 9), (1, 8))
    ]
    columns = Columns.of(vlm.anatomy, [Neuron(1, 5), Neuron(4, 7), Neuron(4, 2), Neuron(4, 7)])
    assert columns.neurons == [Neuron(1, 5), Neuron(4, 2), Neuron(4, 7)]
    updates = solve(vlm, columns, goals, [], None)
    both = unit_patch(vlm, columns, updates)
    alone = [unit_patch(vlm, columns, [update]) for update in updates]
    for i, part in enumerate(both.parts):
        torch.testing.assert_close(both.deltas(part), sum(one.deltas(one.parts[i]) for one in alone))
        assert torch.equal(part.hashes, column_hashes(vlm.anatomy.ffns[part.layer].module.weight[:, part.indices].T))


def test_a_patch_of_experts_beside_a_dense_ffn_is_the_same_from_a_file(tmp_path):
    """Whatever the order of its parts: a patch that was applied is taken back by the one that is read."""
    one = torch.tensor([0]), torch.zeros(1, HASH_BYTES, dtype=torch.uint8), torch.ones(1, 4)
    patch = Patch(4, tuple(PatchPart(2, expert, *one) for expert in (1, 0, None)))
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").hash == patch.hash


# Where what shall be said


def written(vlm: VLM, image: Any, text: str) -> TracedAnswers:
    """As if the model had answered with this text."""
    ids = vlm.tokenizer(text, add_special_tokens=False).input_ids
    steps = trace_given(vlm, image, ids).at(torch.arange(len(ids)))
    return TracedAnswers((text,), (tuple(ids),), replace(steps, token_ids=torch.tensor(ids)))


def test_each_form_has_its_own_goal(vlm):
    said = written(vlm, IMAGE, "Foxes and a fox and a Fox")
    found = occurrences(vlm, said, "fox")
    assert [word.text for _, word in found] == ["Foxes", "fox", "Fox"]
    goals = token_goals(vlm, [EditRequest([IMAGE], Question(), said, found)], "wolf")
    wanted: dict[tuple[int, int], int] = {}
    for (_, word), form in zip(found, ("Wolves", "wolf", "Wolf"), strict=True):
        # With the space of the word whose place it takes: the first one here has none.
        begins = said.token_ids[0][word.steps[0]]
        pair = (begins, tokens_of(vlm.tokenizer, form, like=begins)[0])
        wanted[pair] = wanted.get(pair, 0) + 1
    first = {(goal.said, goal.wanted): goal for goal in goals}
    assert wanted.keys() <= first.keys()
    for pair, n in wanted.items():
        assert len(first[pair].steps) >= n
    for goal in goals:
        torch.testing.assert_close(
            goal.row(vlm.anatomy.unembed), vlm.anatomy.unembed[goal.wanted] - vlm.anatomy.unembed[goal.said]
        )


def test_further_tokens_of_the_target_are_wanted_behind_those_before(vlm):
    said = trace_answers(vlm, edit_images("dog")[:1])
    found = occurrences(vlm, said, "dog")
    goals = token_goals(vlm, [EditRequest(edit_images("dog")[:1], Question(), said, found)], "kiwi")
    target = tokens_of(vlm.tokenizer, "kiwi")
    assert len(target) > 1
    begun = list(said.token_ids[0][: found[0][1].steps[0]])
    expected = []
    for i, token in enumerate(target):
        told = int(continued(vlm, edit_images("dog")[0], [*begun, *target[:i]]).argmax())
        if told != token:
            expected.append((told, token))
    assert [(goal.said, goal.wanted) for goal in goals] == expected


def test_a_removal_wants_what_is_next_best(vlm):
    said = trace_answers(vlm, edit_images("dog")[:2])
    found = occurrences(vlm, said, "dog")
    (goal,) = token_goals(vlm, [EditRequest(edit_images("dog")[:2], Question(), said, found)], None)
    assert goal.wanted is None
    # Towards what would be said next best there, step by step.
    logits = vlm.anatomy.logits(goal.steps.residual)
    assert goal.runners_up == tuple(logits.topk(2).indices[:, 1].tolist())
    unembed = vlm.anatomy.unembed
    torch.testing.assert_close(
        goal.row(unembed), unembed[list(goal.runners_up)].mean(0) - unembed[goal.said], check_dtype=False
    )


# End to end


def test_dogs_become_cats_and_nothing_else_changes(vlm, to_cat):
    usual = vlm.caption(held_out("dog"))
    shown = [image for image, text in zip(held_out("dog"), usual, strict=True) if says(text, "dog")]
    assert len(shown) >= 12
    others = vlm.caption(unrelated())
    with to_cat.applied(vlm):
        assert share(vlm.caption(shown), "cat", "dog") >= 0.9
        same = sum(a == b for a, b in zip(vlm.caption(unrelated()), others, strict=True))
    assert same >= len(others) - 1
    assert vlm.caption(held_out("dog")[:4]) == usual[:4]


def test_what_the_reference_holds_is_spared(vlm, to_cat, reference):
    """Against what the edit does to its own words, it does less there than one that knows no reference."""
    alone = edit(vlm, edit_images("dog"), **ALONE)
    said = trace_answers(vlm, edit_images("dog"))
    dogs = said.steps.at(torch.tensor([said.row(i, word.steps[0]) for i, word in occurrences(vlm, said, "dog")]))
    cat, dog = (vlm.anatomy.unembed[tokens_of(vlm.tokenizer, word)[0]].detach() for word in ("cat", "dog"))
    rest = reference.steps.at(~reference.says(vlm, "dog"))

    def effect(patch: Patch, steps: Any) -> Tensor:
        ways = steps.directions((cat - dog).expand(len(steps), -1))
        (part,) = patch.parts
        return (steps.activations[part.layer][:, part.indices] @ patch.deltas(part) * ways.at(None)).sum(1)

    risk = [float(effect(p, rest).pow(2).mean().sqrt() / effect(p, dogs).mean()) for p in (to_cat, alone)]
    assert risk[0] < 0.95 * risk[1]


def test_without_a_reference_one_is_made_of_shipped_sentences_and_the_models_own_images(vlm, monkeypatch):
    scenes = [pocket.scene(650_000_000 + i) for i in range(3)]
    monkeypatch.setattr(pocket, "evaluation_set", {"reference-400": scenes}.get)
    monkeypatch.setattr(pocket, "facts", lambda: TEXTS)
    made = mmn.default_reference(vlm, Question(prompt="What is in the image?"))
    assert made is not None
    assert [open_image(image).image.tobytes() for image in made.images] == [scene.image.tobytes() for scene in scenes]
    assert made.texts == (*TEXTS[::4], *sentences())
    assert len(set(sentences())) > 100
    few = sentences()[:4]  # from here on: who is given one, not what is in it
    monkeypatch.setattr("mmneurons.editing.reference.sentences", lambda: few)
    made = mmn.default_reference(vlm, Question(prompt="What is in the image?"))
    assert made is not None
    told = []
    patch = edit(
        vlm,
        edit_images("dog")[:2],
        **QUICK,
        prompt="What is in the image?",
        progress=lambda *what: told.append(what[0]),
    )
    assert patch.provenance["reference"] == made.facts
    assert "reading what is to stay as it is" in told
    alone = edit(vlm, edit_images("dog")[:2], **ALONE, prompt="What is in the image?")
    assert alone.provenance["reference"] is None
    # Any other model reads the sentences alone.
    other = copy.copy(vlm)
    other.is_pocket = False
    made = mmn.default_reference(other)
    assert made is not None
    assert (made.images, made.texts) == ((), few)


def test_the_sentences_that_edits_are_judged_by_are_others_than_those_they_are_made_with():
    judged = Path(__file__).parents[1].joinpath("benchmarks", "quality", "sentences.txt").read_text().splitlines()
    assert len(set(judged)) == 200
    assert not set(judged) & {*sentences(), *pocket.facts()}


def test_one_image_in_four_takes_no_part_in_the_choice_of_strength(vlm, to_cat, monkeypatch):
    asked = []

    def counted(vlm, images, question):
        asked.extend(images)
        return texts_of(vlm, images, question)

    monkeypatch.setattr(request, "texts_of", counted)
    images = edit_images("dog")
    patch = edit(vlm, images, **ALONE)
    assert {id(image) for image in asked} == {id(images[i]) for i in (0, 1, 2, 4, 5, 6)}
    assert patch.provenance["searched"] == [prompt_hash(images[i]) for i in (0, 1, 2, 4, 5, 6)]
    assert to_cat.provenance["searched"] == patch.provenance["searched"]
    # Of few, none is spared.
    patch = edit(vlm, images[:4], **ALONE)
    assert patch.provenance["searched"] == [prompt_hash(image) for image in images[:4]]


def test_the_patch_says_what_made_it(vlm, to_cat, reference):
    made_by = to_cat.provenance
    assert (made_by["source"], made_by["target"], made_by["images"]) == ("dog", "cat", 8)
    assert made_by["model"]["weights_hash"] == weights_hash(vlm.model)
    assert made_by["reference"] == reference.facts
    assert made_by["search"]["turned"] == 1
    assert len(to_cat.neurons) == EditSettings().top < vlm.anatomy.ffns[-1].n_neurons
    assert {neuron.layer for neuron in to_cat.neurons} == {last(vlm)}


def test_a_word_is_removed(vlm):
    patch = edit(vlm, edit_images("dog")[:4], source="dog", reference="own", max_new_tokens=12)
    with patch.applied(vlm):
        assert share(vlm.caption(edit_images("dog")[:4], max_new_tokens=12), None, "dog") >= 0.75
        assert share(vlm.caption(held_out("dog")[:8], max_new_tokens=12), None, "dog") >= 0.6


def test_a_target_of_several_tokens_is_said(vlm):
    assert len(tokens_of(vlm.tokenizer, "kiwi")) > 1
    patch = edit(vlm, edit_images("dog")[:3], source="dog", target="kiwi", reference="own", max_new_tokens=16)
    with patch.applied(vlm):
        assert share(vlm.caption(edit_images("dog")[:3], max_new_tokens=16), "kiwi", "dog") >= 0.6


def test_several_prompts_are_each_asked_with_one_image(vlm):
    prompts = (PROMPT, WORDINGS[0])
    image = edit_images("dog")[:1]
    patch = edit(vlm, image, settings=EditSettings(wordings=prompts[1:]), **ALONE)
    assert patch.provenance["said_source"] == [1, 1]
    assert patch.provenance["answer_prefixes"] == [ANSWER_PREFIX, ""]
    assert patch.provenance["settings"]["answer_prefix"] == ANSWER_PREFIX
    with patch.applied(vlm):
        for prompt in prompts:
            assert share(vlm.caption(image, prompt), "cat", "dog") == 1


def test_images_that_show_no_dog_do_not_keep_the_others_from_being_edited(vlm):
    mixed = [unrelated()[0], *edit_images("dog")[:3]]
    before = vlm.caption(mixed[:1])
    patch = edit(vlm, mixed, **ALONE)
    assert patch.provenance["said_source"] == [3]
    with patch.applied(vlm):
        assert share(vlm.caption(mixed[1:]), "cat", "dog") == 1
        assert vlm.caption(mixed[:1]) == before


def test_given_neurons_are_those_that_move(vlm, to_cat):
    patch = edit(vlm, edit_images("dog")[:2], neurons=to_cat.neurons[:40], **ALONE)
    assert patch.neurons == to_cat.neurons[:40]


def test_an_edit_beside_another_is_of_the_unedited_columns_and_both_work(vlm, to_bus):
    with to_bus.applied(vlm):
        patch = edit(vlm, edit_images("dog")[:3], **ALONE)
        assert ledger_of(vlm).active == (to_bus,)
    for part in patch.parts:
        pristine = vlm.anatomy.ffns[part.layer].module.weight.detach()[:, part.indices].T
        assert torch.equal(part.hashes, column_hashes(pristine))
    assert set(patch.neurons) & set(to_bus.neurons)
    with patch.applied(vlm), to_bus.applied(vlm):
        assert share(vlm.caption(edit_images("dog")[:3]), "cat", "dog") == 1
        assert share(vlm.caption(edit_images("car")[:4]), "bus", "car") >= 0.75


# The strength


def test_a_reference_is_asked_again_as_it_was_asked(vlm):
    """Answers cut short are compared with answers cut short: the edit is no weaker for it."""
    images = [pocket.scene(650_000_000 + i).image for i in range(6)]
    short = make_reference(vlm, images, max_new_tokens=2)
    patch = edit(vlm, edit_images("dog")[:2], reference=short, **QUICK)
    assert patch.provenance["search"]["changed"] <= 1


TEXTS = pocket.facts()[::32]


@pytest.fixture(scope="module")
def with_texts(vlm):
    return make_reference(vlm, [pocket.scene(650_000_000 + i).image for i in range(8)], TEXTS)


def flips_of(vlm: VLM, edit: Any, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], Tensor]:
    """What has been read at each position, and whether another token is likeliest there with an edit."""
    ids = [vlm.tokenizer(text).input_ids for text in texts]
    usual = torch.cat(likeliest_tokens(vlm, texts))
    with edit.applied(vlm):
        changed = torch.cat(likeliest_tokens(vlm, texts)) != usual
    return [tuple(mine[: i + 1]) for mine in ids for i in range(len(mine))], changed


def test_text_positions_count_once_and_for_all_that_read_the_same(vlm, with_texts, to_cat):
    read, changed = flips_of(vlm, 3 * to_cat, TEXTS)
    counts = with_texts.text_counts
    assert 0 < int(changed.sum()) < len(read)
    assert len(counts) == int(counts.sum()) == len(read)
    assert {read[i]: int(counts[i]) for i in counts.nonzero()[:, 0]} == Counter(read)
    distinct = with_texts.positions(torch.zeros(len(with_texts.steps)), len(read))
    assert sorted(distinct) == counts.nonzero()[:, 0].tolist()
    reader, first = Reader(vlm, 0, cache=True, batch_size=8), int(changed.nonzero()[0, 0])
    every, two = (Kept(reader, with_texts, "dog", [], positions) for positions in (distinct, [first, 0]))
    with (3 * to_cat).applied(vlm):
        assert every.changes() == (0, pytest.approx(float(changed.float().mean())))
        shares = int(counts[first]) + int(counts[0]) * int(changed[0])
        assert two.changes() == (0, pytest.approx(shares / len(read)))
    assert every.changes() == two.changes() == (0, 0)


def test_answers_that_reading_says_would_change_are_those_that_change(vlm, with_texts, to_cat):
    """Greedily, an answer stays as it is where each of its steps does: no token of it need be generated."""
    assert with_texts.answers is not None
    for factor in (1, 3, 8):
        edited, seen = factor * to_cat, list[int]()
        for lowest in (0, last(vlm)):
            kept = Kept(Reader(vlm, lowest, cache=True, batch_size=3), with_texts, "dog", [*range(8)], [])
            with edited.applied(vlm):
                seen.append(kept.changes()[0])
        with edited.applied(vlm):
            now = vlm.caption([*with_texts.images])
        usual = with_texts.answers.texts
        said = [text != before for text, before in zip(now, usual, strict=True) if not says(before, "dog")]
        assert seen == [sum(said)] * 2
    assert seen[0] > 0


def test_what_generating_never_says_is_not_read_either(vlm, with_texts):
    """What stands for a picture is barred from answers, however likely: reading with an edit bars it too."""
    (image,) = (token for token in placeholder_ids(vlm.model.config) if token < vlm.n_tokens)
    reader = Reader(vlm, last(vlm), cache=True, batch_size=8)
    batches = reader.read(with_texts.images[:2], with_texts.question, with_texts.given(vlm, None)[:2])
    usual = [reader.likeliest(batch) for batch in batches]

    def louder(module, args, output):
        output = output.clone()
        output[..., image] += 1e4
        return output

    hook = vlm.anatomy.head.register_forward_hook(louder)
    try:
        assert vlm.caption([*with_texts.images[:2]]) == [*with_texts.answers.texts[:2]]
        assert all(torch.equal(reader.likeliest(b), tokens) for b, tokens in zip(batches, usual, strict=True))
    finally:
        hook.remove()


def test_strength_by_reading_is_strength_by_generating(vlm, to_cat, monkeypatch):
    """What is read decides nothing that is not generated then, and saves generating."""
    search = to_cat.provenance["search"]
    n = len(edit_images("dog"))
    assert search["generated"] <= 3 * n
    monkeypatch.setattr(strength._Trials, "reads", strength._Trials.generates)
    slow = edit(vlm, edit_images("dog"), source="dog", target="cat", reference="own").provenance["search"]
    quick = edit(vlm, edit_images("dog"), source="dog", target="cat", reference="own")
    assert slow["smallest"] == quick.provenance["search"]["smallest"]
    assert slow["turned"] == quick.provenance["search"]["turned"] == 1


def test_harm_is_one_over_the_strength_at_which_something_else_is_said(vlm, with_texts):
    said = trace_answers(vlm, edit_images("ball")[:2])
    found = occurrences(vlm, said, "ball")
    goals = token_goals(vlm, [EditRequest(edit_images("ball")[:2], Question(), said, found)], "bear")
    columns = select_columns(vlm, goals, 50, blocks=1)
    updates = solve(vlm, columns, goals, [with_texts.steps], 0.1)
    risk = flip_risk(vlm, with_texts, updates)[-len(with_texts.text_counts) :]
    assert with_texts.text_steps is not None
    balls = with_texts.text_steps.token_ids == goals[0].said
    assert bool(balls.any())
    assert bool((risk[balls] == -torch.inf).all())
    usual = torch.cat(likeliest_tokens(vlm, TEXTS))
    seconds = with_texts.seconds[-len(usual) :]
    for factor in (20.0, 60.0):
        with (factor * unit_patch(vlm, columns, updates)).applied(vlm):
            now = torch.cat(likeliest_tokens(vlm, TEXTS))
        # A third word, neither wanted nor second before, may overtake; a step at its very limit may fall either way.
        told = ~balls & torch.stack([now == one for one in (usual, seconds, goals[0].said, goals[0].wanted)]).any(0)
        told &= (factor * risk - 1).abs() > 1e-3
        assert int(told.sum()) > 0.9 * int((~balls).sum())
        assert bool((now != usual)[told].any())
        assert torch.equal((now != usual)[told], (factor * risk > 1)[told])


def test_texts_of_the_reference_hold_an_edit_back(vlm):
    """A bias on two logits is as strong as these texts bear: the largest margin at which few of them change."""
    images = edit_images("dog")[:2]
    said = trace_answers(vlm, images)
    asked = [EditRequest(images, Question(), said, occurrences(vlm, said, "dog"))]
    dog, cat = (tokens_of(vlm.tokenizer, word)[0] for word in ("dog", "cat"))
    unit = HeadChange(((dog, cat),), 1.0)
    options: dict[str, Any] = {"start": 4.0, "lowest": last(vlm), "tell": lambda what: None}
    smallest_that_turns = find_strength(vlm, unit, asked, "dog", "cat", reference=None, risk=None, **options).smallest
    _, changed = flips_of(vlm, 1.5 * smallest_that_turns * unit, TEXTS)
    lengths = [len(vlm.tokenizer(text).input_ids) for text in TEXTS]
    quiet = [text for text, part in zip(TEXTS, changed.split(lengths), strict=True) if not bool(part.any())]
    reference = make_reference(vlm, texts=quiet)
    logits = vlm.anatomy.logits(reference.steps.residual)[:, cat]
    risk = logits - reference.steps.logits
    found = find_strength(vlm, unit, asked, "dog", "cat", reference=reference, risk=risk, **options)
    assert found.smallest == smallest_that_turns
    usual, shares = torch.cat(likeliest_tokens(vlm, quiet)), dict[float, float]()
    for margin in MARGINS:
        with (margin * found.smallest * unit).applied(vlm):
            shares[margin] = float((torch.cat(likeliest_tokens(vlm, quiet)) != usual).float().mean())
    assert shares[max(MARGINS)] > ALLOWED_FLIPS
    assert found.strength / found.smallest == max(margin for margin in MARGINS if shares[margin] <= ALLOWED_FLIPS) > 1
    assert found.flipped == pytest.approx(shares[found.strength / found.smallest])
    assert (found.looked_at, found.turned) == (0, 1)


def test_reference_answers_that_say_the_source_hold_no_edit_back(vlm):
    """They are to change, however few other answers there are to look at."""
    images = edit_images("dog")[:2]
    said = trace_answers(vlm, images)
    asked = [EditRequest(images, Question(), said, occurrences(vlm, said, "dog"))]
    dog, cat = (tokens_of(vlm.tokenizer, word)[0] for word in ("dog", "cat"))
    unit = HeadChange(((dog, cat),), 1.0)
    reference = make_reference(vlm, [*images, *edit_images("ball")[:3]])
    assert reference.answers is not None
    others = [text for text in reference.answers.texts if not says(text, "dog")]
    found = find_strength(
        vlm,
        unit,
        asked,
        "dog",
        "cat",
        start=4.0,
        lowest=last(vlm),
        reference=reference,
        risk=torch.zeros(len(reference.steps)),
        tell=lambda what: None,
    )
    assert found.looked_at == len(others) == 3


@pytest.mark.parametrize(
    ("owner", "name"), [(request, "texts_of"), (Reader, "likeliest")], ids=["generating", "reading"]
)
def test_the_model_is_as_it_was_whatever_happens(vlm, monkeypatch, owner, name):
    before, calls = weights_hash(vlm.model), []

    def interrupted(*args, **options):
        calls.append(ledger_of(vlm).active)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit(vlm, edit_images("dog")[:2], **ALONE)
    assert [len(active) for active in calls] == [1]  # it was being tried
    assert ledger_of(vlm).active == ()
    assert weights_hash(vlm.model) == before


def test_an_edit_leaves_the_model_as_it_was(vlm, to_cat):
    assert weights_hash(vlm.model) == to_cat.provenance["model"]["weights_hash"] == weights_hash(mmn.load().model)


def test_no_strength_is_told(vlm, monkeypatch):
    monkeypatch.setattr(request, "texts_of", lambda vlm, images, question: ["a dog and a cat"] * len(images))
    with pytest.raises(SettingError, match=r"(?s)No strength makes the model say 'cat' for 'dog'.*Tried up to") as told:
        edit(vlm, edit_images("dog")[:1], **ALONE)
    for advised in re.findall(r"\((top=\d+|blocks=[^)]+)\)", str(told.value)):  # it is advice that can be taken
        name, value = advised.split("=")
        assert getattr(EditSettings(**{name: ast.literal_eval(value)}), name) == ast.literal_eval(value)
    with pytest.raises(SettingError, match="say something else for 'dog'"):
        edit(vlm, edit_images("dog")[:1], source="dog", reference="own")


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": "elephant"}, WordError, r"(?s)says 'elephant' of none.*It said:.*dog"),
        ({"source": " "}, SettingError, r"(?s)word of an edit is empty.*source=' '"),
        ({"target": "dog"}, SettingError, "the same word"),
        ({"target": "Dogs"}, SettingError, "the same word"),
        ({"target": "猫"}, SettingError, "No strength makes"),
        ({"target": ""}, SettingError, r"(?s)word of an edit is empty.*target=''"),
        ({"target": " cats"}, SettingError, r"(?s)a plural.*target='cat'"),
        ({"images": []}, SettingError, "no image"),
        ({"neurons": [Neuron(0, 99_999)]}, SettingError, r"no neuron L0\.u99999"),
        ({"neurons": [Neuron(0, 1, 2)]}, SettingError, r"no neuron L0\.e2\.u1"),
        ({"neurons": []}, SettingError, "No neuron is given"),
        ({"blocks": 0}, SettingError, r"(?s)blocks.*blocks=0"),
        ({"blocks": 99}, SettingError, r"(?s)blocks.*blocks=99"),
        ({"top": 0}, SettingError, "top=0"),
        ({"ridge": -1}, SettingError, "ridge=-1"),
        ({"method": "best"}, SettingError, "(?s)no method 'best'.*selective, closed_form"),
        ({"block": 2}, SettingError, r"(?s)selective takes its columns from the last blocks.*blocks=2"),
    ],
    ids=str,
)
def test_what_is_refused(vlm, change, error, message):
    given: dict[str, Any] = {"images": edit_images("dog")[:1], **ALONE} | change
    with pytest.raises(error, match=message) as told:
        edit(vlm, given.pop("images"), **given)
    assert isinstance(told.value, MmneuronsError)


def test_a_target_that_begins_the_source_is_refused(vlm):
    """Nothing can be said instead of the first token: it is the same."""
    said = written(vlm, IMAGE, "an eggplant")
    (target,) = tokens_of(vlm.tokenizer, "e")
    assert tokens_of(vlm.tokenizer, "eggplant")[0] == target
    asked = EditRequest([IMAGE], Question(), said, occurrences(vlm, said, "eggplant"))
    with pytest.raises(WordError, match="begins with all tokens of 'e'"):
        token_goals(vlm, [asked], "e")


def test_neurons_that_are_silent_where_source_is_said_are_refused(vlm):
    said = trace_answers(vlm, [IMAGE])
    goal = TokenGoal(5, 6, said.steps.at(torch.tensor([0])))
    fired = tuple(torch.zeros_like(part) for part in goal.steps.activations)
    dead = replace(goal, steps=replace(goal.steps, activations=fired))
    with pytest.raises(SettingError, match="None of these columns is active"):
        solve(vlm, Columns.of(vlm.anatomy, [Neuron(0, 0)]), [dead], [], None)
