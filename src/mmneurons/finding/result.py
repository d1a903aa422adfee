"""What `find` found, as data: plain numbers and words, no tensors; to JSON and back without torch.

The JSON form is described in docs/reference/format.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from textwrap import shorten
from typing import Annotated, Any, Literal

import msgspec
from PIL import Image

from mmneurons.errors import FormatError, WordError
from mmneurons.files import check_facts, decode_json, read_text, write_whole
from mmneurons.finding.grounded import Count, Grounded
from mmneurons.finding.rows import Row, rows_of
from mmneurons.neurons import Neuron
from mmneurons.settings import Says, Score

SCHEMA = 4
"""Number of the JSON form; a reader refuses any other."""
LARGEST = 2**30
"""Bytes of a file: maps of a thousand images take a quarter of it."""
BaselineName = Literal["zero", "blank", "reference"]
Grid = tuple[tuple[float, ...], ...]
"""One number per patch, rows from top to bottom, columns from left to right."""


@dataclass(frozen=True)
class NeuronFinding:
    """A NeuronFinding is one of the neurons that wrote a noun."""

    neuron: Neuron
    score: float
    """Its contribution to the noun, in the units of the score chosen."""
    activation: float
    """a[l,i] at the position that predicts the noun (`score="paper"`: the gate alone)."""
    tokens: tuple[str, ...]
    """The ten tokens that sign(activation - baseline) * its column promotes most; standardised, next to all neurons."""
    suppressed: tuple[str, ...] = ()
    """The three it pushes down most."""
    maps: tuple[Grid, ...] = ()
    """Per picture, activation at each patch, times the sign of `activation - baseline` (`score="paper"`: as it is).

    Empty if not asked for or without a grid.
    """
    lost_without_image: float | None = None
    """Share of `score` that is lost when the same words are read with a blank image, over the same reference, if any.

    None if not asked for, and over a blank image, of which a score is all that is lost."""
    baseline: float | None = None
    """The activation that `activation` is compared with; None: zero."""

    def __repr__(self) -> str:
        return f"NeuronFinding({self.neuron} {self.score:+.3g}: {_line(' '.join(self.tokens))})"


@dataclass(frozen=True)
class Parts:
    """Where the noun's logit comes from; the five parts that are not `top` add up to it (before any softcap)."""

    ffn: float
    """Written by all FFN neurons."""
    top: float
    """Written by the top neurons listed; contained in `ffn`."""
    attention: float
    """Written by attention (or another token mixer) of all blocks."""
    other: float
    """Written by anything else in the blocks, such as Gemma 4's per-layer inputs; 0 in most models."""
    embedding: float
    """Read off the embedding of the last token."""
    bias: float
    """Biases of the FFN output projections, of norms on the way, of the final norm and the head."""

    @property
    def total(self) -> float:
        """The logit as the parts have it."""
        return self.ffn + self.attention + self.other + self.embedding + self.bias


@dataclass(frozen=True)
class NounFinding:
    """A NounFinding is one noun of the caption with the neurons that wrote it."""

    word: str
    """As the caption writes it."""
    lemma: str
    """Singular, lower case."""
    start: int
    """Offset of the word's first character in the caption."""
    token: str
    """The token that is scored: the word's first."""
    token_id: int
    step: int
    """Index of that token among the generated ones."""
    n_tokens: int
    """How many tokens wrote the word."""
    probability: float
    """The model's next-token probability of the token there."""
    logit: float
    """The model's logit of the token there, before any softcap."""
    parts: Parts
    neurons: tuple[NeuronFinding, ...]
    """Highest score first; equal scores by (layer, index)."""
    layers: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """For k = 10, 100, 1000: how many of the top k lie in each block."""
    regions: Mapping[int, tuple[Grid, ...]] = field(default_factory=dict)
    """For k = 1, 10, 50, 100, 500, 1000: per picture, the mean of the maps of the top k; empty if not asked for or
    without a grid."""
    grounded: Grounded | None = None
    """Whether the image tokens say it; None if not asked for or without a grid."""

    def __repr__(self) -> str:
        best = f", first {self.neurons[0].neuron} {self.neurons[0].score:+.3g}" if self.neurons else ""
        return f"NounFinding({_line(self.word)}, p {self.probability:.3g}: {len(self.neurons)} neurons{best})"


