from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import unwrap
from typing import Any

import pytest
import torch
from kits.float64 import in_float64
from torch import nn

import mmneurons as mmn
from mmneurons import methods, pocket
from mmneurons.baselines import finetune, lora
from mmneurons.baselines import task as teaching
from mmneurons.baselines.baseline import NAMES, Change, Name, baseline
from mmneurons.baselines.matched import matched_neurons
from mmneurons.baselines.memit import spread
from mmneurons.baselines.output_layer import HeadChange
from mmneurons.baselines.rome import carried
from mmneurons.baselines.task import Schedule, Task
from mmneurons.editing import edit as own
from mmneurons.editing import request
from mmneurons.editing.answers import occurrences, trace_answers
from mmneurons.editing.closed_form import select_columns
from mmneurons.editing.edit import EditSettings
from mmneurons.editing.reference import Reference, make_reference
from mmneurons.editing.request import EditRequest, token_goals
from mmneurons.errors import ModelError, SettingError, WordError
from mmneurons.patches.patch import Patch
from mmneurons.settings import Question
from mmneurons.vlm.hooks.recording import record
from mmneurons.vlm.vlm import VLM
from mmneurons.words import Word, says

pytestmark = pytest.mark.filterwarnings("ignore:builtin type Swig:DeprecationWarning")  # of what PEFT imports

IMAGES = [scene.image for scene in pocket.edit_set("dog").edit]
SETTINGS = EditSettings(batch_size=20, top=400)
LEAST = {"random": 0.5, "rome": 0.75}
"""Share of the edit's images that turn at least; of the others, all."""


@pytest.fixture(autouse=True)
def small_default_reference(monkeypatch):
    """What is held where no reference is given is small here: these tests are about methods, and make it many times."""
    scenes = [pocket.scene(650_000_000 + i) for i in range(4)]
    monkeypatch.setattr(pocket, "evaluation_set", {"reference-400": scenes}.get)
    monkeypatch.setattr(pocket, "facts", lambda: ["A dog is an animal"])
    monkeypatch.setattr("mmneurons.editing.reference.sentences", lambda: ("The road is long.",))


@pytest.fixture(scope="module")
def model() -> VLM:
    """One of its own: should a baseline leave something behind, other test files shall not suffer."""
    vlm = mmn.load(device="cpu")
    vlm.caption(IMAGES[0])  # at the first picture transformers takes hooks away that it set while loading
    return vlm


@pytest.fixture(scope="module")
def reference(model: VLM) -> Reference:
    return make_reference(model, [pocket.scene(650_000_000 + i).image for i in range(20)], batch_size=20)


@pytest.fixture(scope="module")
def task(model: VLM, reference: Reference) -> Task:
    said = trace_answers(model, IMAGES, Question(batch_size=20))
    asked = EditRequest(IMAGES, Question(), said, occurrences(model, said, "dog"))
    return Task(model, [asked], "dog", "cat", reference, SETTINGS, 0, lambda what: None)


def state(vlm: VLM) -> dict[str, Any]:
    """All that a baseline could leave behind."""
    found: dict[str, Any] = {}
    for name, module in vlm.model.named_modules():
        hooks = [value for key, value in vars(module).items() if key.endswith("_hooks")]
        kept = {key for key in vars(module) if not key.startswith("_")}
        found[name] = (id(module), type(module), module.training, kept, [len(each) for each in hooks if each])
    for name, parameter in vlm.model.named_parameters():
        assert parameter.grad is None
        found[f"{name}?"] = (id(parameter), parameter.requires_grad)
    return found


