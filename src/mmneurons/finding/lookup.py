"""What a neuron says, and which neurons say a word: read off the weights, no image and no forward pass needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.finding.reading import Reader, columns_of, reader_for
from mmneurons.finding.scoring import unembed_rows
from mmneurons.maths.ranking import token_pushes
from mmneurons.neurons import Neuron
from mmneurons.settings import Says
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.anatomy.paths import in_stream
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.tokens import token_of
from mmneurons.vlm.vlm import VLM

CANDIDATES = 400
"""How many columns with large cosines `neurons_for` looks at, or ten times as many as it gives if that is more."""


@dataclass(frozen=True)
class Neighbour:
    """A neuron whose column lies close to another's."""

    neuron: Neuron
    cosine: float
    """Of the two columns as they reach the stream; near -1 they say the opposite when both fire the same way."""


@dataclass(frozen=True)
class NeuronCard:
    """What one neuron writes whenever it fires."""

    neuron: Neuron
    norm: float
    """Euclidean length of its column of `w_out`."""
    norm_rank: float
    """Share of the neurons of its FFN (its expert) whose columns are shorter, 0 to 1."""
    tokens: tuple[str, ...]
    """What it promotes when its activation is positive, strongest first; negative, it promotes `suppressed`."""
    suppressed: tuple[str, ...]
    """What it pushes down then, strongest first."""
    neighbours: tuple[Neighbour, ...]
    """The neurons of the whole model with the largest cosines, of either sign, largest first."""
    says: Says = "standardised"
    """How its tokens were read."""

    def __repr__(self) -> str:
        says, suppresses = (" ".join(map(str.strip, tokens[:5])) for tokens in (self.tokens, self.suppressed))
        near = f", {len(self.neighbours)} neighbours" if self.neighbours else ""
        return f"NeuronCard({self.neuron}: says {says!r}, suppresses {suppresses!r}, length {self.norm:.3g}{near})"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        near = [{"neuron": str(n.neuron), "cosine": n.cosine} for n in self.neighbours]
        return asdict(self) | {"neuron": str(self.neuron), "neighbours": near}


@dataclass(frozen=True)
class WordNeuron:
    """A neuron whose column points to a word."""

    neuron: Neuron
    cosine: float
    """Between its column as it reaches the stream and the direction that the word's token is read along; below 0, the
    neuron says the word by a negative activation."""
    rank: int
    """Place of the token among all that the column promotes, with the sign that suits the word; 0 is the first."""
    tokens: tuple[str, ...]
    """What it promotes with that sign, strongest first."""


@dataclass(frozen=True)
class WordNeurons:
    """The neurons whose columns point to a word."""

    word: str
    token: str
    """The token that was looked for: the word's first, as it begins inside a sentence."""
    token_id: int
    neurons: tuple[WordNeuron, ...]
    """Lowest rank first; of the same rank, the largest cosine of either sign."""
    says: Says = "standardised"
    """How their tokens were read, and ranks told."""

    def __repr__(self) -> str:
        first = f", first {self.neurons[0].neuron}" if self.neurons else ""
        return f"WordNeurons({self.word!r}, token {self.token!r}: {len(self.neurons)} neurons{first})"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self) | {"neurons": [asdict(n) | {"neuron": str(n.neuron)} for n in self.neurons]}


@by_one_thread
def explain_neuron(
    vlm: VLM, neuron: str | Neuron, *, n_tokens: int = 10, n_neighbours: int = 10, says: Says = "standardised"
) -> NeuronCard:
    """What a neuron promotes and suppresses, how long its column is, and which neurons are like it.

    Args:
        vlm: The model, from `load`.
        neuron: A `Neuron` or its name: "L23.u6012", or "L23.e5.u6012" for expert 5.
        n_tokens: How many tokens to give each way.
        n_neighbours: How many neighbours to give; one read of every `w_out` finds them.
        says: How its tokens are read, as in `find`.

    Raises:
        SettingError: if the model has no such neuron, or this is no name of one.

    Source: projecting columns onto the vocabulary follows Geva et al., EMNLP 2022; Pan et al., section 3.
    """
    neuron = Neuron.parse(str(neuron))
    anatomy = vlm.anatomy
    ffn = anatomy.find(neuron)
    if ffn is None:
        raise no_such_neuron(anatomy, neuron)
    place = (anatomy.ffns.index(ffn), neuron.index + (neuron.expert or 0) * ffn.n_neurons)
    device = anatomy.norm.weight.device
    column = columns_of(anatomy, [place], device)
    reader = reader_for(vlm, says)
    up, down = reader.tokens(reader.read(column, [place], torch.ones(1, dtype=torch.float32)), n_tokens)
    lengths = torch.cat([part.norm(dim=0).cpu() for _, part in weights.chunks(ffn.module, expert=neuron.expert)])
    norm = float(column.norm())
    found = _closest(anatomy, in_stream(column, ffn.path)[0], n_neighbours + 1)
    return NeuronCard(
        neuron=neuron,
        norm=norm,
        norm_rank=float((lengths < lengths[neuron.index]).float().mean()),
        tokens=up[0],
        suppressed=down[0],
        neighbours=tuple(Neighbour(n, cosine) for n, cosine, _ in found if n != neuron)[:n_neighbours],
        says=says,
    )


