"""Report what was found in a model, and measure whether the numbers that rest on it hold for this model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmneurons import pocket
from mmneurons.data.images import open_image
from mmneurons.data.pictures import Picture
from mmneurons.errors import ModelError
from mmneurons.settings import PROMPT, Question
from mmneurons.vlm import provenance, weights
from mmneurons.vlm.anatomy import norms
from mmneurons.vlm.anatomy.parts import Anatomy, hops, normed
from mmneurons.vlm.anatomy.paths import Directions, frozen_rows
from mmneurons.vlm.context import hooked
from mmneurons.vlm.grid import find_grids
from mmneurons.vlm.hooks.recording import Recording, record
from mmneurons.vlm.locking import by_one_thread, restored
from mmneurons.vlm.traces import Trace, pick_trace, written
from mmneurons.vlm.vlm import VLM, Answers, Inputs

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error of additivity, by the dtype of the language model (this package computes in float32 throughout)."""
QUANTISED_TOLERANCE = 3e-2
"""Largest error of additivity where weights are quantised: some kernels round the activations too."""


@dataclass(frozen=True)
class Check:
    """A check is one thing that was measured on a model, with its outcome."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """A report says what `doctor` found in a model and what it measured."""

    model: dict[str, Any]
    structure: dict[str, Any]
    checks: tuple[Check, ...]
    packages: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {"passed": self.passed, **asdict(self)}


@by_one_thread
def doctor(
    vlm: VLM,
    image: Picture | None = None,
    prompt: str = PROMPT,
    answer_prefix: str | None = None,
    *,
    inputs: Inputs | None = None,
    max_new_tokens: int = 16,
) -> Report:
    """Check a model on one image, or on a sample if none is given.

    The main check is additivity: for every generated token, the contributions of all neurons and what attention,
    embedding and biases write, each recorded by itself, add up to the logit that the model gave (before any softcap).
    Reading `w_out` the wrong way round, a missed bias or a misread norm all break it. Where a model's architecture
    makes contributions inexact, the check fails and its detail says by how much.

    Args:
        vlm: The model, from `load`.
        image: The picture to ask about.
        prompt: What to ask.
        answer_prefix: Words that the answer is made to begin with; None: "An image of" with the default prompt, none
            with another.
        inputs: Ready-made model inputs instead of image and prompt, of one row or several; needed for a model without
            a processor.
        max_new_tokens: How many tokens to check.

    Returns:
        The parts found, the outcome of every check, and the versions of the packages.

    Raises:
        ModelError: if the model has no processor and no `inputs` are given.
        SettingError: if `inputs` have several rows and this model's prompts run one at a time.
    """
    # 1. What the model is asked: `picture` stays None for ready-made inputs, of which nothing is known but their
    # tensors.
    picture, answer_prefix = None, Question(prompt, answer_prefix).prefix
    if inputs is None:
        picture = open_image(pocket.samples()[0].path if image is None else image).image
        inputs = vlm.encode([picture], prompt, answer_prefix)
    else:
        inputs, answer_prefix = vlm.placed(inputs), ""
    # 2. Generated twice, without hooks and with: recording must not change the answer.
    plain = vlm.generate(inputs, max_new_tokens)
    vlm.check_batch(len(plain.token_ids))
    with record(vlm.anatomy) as recording, _outputs(vlm.anatomy, len(plain.token_ids)) as outputs:
        answers = vlm.generate(inputs, max_new_tokens)
    # 3. Everything is measured at the position of every generated token.
    trace = pick_trace(recording, _places(answers))
    checks = [
        _weights(vlm),
        _structure(vlm),
        _reading(vlm, recording, outputs),
        _norms(vlm, trace),
        additivity(vlm, trace, answers),
        _residual(vlm, trace, answers),
        Check(
            "recording changes nothing",
            torch.equal(plain.sequences, answers.sequences),
            "the same tokens with and without hooks",
        ),
        _forced(vlm, inputs, answers, trace),
    ]
    if picture is not None:
        checks.append(_batched(vlm, picture, prompt, answer_prefix, trace, max_new_tokens))
    # 4. What a reader wants to see beside the checks: the parts, the patch grid, the answer.
    structure = describe_anatomy(vlm)
    grids = find_grids(vlm.model, inputs, n_images=1)
    structure["patch_grid"] = grids if isinstance(grids, str) else [grids[0][0].rows, grids[0][0].columns]
    structure["answer"] = f"{answer_prefix} {answers.texts[0]}".strip()
    return Report(dict(vlm.facts), structure, tuple(checks), provenance.versions())


def additivity(vlm: VLM, trace: Trace, answers: Answers) -> Check:
    """Check additivity for each token of a recorded batch, row by row, against the logits that the model gave."""
    error, limit = additivity_error(vlm, trace, answers), tolerance(vlm)
    return Check(
        "neurons, attention, embedding and biases add up to the logit",
        error <= limit,
        f"{'' if error <= limit else 'approximate: '}error {error:.1e} of the largest logit over "
        f"{len(trace.residual)} tokens; limit {limit:.0e} in {_name(vlm.anatomy.dtype)}",
    )


def additivity_error(vlm: VLM, trace: Trace, answers: Answers) -> float:
    """Return the largest difference between a logit and the sum of its parts, relative to the largest logit."""
    token_ids, logits = _said(answers)
    summed = sum_of_writes(trace, token_ids)
    given = vlm.anatomy.logit_rule.undo(logits).to(summed.device)
    return float((summed - given).abs().max() / given.abs().max())


def sum_of_writes(trace: Trace, token_ids: list[int]) -> Tensor:
    """Return the logit of one token per position, summed from recorded writes, none of them a rest of the others."""
    anatomy = trace.anatomy
    rows = anatomy.unembed[token_ids].float().to(trace.residual.device)
    directions = Directions(anatomy, frozen_rows(anatomy, rows, trace.residual), trace.norms)
    ffn = torch.zeros(len(rows), device=rows.device, dtype=torch.float32)
    for i, part in enumerate(anatomy.ffns):
        ffn += (trace.activations[i] * trace.projected(i, directions.at(part.path))).sum(-1)
    bias = anatomy.head_bias
    return written(trace, rows, directions, ffn, None if bias is None else bias[token_ids].float()).total


def describe_anatomy(vlm: VLM) -> dict[str, Any]:
    """Return the parts that were found in a model, as plain data."""
    anatomy, rule = vlm.anatomy, vlm.anatomy.logit_rule
    padding = anatomy.vocab - vlm.n_tokens
    logits = [f"x {rule.before * rule.scale:.6g}"] if rule.before * rule.scale != 1 else []
    logits += [f"softcap {rule.cap:g}"] if rule.cap else []
    acts = (None if ffn.activation is None else type(ffn.activation).__name__ for ffn in anatomy.ffns)
    norm = f"{norms.kind(anatomy.norm_module, anatomy.norm)}, epsilon {anatomy.norm.eps:.1e}"
    head = f"{anatomy.vocab} x {anatomy.hidden}" + (f", {padding} rows of padding" if padding else "")
    return {
        "language_model": anatomy.decoder_name,
        "blocks": f"{len(anatomy.blocks)} x {_list(type(block.module).__name__ for block in anatomy.blocks)}",
        "w_out": _list(_ffn(anatomy, i) for i in range(len(anatomy.ffns))),
        "activation": _list(act or "none of its own" for act in acts),
        "write_back": _list(_path(ffn.path) for ffn in anatomy.ffns),
        "attention": _list(_below(anatomy, s.layer, s.name) for s in anatomy.sources if s.kind == "attention"),
        "other_writes": _list(_below(anatomy, s.layer, s.name) for s in anatomy.sources if s.kind == "other"),
        "final_norm": f"{anatomy.norm_name} ({norm})",
        "head": f"{anatomy.head_name} ({head})",
        "logits": ", ".join(logits) or "as the head gives them",
        "tied": _is_tied(vlm),
        "neurons": anatomy.n_neurons,
        "batches": f"one at a time: {vlm.family.why}" if vlm.family.one_at_a_time else "yes",
    }


def _list(items: Iterable[str]) -> str:
    """Join different items in one text, each once."""
    return "; ".join(dict.fromkeys(items)) or "none"


def _weights(vlm: VLM) -> Check:
    """Check that no weight that runs was drawn at random; `load` has refused any checkpoint where one would be."""
    name, loading = "every weight that runs came from the checkpoint", vlm.loading
    if loading is None:
        return Check(name, True, "not known: the model came loaded")
    idle = f"{len(loading.made_up)} that do not run are missing" if loading.made_up else "none is missing"
    return Check(name, True, ". ".join([idle, *loading.notes]))


def _structure(vlm: VLM) -> Check:
    """Check that nothing about the anatomy is in doubt."""
    doubts = vlm.anatomy.doubts
    detail = f"{len(vlm.anatomy.blocks)} blocks, each a sum of what its parts give"
    return Check("every write into the residual stream is known", not doubts, " ".join(doubts[:3]) or detail)


def _reading(vlm: VLM, recording: Recording, outputs: dict[int, list[Tensor]]) -> Check:
    """Check that `w_out` as it is read here, times the recorded activations, is what each module gave."""
    worst, limit = 0.0, tolerance(vlm)
    name = "none could be compared"
    for i, ffn in enumerate(recording.anatomy.ffns):
        if ffn.n_experts is not None or not outputs[id(ffn.module)]:  # no outputs: a block that was left out as a whole
            continue
        # Without the gate of shared experts, which multiplies the module's output later.
        fired = recording.stacked(recording.raw[i]).float()
        gave = recording.stacked(outputs[id(ffn.module)]).float()
        matrix = weights.dense(ffn.module).float()
        ours = fired.to(matrix.device) @ matrix.T
        bias = weights.bias(ffn.module)
        ours = ours if bias is None else ours + bias.float()
        error = float((ours - gave.to(ours.device)).norm() / gave.norm().clamp_min(1e-30))
        if not error <= worst:  # also true of NaN, which must not pass
            worst, name = error, ffn.name
    return Check(
        "each w_out times its activations is what its module gave",
        worst <= limit,
        f"error at most {worst:.1e} ({name}); limit {limit:.0e}",
    )


@torch.inference_mode()
def _norms(vlm: VLM, trace: Trace) -> Check:
    """Check that the final norm and those on the paths, as they are read here, give what their modules give."""
    anatomy = vlm.anatomy
    given = [(anatomy.norm_name, anatomy.norm_module, anatomy.norm, trace.residual)]
    given += [(s.name, s.module, s.norm, x) for s, x in zip(anatomy.norms, trace.norms, strict=True)]
    errors = {}
    for name, module, norm, x in given:
        gave = normed(module, x).float().to(x.device)
        errors[name] = float((norm.to(x.device)(x) - gave).norm() / gave.norm().clamp_min(1e-30))
    limit = tolerance(vlm) / 2  # nothing adds up on the way
    # A NaN is no larger than anything, and `max` would pass over it: it is made infinite, as is any error over the
    # limit.
    worst = max(errors, key=lambda name: errors[name] if errors[name] <= limit else float("inf"))
    return Check(
        "each norm as it is read gives what its module gives",
        errors[worst] <= limit,
        f"error at most {errors[worst]:.1e} ({worst}); limit {limit:.1e}",
    )


def _residual(vlm: VLM, trace: Trace, answers: Answers) -> Check:
    """Check that final norm, head and logit rule, as they are read here, give the logits that the model gave."""
    token_ids, logits = _said(answers)
    ours = vlm.anatomy.logits(trace.residual)
    chosen, gave = ours[torch.arange(len(token_ids)), token_ids], logits.to(ours.device)
    error, limit = float((chosen - gave).abs().max() / gave.abs().max()), tolerance(vlm)
    return Check(
        "residual stream gives the answer",
        error <= limit,
        f"norm, head and what follows it give the model's logits: error {error:.1e}; limit {limit:.0e}",
    )


def _forced(vlm: VLM, inputs: Inputs, answers: Answers, trace: Trace) -> Check:
    """Check that what is recorded step by step is what one forward pass over prompt and answer gives."""
    # Counted from the end: some models put the picture before the first position.
    last = torch.arange(answers.n_prompt - 1 - answers.sequences.shape[1], -1)
    name = "recording step by step is recording the whole answer at once"
    try:
        with record(vlm.anatomy, lambda values: values[:, last]) as recording:
            vlm.read(inputs, answers)
    except (TypeError, ValueError, RuntimeError) as error:
        return Check(name, False, f"the model does not read prompt and answer at once: {str(error).splitlines()[0]}")
    error, limit = _largest_difference(trace, pick_trace(recording, _places(answers))), 10 * tolerance(vlm)
    return Check(name, error <= limit, f"activations differ by {error:.1e} of the largest; limit {limit:.0e}")


def _batched(
    vlm: VLM, picture: Image.Image, prompt: str, answer_prefix: str, trace: Trace, max_new_tokens: int
) -> Check:
    """Check that a prompt in a padded batch gives what it gives alone."""
    name = "a batch gives what single prompts give"
    if vlm.family.one_at_a_time:
        return Check(name, True, f"not asked: prompts run one at a time. {vlm.family.why}")
    # A picture of another shape, which a processor may turn into another number of image tokens: the batch is padded.
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((2 * picture.width, picture.height))
    with record(vlm.anatomy) as recording:
        answers = vlm.generate(vlm.encode([picture, other], prompt, answer_prefix), max_new_tokens)
    # Row 0 is the picture that was asked about alone. Rounding may have ended the answer earlier or later.
    n = min(len(trace.residual), len(answers.token_ids[0]))
    together = pick_trace(recording, torch.tensor([[0, i] for i in range(n)]))
    error, limit = _largest_difference(trace, together), 10 * tolerance(vlm)
    return Check(name, error <= limit, f"activations differ by {error:.1e} of the largest; limit {limit:.0e}")


def _places(answers: Answers) -> Tensor:
    """Return the (row, step) of every token of every answer, (n, 2)."""
    return torch.tensor([(row, step) for row, ids in enumerate(answers.token_ids) for step in range(len(ids))])


def _said(answers: Answers) -> tuple[list[int], Tensor]:
    """Return every token of every answer, row by row, and the logits that the model gave them, float32."""
    logits = [row[: len(ids)] for ids, row in zip(answers.token_ids, answers.logits, strict=True)]
    return [token for ids in answers.token_ids for token in ids], torch.cat(logits).float()


def _largest_difference(one: Trace, other: Trace) -> float:
    """Return the largest difference of two traces' activations, over the largest of each FFN, as far as both go."""
    worst = 0.0
    for i, mine in enumerate(one.activations):
        theirs = other.activations[i]
        n, width = min(len(mine), len(theirs)), min(mine.shape[1], theirs.shape[1])
        largest = float(mine.abs().max().clamp_min(1e-30))
        error = float((mine[:n, :width] - theirs[:n, :width]).abs().max()) / largest
        worst = worst if error <= worst else error  # a NaN stays, once it is there
    return worst


