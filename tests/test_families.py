"""Every family of docs/reference/models.md: its parts are found, its numbers exact, and `doctor` notices misreadings.

`python tests/test_families.py` writes the tables of docs/reference/models.md anew.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kits import zoo
from kits.library import lacking
from kits.zoo import FAMILIES, Family, Row, quiet_vision, randomise
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

import mmneurons as mmn
from mmneurons.attribution.ablation import Replay, replays
from mmneurons.errors import ModelError, SettingError
from mmneurons.finding.result import Finding
from mmneurons.neurons import Neuron
from mmneurons.settings import Question
from mmneurons.vlm import experts, families, weights
from mmneurons.vlm.anatomy import norms
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn, LogitRule, hops
from mmneurons.vlm.asking import answer
from mmneurons.vlm.doctor import TOLERANCE, Check, Report, additivity_error, describe_anatomy, tolerance
from mmneurons.vlm.grid import Grids, find_grids
from mmneurons.vlm.hooks.interventions import Intervention, intervene, parts_of
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.traces import pick_trace
from mmneurons.vlm.vlm import VLM, Answers
from mmneurons.vlm.weights.stored import Located

REFUSED = ("idefics",)
"""Families that `load` refuses, and says so."""
BY_NAME = {family.name: family for family in FAMILIES}
NAMES = [name for name in BY_NAME if name not in REFUSED]
ROWS = (Row(0, 5), Row(1, 9), Row(2, 7))
N_TOKENS = 4
LIMIT = 1e-4
"""Of the largest number, in float32."""

every_family = pytest.mark.parametrize("name", NAMES)


@dataclass(frozen=True, eq=False)
class Case:
    """One family's tiny model, loaded, and what it says to three prompts of different length, each asked alone."""

    family: Family
    vlm: VLM
    alone: list[dict[str, Any]]
    batch: dict[str, Any]
    raw: list[tuple[int, ...]]
    """What the bare model's own `generate` says."""
    answers: list[Answers]
    recordings: list[Recording]

    @property
    def model(self) -> PreTrainedModel:
        return self.vlm.model

    @property
    def anatomy(self) -> Anatomy:
        return self.vlm.anatomy

    @property
    def facts(self) -> Mapping[str, str]:
        assert self.family.facts is not None
        return self.family.facts


@cache
@torch.inference_mode(False)  # whatever the test that asks first: gradients need weights made outside of it
def case(name: str) -> Case:
    """Of the first seed whose answers hold no special token: read again, an image token would ask for an image."""
    family = BY_NAME[name]
    for seed in range(100):
        model = randomise(family.build(), seed)
        alone = [family.inputs(model, [row]) for row in ROWS]
        raw = [tuple(said(model, inputs)) for inputs in alone]
        if special(model).isdisjoint(token for row in raw for token in row):
            break
    else:
        raise AssertionError(f"{name} says special tokens, whatever the seed")
    vlm = mmn.load(model)
    answers, recordings = [], []
    for inputs in alone:
        with record(vlm.anatomy) as recording:
            answers.append(vlm.generate(inputs, N_TOKENS))
        recordings.append(recording)
    return Case(family, vlm, alone, family.inputs(model, ROWS), raw, answers, recordings)


