"""The optimised edit is found by Adam, on the chosen columns alone, from the lowest block that holds one upwards.

The answers are given to the model, with TARGET in the place of SOURCE, and read again at each step. The change is added
to what `w_out` gives, by a hook: no weight is written to, and the blocks below the lowest edited one run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor

from mmneurons.editing.fit import fit
from mmneurons.editing.losses import divergence, lead, log_not, log_p
from mmneurons.editing.reference import Reference
from mmneurons.editing.request import EditRequest, given, share_turned
from mmneurons.errors import ModelError, SettingError
from mmneurons.patches.parts import patch_of, pristine_columns
from mmneurons.patches.patch import Patch
from mmneurons.vlm.columns import Columns
from mmneurons.vlm.context import evaluating, frozen
from mmneurons.vlm.hooks.deltas import Deltas
from mmneurons.vlm.teacher_forcing import Batch, Reader
from mmneurons.vlm.vlm import VLM

STEPS = 100
"""Of Adam, at most."""
RATE = 0.1
"""Of Adam, in the root mean square of an FFN's chosen columns."""
KEEP, REPEAT, NORM = 1.0, 0.1, 0.01
"""Weights of divergence, of saying TARGET again and of size, beside 1 for the edit."""
SAMPLE = 16
"""Reference answers read at each step; the next ones at the next."""
MARGIN = 2.0
"""Logits by which what is wanted is to lead."""
CHECK = 5
"""Steps from one look at the whole reference to the next, once it does."""


@dataclass(frozen=True)
class Optimised:
    """An Optimised says what the search found, for the provenance of the patch."""

    steps: int
    """Of Adam, up to the change that was taken."""
    margin: float
    """Logits by which what is wanted leads where it leads least, in the answers as given."""
    changed: int
    """Steps with another likeliest token, of those to be kept, in the answers as given."""
    looked_at: int
    """Such steps."""
    turned: float
    """Share of the answers that said SOURCE which, generated with the edit, no longer say it, and say TARGET."""
    generated: int
    """Answers generated for that."""


def optimise(
    vlm: VLM,
    columns: Columns,
    requests: Sequence[EditRequest],
    source: str,
    target: str | None,
    reference: Reference | None,
    *,
    start: Patch | None = None,
    cache: bool = True,
    tell: Callable[[str], None],
) -> Patch:
    """Find by Adam the change of columns that turns the answers; the model is left as it was.

    Loss, each a mean over its steps: -log p(wanted); KL from the unedited model at the other steps of the same answers,
    and at those of a sample of the reference; -log(1 - p(TARGET)) behind TARGET; |change|^2 / |column|^2. It ends once
    what is wanted leads by `MARGIN` everywhere and nothing that is to stay has another likeliest token.

    Args:
        vlm: The model.
        columns: What moves; of dense FFNs.
        requests: The images of the edit and what was said about them.
        source: What is to go.
        target: What is to come; None: anything else, by -log(1 - p(said)).
        reference: What is to stay, but for the steps that say `source`.
        start: Where to begin, a change of these columns; None: at none.
        cache: Run what is below the lowest edited block once, not at each step. The patch does not depend on it.
        tell: Told the steps.

    Returns:
        The patch: a delta for each column, float32, added to what the column was. Its provenance is `Optimised`.

    Raises:
        ModelError: a column is one of an expert, or cannot be written.
        SettingError: `start` changes other columns; no answer says `source`, or none turns.
        WordError: a form of the target has no token.

    Source: FiNE (Pan et al., ICLR 2025): columns alone, with terms for the edit, divergence and repetition. Theirs
    edits facts in text; ours keeps answers about other images too, and the size of the change is a term of the loss.
    """
    # 0. What cannot be done.
    if any(vlm.anatomy.ffns[i].n_experts is not None for i in columns.indices):
        raise ModelError(
            "The optimised edit works on dense FFNs only; some of these columns are an expert's.",
            fix='Choose a closed form: EditSettings(method="selective")',
        )
    if not any(one.found for one in requests):
        raise SettingError(f"None of these answers says '{source}'.", fix="Give images of which the model says it.")
    with torch.inference_mode(False), frozen(vlm.model), evaluating(vlm.model):
        # 1. The answers are read once, up to the lowest block that is edited.
        lowest = min(vlm.anatomy.ffns[i].layer for i in columns.indices)
        reader = Reader(vlm, lowest, cache, requests[0].question.batch_size)
        tell("reading the answers")
        own = [batch for one in requests for batch in reader.read(one.images, one.question, given(vlm, one, target))]
        others = [] if reference is None else reference.read(reader, source)
        # 2. Adam goes down from there to the change that is taken.
        pristine = pristine_columns(vlm, columns)
        objective = Objective(reader, _begun(columns, pristine, start), pristine, own, others, target is not None)
        found, change = search(objective, tell)
    # 3. What the edited model generates decides whether it is an edit.
    patch = patch_of(vlm, change)
    with patch.applied(vlm):
        share = share_turned(vlm, requests, source, target)
    if share == 0:
        raise SettingError(
            f"No change makes the model say {'something else' if target is None else repr(target)} for '{source}'.",
            seen=f"After {found.steps} steps what is wanted leads by {found.margin:.2g} logits.",
            fix="Take more columns (top=2000), or of more blocks (blocks='all'), or more images.    "
            "CLI: --top 2000 --blocks all",
        )
    found = replace(found, turned=share, generated=sum(len(one.searched) for one in requests))
    return replace(patch, provenance=asdict(found))


