"""What was found in a model, and whether the numbers that rest on it are true for this model: measured, not assumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons import pocket
from mmneurons.maths.readout import frozen_direction
from mmneurons.vlm import provenance, weights
from mmneurons.vlm.anatomy import Anatomy
from mmneurons.vlm.grid import find_grid
from mmneurons.vlm.images import open_image
from mmneurons.vlm.prompts import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.recording import Recording, record
from mmneurons.vlm.vlm import VLM, Answers, Picture

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error of the additivity identity, by the dtype the model computes in (ours is float32 throughout)."""


@dataclass(frozen=True)
class Check:
    """One thing that was measured."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What `doctor` says."""

    model: dict[str, Any]
    structure: dict[str, Any]
    checks: tuple[Check, ...]
    packages: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {"passed": self.passed, **asdict(self)}


def doctor(vlm: VLM, image: Picture | None = None, prompt: str = PROMPT, answer_prefix: str = ANSWER_PREFIX) -> Report:
    """Check a model on one image; a sample image if none is given.

    The additivity identity: for every generated token, the contributions of all neurons and what attention, embedding
    and biases write, each recorded by itself, add up to the logit that the model gave. Reading `w_out` the wrong way
    round, a missed bias or a misread norm all break it.
    """
    opened = open_image(pocket.samples()[0].path if image is None else image)
    inputs = vlm.encode([opened.image], prompt, answer_prefix)
    plain = vlm.generate(inputs)
    with record(vlm.anatomy) as recording:
        answers = vlm.generate(inputs, logits=True)
    checks = [additivity(vlm, recording, answers)]
    same = torch.equal(plain.sequences, answers.sequences)
    checks.append(Check("recording changes nothing", same, "the same tokens with and without hooks"))
    chosen = vlm.anatomy.logits(Recording.stacked(recording.residual)[0])[: len(answers.token_ids[0])].argmax(-1)
    agree = chosen.tolist() == list(answers.token_ids[0])
    detail = "each generated token has the highest logit read off the recorded residual stream"
    checks.append(Check("residual stream gives the answer", agree, detail))
    facts, structure = dict(vlm.facts), describe_anatomy(vlm)
    structure["patch_grid"] = (
        grid if isinstance(grid := find_grid(vlm.model, inputs), str) else [grid.rows, grid.columns]
    )
    structure["caption"] = f"{answer_prefix} {answers.texts[0]}"
    return Report(facts, structure, tuple(checks), provenance.versions())


def additivity(vlm: VLM, recording: Recording, answers: Answers) -> Check:
    """Check the identity for each token of row 0 of a recorded batch, against the logits that the model gave."""
    token_ids = answers.token_ids[0]
    n, anatomy = len(token_ids), vlm.anatomy
    residual = Recording.stacked(recording.residual)[0, :n].float()
    logits = torch.stack([answers.logits[step][0, token] for step, token in enumerate(token_ids)]).float()
    summed = sum_of_writes(anatomy, recording, residual, list(token_ids))
    relative = float((summed - logits).abs().max() / logits.abs().max())
    limit = TOLERANCE.get(vlm.model.dtype, 0.0)
    return Check(
        "neurons, attention, embedding and biases add up to the logit",
        relative <= limit,
        f"error {relative:.1e} of the largest logit over {n} tokens; limit {limit:.0e} in {vlm.model.dtype}",
    )


def sum_of_writes(
    anatomy: Anatomy, recording: Recording, residual: Float[Tensor, "steps hidden"], token_ids: list[int]
) -> Float[Tensor, "steps"]:
    """Logit of each token from the recorded writes alone: none of them is had by subtraction."""
    n = len(token_ids)
    rows = anatomy.unembed[token_ids].float()
    directions = frozen_direction(rows, residual, anatomy.norm)
    total = rows @ anatomy.norm.bias
    if anatomy.head_bias is not None:
        total = total + anatomy.head_bias[token_ids].float()
    for parts in (recording.embedding, recording.attention):
        total = total + (Recording.stacked(parts)[0, :n].to(total.device).float() * directions).sum(-1)
    for block, parts in zip(anatomy.blocks, recording.activations, strict=True):
        activations = Recording.stacked(parts)[0, :n].float()
        total = total + (activations * weights.project(directions, block.w_out)).sum(-1).to(total.device)
        bias = getattr(block.w_out, "bias", None)
        if bias is not None:
            total = total + directions @ bias.detach().to(total.device).float()
    return total


def describe_anatomy(vlm: VLM) -> dict[str, Any]:
    """The parts found, as plain data."""
    anatomy = vlm.anatomy
    first = anatomy.blocks[0]
    kind = "LayerNorm" if anatomy.norm.centred else "RMSNorm"
    return {
        "language_model": anatomy.decoder_name,
        "blocks": f"{len(anatomy.blocks)} x {type(first.module).__name__}",
        "w_out": f"{first.w_out_name} ({anatomy.hidden} x {first.n_neurons}, {type(first.w_out).__name__})",
        "activation": "none of its own" if first.activation is None else type(first.activation).__name__,
        "attention": f"{first.mixer_name} ({type(first.mixer).__name__})",
        "final_norm": f"{anatomy.norm_name} ({kind}, epsilon {anatomy.norm.eps:.1e})",
        "head": f"{anatomy.head_name} ({anatomy.vocab} x {anatomy.hidden})",
        "tied": anatomy.head.weight is getattr(vlm.model.get_input_embeddings(), "weight", None),
        "neurons": anatomy.n_neurons,
    }