def said(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """The bare model's greedy answer to one prompt."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=N_TOKENS)[0, -N_TOKENS:].tolist()


def special(model: PreTrainedModel) -> set[int]:
    """Ids that are no words, as far as the configs say."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    found = [v for c in configs for n, v in vars(c).items() if "token_id" in n or n.endswith("token_index")]
    found.append(getattr(model.config, "image_token_id", None))
    return {one for value in found for one in (value if isinstance(value, list) else [value])}


@cache
def grids(name: str) -> Grids | str:
    return find_grids(case(name).model, case(name).alone[0], 1)


# What is found is what a reader of the code sees


def path_of(anatomy: Anatomy, ffn: Ffn) -> str:
    """Of `w_out` in its block."""
    path = ffn.name.removeprefix(f"{anatomy.blocks[ffn.layer].name}.")
    return path if ffn.n_experts is None else f"{path}.down_proj"


def kind(anatomy: Anatomy, ffn: Ffn) -> str:
    """How what an FFN writes gets into the stream, in the words of `Family.facts`."""
    if any(step.norm for step in hops(anatomy.embedding)):  # the stream itself goes through norms
        return "post-LN"
    path = list(hops(ffn.path))
    scaled = ffn.gate is not None or any(step.scale != 1 for step in path)
    through = any(step.norm for step in path)
    return {(False, False): "identity", (True, False): "scalar", (False, True): "norm"}.get((scaled, through), "other")


def kind_told(facts: Mapping[str, str], layer: int, path: str) -> str:
    """The same as the facts say it: for all alike, one for each block, or one for each `w_out` of a block."""
    told = facts.get("kinds", facts["kind"])
    if "," in told:
        return dict(zip(facts["w_out"].split(","), told.split(","), strict=True))[path]
    return told.split()[layer] if " " in told else told


def final_norm(anatomy: Anatomy) -> str:
    said = norms.kind(anatomy.norm_module, anatomy.norm)
    return "LayerNorm" if said.startswith("LayerNorm") else {"w": "RMS w", "w - 1": "RMS 1+w"}[said.split(" as ")[1]]


def logits(rule: LogitRule) -> str:
    return "softcap" if rule.cap else "scale" if (rule.before, rule.scale) != (1, 1) else "raw"


@every_family
def test_the_parts_found_are_those_that_the_code_has(name):
    anatomy, facts = case(name).anatomy, case(name).facts
    n_blocks = len(case(name).model.get_submodule(facts["blocks"]))  # pyright: ignore[reportArgumentType]
    assert [block.name for block in anatomy.blocks] == [f"{facts['blocks']}.{i}" for i in range(n_blocks)]
    found = {(ffn.layer, path_of(anatomy, ffn)): kind(anatomy, ffn) for ffn in anatomy.ffns}
    raw = {(layer, path) for layer in range(n_blocks) for path in raw_weights(case(name).model, facts, layer)}
    assert found == {(layer, path): kind_told(facts, layer, path) for layer, path in raw}
    assert (anatomy.norm_name, anatomy.head_name) == (facts["norm"], facts["head"])
    assert (final_norm(anatomy), logits(anatomy.logit_rule)) == (facts["final_norm"], facts["logits"])
    assert anatomy.doubts == ()


def raw_weights(model: nn.Module, facts: Mapping[str, str], layer: int) -> dict[str, nn.Parameter]:
    """The parameter of each `w_out` that one block has, by its path."""
    parameters = dict(model.get_submodule(f"{facts['blocks']}.{layer}").named_parameters())
    names = {path: path if path in parameters else f"{path}.weight" for path in facts["w_out"].split(",")}
    return {path: parameters[name] for path, name in names.items() if name in parameters}


# The numbers


@every_family
def test_doctor_passes(name):
    one = case(name)
    for inputs in (one.alone[0], *([] if one.vlm.family.one_at_a_time else [one.batch])):
        assert failed(mmn.doctor(one.vlm, inputs=inputs, max_new_tokens=N_TOKENS)) == []
    assert error(name) < LIMIT


def failed(report: Report) -> list[Check]:
    return [check for check in report.checks if not check.passed]


@pytest.mark.filterwarnings("ignore:Casting complex values")  # Llama 4's rotations of pictures
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma4", "llama4", "blip-2 (opt)", "blip-2 (flan-t5)", "florence2", "qwen3_5_moe"])
def test_doctor_passes_in_half_precision(name, dtype):
    """Queries stay in float32, as `from_pretrained` leaves those of BLIP-2: they are not what is judged."""
    model = randomise(BY_NAME[name].build(), seed=3).to(dtype)  # pyright: ignore[reportArgumentType]
    if name.startswith("blip-2"):
        model.query_tokens.data = model.query_tokens.data.float()  # pyright: ignore
        model.qformer.float()  # pyright: ignore
    vlm = mmn.load(model)
    report = mmn.doctor(vlm, inputs=BY_NAME[name].inputs(model, ROWS), max_new_tokens=N_TOKENS)
    assert failed(report) == []
    assert vlm.anatomy.dtype == dtype
    assert report.model["dtype"] == str(dtype).removeprefix("torch.")
    assert tolerance(vlm) == TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_doctor_notices_a_misread_norm_in_half_precision(name, dtype):
    """What such a norm does to the sum can be less than the sum's own limit."""
    model = randomise(BY_NAME[name].build(), seed=3).to(dtype)  # pyright: ignore[reportArgumentType]
    vlm, inputs = mmn.load(model), BY_NAME[name].inputs(model, ROWS[:1])
    anatomy = vlm.anatomy

    misread = (
        dataclasses.replace(anatomy.norm, centred=True),
        dataclasses.replace(anatomy.norm, weight=1.3 * anatomy.norm.weight),
    )
    spoiled = [dataclasses.replace(anatomy, norm=norm) for norm in misread]
    for vlm.analysed in (anatomy, *spoiled):
        named = [check.name for check in failed(mmn.doctor(vlm, inputs=inputs, max_new_tokens=N_TOKENS))]
        assert any("each norm" in name for name in named) == (vlm.anatomy is not anatomy)


def scale_writes(blocks: nn.ModuleList, share: float, run: Callable[[], Any]) -> None:
    """Scale what attention and FFN of each block write to a share of the stream, as a pass goes through them."""

    def enter(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes[block] = args[0].norm()

    def scale(block: nn.Module, module: Any, args: Any, output: Tensor) -> Tensor:
        factor = share * sizes[block] / output.norm()
        module.weight.data *= factor
        return output * factor

    sizes: dict[nn.Module, Tensor] = {}
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(enter))
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            module = block.get_submodule(name)
            hooks.append(module.register_forward_hook(functools.partial(scale, block)))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()


def scales(anatomy: Anatomy) -> list[float]:
    """The factor of each FFN's writes."""
    return [math.prod(step.scale for step in hops(ffn.path)) for ffn in anatomy.ffns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.001])
