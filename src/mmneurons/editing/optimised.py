"""The edit that gradients find: Adam on the chosen columns alone, from the lowest block that holds one upwards.

The answers are given to the model, with TARGET in the place of SOURCE, and read again at each step. The change is added
to what `w_out` gives, by a hook: no weight is written to, and the blocks below the lowest edited one run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mmneurons.editing.forced import Batch, Given, Reader
from mmneurons.editing.goals import Asked, rewritten, share_turned
from mmneurons.editing.reference import Reference
from mmneurons.errors import ModelError, SettingError
from mmneurons.patches.ledger import ledger_of
from mmneurons.patches.patch import Patch, PatchPart
from mmneurons.vlm.columns import Columns, column_hashes
from mmneurons.vlm.context import evaluating, frozen, hooked
from mmneurons.vlm.locking import restored
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
    """What was found; the provenance of the patch."""

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
    asked: Sequence[Asked],
    source: str,
    target: str | None,
    reference: Reference | None,
    *,
    start: Patch | None = None,
    cache: bool = True,
    tell: Callable[[str], None],
) -> Patch:
    """The change of columns that turns the answers, by Adam; the model is left as it was.

    Loss, each a mean over its steps: -log p(wanted); KL from the unedited model at the other steps of the same answers,
    and at those of a sample of the reference; -log(1 - p(TARGET)) behind TARGET; |change|^2 / |column|^2. It ends once
    what is wanted leads by `MARGIN` everywhere and nothing that is to stay has another likeliest token.

    Args:
        vlm: The model.
        columns: What moves; of dense FFNs.
        asked: The images of the edit and what was said about them.
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
    if any(vlm.anatomy.ffns[i].n_experts is not None for i in columns.indices):
        raise ModelError(
            "The optimised edit works on dense FFNs only; some of these columns are an expert's.",
            fix='Choose a closed form: EditSettings(method="selective")',
        )
    if not any(one.found for one in asked):
        raise SettingError(f"None of these answers says '{source}'.", fix="Give images of which the model says it.")
    with torch.inference_mode(False), frozen(vlm.model), evaluating(vlm.model):
        lowest = min(vlm.anatomy.ffns[i].layer for i in columns.indices)
        reader = Reader(vlm, lowest, cache, 1 if vlm.family.one_at_a_time else asked[0].question.batch_size)
        study = Study(reader, columns, start, to_target=target is not None)
        tell("reading the answers")
        own: list[Batch] = []
        for one in asked:
            own += reader.read(one.images, one.question, given(vlm, one, target))
        found = study.run(own, [] if reference is None else reader.read_reference(reference, source), tell)
    patch = study.patch()
    with patch.applied(vlm):
        share = share_turned(vlm, asked, source, target)
    if share == 0:
        raise SettingError(
            f"No change makes the model say {'something else' if target is None else repr(target)} for '{source}'.",
            seen=f"After {found.steps} steps what is wanted leads by {found.margin:.2g} logits.",
            fix="Take more columns (top=2000), or of more blocks (blocks=None), or more images.",
        )
    found = replace(found, turned=share, generated=sum(len(one.saying) for one in asked))
    return replace(patch, provenance=asdict(found))


def given(vlm: VLM, one: Asked, target: str | None) -> list[Given]:
    """Answers with TARGET in the place of SOURCE; without a target, as they are."""
    made = []
    for i, said in enumerate(one.said.token_ids):
        words = sorted((word for answer, word in one.found if answer == i), key=lambda word: word.steps[0])
        if target is None:
            writing = {step for word in words for step in word.steps}
            kept = {step: -1 for step in range(len(said)) if step not in writing}
            made.append(Given(list(said), {word.steps[0]: (said[word.steps[0]],) for word in words}, kept))
            continue
        ids, written = rewritten(vlm, said, words, target)
        turn = {start + k: (token,) for start, wanted in written for k, token in enumerate(wanted)}
        firsts = {start: wanted[0] for start, wanted in written}
        kept, behind = dict[int, int](), -1
        for step in range(len(ids)):
            behind = firsts.get(step, behind)
            if step not in turn:
                kept[step] = behind
        made.append(Given(ids, turn, kept))
    return made


