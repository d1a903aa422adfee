"""Answers that are given to the model, to be read again and again from one block upwards.

    reader = Reader(vlm, lowest=30)
    batches = reader.read(images, question, given)
    reader.final(batches[0])    # what enters the final norm now, differentiable

What enters the lowest block is kept from one pass over the whole model, with what else the blocks are called with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmneurons.data.pictures import Picture, opened_batches
from mmneurons.editing.reference import Reference
from mmneurons.editing.steps import text_batches
from mmneurons.settings import Question
from mmneurons.vlm.block_calls import Catcher, repeated
from mmneurons.vlm.context import hooked
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.vlm import VLM, Inputs


@dataclass(frozen=True, eq=False)
class Given:
    """An answer that the model is given, and what its steps are to do."""

    token_ids: list[int]
    turn: dict[int, tuple[int, ...]]
    """Step that is to change -> tokens, as the loss takes them: of `optimise`, the one that is wanted there (without a
    target, the one that is not)."""
    kept: dict[int, int]
    """Step to be left as it is -> the token that is not to be repeated there, or -1."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What is read at once, and the steps of it that count."""

    inputs: Inputs
    """Of the whole model."""
    entering: Float[Tensor, "batch positions hidden"] | None
    """The residual stream as it enters the lowest edited block; None: the whole model is to run."""
    calls: Sequence[tuple[tuple, dict[str, Any]]]
    """What else each block from there on is called with."""
    places: tuple[Int[Tensor, "n"], Int[Tensor, "n"]]
    """Row and position of each step."""
    tokens: Int[Tensor, "n tokens"]
    """See `Given`; filled up with -1."""
    turn: Bool[Tensor, "n"]
    base: Float[Tensor, "n hidden"]
    """What entered the final norm, unedited: narrower than the logits."""

    @property
    def kinds(self) -> tuple[Bool[Tensor, "n"], Bool[Tensor, "n"], Bool[Tensor, "n"]]:
        """Steps that are to turn, that are to stay, and that are not to repeat TARGET."""
        return self.turn, ~self.turn, ~self.turn & (self.tokens[:, 0] >= 0)


@dataclass(frozen=True, eq=False)
class Reader:
    """How answers are read: from block `lowest` up if `cache`, else by the whole model each time."""

    vlm: VLM
    lowest: int
    cache: bool
    batch_size: int
    """Answers in one batch."""

    def read_reference(self, reference: Reference, source: str | None) -> list[Batch]:
        """All steps that do not say SOURCE, if there is one."""
        stay = [True] * len(reference.steps) if source is None else (~reference.says(self.vlm, source)).tolist()
        made, start = list[Batch](), 0
        if reference.said is not None:
            given = []
            for ids in reference.said.token_ids:
                kept = {step: -1 for step in range(len(ids)) if stay[start + step]}
                given.append(Given(list(ids), {}, kept))
                start += len(ids)
            made = self.read(reference.images, reference.question, given)
        for numbers, inputs in text_batches(self.vlm, reference.texts, self.batch_size):
            every = dict.fromkeys(range(inputs["input_ids"].shape[1]), -1)
            made.append(self.batch(inputs, 0, [Given([], {}, every) for _ in numbers]))
        return made

    def read(self, images: Sequence[Picture], question: Question, given: Sequence[Given]) -> list[Batch]:
        """Prompts and answers, these without their last tokens, behind which nothing counts."""
        made, answers = [], iter(given)
        for rows in opened_batches(images, self.batch_size):
            now = list(islice(answers, len(rows)))
            if not any(one.turn or one.kept for one in now):
                continue
            inputs = self.vlm.encode([[o.image for o in row] for row in rows], question.prompt, question.prefix)
            answers_given = self.vlm.given(inputs, [one.token_ids[:-1] for one in now])
            made.append(self.batch(self.vlm.extended(inputs, answers_given), answers_given.n_prompt - 1, now))
        return made

    def batch(self, inputs: Inputs, first: int, given: Sequence[Given]) -> Batch:
        """Answers, whose steps begin at position `first`; read once, and again from the lowest edited block up."""
        steps = [(row, first + step, 1, tokens) for row, one in enumerate(given) for step, tokens in one.turn.items()]
        steps += [(row, first + step, 0, (token,)) for row, one in enumerate(given) for step, token in one.kept.items()]
        rows, positions, turn = torch.tensor([step[:3] for step in steps]).unbind(1)
        width = max(len(tokens) for *_, tokens in steps)
        tokens = torch.tensor([[*tokens, *[-1] * (width - len(tokens))] for *_, tokens in steps])
        made = Batch(inputs, None, (), (rows, positions), tokens, turn.bool(), torch.empty(0, dtype=torch.float32))
        blocks, catcher = self.vlm.anatomy.blocks[self.lowest :], Catcher({0})
        with torch.no_grad():
            catching = enumerate(block.module for block in blocks)
            with hooked(partial(m.register_forward_pre_hook, catcher.hook(k), with_kwargs=True) for k, m in catching):
                whole = replace(made, base=self.final(made))
            if not self.cache:
                return whole
            entering, calls = _apart(catcher.caught[0])
            upper = replace(made, inputs={}, entering=entering, calls=calls)
            upper = replace(upper, base=self.final(upper))
            known, again = self.vlm.anatomy.logits(whole.base), self.vlm.anatomy.logits(upper.base)
        bound = known[known > torch.finfo(torch.float32).min / 2].abs().max()
        # A model that does more between its blocks than it tells them runs as a whole each time.
        return upper if bool((known - again).abs().max() <= tolerance(self.vlm) * bound) else whole

    def final(self, batch: Batch) -> Float[Tensor, "n hidden"]:
        """What enters the final norm at the steps of a batch."""
        # The norm before the head can be the last one of the last block (post-LN): then it runs on the way.
        entered, norm, hidden = list[Tensor](), self.vlm.anatomy.norm_module, batch.entering
        watching = hooked([partial(norm.register_forward_pre_hook, lambda _, args: entered.append(args[0]))])
        with self.vlm.alone(), watching:
            if hidden is None:
                self.vlm.model(**batch.inputs, **self.vlm.once())
            else:
                hidden, shared = hidden.clone(), dict[int, Any]()
                for block, (args, kwargs) in zip(self.vlm.anatomy.blocks[self.lowest :], batch.calls, strict=True):
                    args, kwargs = repeated(args, 1, shared), repeated(kwargs, 1, shared)
                    if args:
                        args = (hidden, *args[1:])
                    else:
                        kwargs["hidden_states"] = hidden
                    output = block.module(*args, **kwargs)
                    hidden = output if isinstance(output, Tensor) else output[0]
        return [hidden, *entered][-1][batch.places]


def _apart(calls: Sequence[tuple[tuple, dict[str, Any]]]) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
    """What enters the first of the blocks, and what else each is called with."""
    args, kwargs = calls[0]
    entering = args[0] if args else kwargs["hidden_states"]
    return entering, [((None, *a[1:]), k) if a else (a, {**k, "hidden_states": None}) for a, k in calls]