def test_a_multiplier_is_read_however_small_the_writes_are(share, dtype):
    """Granite's 0.22: in bfloat16, a write of a thousandth of the stream times that is less than its rounding."""
    model = randomise(zoo.extra.granite_docling(0.22, num_hidden_layers=8), seed=1)
    language_model: Any = model.get_submodule("model.text_model")
    ids = torch.arange(10, 26)[None]
    scale_writes(
        language_model.layers, share, lambda: language_model(inputs_embeds=language_model.get_input_embeddings()(ids))
    )
    vlm = mmn.load(model.to(dtype))  # pyright: ignore[reportArgumentType]
    assert vlm.anatomy.doubts == ()
    assert scales(vlm.anatomy) == pytest.approx([0.22] * 8, rel=0.05)
    assert [step.scale for s in vlm.anatomy.sources for step in hops(s.path)] == pytest.approx([0.22] * 8, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", [0.0, 1e-3, 0.01])
def test_gates_at_and_near_zero_are_read(gate, dtype):
    """Mllama's cross-attention as it is initialised, and after a little training."""
    model = randomise(BY_NAME["mllama"].build())
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.data.fill_(gate)
    vlm = mmn.load(model.to(dtype))  # pyright: ignore[reportArgumentType]
    assert scales(vlm.anatomy) == pytest.approx([1, gate, 1, gate], rel=0.05, abs=1e-9)
    inputs = BY_NAME["mllama"].inputs(model, ROWS[:1])
    assert failed(mmn.doctor(vlm, inputs=inputs, max_new_tokens=N_TOKENS)) == []


def test_a_model_as_initialised_has_norms_that_are_all_alike():
    """The last block of this Mllama sees the picture through a gate of 0: its norm gives what the final one does."""
    model = BY_NAME["mllama"].build()
    vlm = mmn.load(model)  # pyright: ignore[reportArgumentType]
    assert vlm.anatomy.norm_name.endswith("language_model.norm")
    inputs = BY_NAME["mllama"].inputs(model, ROWS[:1])
    assert failed(mmn.doctor(vlm, inputs=inputs, max_new_tokens=N_TOKENS)) == []


def error(name: str) -> float:
    """The largest of the additivity identity, over all prompts."""
    one = case(name)
    places = torch.tensor([[0, step] for step in range(N_TOKENS)])
    pairs = zip(one.recordings, one.answers, strict=True)
    return max(additivity_error(one.vlm, pick_trace(recording, places), answers) for recording, answers in pairs)


@every_family
@pytest.mark.parametrize("score", ["logit", "logprob"])
def test_scores_in_the_last_block_are_gradient_times_weight(name, score):
    """A column times the gradient by it is activation times column times what a write does, with no hook on it."""
    one = case(name)
    found = first_row(one, one.alone[0], score=score, top=10**6)
    assert [noun.step for noun in found.nouns] == list(range(N_TOKENS))
    layer = len(one.anatomy.blocks) - 1
    for noun, expected in zip(found.nouns, raw_scores(one, score), strict=True):
        ours = {path: torch.zeros_like(scores) for path, scores in expected.items()}
        dense, fused = ([path for path, scores in ours.items() if scores.ndim == n] for n in (1, 2))
        for neuron in noun.neurons:
            if neuron.neuron.layer == layer and neuron.neuron.expert is None:
                ours[dense[0]][neuron.neuron.index] = neuron.score
            elif neuron.neuron.layer == layer:
                ours[fused[0]][neuron.neuron.expert, neuron.neuron.index] = neuron.score
        largest = max(float(scores.abs().max()) for scores in expected.values())
        for path, scores in expected.items():
            assert scores.abs().max() > 0
            torch.testing.assert_close(ours[path], scores, rtol=0, atol=LIMIT * largest)


def first_row(one: Case, inputs: Mapping[str, Any], **choices: Any) -> Finding:
    """What is found for every token that the first prompt is answered with."""
    found: Any = mmn.find(one.vlm, inputs=inputs, token_ids=one.raw[0], max_new_tokens=N_TOKENS, **choices)
    return found[0]


def raw_scores(one: Case, score: str) -> list[dict[str, Tensor]]:
    """For each token said, and each `w_out` of the last block: one number per neuron, from autograd."""
    model, facts = copy.deepcopy(one.model).requires_grad_(False), one.facts
    if "experts" in facts["w_out"]:
        model.set_experts_implementation("eager")
    layer = len(one.anatomy.blocks) - 1
    parameters = raw_weights(model, facts, layer)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    final, head = model.get_submodule(facts["norm"]), model.get_submodule(facts["head"])
    hold_side_effects(model.get_submodule(f"{facts['blocks']}.{layer}"), final)
    if score == "logit":
        final.register_forward_hook(frozen(centred=facts["final_norm"] == "LayerNorm"))
    heads: list[Any] = []
    head.register_forward_hook(lambda module, args, output: heads.append(output))
    given = model(**one.vlm.extended(one.alone[0], one.answers[0])).logits
    if score == "logit" and facts["logits"] == "softcap":
        given = heads[-1]
    scores = []
    for row, token in zip(given[0, -N_TOKENS - 1 : -1], one.raw[0], strict=True):
        value = row[token] if score == "logit" else row.log_softmax(-1)[token]
        slopes = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        products = [p.detach() * slope for p, slope in zip(parameters.values(), slopes, strict=True)]
        axes = [list(product.shape).index(one.anatomy.hidden, product.ndim - 2) for product in products]
        scores.append({path: p.sum(axis) for path, p, axis in zip(parameters, products, axes, strict=True)})
    return scores


def hold_side_effects(block: nn.Module, final: nn.Module) -> None:
    """Hold what a block does with the output of its FFN besides adding it: a norm's divisor, what a side path reads."""
    for module in block.modules():
        if "norm" in type(module).__name__.lower() and module is not final:
            module.register_forward_hook(frozen(centred=False))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


def frozen(*, centred: bool) -> Callable[..., Tensor]:
    """A norm whose divisor does not follow its input."""

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        given = args[0]
        if not given.requires_grad:
            return output
        bias = getattr(module, "bias", None)
        given = given - given.mean(-1, keepdim=True) if centred else given
        factor = (output if bias is None else output - bias) / given
        return output.detach() + factor.detach() * (given - given.detach())

    return hook


def fired(recording: Recording, places: list[list[int]]) -> list[Tensor]:
    """Per FFN the activations at (row, step) of each place, those of experts that were not asked included."""
    trace = pick_trace(recording, torch.tensor(places))
    blanks = [torch.zeros(len(places), ffn.size) for ffn in recording.anatomy.ffns]
    return [blank.scatter_add_(1, trace.neurons(i), trace.activations[i]) for i, blank in enumerate(blanks)]


def assert_same_activations(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        largest = float(theirs.abs().max())
        assert largest > 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=LIMIT * largest)


@every_family
def test_a_batch_and_one_pass_record_what_single_prompts_do(name):
    one = case(name)
    at = [[0, step] for step in range(N_TOKENS)]
    alone = [fired(recording, at) for recording in one.recordings]
    if one.vlm.family.one_at_a_time:
        for ask in (mmn.find, mmn.doctor):
            with pytest.raises(SettingError, match="one at a time"):
                ask(one.vlm, inputs=one.batch)
        asked = list(zip(one.alone, one.answers, [[0]] * 3, strict=True))
    else:
        with record(one.anatomy) as together:
            answers = one.vlm.generate(one.batch, N_TOKENS)
        assert list(answers.token_ids) == one.raw
        for row, expected in enumerate(alone):
            assert_same_activations(fired(together, [[row, step] for _, step in at]), expected)
        asked = [(one.batch, answers, [0, 1, 2])]
    rows: list[list[Tensor]] = []
    for inputs, answers, places in asked:
        read, at_once = answer(one.vlm, inputs, Question(), given=answers.token_ids, recorder=record)
        assert torch.equal(read.sequences, answers.sequences)
        for ours, chosen in ((read.logits, answers.logits), (read.log_totals, answers.log_totals)):
            torch.testing.assert_close(ours, chosen, rtol=0, atol=LIMIT * float(answers.log_totals.abs().max()))
        rows += [fired(at_once, [[row, step] for _, step in at]) for row in places]
    for ours, expected in zip(rows, alone, strict=True):
        assert_same_activations(ours, expected)


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    own = [id(getattr(m, "generation_config", None)) for m in model.modules()]
    return hooks, own, [m.training for m in model.modules()]


@every_family
def test_answers_are_those_of_the_bare_model_and_nothing_is_left_behind(name):
    one = case(name)
    assert [answers.token_ids[0] for answers in one.answers] == one.raw
    model: Any = one.model
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **own.to_diff_dict() | {"do_sample": True, "temperature": 9.0, "cache_implementation": "static"}
    )
    model.train()
    training: list[bool] = []
    watch = one.anatomy.blocks[0].module.register_forward_hook(lambda module, *_: training.append(module.training))
    try:
        before = state(model)
        with record(one.anatomy) as recording:
            answers = one.vlm.generate(one.alone[1], N_TOKENS)
        assert state(model) == before
    finally:
        watch.remove()
        model.generation_config = own
        model.eval()
    assert not any(training)
    assert answers.token_ids[0] == one.raw[1]
    assert recording.n_passes == N_TOKENS


