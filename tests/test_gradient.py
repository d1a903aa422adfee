"""The optimised edit: what it turns, what it leaves alone, and that its gradient is the loss's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kits.float64 import in_float64, slope

from mmneurons import pocket
from mmneurons.editing import gradient
from mmneurons.editing.answers import occurrences, trace_answers
from mmneurons.editing.closed_form import select_columns
from mmneurons.editing.fit import descend
from mmneurons.editing.gradient import Objective, optimise
from mmneurons.editing.reference import Reference, make_reference
from mmneurons.editing.request import EditRequest, given, token_goals
from mmneurons.errors import ModelError, SettingError
from mmneurons.neurons import Neuron
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.parts import patch_of, pristine_columns
from mmneurons.patches.patch import Patch
from mmneurons.settings import Question
from mmneurons.vlm import teacher_forcing
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.teacher_forcing import Reader
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says


@dataclass(frozen=True)
class Case:
    """An edit that is ready to be made."""

    requests: list[EditRequest]
    columns: Columns
    reference: Reference
    patch: Patch

    def optimise(self, vlm: VLM, target: str | None = "cat", **options: Any) -> Patch:
        columns = options.pop("columns", self.columns)
        usual: dict[str, Any] = {"tell": lambda what: None}
        return optimise(vlm, columns, self.requests, "dog", target, self.reference, **(usual | options))


def hooks_of(vlm: VLM) -> list[tuple[dict, dict]]:
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in vlm.model.modules()]


@pytest.fixture(scope="module")
def case(vlm: VLM) -> Case:
    made = case_of(vlm)
    return replace(made, patch=made.optimise(vlm))


def case_of(vlm: VLM, references: int = 20) -> Case:
    """Everything but the patch."""
    images = [scene.image for scene in pocket.edit_set("dog").edit]
    said = trace_answers(vlm, images)
    requests = [EditRequest(images, Question(), said, occurrences(vlm, said, "dog"))]
    others = [pocket.scene(650_000_000 + i).image for i in range(references)]
    reference = make_reference(vlm, others, ["a house on a table"])
    columns = select_columns(vlm, token_goals(vlm, requests, "cat"), 100, 1)
    return Case(requests, columns, reference, Patch(vlm.anatomy.hidden, ()))


@pytest.fixture(autouse=True)
def untouched(vlm: VLM):
    """Whatever a test does: the model's weights, modes, gradients and hooks are what they were."""
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    modes = [parameter.requires_grad for parameter in vlm.model.parameters()]
    hooks = hooks_of(vlm)
    yield
    assert all(torch.equal(weights[name], value) for name, value in vlm.model.state_dict().items())
    assert [parameter.requires_grad for parameter in vlm.model.parameters()] == modes
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    assert hooks_of(vlm) == hooks  # transformers has some of its own
    assert ledger_of(vlm).active == ()


def test_dogs_become_cats_and_the_reference_stays(vlm, case):
    facts = case.patch.provenance
    assert facts["turned"] == 1
    shown = len({answer for answer, _ in case.requests[0].found})
    assert (shown, facts["generated"]) == (8, 6)  # every fourth is held back from the search
    assert facts["margin"] >= gradient.MARGIN
    with case.patch.applied(vlm):
        texts = vlm.caption(list(case.requests[0].images))
        after = vlm.caption(list(case.reference.images))
    assert all(says(text, "cat") and not says(text, "dog") for text in texts)
    kept = [(a, b) for a, b in zip(after, case.reference.answers.texts, strict=True) if not says(b, "dog")]
    assert sum(a == b for a, b in kept) >= len(kept) - 1


def test_only_the_chosen_columns_change(vlm, case):
    assert case.patch.neurons == case.columns.neurons
    assert all(part.deltas.dtype == torch.float32 for part in case.patch.parts)
    before = [ffn.module.weight.detach().clone() for ffn in vlm.anatomy.ffns]
    with case.patch.applied(vlm):
        changed = [(ffn.module.weight != old).any(0) for ffn, old in zip(vlm.anatomy.ffns, before, strict=True)]
    for i, columns in enumerate(changed):
        assert columns.nonzero()[:, 0].tolist() == case.columns.indices.get(i, torch.tensor([])).tolist()


def read(vlm: VLM, case: Case, reader: Reader, target: str | None = "cat"):
    one = case.requests[0]
    own = reader.read(one.images, Question(), given(vlm, one, target))
    return own, case.reference.read(reader, "dog")


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_cache_changes_nothing(vlm, case, blocks, monkeypatch):
    monkeypatch.setattr(gradient, "STEPS", 2)
    monkeypatch.setattr(gradient, "SAMPLE", 8)
    columns = select_columns(vlm, token_goals(vlm, case.requests, "cat"), 60, blocks)
    assert len(columns.indices) == blocks
    patches = []
    for cache in (True, False):
        reader = Reader(vlm, 5 - blocks, cache, 8)
        with frozen(vlm.model), evaluating(vlm.model):
            own, others = read(vlm, case, reader)
            assert all((batch.entering is not None) == cache for batch in (*own, *others))
            objective = Objective(reader, Deltas.zero(columns), pristine_columns(vlm, columns), own, others, True)
            _, change = gradient.search(objective, lambda what: None)
        patches.append(patch_of(vlm, change))
    for a, b in zip(patches[0].parts, patches[1].parts, strict=True):
        assert a.deltas is not None
        assert bool(a.deltas.any())
        torch.testing.assert_close(a.deltas, b.deltas, rtol=1e-3, atol=1e-5)


