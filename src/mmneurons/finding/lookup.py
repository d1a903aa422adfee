"""What a neuron says, and which neurons say a word: read off the weights, no image and no forward pass needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmneurons.errors import SettingError
from mmneurons.finding.reading import Reader, columns_of, reader_for
from mmneurons.maths.ranking import token_pushes
from mmneurons.neurons import Neuron
from mmneurons.settings import Says
from mmneurons.vlm import weights
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.anatomy.paths import in_stream
from mmneurons.vlm.locking import by_one_thread
from mmneurons.vlm.tokens import token_of
from mmneurons.vlm.vlm import VLM

PROBES = 1024
"""How many tokens a column is first compared on; its rank among all of them is worked out only if it may be among the
lowest."""
AT_ONCE = 512
"""How many columns are then ranked among all tokens before it is asked again whether others may be lower."""


@dataclass(frozen=True)
class Neighbour:
    """A neuron whose column lies close to another's."""

    neuron: Neuron
    cosine: float
    """Of the two columns as they reach the stream; near -1 they say the opposite when both fire the same way."""


@dataclass(frozen=True)
class NeuronCard:
    """A NeuronCard says what one neuron writes whenever it fires."""

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
    """Between its column as the head reads it (standardised, less the mean of all columns) and the token's row of the
    unembedding; below 0, the neuron says the word by a negative activation."""
    rank: int
    """Place of the token among all that the column promotes, with the sign that suits the word; 0 is the first."""
    tokens: tuple[str, ...]
    """What it promotes with that sign, strongest first."""


@dataclass(frozen=True)
class WordNeurons:
    """A WordNeurons holds the neurons whose columns point to a word."""

    word: str
    token: str
    """The token that was looked for: the word's first, as it begins inside a sentence."""
    token_id: int
    neurons: tuple[WordNeuron, ...]
    """Lowest rank first, of all neurons of the model; of the same rank, the largest cosine of either sign."""
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
    """Explain what a neuron promotes and suppresses, how long its column is, and which neurons are like it.

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
        neighbours=tuple(Neighbour(n, cosine) for n, cosine in found if n != neuron)[:n_neighbours],
        says=says,
    )


@by_one_thread
def neurons_for(vlm: VLM, word: str, *, top: int = 10, says: Says = "standardised") -> WordNeurons:
    """Find the neurons of the whole model whose columns point to a word: no image, one read of every `w_out`.

    Of all columns, those come first that promote fewest other tokens more than the word: a large cosine alone is often
    one with every noun. The search leaves none out. Which neurons fire for an image, `find` tells.

    Args:
        vlm: The model, from `load`.
        word: A word; of several tokens, its first counts. Of a model without tokenizer, `<17>` is token 17.
        top: How many neurons to give.
        says: How their tokens are read, as in `find`; ranks are places in that reading.

    Raises:
        WordError: if the word has no token to begin with.
    """
    token_id = token_of(vlm.tokenizer, word)
    reader = reader_for(vlm, says)
    lowest = _lowest_ranks(reader, token_id, top)
    read = _read(reader, [one.place for one in lowest], [one.cosine for one in lowest])
    neurons = tuple(
        WordNeuron(vlm.anatomy.ffns[one.place[0]].neuron(one.place[1]), one.cosine, one.rank, tokens)
        for one, tokens in zip(lowest, reader.tokens(read)[0], strict=True)
    )
    return WordNeurons(word, vlm.token_text(token_id), token_id, neurons, says)


class _Ranked(NamedTuple):
    """A column's place in the list of a word; those of lower rank come first, then those of larger cosine."""

    rank: int
    opposed: float
    """The size of its cosine, negative."""
    number: int
    """Of all columns of the model, so that what is equal keeps its order."""
    place: tuple[int, int] = (0, 0)
    cosine: float = 0.0


