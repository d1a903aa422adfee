"""Answers that the model is given, to be read again and again from one block upwards.

    reader = Reader(vlm, lowest=30, cache=True, batch_size=8)
    batches = reader.read(images, question, given)
    reader.final(batches[0])    # what enters the final norm now, differentiable

What enters the lowest block is kept from one pass over the whole model, with what else the blocks are called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmneurons.data.pictures import Picture
from mmneurons.settings import Question
from mmneurons.vlm.anatomy.parts import Anatomy
from mmneurons.vlm.asking import batches_of
from mmneurons.vlm.block_calls import Catcher, repeated
from mmneurons.vlm.context import hooked, placeholder_ids
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.vlm import VLM, Inputs


@dataclass(frozen=True, eq=False)
class Given:
    """An answer that the model is given, and what its steps are to do."""

    token_ids: list[int]
    turn: dict[int, tuple[int, ...]]
    """Step that is to change -> tokens, as the loss takes them: of an edit, the one that is wanted there (without a
    target, the one that is not)."""
    kept: dict[int, int]
    """Step to be left as it is -> the token that is not to be repeated there, or -1."""

    @staticmethod
    def as_said(token_ids: Sequence[int]) -> Given:
        """An answer of which every step is to be left as it is."""
        return Given([*token_ids], {}, dict.fromkeys(range(len(token_ids)), -1))


@dataclass(frozen=True, eq=False)
class Batch:
    """Answers that are read at once, and the steps of them that count."""

    inputs: Inputs
    """Of the whole model."""
    numbers: list[int]
    """Which of the answers, or of the texts, that were to be read each row is."""
    places: tuple[Int[Tensor, "n"], Int[Tensor, "n"]]
    """Row and position of each step, counted from the end: some models put the picture before the first position."""
    tokens: Int[Tensor, "n tokens"]
    """See `Given`; filled up with -1."""
    turn: Bool[Tensor, "n"]
    """Steps that are to change, before all others."""
    base: Float[Tensor, "n hidden"]
    """What entered the final norm, unedited: narrower than the logits."""
    entering: Float[Tensor, "batch positions hidden"] | None = None
    """The residual stream as it enters the lowest edited block; None: the whole model is to run."""
    calls: Sequence[tuple[tuple, dict[str, Any]]] = ()
    """What else each block from there on is called with."""

    @property
    def n_rows(self) -> int:
        """How many answers are read at once."""
        return len(self.numbers)

    @property
    def stay(self) -> Bool[Tensor, "n"]:
        """Steps that are to be left as they are."""
        return ~self.turn

    def rows_of(self, values: Float[Tensor, "..."]) -> Float[Tensor, "batch positions width"]:
        """What a module gave or was given, by row and position: a few modules see these as one axis."""
        return values.reshape(self.n_rows, -1, values.shape[-1])


@dataclass(eq=False)
class Reader:
    """Reads answers from block `lowest` up if `cache`, else by the whole model each time."""

    vlm: VLM
    lowest: int
    cache: bool
    batch_size: int
    """Answers in one batch; 1 where the model takes one at a time."""
    anatomy: Anatomy = field(init=False)
    """Of the model as it is now: asking the model for it looks at every weight."""

    def __post_init__(self) -> None:
        """Keep to the model's own limit."""
        self.batch_size = 1 if self.vlm.family.one_at_a_time else self.batch_size
        self.anatomy = self.vlm.anatomy

    def read(self, images: Sequence[Picture], question: Question, given: Sequence[Given]) -> list[Batch]:
        """Prompts and answers, these without their last tokens, behind which nothing counts."""
        made = []
        for asked in batches_of(self.vlm, images, replace(question, batch_size=self.batch_size)):
            now = given[asked.first : asked.first + len(asked.rows)]
            # A batch of which nothing counts is not read.
            if any(one.turn or one.kept for one in now):
                inputs = asked.inputs(self.vlm, question)
                answers = self.vlm.given(inputs, [one.token_ids[:-1] for one in now])
                numbers, longest = [*range(asked.first, asked.first + len(now))], max(len(o.token_ids) for o in now)
                made.append(self._batch(self.vlm.extended(inputs, answers), numbers, now, longest))
        return made

    def read_texts(self, texts: Sequence[str], kept: Sequence[Sequence[int]] | None = None) -> list[Batch]:
        """Texts without an image, of which every position is to be left as it is, or those of `kept`, text by text."""
        made = []
        for numbers, inputs in text_batches(self.vlm, texts, self.batch_size):
            ids = [0] * inputs["input_ids"].shape[1]
            given = [
                Given([*ids], {}, dict.fromkeys(range(len(ids)) if kept is None else kept[i], -1)) for i in numbers
            ]
            made.append(self._batch(inputs, numbers, given, len(ids)))
        return made

    def _batch(self, inputs: Inputs, numbers: list[int], given: Sequence[Given], n_steps: int) -> Batch:
        """Answers, of which step `n_steps` would stand behind the end; read once, and again from the lowest block."""
        steps = [(row, step - n_steps, 1, tokens) for row, one in enumerate(given) for step, tokens in one.turn.items()]
        steps += [
            (row, step - n_steps, 0, (token,)) for row, one in enumerate(given) for step, token in one.kept.items()
        ]
        # Steps as one list: those that are to change, then those that are to stay, row after row.
        rows, positions, turn = torch.tensor([step[:3] for step in steps]).unbind(1)
        width = max(len(tokens) for *_, tokens in steps)
        tokens = torch.tensor([[*tokens, *[-1] * (width - len(tokens))] for *_, tokens in steps])
        unread = torch.empty(len(steps), self.anatomy.hidden, dtype=torch.float32)
        made = Batch(inputs, numbers, (rows, positions), tokens, turn.bool(), unread)
        blocks, catcher = self.anatomy.blocks[self.lowest :], Catcher({0})
        # Once through the whole model, unedited; what the upper blocks are called with is caught on the way.
        with torch.no_grad():
            catching = enumerate(block.module for block in blocks)
            with hooked(partial(m.register_forward_pre_hook, catcher.hook(k), with_kwargs=True) for k, m in catching):
                whole = replace(made, base=self.final(made))
            if not self.cache:
                return whole
            # Once more through the upper blocks alone, to see whether that gives the same.
            entering, calls = _apart(catcher.caught[0])
            upper = replace(made, inputs={}, entering=entering, calls=calls)
            upper = replace(upper, base=self.final(upper))
            known, again = self.anatomy.logits(whole.base), self.anatomy.logits(upper.base)
        bound = known[known > torch.finfo(torch.float32).min / 2].abs().max()
        # A model that does more between its blocks than it tells them runs as a whole each time.
        return upper if bool((known - again).abs().max() <= tolerance(self.vlm) * bound) else whole

    def final(self, batch: Batch) -> Float[Tensor, "n hidden"]:
        """What enters the final norm at the steps of a batch."""
        # The norm before the head can be the last one of the last block (post-LN): then it runs on the way.
        entered, norm, hidden = list[Tensor](), self.anatomy.norm_module, batch.entering
        watching = hooked([partial(norm.register_forward_pre_hook, lambda _, args: entered.append(args[0]))])
        with self.vlm.alone(), watching:
            if hidden is None:
                self.vlm.model(**batch.inputs, **self.vlm.once())
            else:
                # Copies: models write into what they are called with, such as a cache.
                hidden, shared = hidden.clone(), dict[int, Any]()
                for block, (args, kwargs) in zip(self.anatomy.blocks[self.lowest :], batch.calls, strict=True):
                    args, kwargs = repeated(args, 1, shared), repeated(kwargs, 1, shared)
                    # Some models give the stream by its place, some by its name.
                    if args:
                        args = (hidden, *args[1:])
                    else:
                        kwargs["hidden_states"] = hidden
                    output = block.module(*args, **kwargs)
                    hidden = output if isinstance(output, Tensor) else output[0]
        return [hidden, *entered][-1][batch.places]

    def logits(self, batch: Batch) -> Float[Tensor, "n vocab"]:
        """What the model says at the steps of a batch now; differentiable."""
        return self.anatomy.logits(self.final(batch), grad=True)

    def likeliest(self, batch: Batch, *, unedited: bool = False) -> Int[Tensor, "n"]:
        """The token that would be said at each step of a batch now, or when the batch was made; on the CPU.

        It is the likeliest one that can be said: as in `VLM.generate`, what stands for a picture cannot.
        """
        with torch.no_grad():
            logits = self.anatomy.logits(batch.base if unedited else self.final(batch))[:, : self.vlm.n_tokens].clone()
        logits[:, [i for i in placeholder_ids(self.vlm.model.config) if i < logits.shape[1]]] = -torch.inf
        return logits.argmax(-1).cpu()

    def base(self, batch: Batch) -> Float[Tensor, "n vocab"]:
        """What the unedited model says there."""
        return self.anatomy.logits(batch.base, grad=True)

    def at(self, batch: Batch, module: nn.Module, *, inputs: bool) -> Float[Tensor, "n width"]:
        """What a module, in the lowest block or above, is given or gives at the steps of a batch; no gradients."""
        seen = list[Tensor]()

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(args[0] if inputs else output if isinstance(output, Tensor) else output[0])

        with torch.no_grad(), hooked([partial(module.register_forward_hook, see)]):
            self.final(batch)
        return batch.rows_of(seen[-1])[batch.places]


def text_batches(vlm: VLM, texts: Sequence[str], batch_size: int = 64) -> Iterator[tuple[list[int], Inputs]]:
    """Texts as the language model reads them, with its opening token, without prompt template and image.

    Texts of one length together, so that none is padded: which of `texts` they are, and the inputs.
    """
    by_length: dict[int, list[int]] = {}
    ids = [vlm.tokenizer(text).input_ids for text in texts]
    for i, mine in enumerate(ids):
        by_length.setdefault(len(mine), []).append(i)
    size = 1 if vlm.family.one_at_a_time else batch_size
    for numbers in by_length.values():
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            tokens = torch.tensor([ids[i] for i in part])
            yield part, vlm.placed({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


def _apart(calls: Sequence[tuple[tuple, dict[str, Any]]]) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
    """What enters the first of the blocks, and what else each is called with."""
    args, kwargs = calls[0]
    entering = args[0] if args else kwargs["hidden_states"]
    return entering, [((None, *a[1:]), k) if a else (a, {**k, "hidden_states": None}) for a, k in calls]