@every_family
@torch.inference_mode()
def test_weights_times_inputs_are_what_the_modules_give(name):
    one = case(name)
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    hooks = []
    for ffn in one.anatomy.ffns:

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor, path: str = ffn.name) -> None:
            seen[path] = (*args, *kwargs.values()), output.clone()  # Llama 4 adds to it in place

        hooks.append(ffn.module.register_forward_hook(hook, with_kwargs=True))
    one.vlm.read(one.alone[0], one.answers[0])
    for handle in hooks:
        handle.remove()
    for ffn in one.anatomy.ffns:
        given, output = seen[ffn.name]
        if ffn.n_experts is None:
            bias = weights.bias(ffn.module)
            ours = given[0] @ weights.dense(ffn.module).T + (0 if bias is None else bias)
        else:
            ours = through_experts(ffn, given)
            output = output.view(-1, *ours.shape).sum(0)  # Llama 4: an answer of each expert to each token
        torch.testing.assert_close(ours, output, rtol=0, atol=1e-5 * float(output.abs().max()))


def through_experts(ffn: Ffn, given: tuple[Tensor, ...]) -> Tensor:
    """The sum of all activations times columns, at every position: (positions, hidden)."""
    assert ffn.n_experts is not None
    places = experts.routed(ffn.module, given, 1)
    slots = experts.activations(ffn.module, places)[0].view(*places.experts.shape[1:], -1)
    total = torch.zeros(slots.shape[0], one_matrix(ffn, 0).shape[0])
    for expert in range(ffn.n_experts):
        asked = (places.experts[0] == expert)[..., None]
        total += (slots * asked).sum(1) @ one_matrix(ffn, expert).T
    return total


