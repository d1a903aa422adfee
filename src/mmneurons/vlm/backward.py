"""Gradients of what a model says by what each FFN writes, at the position that says it: one backward pass for all.

A write at the predicting position reaches the logits there through that position alone: no other sees it. So the
position is run again, all of a batch side by side, on the key-value cache that the answer left (`on_cache`). Where
blocks cannot be run like that, or a prompt is read in both directions, prompt and answer are read once more with a
graph (`on_whole`), and gone back through once for each word of a row. Either way what the model says there must be
what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmneurons.errors import ModelError
from mmneurons.vlm import weights
from mmneurons.vlm.context import evaluating, frozen, hooked
from mmneurons.vlm.doctor import tolerance
from mmneurons.vlm.hooks.recording import Recording
from mmneurons.vlm.locking import restored
from mmneurons.vlm.pass_calls import STREAM, NotOnCacheError, PassCalls, rows_of
from mmneurons.vlm.vlm import VLM, Answers, Inputs

Goal = Callable[[Float[Tensor, "n vocab"]], tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]
"""Function of the logits at n positions: for each what is gone back from, and the factor of its derivative. The slope
of log p is 1 - p times one that is never small: near p = 1, float16 would hold nothing of the whole."""
Directions = list[Float[Tensor, "n hidden"]]
"""For each FFN the derivatives by what its `w_out` writes, at n positions, float32."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The positions of one batch that are asked about, and what was recorded there."""

    vlm: VLM
    recording: Recording
    answers: Answers
    places: Int[Tensor, "n 2"]
    """Row, and pass or place in the recording, of each."""
    steps: Int[Tensor, "n"]
    """The token of the answer that each predicted."""
    goal: Goal

    @property
    def n_rows(self) -> int:
        """The number of prompts in the batch."""
        return len(self.answers.token_ids)

    @cached_property
    def said(self) -> Float[Tensor, "n vocab"]:
        """The logits of what entered the final norm then."""
        then = self.recording.stacked(self.recording.residual)
        rows, places = self.places.to(then.device).unbind(1)
        return self.vlm.anatomy.logits(then[rows, places])

    def slots(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "rows width"]]:
        """Number the places of each row: which of its row each is, and the steps of all rows, filled up with 0."""
        steps: list[list[int]] = [[] for _ in range(self.n_rows)]
        which = []
        for row, step in zip(self.places[:, 0].tolist(), self.steps.tolist(), strict=True):
            which.append(len(steps[row]))
            steps[row].append(step)
        width = max(map(len, steps))
        return torch.tensor(which), torch.tensor([row + [0] * (width - len(row)) for row in steps])