class Study:
    """One search: the deltas, and what is done with them."""

    def __init__(self, reader: Reader, columns: Columns, start: Patch | None, *, to_target: bool) -> None:
        self.reader, self.anatomy, self.columns, self.to_target = reader, reader.vlm.anatomy, columns, to_target
        self.layers = {i: self.anatomy.ffns[i].layer for i in columns.indices}
        ledger = ledger_of(reader.vlm)
        self.pristine = {i: ledger.pristine((self.layers[i], None), mine) for i, mine in columns.indices.items()}
        self.deltas = {i: torch.zeros_like(held, dtype=torch.float32) for i, held in self.pristine.items()}
        for part in () if start is None else start.parts:
            i = next((i for i, layer in self.layers.items() if layer == part.layer), -1)
            at = torch.isin(columns.indices.get(i, part.indices[:0]), part.indices)
            if start is None or int(at.sum()) < len(part.indices) or part.expert is not None:
                raise SettingError(f"The start changes other columns, such as {part.neurons[0]}.")
            self.deltas[i][at] = start.deltas(part).to(self.deltas[i].device)

    def run(self, own: Sequence[Batch], others: Sequence[Batch], tell: Callable[[str], None]) -> Optimised:
        """Go down until the edit leads and all else is as it was, or to what changes least of it."""
        looked_at, samples = sum(int((~batch.turn).sum()) for batch in (*own, *others)), cycle(others)
        adam = torch.optim.Adam(
            {"params": [delta.requires_grad_()], "lr": RATE * float(self.pristine[i].float().pow(2).mean().sqrt())}
            for i, delta in self.deltas.items()
        )
        best: tuple[Optimised, dict[int, Tensor]] | None = None
        per_step = min(len(others), -(-SAMPLE // self.reader.batch_size))
        with self.hooked():
            for step in range(STEPS + 1):
                loss, margin = self.descend(own, list(islice(samples, per_step)))
                tell(f"step {step}: loss {loss:.3g}, ahead by {margin:.2g}")
                if (margin >= MARGIN and step % CHECK == 0) or (step == STEPS and best is None):
                    changed = sum(self.changed(batch) for batch in (*own, *others))
                    if best is None or changed < best[0].changed:
                        found = Optimised(step, margin, changed, looked_at, 0.0, 0)
                        best = found, {i: delta.detach().clone() for i, delta in self.deltas.items()}
                    if changed == 0:
                        break
                adam.step()
        assert best is not None, "the last step is always looked at"
        self.deltas = best[1]
        return best[0]

    def patch(self) -> Patch:
        """The deltas as they are."""
        parts = [
            PatchPart(self.layers[i], None, mine, column_hashes(self.pristine[i]), deltas=self.deltas[i].cpu())
            for i, mine in self.columns.indices.items()
        ]
        return Patch(self.anatomy.hidden, tuple(parts))

    def descend(self, own: Sequence[Batch], sample: Sequence[Batch]) -> tuple[float, float]:
        """Loss and least lead at the deltas as they are; its gradients are left with them."""
        deltas = list(self.deltas.values())
        for delta in deltas:
            delta.grad = None
        with torch.enable_grad():
            sizes = [d.pow(2).sum(1) / self.pristine[i].float().pow(2).sum(1) for i, d in self.deltas.items()]
            size = NORM * torch.cat(sizes).mean()
            size.backward(inputs=deltas)
            total, lead = float(size.detach()), float("inf")
            for group in (own, sample):
                n = [max(1, sum(int(batch.kinds[kind].sum()) for batch in group)) for kind in range(3)]
                for batch in group:
                    turn, kept, again, ahead = self.terms(batch)
                    loss = turn / n[0] + KEEP * kept / n[1] + REPEAT * again / n[2]
                    loss.backward(inputs=deltas)
                    total, lead = total + float(loss.detach()), min(lead, ahead)
        return total, lead

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, float]:
        """Of the loss, each summed over its steps; and the least lead of what is wanted."""
        logits, base = (self.anatomy.logits(x, grad=True) for x in (self.reader.final(batch), batch.base))
        turn, kept, again = batch.kinds
        token = batch.tokens.to(logits.device).clamp_min(0)
        own, others, whole = logits.gather(1, token)[:, 0], logits.scatter(1, token, -torch.inf), logits.logsumexp(1)
        log_p, log_not = own - whole, others.logsumexp(1) - whole  # log(1 - p) itself is lost where p is near 1
        lead = (own - others.max(1).values)[turn] * (1 if self.to_target else -1)
        moved = F.kl_div(logits[kept].log_softmax(1), base[kept].log_softmax(1), reduction="sum", log_target=True)
        wanted = log_p if self.to_target else log_not
        return -wanted[turn].sum(), moved, -log_not[again].sum(), min(lead.tolist(), default=float("inf"))

    def changed(self, batch: Batch) -> int:
        """At how many of the steps that are to stay the likeliest token is another."""
        with torch.no_grad():
            now, before = (self.anatomy.logits(x).argmax(1) for x in (self.reader.final(batch), batch.base))
        return int((now != before)[~batch.turn].sum())

    @restored
    def hooked(self) -> Iterator[None]:
        """What the deltas write is added to what each `w_out` gives."""

        def hook(i: int) -> RemovableHandle:
            def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                fired = args[0][..., self.columns.indices[i].to(args[0].device)].float()
                return output + (fired @ self.deltas[i].to(fired.device)).to(output.dtype)

            return self.anatomy.ffns[i].module.register_forward_hook(add)

        with hooked(partial(hook, i) for i in self.deltas):
            yield