def _begun(columns: Columns, pristine: dict[int, Tensor], start: Patch | None) -> Deltas:
    """Return the change to begin with: none, or that of a patch.

    Raises:
        SettingError: the patch changes others.
    """
    change = Deltas(columns, {i: torch.zeros_like(held, dtype=torch.float32) for i, held in pristine.items()})
    # A start may leave columns as they are, but change no other.
    layers = {columns.anatomy.ffns[i].layer: i for i in columns.indices}
    for part in () if start is None else start.parts:
        i = layers.get(part.layer, -1)
        at = torch.isin(columns.indices.get(i, part.indices[:0]), part.indices)
        if start is None or int(at.sum()) < len(part.indices) or part.expert is not None:
            raise SettingError(f"The start changes other columns, such as {part.neurons[0]}.")
        change.rows[i][at] = start.deltas(part).to(change.rows[i].device)
    return change


@dataclass(frozen=True, eq=False)
class Objective:
    """An Objective is what is minimised, and measures how good a change is."""

    reader: Reader
    change: Deltas
    pristine: dict[int, Tensor]
    """Per FFN the columns before any edit."""
    own: Sequence[Batch]
    """Of the edit."""
    others: Sequence[Batch]
    """Of the reference."""
    to_target: bool
    """Whether a token is wanted; else all but the one that is said."""

    def losses(self, sample: Sequence[Batch]) -> Iterator[Tensor]:
        """Compute the loss part by part: the size of the change, then each batch of the edit's own and of a sample."""
        # In units of each column's own length, so that loud columns do not hide what quiet ones do.
        sizes = [d.pow(2).sum(1) / self.pristine[i].float().pow(2).sum(1) for i, d in self.change.rows.items()]
        yield NORM * torch.cat(sizes).mean()
        for group in (self.own, sample):
            # Means over the steps of each kind in the whole group, however it is cut into batches.
            kinds = [(batch.turn, batch.stay, batch.stay & (batch.tokens[:, 0] >= 0)) for batch in group]
            n = [max(1, sum(int(mine[kind].sum()) for mine in kinds)) for kind in range(3)]
            for batch, (turn, kept, again) in zip(group, kinds, strict=True):
                logits, base = self.reader.logits(batch), self.reader.base(batch)
                tokens = batch.tokens[:, 0].to(logits.device)
                wanted = (log_p if self.to_target else log_not)(logits[turn], tokens[turn]).sum()
                moved, repeated = divergence(logits[kept], base[kept]), log_not(logits[again], tokens[again]).sum()
                yield -wanted / n[0] + KEEP * moved / n[1] - REPEAT * repeated / n[2]

    def measured(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Measure the least lead of the token wanted, and count the kept steps whose likeliest token is another."""
        least, changed = float("inf"), 0
        for batch in batches:
            with torch.no_grad():
                logits, base = (self.reader.vlm.anatomy.logits(x) for x in (self.reader.final(batch), batch.base))
            # Without a target, what is said is to fall behind instead.
            ahead = lead(logits[batch.turn], batch.tokens[batch.turn, 0].to(logits.device))
            least = min([least, *(ahead if self.to_target else -ahead).tolist()])
            changed += int((logits.argmax(1) != base.argmax(1))[batch.stay].sum())
        return least, changed


def search(objective: Objective, tell: Callable[[str], None]) -> tuple[Optimised, Deltas]:
    """Minimise until the edit leads and everything else is as before; else take the change that alters least of it."""
    change, everything = objective.change, (*objective.own, *objective.others)
    looked_at = sum(int(batch.stay.sum()) for batch in everything)
    best: tuple[Optimised, Deltas] | None = None

    # Asked by `fit` before each step; the best change so far is kept, as the last need not be the best.
    def look(step: int) -> bool:
        nonlocal best
        needed = step == STEPS and best is None  # the last step is taken where no other was good enough
        if step % CHECK and not needed:
            return False
        # The reference is read only where the edit's own answers lead: it is the larger part.
        margin, changed = objective.measured(objective.own)
        if margin < MARGIN and not needed:
            return False
        changed += objective.measured(objective.others)[1]
        if best is None or changed < best[0].changed:
            rows = {i: delta.detach().clone() for i, delta in change.rows.items()}
            best = Optimised(step, margin, changed, looked_at, 0.0, 0), replace(change, rows=rows)
        return changed == 0

    # Of the reference some batches a step, the next ones at the next.
    samples, per_step = cycle(objective.others), min(len(objective.others), -(-SAMPLE // objective.reader.batch_size))
    adam = torch.optim.Adam(
        {"params": [delta.requires_grad_()], "lr": RATE * float(objective.pristine[i].float().pow(2).mean().sqrt())}
        for i, delta in change.rows.items()
    )
    with change.added():
        fit(
            adam,
            lambda step: objective.losses(list(islice(samples, per_step))),
            range(STEPS),
            stop=look,
            after=lambda step, loss: tell(f"step {step}: loss {loss:.3g}"),
        )
    assert best is not None, "the last step is always looked at"
    return best