def one_matrix(ffn: Ffn, expert: int) -> Tensor:
    return weights.dense(ffn.module, expert).detach()


@pytest.mark.parametrize("name", [name for name in NAMES if "experts" in (BY_NAME[name].facts or {})["w_out"]])
def test_neurons_of_experts_have_names(name):
    anatomy = case(name).anatomy
    for ffn in anatomy.ffns:
        last = ffn.neuron(ffn.size - 1)
        assert last == Neuron(ffn.layer, ffn.n_neurons - 1, None if ffn.n_experts is None else ffn.n_experts - 1)
        assert anatomy.find(Neuron.parse(str(last))) is ffn
        assert anatomy.find(dataclasses.replace(last, index=last.index + 1)) is None
    assert {ffn.n_experts for ffn in anatomy.ffns} > {4} or {ffn.n_experts for ffn in anatomy.ffns} == {4}


# Interventions


@every_family
@torch.inference_mode()
def test_intervening_gives_what_changed_weights_give(name):
    one = case(name)
    given = one.vlm.extended(one.alone[0], one.answers[0])
    neurons = [ffn.neuron(n) for ffn in one.anatomy.ffns for n in (1, ffn.size - 1)]
    places = [(ffn, n // ffn.n_neurons, n % ffn.n_neurons) for ffn in one.anatomy.ffns for n in (1, ffn.size - 1)]
    matrices = [weights.dense(f.module, None if f.n_experts is None else expert) for f, expert, _ in places]
    columns = [matrix[:, i] for matrix, (_, _, i) in zip(matrices, places, strict=True)]
    pristine = [column.clone() for column in columns]
    noise = dict(noises(one.anatomy, neurons))
    as_it_is = one.model(**given).logits
    changes: tuple[tuple[dict[str, Any], list[Tensor]], ...] = (
        ({"scale": 0}, [0 * column for column in pristine]),
        ({"scale": -2.5}, [-2.5 * column for column in pristine]),
        ({"noise": 0.7, "seed": 3}, [column + noise[n] for n, column in zip(neurons, pristine, strict=True)]),
    )
    for how, new in changes:
        with intervene(one.vlm, neurons, **how):
            ours = one.model(**given).logits
        for column, value in zip(columns, new, strict=True):
            column.copy_(value)
        expected = one.model(**given).logits
        for column, value in zip(columns, pristine, strict=True):
            column.copy_(value)
        assert (expected - as_it_is).abs().max() > 1e-3
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(one.model(**given).logits, as_it_is)


@every_family
@torch.inference_mode()
def test_a_step_run_again_without_neurons_is_the_model_without_them(name):
    one = case(name)
    step = N_TOKENS - 1
    replay = replay_of(one, step)
    assert replay.token_id == one.raw[0][step]
    ends = [*replay.slot_starts.tolist()[1:], replay.n_slots]
    singles = [slot for start, end in zip(replay.slot_starts.tolist(), ends, strict=True) for slot in (start, end - 1)]
    sets = [torch.tensor(slots).long() for slots in (*([slot] for slot in singles), singles, [])]
    ours = replay.without(sets)
    torch.testing.assert_close(ours, replay.without(sets, batch_size=1), rtol=0, atol=1e-4)
    given = one.vlm.extended(one.alone[0], one.answers[0])
    from_end = one.answers[0].n_prompt + step - 1 - one.answers[0].sequences.shape[1]
    place = n_positions(one, given) + from_end  # some models put the picture before the first token
    for logits, slots in zip(ours, sets, strict=True):
        with intervene(one.vlm, [replay.neuron(int(slot)) for slot in slots], scale=0, positions=[place]):
            expected = one.model(**given).logits[0, from_end].float()
        known = expected > -1e30
        assert torch.equal(known, logits > -1e30)
        torch.testing.assert_close(
            logits[known], expected[known], rtol=0, atol=3e-5 * float(expected[known].abs().max())
        )


def replay_of(one: Case, step: int) -> Replay:
    """One step to be run again; a model whose cache is not as its arguments say is refused, never misread."""
    try:
        return replays(one.vlm, one.alone[0], [step]).replays[0]
    except ModelError as error:
        if "called again, do not give what they gave" not in str(error):
            raise
        lacking(f"blocks of {one.family.name} that can be called again")


@every_family
def test_gradients_are_what_small_changes_do(name):
    """Central differences of log p, block by block; in the last one also where its activations are scaled."""
    one = case(name)
    replay = replay_of(one, N_TOKENS - 1)
    direction = torch.randn(replay.n_slots, generator=torch.Generator().manual_seed(0))
    fired = torch.cat(replay.activations)
    sizes = torch.tensor([len(part) for part in replay.activations])
    layer_of = torch.tensor([ffn.layer for ffn in replay.anatomy.ffns]).repeat_interleave(sizes)
    last = int(layer_of[-1])
    plain = replay.gradients()
    scaled = replay.gradients(last, torch.tensor([0.4, 0.4]))
    assert not scaled[layer_of != last].any()
    for layer, scale, ours in (*((layer, 1.0, plain) for layer in layer_of.unique().tolist()), (last, 0.4, scaled)):
        mine = torch.nonzero(layer_of == layer).squeeze(1)
        size = float(fired[mine].abs().mean() / direction[mine].abs().mean())

        def log_p(shift: float, mine: Tensor = mine, scale: float = scale) -> float:
            values = scale * fired + shift * direction
            return float(replay.without([mine], values)[0].double().log_softmax(-1)[replay.token_id])

        terms = ours[mine] * direction[mine]
        steps = (5e-3 * size, 5e-4 * size)  # a router may change its mind within the longer one
        errors = [abs(float(terms.sum()) - (log_p(h) - log_p(-h)) / (2 * h)) for h in steps]
        assert min(errors) < 1e-2 * float(terms.norm()), layer


def n_positions(one: Case, given: Mapping[str, Any]) -> int:
    """Of the stream that enters the first block."""
    seen: list[int] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = one.anatomy.blocks[0].module.register_forward_pre_hook(hook, with_kwargs=True)
    one.model(**given)
    handle.remove()
    return seen[0]


def noises(anatomy: Anatomy, neurons: Sequence[Neuron]) -> Iterator[tuple[Neuron, Tensor]]:
    """The noise that each neuron's column gets."""
    for part in parts_of(anatomy, Intervention(tuple(neurons), noise=0.7, seed=3)):
        assert part.noise is not None
        for index, row in zip(part.indices.tolist(), part.noise, strict=True):
            yield Neuron(part.ffn.layer, index, part.expert), row


# The patch grid


@every_family
def test_each_image_token_stands_for_its_patch(name):
    one, found = case(name), grids(name)
    if one.family.grid is None:
        assert isinstance(found, str)
        return
    assert not isinstance(found, str), found
    grid = found[0][0]
    assert (grid.rows, grid.columns) == one.family.grid
    assert len(grid.positions) == grid.rows * grid.columns
    if one.family.perturb is None:
        return
    model = quiet(one.model, one.facts["blocks"])
    before = entering(model, one.facts["blocks"], one.alone[0])
    for cell, position in enumerate(grid.positions.tolist()):
        changed = one.family.perturb(model, one.alone[0], cell // grid.columns, cell % grid.columns)
        moved = (entering(model, one.facts["blocks"], changed) - before).norm(dim=-1)
        assert int(moved.argmax()) == position, f"patch {divmod(cell, grid.columns)}"


@every_family
def test_maps_of_a_row_are_the_same_in_a_batch_and_alone(name):
    one = case(name)
    if one.vlm.family.one_at_a_time or one.family.grid is None:
        inputs, n_maps = one.alone[0], int(one.family.grid is not None)
    else:
        inputs, n_maps = one.batch, 1
    found, alone = (first_row(one, given, maps=True, top=3) for given in (inputs, one.alone[0]))
    assert found.notes == alone.notes
    assert any("No map is drawn" in note for note in found.notes) == (n_maps == 0)
    for noun, other in zip(found.nouns, alone.nouns, strict=True):
        assert [n.neuron for n in noun.neurons] == [n.neuron for n in other.neurons]
        for ours, expected in zip(noun.neurons, other.neurons, strict=True):
            assert len(ours.maps) == n_maps
            torch.testing.assert_close(torch.tensor(ours.maps), torch.tensor(expected.maps), rtol=0, atol=1e-3)


def quiet(model: PreTrainedModel, blocks: str) -> PreTrainedModel:
    """A copy whose patches do not see each other: no attention outside the blocks of the language model."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if not f"{blocks}.".startswith(f"{name}.") and not name.startswith(f"{blocks}.") and name:
            quiet_vision(model, module)
    return model


class _Enough(Exception):
    pass


def entering(model: PreTrainedModel, blocks: str, inputs: Mapping[str, Any]) -> Tensor:
    """The residual stream of row 0 as it enters the first block."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())
        raise _Enough

    handle = model.get_submodule(f"{blocks}.0").register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode(), pytest.raises(_Enough):
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


# Negative controls: what is read wrongly makes doctor fail


def transposed(matrix: Tensor) -> Tensor:
    return matrix.T.reshape(matrix.shape)


def rolled(matrix: Tensor) -> Tensor:
    return matrix.roll(1, 1)


def spoiled(one: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, VLM]]:
    """Everything in the model's anatomy that can be read wrongly, one after the other."""
    anatomy = one.anatomy

    def replaced(**parts: Any) -> VLM:
        vlm = copy.copy(one.vlm)
        vlm.analysed = dataclasses.replace(anatomy, **parts)
        return vlm

    if has_bias(one):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "bias", lambda *_: None)
            yield "a bias dropped", one.vlm
    real = weights.locate
    for form in ("dense", "fused"):
        mine = {id(ffn.module) for ffn in anatomy.ffns if (ffn.n_experts is None) == (form == "dense")}
        for change in (transposed, rolled) if mine else ():
            with monkeypatch.context() as patch:

                def locate(module: nn.Module, expert: int | None = None, mine: Any = mine, change: Any = change):
                    found = real(module, expert)
                    return Located(lambda: change(found.read())) if id(module) in mine else found

                patch.setattr(weights, "locate", locate)
                yield f"{form} w_out {change.__name__}", one.vlm
    for shift in (1, -1):
        norm = dataclasses.replace(anatomy.norm, weight=anatomy.norm.weight + shift)
        yield f"the norm's weight {shift:+}", replaced(norm=norm)
    if any(ffn.path is not None or ffn.gate is not None for ffn in anatomy.ffns):
        ffns = (dataclasses.replace(ffn, path=None, gate=None) for ffn in anatomy.ffns)
        yield "written as it is", replaced(ffns=tuple(ffns))
    if logits(anatomy.logit_rule) != "raw":
        yield "logits taken as they are", replaced(logit_rule=LogitRule())


def has_bias(one: Case) -> bool:
    """Whether the code has one, of the head or of an FFN's output."""
    paths = [f"{path}.bias" for path in one.facts["w_out"].split(",")]
    names = [name for name, _ in one.model.get_submodule(one.facts["blocks"]).named_parameters()]
    head = dict(one.model.get_submodule(one.facts["head"]).named_parameters())
    return "bias" in head or any(name.endswith(f".{path}") for name in names for path in paths)


@every_family
def test_doctor_notices_what_is_read_wrongly(name, monkeypatch):
    one = case(name)
    tried = []
    for what, vlm in spoiled(one, monkeypatch):
        assert not mmn.doctor(vlm, inputs=one.alone[0], max_new_tokens=2).passed, what
        tried.append(what)
    kinds = {kind_told(one.facts, ffn.layer, path_of(one.anatomy, ffn)) for ffn in one.anatomy.ffns}
    assert ("written as it is" in tried) == (kinds != {"identity"})
    assert ("logits taken as they are" in tried) == (one.facts["logits"] != "raw")


def test_noise_does_not_depend_on_the_order_in_which_neurons_are_named():
    """Aria has a dense FFN and experts in one block: the first expert is not to tie with the dense one."""
    anatomy = case("aria").anatomy
    routed = next(ffn for ffn in anatomy.ffns if ffn.n_experts is not None)
    dense = next(ffn for ffn in anatomy.ffns if ffn.layer == routed.layer and ffn.n_experts is None)
    neurons = (Neuron(dense.layer, 3), Neuron(routed.layer, 5, 0))
    first, second = (parts_of(anatomy, Intervention(order, noise=1.0)) for order in (neurons, neurons[::-1]))
    assert [part.ffn.name for part in first] == [part.ffn.name for part in second] == [dense.name, routed.name]
    for a, b in zip(first, second, strict=True):
        assert a.noise is not None
        assert b.noise is not None
        assert torch.equal(a.noise, b.noise)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_supported_is_refused(name):
    with pytest.raises(ModelError, match="language model cannot be run on a few tokens alone"):
        mmn.load(randomise(BY_NAME[name].build()))


# The page: `python tests/test_families.py` writes its tables anew

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- begin: tests/test_families.py -->\n", "<!-- end: tests/test_families.py -->"
TABLES = re.compile(f"(?<={BEGIN}).*?(?={END})", re.DOTALL)
COLUMNS = ("Type", "Class", "Blocks", "`w_out`", "Activation", "Write-back", "Final norm", "Logits", "Head")
COLUMNS += ("Picture", "Batches", "Error")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [columns, ["---" for _ in columns], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row_of(name: str) -> list[str]:
    one = case(name)
    anatomy, told = one.anatomy, describe_anatomy(one.vlm)
    return [
        name,
        f"`{type(one.model).__name__}`",
        f"`{one.facts['blocks']}`",
        different(w_out(anatomy, ffn) for ffn in anatomy.ffns),
        told["activation"],
        different(write_back(anatomy, ffn) for ffn in anatomy.ffns),
        f"`{anatomy.norm_name}`: {norms.kind(anatomy.norm_module, anatomy.norm)}",
        told["logits"] + (", some tokens barred" if anatomy.logit_rule.barred else ""),
        f"`{anatomy.head_name}`{' + bias' if anatomy.head_bias is not None else ''}{', tied' if told['tied'] else ''}",
        picture(name),
        "one prompt at a time" if one.vlm.family.one_at_a_time else "yes",
        next(bound for bound in ("< 1e-5", "< 1e-4") if error(name) < float(bound[2:])),
    ]


def different(said: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(said))


def w_out(anatomy: Anatomy, ffn: Ffn) -> str:
    path = path_of(anatomy, ffn)
    stored = weights.parameters(ffn.module)[path.rpartition(".")[2] if ffn.n_experts is not None else "weight"]
    axes = "hidden, neurons" if stored.shape[-1] == ffn.n_neurons else "neurons, hidden"
    bias = " + bias" if ffn.n_experts is None and weights.bias(ffn.module) is not None else ""
    return f"`{path}` ({axes if ffn.n_experts is None else f'experts, {axes}'}){bias}"


def write_back(anatomy: Anatomy, ffn: Ffn) -> str:
    if kind(anatomy, ffn) == "post-LN":
        return "through the norms of the stream"
    said = [f"times the sigmoid of `{gate_name(anatomy, ffn)}`"] if ffn.gate is not None else []
    for step in hops(ffn.path):
        said += ["times a number"] if step.scale != 1 else []
        said += [f"through `{step.norm.name.rpartition('.')[2]}`"] if step.norm is not None else []
    return ", ".join(dict.fromkeys(said)) or "as it is"


def gate_name(anatomy: Anatomy, ffn: Ffn) -> str:
    return next(name for name, module in anatomy.blocks[ffn.layer].module.named_modules() if module is ffn.gate)


def picture(name: str) -> str:
    found, family = grids(name), case(name).family
    if isinstance(found, str):
        return f"no map: {found}"
    return f"{found[0][0].rows} x {found[0][0].columns}" + ("" if family.perturb else ", not perturbed")


def told_apart(family: families.Family) -> str:
    said = ["prompts run one at a time"] if family.one_at_a_time else []
    said += ["positions are counted without padding"] if family.counts_positions else []
    said += [f"of tiles, the {family.whole} is the whole picture"] if family.whole else []
    return ", ".join(said + [f"`{name}` is {value} for the answer" for name, value in family.suffix.items()])


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as refused:
        mmn.load(randomise(BY_NAME[name].build()))
    return refused.value.what


def tables() -> str:
    told = ([name, told_apart(family), family.why] for name, family in families.FAMILIES.items())
    refused = ([name, f"`{type(BY_NAME[name].build()).__name__}`", refusal(name)] for name in REFUSED)
    return "\n".join(
        [
            f"\n{len(NAMES)} families:\n",
            table(COLUMNS, map(row_of, NAMES)),
            "What is told per family, as data in `src/mmneurons/vlm/families.py`, since neither structure nor a pass\n"
            "shows it:\n",
            table(("Type", "What is told", "Why"), told),
            "Not supported; `load` says so:\n",
            table(("Type", "Class", "What `load` says"), refused),
        ]
    )


def test_the_page_is_what_its_command_writes():
    (shown,) = TABLES.findall(PAGE.read_text(encoding="utf-8"))
    assert shown == tables(), (
        "docs/reference/models.md is out of date; write its tables anew: python tests/test_families.py"
    )


if __name__ == "__main__":
    logging.set_verbosity_error()
    made = tables()
    PAGE.write_text(TABLES.sub(lambda _: made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