@dataclass(frozen=True)
class Finding:
    """A Finding holds what the model said to one prompt and, for each noun, which neurons wrote it."""

    images: tuple[str, ...]
    """The pictures of the prompt: each a path as given, or '<PIL image>'. None for a prompt of words alone."""
    prompt: str
    answer_prefix: str
    """Words the answer was made to begin with; not part of `caption`."""
    caption: str
    """What the model generated after the prefix."""
    token_ids: tuple[int, ...]
    """The generated tokens, end-of-text included where it came."""
    score: Score
    against: str | None
    nouns: tuple[NounFinding, ...]
    notes: tuple[str, ...] = ()
    """What a reader should be told: how the image was read, that there is no patch grid, that nothing was found."""
    rendered_prompt: str = ""
    """The prompt as the model read it: the chat template's marks, one token for a picture, and the prefix."""
    says: Says = "standardised"
    """How the tokens of its neurons were read."""
    baseline: BaselineName = "zero"
    """What activations were compared with: nothing, a blank image, or a reference's answers."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model, revision, weights hash, dtype, device, package versions, settings."""
    views: tuple[Image.Image | None, ...] = field(default=(), compare=False, repr=False)
    """The pictures as the model saw them (cropped, resized), where known; not saved."""

    def noun(self, word: str) -> NounFinding:
        """The first noun written or lemmatised as `word`.

        Raises:
            WordError: there is none.
        """
        for noun in self.nouns:
            if word in (noun.word, noun.lemma):
                return noun
        there = ", ".join(dict.fromkeys(noun.word for noun in self.nouns)) or "no nouns"
        raise WordError(
            f"'{word}' is none of the nouns of this finding.",
            seen=f"It has: {there}. The answer was: {self.caption}",
            fix=f'Words of the answer that are no nouns are asked for: find(vlm, image, words=["{word}"])',
        )

    def rows(self) -> list[Row]:
        """One flat row for each neuron of each noun, for a data frame; the columns are in docs/reference/format.md."""
        return list(rows_of(self))

    def __repr__(self) -> str:
        images = _line(" + ".join(PurePath(image).name for image in self.images)) if self.images else "no image"
        nouns = ", ".join(noun.word for noun in self.nouns)
        return f"Finding({images}: {_line(self.caption)}; {len(self.nouns)} nouns: {shorten(nouns, 60)})"

    def _repr_html_(self) -> str:
        """The page of `write_report`, for a notebook."""
        from mmneurons.report.page import framed

        return framed(self)


def _line(text: str) -> str:
    """A text in one short line, quoted."""
    return repr(shorten(text, 60, placeholder="..."))


def to_json(findings: Finding | Iterable[Finding]) -> str:
    """The findings of one run as JSON text: the same run gives the same bytes.

    Numbers keep seven significant digits, what float32 holds.

    Raises:
        FormatError: if the findings do not come from one run (their provenance differs).
    """
    findings = [findings] if isinstance(findings, Finding) else list(findings)
    provenance = dict(findings[0].provenance) if findings else {}
    if any(dict(finding.provenance) != provenance for finding in findings):
        raise FormatError("These findings come from different runs.", fix="Write one file for each run.")
    document = {"schema": SCHEMA, "provenance": provenance, "findings": [_finding_to_dict(f) for f in findings]}
    return json.dumps(_rounded(document), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> list[Finding]:
    """Read what `to_json` wrote.

    Raises:
        FormatError: if `text` is not JSON, or not of this schema.
    """
    return _read(text, "This file of findings")


def save(findings: Finding | Iterable[Finding], path: str | os.PathLike[str]) -> None:
    """Write the findings of one run to `path`, whole or not at all."""
    path = Path(path)
    write_whole(path, to_json(findings).encode("utf-8"))


def load(path: str | os.PathLike[str]) -> list[Finding]:
    """Read a file that `save` or `mmneurons find --json` wrote.

    Raises:
        MissingFileError: if there is no such file.
        FormatError: if it is not one.
    """
    return _read(read_text(path, limit=LARGEST), str(path))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == 0 or not math.isfinite(value) else float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(entry) for entry in value]
    return value


def _finding_to_dict(finding: Finding) -> dict[str, Any]:
    return {
        "images": finding.images,
        "prompt": finding.prompt,
        "answer_prefix": finding.answer_prefix,
        "rendered_prompt": finding.rendered_prompt,
        "caption": finding.caption,
        "token_ids": finding.token_ids,
        "choices": {
            "score": finding.score,
            "against": finding.against,
            "says": finding.says,
            "baseline": finding.baseline,
        },
        "notes": finding.notes,
        "nouns": [_noun_to_dict(noun) for noun in finding.nouns],
    }


def _noun_to_dict(noun: NounFinding) -> dict[str, Any]:
    simple = ("word", "lemma", "start", "token", "token_id", "step", "n_tokens", "probability", "logit")
    return {
        **{name: getattr(noun, name) for name in simple},
        **({} if noun.grounded is None else {"grounded": dataclasses.asdict(noun.grounded)}),
        "parts": dataclasses.asdict(noun.parts),
        "layers": noun.layers,
        "regions": noun.regions,
        "neurons": [_neuron_to_dict(neuron) for neuron in noun.neurons],
    }