def weights_of(vlm: VLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def rivals(model: VLM, reference: Reference) -> dict[str, Change]:
    """Made when first asked for."""

    class Made(dict):
        def __missing__(self, name: Name) -> Change:
            options: Any = {"source": "dog", "target": "cat", "reference": reference, "settings": SETTINGS}
            with pytest.MonkeyPatch.context() as patch:  # coarser than what is measured, to be quick
                patch.setattr(teaching, "REFERENCES", 4)
                patch.setattr(finetune, "FINETUNE", Schedule(rate=1e-2, steps=40, keep=1.0))
                patch.setattr(lora, "LORA", Schedule(rate=3e-3, steps=40, keep=1.0))
                self[name] = mmn.edit(model, IMAGES, method=name, **options)
            return self[name]

    return Made()


@pytest.fixture
def unchanged(model: VLM) -> Iterator[None]:
    model.model.lm_head.weight.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
    usual, numbers, drawn = state(model), weights_of(model), torch.random.get_rng_state()
    yield
    assert state(model) == usual
    assert same(numbers, weights_of(model))
    assert torch.equal(drawn, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unchanged")
def test_the_model_says_target_and_is_then_what_it_was(model, rivals, name):
    rival, usual = rivals[name], model.caption(IMAGES)
    with rival.applied(model) as applied:
        assert applied is rival
        edited = model.caption(IMAGES)
    turned = [says(text, "cat") and not says(text, "dog") for text in edited]
    assert sum(turned) / len(turned) >= LEAST.get(name, 1)
    assert model.caption(IMAGES) == usual


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unchanged")
def test_an_exception_inside_takes_the_edit_back(model, rivals, name):
    def fail() -> None:
        with rivals[name].applied(model):
            assert model.caption(IMAGES[0]) != usual or name in LEAST
            raise KeyError("inside")

    usual = model.caption(IMAGES[0])
    with pytest.raises(KeyError, match="inside"):
        fail()
    assert model.caption(IMAGES[0]) == usual


@pytest.mark.parametrize("name", NAMES)
def test_provenance_says_what_it_took(rivals, name):
    said = rivals[name].provenance
    assert (said["settings"]["method"], said["source"], said["target"]) == (name, "dog", "cat")
    assert said["seconds"] > 0
    assert 0 < max(said["said_source"]) <= len(IMAGES)
    assert said["settings"]["batch_size"] == 20
    assert (said["steps"] > 0) == (name in ("finetune", "lora", "rome", "memit"))
    changed = {"finetune": 1, "rome": 1, "memit": 3, "lora": 5, "head_rows": 0, "logit_bias": 0}
    if name in changed:
        assert said["changed"] == changed[name] * 1024 * 192
    stored = {"finetune": 1024 * 192, "rome": 1024 + 192, "lora": 5 * 8 * (1024 + 192), "head_rows": 2, "logit_bias": 3}
    if name in stored:
        assert said["stored"] == stored[name]


def test_rome_maps_the_key_to_the_value_and_is_rank_one():
    torch.manual_seed(0)
    weight, key, value = torch.randn(4, 6), torch.randn(6), torch.randn(4)
    others = torch.randn(50, 6)
    moment = (others.T @ others / 50).double()
    c = carried(key[None], moment).float()
    change = value - weight @ key
    new = weight + (c @ change[None]).T
    torch.testing.assert_close(new @ key, value)
    inverse = torch.linalg.inv(moment).float()
    torch.testing.assert_close(new - weight, torch.outer(change, inverse @ key) / (key @ inverse @ key))
    assert torch.linalg.matrix_rank(new - weight) == 1
    two = torch.stack([key, others[0]])
    torch.testing.assert_close(two @ carried(two, moment).float(), torch.eye(2), atol=1e-5, rtol=0)


def test_memit_is_rome_where_the_reference_weighs_nothing_and_nothing_where_it_weighs_all():
    torch.manual_seed(0)
    keys, others = torch.randn(2, 6), torch.randn(50, 6)
    moment = (others.T @ others / 50).double()
    torch.testing.assert_close(spread(keys, moment, 1e-9), carried(keys, moment), atol=1e-6, rtol=0)
    assert spread(keys, moment, 1e9).abs().max() < 1e-7
    # What the formula minimises: w n C on everything else, and what the keys miss.
    c, w = spread(keys, moment, 0.5)[:, 0].requires_grad_(), 0.5
    missed = keys.double() @ c - torch.tensor([1.0, 0.0]).double()
    (w * 2 * c @ moment @ c + missed.pow(2).sum()).backward()
    assert c.grad is not None
    assert c.grad.abs().max() < 1e-7


def test_rome_moves_the_block_from_the_key_to_what_was_learned(model, rivals, task):
    """In the model: at the mean key its block writes what was found by gradient, and that is TARGET."""
    patch = rivals["rome"]
    assert isinstance(patch, Patch)
    assert patch.directions is not None
    (part,) = patch.parts
    fired = task.lessons(part.layer).at(model.anatomy.ffns[part.layer].module, inputs=True)
    torch.testing.assert_close(fired.mean(0) @ patch.deltas(part), patch.directions[0], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("unchanged")
def test_random_columns_are_others_of_the_same_block_and_as_loud(model, task):
    goals = token_goals(model, task.requests, "cat")
    top = select_columns(model, goals, 100, 2)
    drawn = matched_neurons(model, goals, top, 0)
    assert len(drawn) == 100
    assert not set(drawn) & set(top.neurons)
    for layer in (3, 4):
        assert sum(n.layer == layer for n in drawn) == sum(n.layer == layer for n in top.neurons) > 0
    assert matched_neurons(model, goals, top, 0) == drawn != matched_neurons(model, goals, top, 1)
    steps = goals[0].steps
    loud = [
        steps.activations[i].abs().mean(0) * f.module.weight.detach().norm(dim=0)
        for i, f in enumerate(model.anatomy.ffns)
    ]
    usual = loud[4].mean()
    mean = torch.stack([loud[n.layer][n.index] for n in drawn]).mean()
    assert mean > 1.5 * usual  # far from as quiet as most


def test_random_takes_other_columns_than_edit(model, rivals, task):
    chosen = select_columns(model, token_goals(model, task.requests, "cat"), SETTINGS.top, SETTINGS.blocks)
    assert not set(rivals["random"].neurons) & set(chosen.neurons)


def test_random_columns_are_refused_where_there_are_not_as_many_others(model):
    settings = EditSettings(batch_size=20, top=600, block=2)  # of 1,024; a block does not count
    with pytest.raises(SettingError, match=r"no 600 other columns(?s:.)*424 are left(?s:.)*top=300"):
        baseline(model, "random", IMAGES, source="dog", target="cat", settings=settings)


def test_captions_are_rewritten_and_all_else_is_kept(model, task):
    lessons = task.lessons(0)
    (batch,) = lessons.own
    words = [model.tokenizer.decode([token]).strip() for token in lessons.wanted.tolist()]
    assert words == ["cat"] * 8
    # Positions are counted from the end of the longest caption.
    said = task.requests[0].answers.token_ids
    rows, steps = batch.places[0], batch.places[1] + max(map(len, said))
    for row, step, token in zip(*(each[batch.turn].tolist() for each in (rows, steps)), lessons.wanted, strict=True):
        assert said[row][step] != token  # where it said dog
    assert len(batch.turn) == sum(map(len, said))
    # The first step of each caption predicts its first token.
    first = batch.stay & (steps == 0)
    begun = torch.tensor([said[row][0] for row in rows[first].tolist()])
    assert torch.equal(lessons.reader.base(batch)[first].argmax(1), begun)
    # In the reference nothing is wanted, and SOURCE is not kept.
    reference = task.reference
    kept = sum(int(batch.stay.sum()) for batch in lessons.reminders)
    assert kept == int((~reference.says(model, "dog")).sum())
    assert not any(bool(batch.turn.any()) for batch in lessons.reminders)


def test_a_word_of_several_tokens_is_wanted_token_by_token(model, monkeypatch):
    monkeypatch.setattr(request, "tokens_of", lambda tokenizer, word, like: [7, 8, 9])
    words = [Word("dog", "dog", 0, 3, (1, 2)), Word("dog", "dog", 4, 7, (4,))]
    ids, written = request.rewritten(model, [50, 51, 52, 53, 54, 55], words, "cat")
    assert ids == [50, 7, 8, 9, 53, 7, 8, 9, 55]
    assert written == [(1, [7, 8, 9]), (5, [7, 8, 9])]


def test_learning_without_a_reference_and_what_is_learned_does_not_depend_on_the_batch_size(model, monkeypatch):
    monkeypatch.setattr(finetune, "FINETUNE", Schedule(rate=1e-3, steps=3, keep=1.0))
    made = []
    with in_float64(model) as double:  # Adam's first steps are of one size: no gradient's sign may be rounding
        for size in (8, 4):
            settings = EditSettings(batch_size=size, block=3)
            made.append(baseline(double, "finetune", IMAGES, source="dog", target="cat", settings=settings))
    assert made[0].parts[0].layer == 3
    a, b = (change.parts[0].deltas for change in made)
    assert float(a.abs().max()) > 1e-3
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("unchanged")
def test_lora_inside_is_seen_by_hooks_of_the_anatomy_and_its_weights_are_loaded(model, rivals):
    adapter = rivals["lora"]
    inside = model.anatomy.ffns[-1].module
    inputs = model.encode([IMAGES[0]])
    with torch.no_grad():
        usual = model.model(**inputs).logits
        with rivals["lora"].applied(model), record(model.anatomy) as recording:
            edited = model.model(**inputs).logits
            assert model.model.get_submodule(model.anatomy.ffns[-1].name) is not inside
            assert recording.raw[-1][0].shape[-1] == 1024
        again = model.model(**inputs).logits
        # By hand: each w_out and its product of two matrices.
        change = {}
        for ffn in model.anatomy.ffns:
            name = next(n for n in adapter.weights if n.startswith(ffn.name) and "lora_A" in n)
            change[ffn.module] = 2 * adapter.weights[name.replace("lora_A", "lora_B")] @ adapter.weights[name]
        hooks = [m.register_forward_hook(lambda m, args, out: out + args[0] @ change[m].T) for m in change]
        by_hand = model.model(**inputs).logits
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(edited, by_hand, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(edited, usual, atol=1e-2)
    assert torch.equal(again, usual)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", ["finetune", "lora", "rome", "memit"])
def test_a_failure_while_learning_leaves_nothing_behind(model, name):
    def stop(what: str, done: float, total: int) -> None:
        if what.startswith("step"):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        baseline(model, name, IMAGES, source="dog", target="cat", progress=stop)


def test_heads_change_two_logits_only():
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    module = nn.Identity()
    assert HeadChange(((0, 3),), None)(module, (), logits).tolist() == [[[4, 2, 3, 1]]]
    assert (0.5 * HeadChange(((0, 3),), 1.0))(module, (), logits).tolist() == [[[0.5, 2, 3, 4.5]]]
    # Two forms of SOURCE for one of TARGET (cow, cows: sheep): the likelier takes its place, both lose theirs.
    assert HeadChange(((0, 3), (1, 3)), None)(module, (), logits).tolist() == [[[4, 4, 3, 2]]]
    assert HeadChange(((0, 3), (1, 3)), 1.0)(module, (), logits).tolist() == [[[0, 1, 3, 5]]]
    assert logits.tolist() == [[[1, 2, 3, 4]]]


@pytest.mark.usefixtures("unchanged")
def test_mistakes_are_refused_in_words(model, monkeypatch):
    def make(name: Any = "rome", source: str = "dog", target: str = "cat", **options: Any) -> Change:
        return baseline(model, name, IMAGES[:1], source=source, target=target, **options)

    def late(*given: Any) -> None:
        raise AssertionError("a mistake is refused before the reference is made")

    monkeypatch.setattr("mmneurons.baselines.baseline.reference_of", late)
    with pytest.raises(SettingError, match="no baseline 'grace'"):
        make("grace")
    with pytest.raises(SettingError, match="the same word"):
        make(target="dogs")
    with pytest.raises(WordError, match="says 'umbrella' of none"):
        make(source="umbrella")
    for name in ("finetune", "rome", "memit"):
        with pytest.raises(SettingError, match="5 blocks"):
            make(name, settings=EditSettings(block=5))
    monkeypatch.setattr(model.model, "peft_config", {}, raising=False)
    with pytest.raises(ModelError, match="has adapters already"):
        make("lora")
    monkeypatch.delattr(model.model, "peft_config")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingError, match="needs PEFT"):
        make("lora")


def test_lora_is_learned_in_float32_whatever_the_models_dtype():
    """In half precision Adam's steps of a thousandth would be rounded away, or be no numbers."""
    bf16_vlm = mmn.load(dtype="bfloat16", device="cpu")
    names = [ffn.name for ffn in bf16_vlm.anatomy.ffns]
    before = bf16_vlm.caption(IMAGES[0])
    with lora.attached(bf16_vlm, names, 0) as parameters:
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
        assert bf16_vlm.caption(IMAGES[0]) == before, "new LoRA does nothing"
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.normal_()
        assert bf16_vlm.caption(IMAGES[0]) != before
    assert bf16_vlm.caption(IMAGES[0]) == before


def test_edit_reaches_every_method_by_name(model, monkeypatch):
    asked = []
    made = Patch(model.anatomy.hidden, (), provenance={})

    def other(vlm, name, images, **options):
        asked.append((name, len(images), options["settings"].seed, options["settings"].block))
        return made

    monkeypatch.setattr(methods, "baseline", other)
    for name in NAMES:
        assert mmn.edit(model, IMAGES[0], source="dog", target="cat", method=name, seed=3, block=2) is made
    assert asked == [(name, 1, 3, 2) for name in NAMES]
    with pytest.raises(SettingError, match="rome replaces a word, and cannot remove"):
        mmn.edit(model, IMAGES, source="dog", method="rome")
    with pytest.raises(SettingError, match="lora does not change columns"):
        mmn.edit(model, IMAGES, source="dog", target="cat", method="lora", neurons=[])  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(SettingError, match="no method 'grace'"):
        mmn.edit(model, IMAGES, source="dog", target="cat", method="grace")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(SettingError, match="rome is none of selective"):
        own.edit(model, IMAGES, source="dog", target="cat", method="rome")


def numbers_of(change: Change) -> list[torch.Tensor]:
    """All that says what a change does."""
    if isinstance(change, Patch):
        return list(change._numbers())
    if isinstance(change, lora.Adapter):
        return list(change.weights.values())
    return [torch.tensor(change.pairs), torch.tensor(change.bias or 0.0)]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", ["finetune", "lora", "random", "head_rows"])
def test_edit_by_a_method_makes_what_its_function_makes(model, monkeypatch, name):
    for module, schedule in ((finetune, "FINETUNE"), (lora, "LORA")):
        monkeypatch.setattr(module, schedule, Schedule(rate=1e-2, steps=2, keep=1.0))
    options: Any = {"source": "dog", "target": "cat"}
    chosen: Any = {"seed": 1, "top": 50, "block": 2}
    by_name = mmn.edit(model, IMAGES[0], method=name, **chosen, **options)
    directly = baseline(model, name, IMAGES[:1], settings=EditSettings(**chosen), **options)
    assert type(by_name) is type(directly)
    for one, other in zip(numbers_of(by_name), numbers_of(directly), strict=True):
        assert torch.equal(one, other)
    assert {**by_name.provenance, "seconds": 0} == {**directly.provenance, "seconds": 0}


@pytest.mark.usefixtures("unchanged")
def test_the_smallest_change_is_an_edit_by_its_name(model):
    options: Any = {"source": "dog", "target": "cat", "top": 50}
    patch = mmn.edit(model, IMAGES[0], method="closed_form", **options)
    assert patch.hash == own.edit(model, IMAGES[0], method="closed_form", **options).hash
    usual = model.caption(IMAGES[0])
    with patch.applied(model):
        edited = model.caption(IMAGES[0])
    assert (says(edited, "cat"), says(edited, "dog"), says(usual, "dog")) == (True, False, True)
    assert model.caption(IMAGES[0]) == usual


@pytest.mark.parametrize(
    ("change", "is_what"),
    [(lora.Adapter((), {}), "matrices beside its weights"), (HeadChange(((0, 1),), None), "the output of the head")],
)
def test_what_is_no_patch_says_so(model, tmp_path, change: Any, is_what):
    ways = [
        lambda: change.save(tmp_path / "p.safetensors"),
        lambda: change.push_to_hub("ana/dog-to-cat"),
        lambda: change.apply(model),
        lambda: change.revert(model),
        lambda: change + change,
        lambda: Patch(model.anatomy.hidden, ()) + change,
    ]
    for way in ways:
        with pytest.raises(SettingError, match=is_what) as error:
            way()
        assert "with change.applied(vlm):" in error.value.fix
    with pytest.raises(SettingError, match=f"Given a {type(change).__name__}"):
        # Without the checks of types that the tests add.
        unwrap(mmn.export)(model, [change], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
