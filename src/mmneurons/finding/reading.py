"""What neurons say: their columns as the head reads them, raw or measured against how hard all neurons push a token.

A token that every neuron pushes hard leads every raw list, and tells nothing of the neuron. Standardised, its push is
told in deviations over all neurons of the model: docs/reference/method.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmneurons.errors import SettingError
from mmneurons.maths.moments import Moments
from mmneurons.maths.ranking import said_tokens
from mmneurons.settings import SAYS, Says, Score
from mmneurons.vlm import weights
from mmneurons.vlm.age import age, undoing
from mmneurons.vlm.anatomy.parts import Anatomy, Ffn
from mmneurons.vlm.anatomy.paths import in_stream
from mmneurons.vlm.vlm import VLM
from mmneurons.vlm.weights.stored import is_adapter

AT_ONCE = 4096
"""Columns whose products are summed in one go."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """How hard all neurons of a model push each token, before any edit: what the push of one is measured against."""

    mean: Float[Tensor, "hidden"]
    """Of all columns as the head reads them, float32: its push of a token is the mean push."""
    deviations: Float[Tensor, "vocab"]
    """Of the pushes of each token, float32; infinite where all neurons push it alike, so that nobody says it."""


@dataclass(frozen=True, eq=False)
class Reader:
    """How columns are turned into tokens; made by `reader_for`."""

    vlm: VLM
    score: Score
    yardstick: Yardstick | None
    """None: the raw reading."""

    @property
    def unembed(self) -> Float[Tensor, "vocab hidden"]:
        """What can be said: rows that only pad the vocabulary are no tokens."""
        return self.vlm.anatomy.unembed[: self.vlm.n_tokens]

    @property
    def deviations(self) -> Float[Tensor, "vocab"] | None:
        """What the push of each token of `unembed` is divided by, if by anything."""
        return None if self.yardstick is None else self.yardstick.deviations

    def read(
        self, columns: Float[Tensor, "n hidden"], places: Sequence[tuple[int, int]], signs: Float[Tensor, "n"]
    ) -> Float[Tensor, "n hidden"]:
        """Columns as the head reads them, where neurons fire with given signs; standardised, without the mean column.

        Args:
            columns: As they are in `w_out`, float32, on any device.
            places: Of each column: which FFN, and which neuron of it, counted through all its experts.
            signs: 1 or -1.
        """
        read = as_read(self.vlm.anatomy, columns, places, self.score)
        if self.yardstick is not None:
            read = read - self.yardstick.mean.to(read.device)
        return signs.to(read.device)[:, None] * read

    def tokens(
        self, read: Float[Tensor, "n hidden"], n_tokens: int | None = None
    ) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The tokens that columns, from `read`, promote and suppress most, strongest first; ten and three by default.

        Standardised, a token that all neurons push alike is none that one of them promotes.
        """
        counts = () if n_tokens is None else (n_tokens, n_tokens)
        up, down = said_tokens(read, self.unembed, *counts, deviations=self.deviations)
        return [texts(self.vlm, ids) for ids in up.tolist()], [texts(self.vlm, ids) for ids in down.tolist()]


def reader_for(vlm: VLM, says: Says, score: Score = "logit") -> Reader:
    """How columns are read; standardised, every `w_out` is read once at the first use, and not again.

    Raises:
        SettingError: there is no such reading.
    """
    if says not in SAYS:
        raise SettingError(f"There is no says '{says}'.", fix=f"Choose one of: {', '.join(SAYS)}.")
    return Reader(vlm, score, None if says == "raw" else yardstick_of(vlm, score))


_YARDSTICKS: WeakKeyDictionary[nn.Module, tuple[int, dict[Any, Yardstick]]] = WeakKeyDictionary()
"""Of each model: how old it was, and what was measured then, by all else that a yardstick depends on (`_key`)."""