def _lowest_ranks(reader: Reader, token_id: int, top: int) -> list[_Ranked]:
    """The columns, of all there are, that promote fewest tokens more than this one; vocab x columns is never held."""
    at_least, cosines, places = _lower_bounds(reader, token_id)
    # Those that may be lowest first: no column behind one can be better than what is known of that one.
    order = cosines.abs().sort(descending=True, stable=True).indices
    order = order[at_least[order].sort(stable=True).indices]
    best: list[_Ranked] = []
    for part in order.split(AT_ONCE):
        first = int(part[0])
        if len(best) == top and best[-1] < (int(at_least[first]), -abs(float(cosines[first])), first):
            break
        mine = [(ffn, neuron) for ffn, neuron in places[part].tolist()]
        signed = cosines[part].tolist()
        ranks = _ranks(_read(reader, mine, signed), reader, token_id)
        ranked = zip(ranks, signed, part.tolist(), mine, strict=True)
        best += [_Ranked(rank, -abs(cosine), number, place, cosine) for rank, cosine, number, place in ranked]
        best = sorted(best)[:top]
    return best


def _lower_bounds(
    reader: Reader, token_id: int
) -> tuple[Int[Tensor, "columns"], Float[Tensor, "columns"], Int[Tensor, "columns 2"]]:
    """Of every column of the model how many of some tokens it promotes more than this one, its cosine, and its place.

    Among all tokens its rank is at least as high as among some: so few columns need to be ranked among all.
    """
    unembed, deviations = reader.unembed, reader.deviations
    some = torch.arange(0, len(unembed), -(-len(unembed) // PROBES), device=unembed.device)
    some = torch.cat([some.new_tensor([token_id]), some[some != token_id]])  # the word itself comes first
    probes, spreads = unembed[some], None if deviations is None else deviations[some.to(deviations.device)]
    row = unembed[token_id].float()
    at_least, cosines, places = [], [], []
    for i, ffn in enumerate(reader.vlm.anatomy.ffns):
        for start, columns in _columns(ffn):
            numbers = torch.arange(start, start + columns.shape[1])
            where = [(i, number) for number in numbers.tolist()]
            read = reader.read(columns.T, where, torch.ones(len(where), dtype=torch.float32))
            length = read.norm(dim=1) * row.norm().to(read.device)
            cosine = (read @ row.to(read.device)) / length.clamp_min(1e-30)
            signed = torch.where(cosine < 0, -1.0, 1.0)[:, None] * read
            pushes = token_pushes(signed, probes, spreads)
            at_least.append((pushes > pushes[:, :1]).sum(1).cpu())
            cosines.append(cosine.cpu())
            places.append(torch.stack([torch.full_like(numbers, i), numbers], dim=1))
    return torch.cat(at_least), torch.cat(cosines), torch.cat(places)


def _read(reader: Reader, places: Sequence[tuple[int, int]], cosines: Sequence[float]) -> Float[Tensor, "n hidden"]:
    """Columns as the head reads them, where each fires with the sign with which it says the word."""
    signs = torch.tensor([-1.0 if cosine < 0 else 1.0 for cosine in cosines], dtype=torch.float32)
    return reader.read(columns_of(reader.vlm.anatomy, places, reader.unembed.device), places, signs)


def _ranks(read: Float[Tensor, "n hidden"], reader: Reader, token_id: int, chunk: int = 64) -> list[int]:
    """How many tokens each column promotes more than this one; vocab x n is never held at once."""
    ranks: list[int] = []
    for part in read.split(chunk):
        pushes = token_pushes(part, reader.unembed, reader.deviations)
        ranks += (pushes > pushes[:, token_id, None]).sum(-1).tolist()
    return ranks


def _closest(anatomy: Anatomy, direction: Float[Tensor, "hidden"], top: int) -> list[tuple[Neuron, float]]:
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
    return [(anatomy.ffns[i].neuron(n), cosine) for cosine, (i, n) in zip(best.tolist(), places.tolist(), strict=True)]


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