def write_gradients(asked: Asked, inputs: Inputs | None) -> Directions:
    """Derive the goal at each place by what every FFN's `w_out` writes there; exact, whatever lies in between.

    Args:
        asked: The places.
        inputs: Of the batch; what is read again where the cache that generation left cannot be used.

    Returns:
        Per FFN (n, hidden). Activation x column . direction is gradient x activation; a gate behind `w_out` (shared
        experts) is taken for a part of the activation, as everywhere.

    Raises:
        ModelError: the model cannot be gone back through: its weights are packed in a form without derivatives, or
            off-loaded; or what is read again does not say what was said.
    """
    check_differentiable(asked.vlm)
    _ = asked.said  # before any graph is made: it comes of inference
    found = None
    if asked.recording.calls is not None:
        try:
            found = on_cache(asked, asked.recording.calls)
        # Blocks of a family may refuse such rows in any way of their own; what they do give is checked.
        except (NotOnCacheError, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            found = None
    if found is None:
        if inputs is None:
            raise ModelError(
                "This model's blocks cannot be run again on the cache that its answer left, and there is no prompt.",
                fix='score="logprob"    CLI: --score logprob',
            )
        found = on_whole(asked, inputs)
        if found is None:
            raise ModelError(
                "This model, read again, does not say what it said: no gradient of it is to be believed.",
                fix='score="logprob"    CLI: --score logprob',
            )
    # What is behind `w_out` in a shared expert belongs to the activation.
    rows, steps = asked.places.unbind(1)
    for i, parts in enumerate(asked.recording.factors):
        if parts:
            factor = asked.recording.stacked(parts)
            found[i] = found[i] / factor[rows.to(factor.device), steps.to(factor.device)].sigmoid().to(found[i])
    return found


def check_differentiable(vlm: VLM) -> None:
    """Refuse a model that cannot be gone back through, by name and with the reason."""
    where = 'score="logprob" needs no gradient    CLI: --score logprob'
    if meta := next((name for name, p in vlm.model.named_parameters() if p.is_meta), None):
        raise ModelError(
            "Gradients need all weights in memory, and some of this model's are off-loaded.",
            seen=f"{meta} is not on a device.",
            fix=where,
        )
    for name, module in vlm.model.named_modules():
        if is_packed_without_gradients(module):
            raise ModelError(
                "Gradients cannot be had of these quantised weights: their kernel has no derivative.",
                seen=f"{name}: {type(module).__name__}",
                fix=where,
            )


def is_packed_without_gradients(module: nn.Module) -> bool:
    """Whether a module's weights are packed in a form whose kernel is not known to have a derivative."""
    if not isinstance(getattr(module, "weight", None), Tensor) and not weights.holds_experts(module):
        return False
    # bitsandbytes' kernels go back to their inputs, in 4 and in 8 bits.
    return weights.is_quantised(module) and type(module.weight).__name__ not in ("Params4bit", "Int8Params")


def on_cache(asked: Asked, calls: PassCalls) -> Directions | None:
    """Run the predicting positions alone, all side by side; None if they do not say what was said."""
    vlm, anatomy = asked.vlm, asked.vlm.anatomy
    if vlm.is_encoder_decoder:
        raise NotOnCacheError
    which, steps = asked.slots()
    entered = asked.recording.stacked(asked.recording.embedding)
    rows = torch.arange(asked.n_rows)[:, None]
    hidden: Any = entered[rows.to(entered.device), steps.to(entered.device)].clone()
    with torch.no_grad():
        called = rows_of(calls, steps, asked.answers.n_prompt, hidden)
    with _ready(asked) as seen:
        hidden = hidden.requires_grad_().clone()  # blocks may write into what they are given
        for block, (args, kwargs) in zip(anatomy.blocks, called, strict=True):
            if calls.named:
                kwargs[STREAM] = hidden
            else:
                args = (hidden, *args)
            output = block.module(*args, **kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        residual = (seen.entered or [hidden])[-1]
        return _derived(asked, seen, residual, (asked.places[:, 0], which))


def on_whole(asked: Asked, inputs: Inputs) -> Directions | None:
    """Read prompt and answer again with a graph from the first block on; None if that does not say what was said."""
    vlm, answers = asked.vlm, asked.answers
    # Counted from the end: some models put the picture before the first position.
    positions = answers.n_prompt + asked.steps - 1 - answers.sequences.shape[1]
    batch = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in vlm.extended(inputs, answers).items()
    }
    with _ready(asked) as seen:
        first = partial(vlm.anatomy.blocks[0].module.register_forward_pre_hook, _leaf, with_kwargs=True)
        with hooked([first]):
            vlm.model(**batch, **vlm.once())
        return _derived(asked, seen, seen.entered[-1], (asked.places[:, 0], positions))


@dataclass(eq=False)
class _Seen:
    """What one pass with a graph went through."""

    written: list[Tensor | None]
    """Per FFN what its module gave."""
    entered: list[Tensor]
    """What entered the final norm."""


@restored
def _ready(asked: Asked):
    """Make the model ready for a pass with a graph, which sees what every FFN writes; no weight asks for gradients."""
    vlm, anatomy = asked.vlm, asked.vlm.anatomy
    seen = _Seen([None] * len(anatomy.ffns), [])

    def wrote(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen.written[i] = output if isinstance(output, Tensor) else output[0]

        return hook

    def enter(module: nn.Module, args: tuple) -> None:
        seen.entered.append(args[0])

    watching = [partial(ffn.module.register_forward_hook, wrote(i)) for i, ffn in enumerate(anatomy.ffns)]
    watching.append(partial(anatomy.norm_module.register_forward_pre_hook, enter))
    # Linear attention writes into its state, which autograd would refuse to have saved.
    with (
        vlm.alone(),
        evaluating(vlm.model),
        frozen(vlm.model),
        hooked(watching),
        torch.enable_grad(),
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
    ):
        yield seen


def _leaf(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Begin the graph at the first block; a copy, since blocks may write into what they are given."""
    if args:
        return (args[0].detach().requires_grad_().clone(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_().clone()}


def _derived(
    asked: Asked, seen: _Seen, residual: Float[Tensor, "rows positions hidden"], at: tuple[Tensor, Tensor]
) -> Directions | None:
    """Go back from the goal to every FFN's write, at (row, position) of each place; None if the logits are others."""
    anatomy = asked.vlm.anatomy
    rows, positions = (part.to(residual.device) for part in at)
    logits = anatomy.logits(residual[rows, positions], grad=True)
    # 1. Is this what the model said? Tokens that are never said have a logit near the smallest float32.
    said = asked.said.to(logits.device)
    bound = said[said > torch.finfo(torch.float32).min / 2].abs().max()
    if not bool((logits.detach() - said).abs().max() <= tolerance(asked.vlm) * bound):
        return None
    # 2. Rows and, on the cache, positions do not see one another: all of them go back together. Where a whole row was
    # read, an earlier word's write is seen by a later word: one word of each row at a time.
    goals, factors = asked.goal(logits)
    which, _ = asked.slots()
    together = [torch.arange(len(which))]
    if residual.shape[1] > 1 + int(which.max()):
        together = [torch.nonzero(which == k).squeeze(1) for k in range(1 + int(which.max()))]
    written = [(i, out) for i, out in enumerate(seen.written) if out is not None and out.requires_grad]
    found = [torch.zeros(len(which), anatomy.hidden, dtype=torch.float32, device=residual.device) for _ in anatomy.ffns]
    for turn, mine in enumerate(together):
        mine = mine.to(residual.device)
        total = goals[mine].sum()
        graph = turn + 1 < len(together)
        slopes = torch.autograd.grad(total, [out for _, out in written], retain_graph=graph, allow_unused=True)
        for (i, out), slope in zip(written, slopes, strict=True):
            if slope is None:  # a block that was left out, or an expert that nobody asked
                continue
            # Fused experts that return every expert's output for every token are added up later: one copy stands for
            # all. Some modules see rows and positions as one axis.
            copies = out.numel() // (len(residual) * residual.shape[1] * anatomy.hidden)
            slope = slope.reshape(copies, len(residual), residual.shape[1], anatomy.hidden)[0]
            picked = slope[rows[mine].to(slope.device), positions[mine].to(slope.device)]
            found[i][mine] = picked.float().to(residual.device) * factors[mine, None]
    return found


def log_p_goal(token_ids: Sequence[int], against: Sequence[int] | None = None) -> Goal:
    """The goal log p of one token at each position, or how far it is ahead of another one's.

    log p = -softplus(odds), odds being how far all others together are ahead: its derivative is 1 - p times that of
    -odds. Not by `log_softmax`, whose derivative is off by rounding / (1 - p) where p is near 1.
    """
    own = torch.tensor(list(token_ids))[:, None]

    def goal(logits: Float[Tensor, "n vocab"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        mine = own.to(logits.device)
        if against is not None:
            ahead = logits.gather(1, mine) - logits.gather(1, torch.tensor(list(against))[:, None].to(mine))
            return ahead[:, 0], torch.ones_like(ahead[:, 0])
        odds = (logits - logits.gather(1, mine)).scatter(1, mine, -torch.inf).logsumexp(1)
        return -odds, odds.detach().sigmoid()

    return goal