def yardstick_of(vlm: VLM, score: Score = "logit") -> Yardstick:
    """Mean and deviation of what all neurons, those of all experts, push each token by; measured once at each age.

    From the covariance C of the columns, the variance of a token's pushes is u . C u: neither a table of vocabulary by
    neurons nor the columns are kept. Patches that are applied do not count, so that before and after an edit the
    yardstick is the same.
    """
    anatomy = vlm.anatomy  # asking for it notices what has changed
    through = score != "paper"  # columns are taken as they are by the paper's code
    with vlm.alone():
        now, key = age(vlm.model), _key(vlm, anatomy, through=through)
        known_at, known = _YARDSTICKS.get(vlm.model, (now, {}))
        if known_at != now:
            known = {}
        if key not in known:
            known[key] = _measured(vlm, anatomy, score)
        _YARDSTICKS[vlm.model] = now, known
        return known[key]


def _key(vlm: VLM, anatomy: Anatomy, *, through: bool) -> tuple[Any, ...]:
    """What a yardstick depends on besides the weights: decoder, tokens, and which adapters are switched on."""
    adapters = [
        (ffn.name, tuple(m.active_adapters), m.disable_adapters, str(getattr(m, "scaling", None)))
        for ffn in anatomy.ffns
        if is_adapter(m := cast("Any", ffn.module))
    ]
    return through, vlm.n_tokens, anatomy.ffns[0].name, tuple(adapters)


@torch.no_grad()
def _measured(vlm: VLM, anatomy: Anatomy, score: Score) -> Yardstick:
    moments = Moments(anatomy.hidden, anatomy.norm.weight.device)
    for ffn in anatomy.ffns:
        for columns in _unedited(vlm, ffn):
            moments.add(columns if score == "paper" else _through_norms(anatomy, columns, ffn))
    return Yardstick(moments.mean, moments.deviations(anatomy.unembed[: vlm.n_tokens]))


def _unedited(vlm: VLM, ffn: Ffn) -> Iterator[Float[Tensor, "chunk hidden"]]:
    """All columns of an FFN, as they are without patches, some at a time."""
    for expert in [None] if ffn.n_experts is None else range(ffn.n_experts):
        changes = undoing(vlm.model, ffn.layer, expert)
        for part, columns in weights.chunks(ffn.module, expert=expert):
            for start in range(0, columns.shape[1], AT_ONCE):
                rows = columns[:, start : start + AT_ONCE].T
                first = part.start + start
                mine = {index - first: by for index, by in changes.items() if first <= index < first + len(rows)}
                if mine:  # a view of the model's own weights is not to be written to
                    rows = rows.clone()
                    for row, by in mine.items():
                        rows[row] += by.to(rows.device)
                yield rows


def as_read(
    anatomy: Anatomy, columns: Float[Tensor, "n hidden"], places: Sequence[tuple[int, int]], score: Score
) -> Float[Tensor, "n hidden"]:
    """Columns as the unembedding reads them: through the norms' weights; in the paper's code, as they are."""
    if score == "paper":
        return columns
    read = torch.empty_like(columns)
    for ffn in {ffn for ffn, _ in places}:
        mine = torch.tensor([j for j, (other, _) in enumerate(places) if other == ffn], device=columns.device)
        read[mine] = _through_norms(anatomy, columns[mine], anatomy.ffns[ffn])
    return read


def _through_norms(anatomy: Anatomy, columns: Float[Tensor, "n hidden"], ffn: Ffn) -> Float[Tensor, "n hidden"]:
    """Columns of one FFN through the weights of all norms between it and the head."""
    return anatomy.norm.unscaled(in_stream(columns, ffn.path))


def columns_of(anatomy: Anatomy, places: Sequence[tuple[int, int]], device: torch.device) -> Float[Tensor, "n hidden"]:
    """Columns of `w_out` of neurons given as (FFN, neuron counted through all its experts), float32."""
    columns = torch.empty(len(places), anatomy.hidden, device=device, dtype=torch.float32)
    groups: dict[tuple[int, int | None], list[int]] = {}
    for j, (i, neuron) in enumerate(places):
        groups.setdefault((i, anatomy.ffns[i].neuron(neuron).expert), []).append(j)
    for (i, expert), mine in groups.items():
        ffn: Ffn = anatomy.ffns[i]
        indices = torch.tensor([places[j][1] % ffn.n_neurons for j in mine])
        columns[torch.tensor(mine, device=device)] = weights.columns(ffn.module, indices, expert=expert).to(device)
    return columns


def texts(vlm: VLM, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens as text, one by one."""
    return tuple(vlm.token_text(token_id) for token_id in token_ids)