@restored
def _outputs(anatomy: Anatomy, n_rows: int) -> Iterator[dict[int, list[Tensor]]]:
    """Record the output of each dense `w_out` at the last position of every forward pass, inside the `with`."""
    outputs: dict[int, list[Tensor]] = {id(ffn.module): [] for ffn in anatomy.ffns if ffn.n_experts is None}

    def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        rows = output.view(n_rows, -1, output.shape[-1])  # batch and positions can be one axis (OPT, shared experts)
        outputs[id(module)].append(rows[:, -1:].clone())  # a copy: Llama 4 adds to its shared expert's output in place

    with hooked(partial(ffn.module.register_forward_hook, hook) for ffn in anatomy.ffns if ffn.n_experts is None):
        yield outputs


def tolerance(vlm: VLM) -> float:
    """Return how far additivity may be off for this model, as a share of the largest logit."""
    if any(weights.is_quantised(ffn.module) for ffn in vlm.anatomy.ffns):
        return QUANTISED_TOLERANCE
    return TOLERANCE[vlm.anatomy.dtype]


def _name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def _ffn(anatomy: Anatomy, i: int) -> str:
    """Describe one FFN: path in its block, shape, bias, class."""
    ffn = anatomy.ffns[i]
    size = f"{anatomy.hidden} x {ffn.n_neurons}"
    if ffn.n_experts is not None:
        size = f"{ffn.n_experts} experts of {size}"
    bias = "" if ffn.n_experts is not None or weights.bias(ffn.module) is None else " + bias"
    return f"{_below(anatomy, ffn.layer, ffn.name)} ({size}{bias}, {type(ffn.module).__name__})"


def _path(path: Any) -> str:
    """Describe how what an FFN writes reaches the final norm."""
    said = []
    for step in hops(path):
        if step.scale != 1:
            said.append(f"x {step.scale:.4g}")
        if step.norm is not None:
            said.append(f"through {step.norm.name.rpartition('.')[2]}")
    # In a post-LN model a path goes through two norms of every block above.
    if len(said) > 3:
        said = [*said[:2], f"{len(said) - 2} more"]
    return ", ".join(said) or "as it is"


def _below(anatomy: Anatomy, layer: int, name: str) -> str:
    """Return a path without that of its block, so that the same part of every block has one name."""
    return name.removeprefix(f"{anatomy.blocks[layer].name}.")


def _is_tied(vlm: VLM) -> bool:
    """Whether the unembedding and the input embedding are one parameter."""
    try:
        embedding = vlm.model.get_input_embeddings()
    except (AttributeError, NotImplementedError, ModelError):
        return False
    return getattr(vlm.anatomy.head, "weight", None) is getattr(embedding, "weight", 0)