def _neuron_to_dict(finding: NeuronFinding) -> dict[str, Any]:
    neuron = finding.neuron
    entry: dict[str, Any] = {"layer": neuron.layer, "index": neuron.index}
    if neuron.expert is not None:
        entry["expert"] = neuron.expert
    entry |= {"score": finding.score, "activation": finding.activation, "tokens": finding.tokens}
    entry["suppressed"] = finding.suppressed
    if finding.maps:
        entry["maps"] = finding.maps
    if finding.lost_without_image is not None:
        entry["lost_without_image"] = finding.lost_without_image
    if finding.baseline is not None:
        entry["baseline"] = finding.baseline
    return entry


Number = Annotated[float, msgspec.Meta(ge=-3.5e38, le=3.5e38)]
"""What a float32 can be."""
_Grid = tuple[tuple[Number, ...], ...]


class _Neuron(msgspec.Struct, forbid_unknown_fields=True):
    """A `NeuronFinding` as it is written."""

    layer: Count
    index: Count
    score: Number
    activation: Number
    tokens: tuple[str, ...]
    suppressed: tuple[str, ...]
    expert: Count | None = None
    maps: tuple[_Grid, ...] = ()
    lost_without_image: Number | None = None
    baseline: Number | None = None

    def read(self) -> NeuronFinding:
        fields = msgspec.structs.asdict(self)
        return NeuronFinding(Neuron(*(fields.pop(name) for name in ("layer", "index", "expert"))), **fields)


class _Parts(msgspec.Struct, forbid_unknown_fields=True):
    ffn: Number
    top: Number
    attention: Number
    other: Number
    embedding: Number
    bias: Number


class _Noun(msgspec.Struct, forbid_unknown_fields=True):
    """A `NounFinding` as it is written."""

    word: str
    lemma: str
    start: Count
    token: str
    token_id: Count
    step: Count
    n_tokens: Count
    probability: Number
    logit: Number
    parts: _Parts
    layers: dict[Count, tuple[Count, ...]]
    regions: dict[Count, tuple[_Grid, ...]]
    neurons: tuple[_Neuron, ...]
    grounded: Grounded | None = None

    def read(self) -> NounFinding:
        parts, neurons = Parts(**msgspec.structs.asdict(self.parts)), tuple(neuron.read() for neuron in self.neurons)
        return NounFinding(**msgspec.structs.asdict(self) | {"parts": parts, "neurons": neurons})


class _Choices(msgspec.Struct, forbid_unknown_fields=True):
    score: Score
    against: str | None
    says: Says
    baseline: BaselineName


class _Finding(msgspec.Struct, forbid_unknown_fields=True):
    """A `Finding` as it is written."""

    images: tuple[str, ...]
    prompt: str
    answer_prefix: str
    rendered_prompt: str
    caption: str
    token_ids: tuple[Count, ...]
    choices: _Choices
    notes: tuple[str, ...]
    nouns: tuple[_Noun, ...]

    def read(self, provenance: dict[str, Any]) -> Finding:
        fields = msgspec.structs.asdict(self)
        chosen = msgspec.structs.asdict(fields.pop("choices"))
        fields["nouns"] = tuple(noun.read() for noun in self.nouns)
        return Finding(**fields, **chosen, provenance=provenance)


class _Schema(msgspec.Struct):
    schema: Any = None


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    schema: Literal[4]
    provenance: dict[str, Any]
    findings: tuple[_Finding, ...]


def _read(text: str, name: str) -> list[Finding]:
    """The findings in a text; `name` is what it is called if it is refused."""
    schema = decode_json(text, _Schema, name).schema
    if schema != SCHEMA:
        raise FormatError(
            f"This version reads findings of schema {SCHEMA}.",
            seen=f"The file says schema {str(schema)[:40]}.",
            fix="Make it again with this version: mmneurons find IMAGE --json FILE",
        )
    document = decode_json(text, _Document, name)
    check_facts(document.provenance, name)
    for finding in document.findings:
        for noun in finding.nouns:
            grids = [*(grid for neuron in noun.neurons for grid in neuron.maps)]
            grids += [grid for region in noun.regions.values() for grid in region]
            if any(not grid or not grid[0] or len({len(row) for row in grid}) > 1 for grid in grids):
                raise FormatError(f"{name} is damaged.", seen=f"A map of '{noun.word[:40]}' is no grid of numbers.")
    return [finding.read(document.provenance) for finding in document.findings]