@by_one_thread
def neurons_for(vlm: VLM, word: str, *, top: int = 10, says: Says = "standardised") -> WordNeurons:
    """The neurons of the whole model whose columns point to a word: no image, one read of every `w_out`.

    Of the columns with the largest cosines to the word's direction, those come first that promote fewest other tokens
    more: a large cosine alone is often one with every noun. Which neurons fire for an image, `find` tells.

    Args:
        vlm: The model, from `load`.
        word: A word; of several tokens, its first counts. Of a model without tokenizer, `<17>` is token 17.
        top: How many neurons to give.
        says: How their tokens are read, as in `find`; ranks are places in that reading.

    Raises:
        WordError: if the word has no token to begin with.
    """
    anatomy = vlm.anatomy
    token_id = token_of(vlm.tokenizer, word)
    row = unembed_rows(anatomy, [token_id], anatomy.norm.weight)[0]
    direction = anatomy.norm.centre(anatomy.norm.weight * row)
    found = _closest(anatomy, direction, max(CANDIDATES, 10 * top))
    places = [place for _, _, place in found]
    signs = torch.tensor([1.0 if cosine >= 0 else -1.0 for _, cosine, _ in found], dtype=torch.float32)
    reader = reader_for(vlm, says)
    read = reader.read(columns_of(anatomy, places, row.device), places, signs)
    ranks = _ranks(read, reader, token_id)
    order = sorted(range(len(found)), key=lambda i: (ranks[i], -abs(found[i][1])))[:top]
    up, _ = reader.tokens(read[order])
    neurons = tuple(WordNeuron(found[i][0], found[i][1], ranks[i], tokens) for i, tokens in zip(order, up, strict=True))
    return WordNeurons(word, vlm.token_text(token_id), token_id, neurons, says)


def _ranks(read: Float[Tensor, "n hidden"], reader: Reader, token_id: int, chunk: int = 64) -> list[int]:
    """How many tokens each column promotes more than this one; vocab x n is never held at once."""
    ranks: list[int] = []
    for part in read.split(chunk):
        logits = token_pushes(part, reader.unembed, reader.deviations)
        ranks += (logits > logits[:, token_id, None]).sum(-1).tolist()
    return ranks


def _closest(
    anatomy: Anatomy, direction: Float[Tensor, "hidden"], top: int
) -> list[tuple[Neuron, float, tuple[int, int]]]:
    """The columns with the largest cosines to a direction in the stream, of either sign, over the whole model."""
    unit = direction / direction.norm().clamp_min(1e-30)
    best, places = torch.zeros(0, dtype=torch.float32), torch.zeros(0, 2, dtype=torch.long)
    for i, ffn in enumerate(anatomy.ffns):
        for start, columns in _columns(ffn):
            written = in_stream(columns.T, ffn.path)
            cosines = ((written @ unit.to(written.device)) / written.norm(dim=1).clamp_min(1e-30)).cpu()
            few = cosines.abs().topk(min(top, len(cosines))).indices
            best = torch.cat([best, cosines[few]])
            places = torch.cat([places, torch.stack([torch.full_like(few, i), few + start], dim=1)])
            order = best.abs().sort(descending=True, stable=True).indices[:top]
            best, places = best[order], places[order]
    return [
        (anatomy.ffns[i].neuron(n), cosine, (i, n))
        for cosine, (i, n) in zip(best.tolist(), places.tolist(), strict=True)
    ]


def _columns(ffn: Ffn) -> Iterator[tuple[int, Float[Tensor, "hidden chunk"]]]:
    """Slices of columns of all experts of an FFN, with the number of the first."""
    for expert in range(ffn.n_experts or 1):
        for part, columns in weights.chunks(ffn.module, expert=None if ffn.n_experts is None else expert):
            yield expert * ffn.n_neurons + part.start, columns


def no_such_neuron(anatomy: Anatomy, neuron: Neuron) -> SettingError:
    """Return the error for a neuron that the model does not have, with those that it has in that block."""
    lines = []
    for ffn in anatomy.ffns:
        if ffn.layer == neuron.layer:
            experts = "" if ffn.n_experts is None else f".e0 to .e{ffn.n_experts - 1}, each"
            lines.append(f"L{ffn.layer}{experts} u0 to u{ffn.n_neurons - 1}")
    seen = "; ".join(lines) or f"Its blocks are L0 to L{len(anatomy.blocks) - 1}."
    return SettingError(f"This model has no neuron {neuron}.", seen=f"It has: {seen}" if lines else seen)