def test_blocks_that_give_something_else_when_called_again_are_not_used(vlm, case, monkeypatch):
    monkeypatch.setattr(teacher_forcing, "tolerance", lambda vlm: -1.0)
    own, _ = read(vlm, case, Reader(vlm, 4, True, 8))
    assert own[0].entering is None
    assert "pixel_values" in own[0].inputs


def test_lower_blocks_run_once(vlm, case, monkeypatch):
    monkeypatch.setattr(gradient, "STEPS", 10)
    seen: list[int] = []
    counts: list[tuple[int, int]] = []

    def tell(what: str) -> None:
        counts.append((seen.count(0), seen.count(4)))

    blocks = vlm.anatomy.blocks
    handles = [
        blocks[k].module.register_forward_pre_hook(lambda m, a, k=k: seen.append(k), prepend=True) for k in (0, 4)
    ]
    try:
        case.optimise(vlm, tell=tell)
    finally:
        for handle in handles:
            handle.remove()
    steps = counts[1:]
    assert len({low for low, _ in steps}) == 1
    assert steps[-1][1] > steps[0][1]


def test_the_gradient_is_that_of_the_loss(vlm):
    with in_float64(vlm) as double:
        case = case_of(double, references=8)
        columns = select_columns(double, token_goals(double, case.requests, "cat"), 40, 2)
        reader = Reader(double, 3, True, 8)
        for target in ("cat", None):
            check_gradient(double, case, columns, reader, target)


def check_gradient(vlm: VLM, case: Case, columns: Columns, reader: Reader, target: str | None) -> None:
    """Along the gradient the loss rises as steeply as the gradient is long."""
    with frozen(vlm.model), evaluating(vlm.model):
        own, others = read(vlm, case, reader, target)
        pristine, change = pristine_columns(vlm, columns), Deltas.zero(columns)
        random = torch.Generator().manual_seed(0)
        for i, delta in change.rows.items():
            noise = torch.randn(delta.shape, generator=random)
            delta.add_(0.3 * pristine[i].std() * noise).requires_grad_()
        objective = Objective(reader, change, pristine, own, others, target is not None)

        def loss() -> float:
            return descend(objective.losses(others[:1]), change.parameters)

        with change.added():
            for delta in change.parameters:
                delta.grad = None
                loss()
                assert delta.grad is not None
                steepest = delta.grad.norm()
                along = delta.grad / steepest
                assert slope(loss, delta, along, 1e-4) == pytest.approx(float(steepest), rel=1e-4)


def test_without_a_target_source_goes(vlm, case):
    patch = case.optimise(vlm, target=None)
    with patch.applied(vlm):
        assert not any(says(text, "dog") for text in vlm.caption(list(case.requests[0].images)))


def test_answers_are_given_with_target_for_source(vlm, case):
    one = case.requests[0]
    for taught, text in zip(given(vlm, one, "cat"), one.answers.texts, strict=True):
        assert vlm.tokenizer.decode(taught.token_ids, skip_special_tokens=True).strip() == text.replace("dog", "cat")
        assert sorted([*taught.turn, *taught.kept]) == list(range(len(taught.token_ids)))
        assert all((taught.token_ids[step],) == tokens for step, tokens in taught.turn.items())
        assert all((token >= 0) == (step > min(taught.turn)) for step, token in taught.kept.items())
    for taught, ids in zip(given(vlm, one, None), one.answers.token_ids, strict=True):
        assert taught.token_ids == list(ids)
        assert set(taught.kept.values()) <= {-1}


def test_it_can_go_on_from_a_patch(vlm, case):
    again = case.optimise(vlm, start=case.patch)
    assert again.provenance["steps"] == 0
    assert torch.equal(again.parts[0].deltas, case.patch.parts[0].deltas)
    fewer = Columns.of(vlm.anatomy, case.columns.neurons[1:])
    with pytest.raises(SettingError, match="other columns"):
        case.optimise(vlm, columns=fewer, start=case.patch)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 3])
def test_nothing_is_left_behind_by_an_exception(vlm, case, error: type[BaseException], at: int):
    told: list[str] = []

    def tell(what: str) -> None:
        told.append(what)
        if len(told) > at:
            raise error

    with pytest.raises(error):
        case.optimise(vlm, tell=tell)


def test_what_cannot_be_done_is_said(vlm, case, monkeypatch):
    silent = [EditRequest(one.images, one.question, one.answers, []) for one in case.requests]
    with pytest.raises(SettingError, match="None of these answers says 'dog'"):
        optimise(vlm, case.columns, silent, "dog", "cat", None, tell=lambda what: None)
    monkeypatch.setattr(gradient, "STEPS", 0)
    with pytest.raises(SettingError, match=r"(?s)No change makes the model say 'cat'.*blocks='all'"):
        case.optimise(vlm)


def test_experts_are_refused(vlm, case):
    ffns = tuple(replace(ffn, n_experts=2) if ffn.layer == 4 else ffn for ffn in vlm.anatomy.ffns)
    anatomy = replace(vlm.anatomy, ffns=ffns)
    routed = VLM(vlm.model, vlm.processor, anatomy, "routed")
    with pytest.raises(ModelError, match="dense FFNs only"):
        case.optimise(routed, columns=Columns.of(anatomy, [Neuron(4, 0, 1)]))
