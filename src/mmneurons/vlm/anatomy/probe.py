"""Find out by one tiny forward pass what a model does between its FFNs and its logits, without a table of models.

Sixteen made-up tokens go through the language model. Each block's output is written as a sum of what its parts gave
(least squares over all positions and hidden units, exact up to rounding): coefficients are gates and multipliers,
and where the sum goes through a norm, the norm's input is taken apart in turn. A small write times a small gate is
lost in the rounding of a large stream, so each block also reads that stream made small, where its writes stand out.
The head's output is replaced by a ramp, so that whatever the model does to its logits (a scale, a softcap) shows as a
curve.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutput

from mmneurons.errors import ModelError
from mmneurons.vlm.anatomy.parts import LogitRule, check_finite
from mmneurons.vlm.anatomy.structure import FoundFfn, Tree, is_linear, is_norm, linear_shape, visible
from mmneurons.vlm.context import evaluating, hooked, input_device
from mmneurons.vlm.locking import alone
from mmneurons.vlm.weights import holds_experts

N_TOKENS = 16
"""Number of made-up tokens in the tiny pass."""
STREAMS = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)
"""Factors by which each block reads the stream of the first row, one row each; powers of two, which round nothing."""
N_ROWS = len(STREAMS) * N_TOKENS
"""Number of positions in the tiny pass, of all streams together."""
CERTAIN = 8
"""Number of standard errors by which a scale must differ from 0 to be a summand's, and from 1 not to count as 1."""
MATERIAL = 4
"""Number of roundings (in the model's dtype) that a summand with a scale other than 1 must be worth.

Rounding follows the values that are rounded, and so looks a little like everything that is made of them."""
LEAST = 1e-5
"""Share of the whole that such a summand must be worth in any dtype."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest share of a block's output that may stay unexplained, by the dtype the model computes in."""


@dataclass(eq=False)
class Seen:
    """The output of one module in the tiny pass, one row per position, float32."""

    module: nn.Module
    output: Float[Tensor, "tokens hidden"]
    input: Float[Tensor, "tokens hidden"] | None = None
    """Input of the module, kept for norms only."""
    gate: nn.Module | None = None
    """A module whose sigmoid the output was multiplied by (shared experts); None for a plain output."""


@dataclass(eq=False)
class SeenBlock:
    """What was seen of one block in the tiny pass, its parts in the order in which they ran."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    """Dtypes of all outputs seen in the block."""
    entered: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    left: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    parts: list[Seen] = field(default_factory=list)
    numbers: list[Seen] = field(default_factory=list)
    """Outputs of projections to one number per token, which may be gates."""


@dataclass(frozen=True, eq=False)
class Term:
    """A summand of a vector: `scale` times the output of a part, or times what entered the block (part None)."""

    scale: float
    part: Seen | None


@dataclass(eq=False)
class Pass:
    """What was seen in the tiny pass."""

    blocks: list[SeenBlock]
    norms: list[Seen]
    """The norms of the last block, then those outside the blocks: one of them is the final norm."""
    head_input: Tensor
    rule: LogitRule | None
    """The rule from the head's output to the logits; None if it is neither a scale nor a softcap."""
    dtype: torch.dtype
    """The dtype that the language model computes in; where it differs from part to part, the coarsest."""

    @property
    def limit(self) -> float:
        """Largest share of a block's output that may stay unexplained in this model's dtype."""
        return TOLERANCE[self.dtype]


def run(tree: Tree, ffns: list[list[FoundFfn]]) -> Pass:
    """Run the tiny pass, and return what was seen of every block, of the norms and of the head.

    Raises:
        ModelError: if the language model cannot be run on tokens alone, or gives no numbers.
    """
    blocks = [SeenBlock() for _ in tree.layers]
    norms: list[Seen] = []
    heads: list[tuple[Tensor, Tensor]] = []
    # Hooks on every block and its parts, on the norms outside of blocks (the final norm among them), and on the head.
    dense = {id(ffn.module) for found in ffns for ffn in found if not ffn.is_experts}
    inside = {id(m) for m in tree.layers.modules()}
    outer = [module for module in tree.owner.modules() if is_norm(module) and id(module) not in inside]
    watching = chain(
        *(_watch_block(block, seen, tree.hidden) for block, seen in zip(tree.layers, blocks, strict=True)),
        (partial(module.register_forward_hook, _watcher(norms, tree.hidden)) for module in outer),
        [partial(tree.head.register_forward_hook, _ramp(heads))],
    )
    # The model's own code can raise anything where it needs a picture or an argument that is not given here.
    try:
        with alone(tree.owner), hooked(watching), torch.inference_mode(), evaluating(tree.owner):
            logits = tree.owner(**_tiny_inputs(tree)).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(
            "The language model cannot be run on a few tokens alone, which its analysis needs.",
            seen=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="mmneurons supports models whose language model reads token ids; please report this one.",
        ) from error
    # A block that was not reached has no data, and silence must not be taken for zero.
    if not heads or any(seen.left.numel() == 0 for seen in blocks):
        raise ModelError("Not every block of the language model, or not its head, was reached in a forward pass.")
    check_finite(heads[-1][0], tree.owner.dtype)
    # More candidates for the fits: gated outputs. The limit of the fits follows the coarsest dtype that was seen.
    for seen in blocks:
        _add_gated(seen, dense)
    dtype = max(set.union(*(seen.dtypes for seen in blocks)), key=lambda dtype: torch.finfo(dtype).eps)
    # `find_final_norm` goes through this list from its end: norms inside the last block count only where no norm behind
    # it fits, since before training all norms are alike.
    norms = [*(part for part in blocks[-1].parts if is_norm(part.module)), *norms]
    given, ramp = heads[-1]
    return Pass(blocks, norms, given, _logit_rule(ramp, logits[0, -1].float().cpu(), TOLERANCE[dtype]), dtype)


def explain(
    target: Tensor,
    block: SeenBlock,
    before: Seen | None = None,
    *,
    rounding: float,
    writers: Collection[nn.Module] = (),
) -> tuple[list[Term], float]:
    """Write a vector as a sum of what entered the block and what its parts gave before the vector was made.

    Args:
        target: The vector at every position, (tokens, hidden).
        block: The block in which it was made.
        before: Only parts that ran before this one can be summands; None for all.
        rounding: Relative spacing of numbers in the dtype that the model computes in.
        writers: Parts that are known to write: summands too where they hardly stand out from the rounding.

    Returns:
        The summands, and the relative error of their sum (0 is exact, 1 if nothing fits).
    """
    parts = block.parts[: block.parts.index(before)] if before is not None else block.parts
    # The output of a part, to the bit (a block that ends with a norm): no fit is needed, and none would be as sure.
    same = [part for part in parts if torch.equal(part.output, target)]
    if same:
        return [Term(1.0, same[0])], 0.0
    # Otherwise least squares over all candidates: the stream that entered (None), and each output that is not a copy.
    candidates: list[Seen | None] = [None, *_distinct(block, parts)]
    columns = [block.entered if part is None else part.output for part in candidates]
    # A sum is rounded in proportion to its size, entry by entry, and a few entries can be a thousand times larger than
    # others: each equation is weighted by the inverse of its size. Where summands cancel, the rounding is larger than
    # the sum tells; hence the median of the position is added.
    size = target.abs() + block.entered.abs()
    usual = size.median(1, keepdim=True).values
    weight = 1 / (size + usual.clamp_min(1e-6 * float(usual.max())).clamp_min(1e-30))
    # One equation for each position and hidden unit, one unknown for each candidate; float64, since streams and writes
    # differ in size by orders of magnitude.
    matrix = torch.stack([(column * weight).flatten() for column in columns], dim=1).double()
    wanted = (target * weight).flatten().double()
    scales, errors, _ = _least_squares(matrix, wanted)
    # A candidate is a summand if its scale is surely not 0, and if the scale is 1, the part is known to write, or what
    # it gives is worth more than rounding in at least one of the streams.
    certain = scales.abs() > CERTAIN * errors + 1e-9
    unit = (scales - 1).abs() < CERTAIN * errors + 1e-5
    worth = scales.abs() * (_norms(matrix) / _norms(wanted[:, None]).clamp_min(1e-30)).amax(0)
    known = torch.tensor([part is not None and part.module in writers for part in candidates])
    kept = torch.nonzero(certain & (unit | known | (worth > max(MATERIAL * rounding, LEAST)))).flatten().tolist()
    if not kept:
        return [], 1.0
    # Fitted again without the others, which took a little of the rounding; scales that may be 1 are exactly 1.
    scales, errors, rest = _least_squares(matrix[:, kept], wanted)
    terms = []
    for j, scale, error in zip(kept, scales.tolist(), errors.tolist(), strict=True):
        near_one = abs(scale - 1) < CERTAIN * error + 1e-5
        terms.append(Term(1.0 if near_one else scale, candidates[j]))
    return terms, rest


def find_final_norm(seen: Pass) -> tuple[Seen, float]:
    """Find the norm whose output the head reads, and the factor by which the model multiplies that output first.

    Raises:
        ModelError: if there is none: something else stands between stream and head.
    """
    for norm in reversed(seen.norms):
        if norm.output.shape != seen.head_input.shape:
            continue
        scale = float((norm.output * seen.head_input).sum() / norm.output.pow(2).sum().clamp_min(1e-30))
        rest = (seen.head_input - scale * norm.output).norm() / seen.head_input.norm().clamp_min(1e-30)
        if rest < seen.limit:
            return norm, 1.0 if abs(scale - 1) < seen.limit else scale
    raise ModelError(
        "Cannot tell the norm before the output head.",
        seen="No norm's output is what the head reads, not even up to a factor: a transform stands between them.",
        fix="Contributions through such a transform are not supported.",
    )


def _tiny_inputs(tree: Tree) -> dict[str, Any]:
    """Make the inputs of the tiny pass: made-up tokens, and states of an encoder where the model reads such."""
    owner, config = tree.owner, tree.owner.config
    takes = inspect.signature(owner.forward).parameters
    text = config.get_text_config(decoder=True)
    # Ordinary tokens spread over the vocabulary: one with a meaning of its own (a picture, the end) could send the pass
    # another way. All streams read the same tokens.
    n_words = min(getattr(text, "vocab_size", linear_shape(tree.head)[1]), 1 << 15)
    special = {token for c in (config, text) for token in _special(c)}
    plain = [i for i in range(n_words - 1, 0, -max(1, n_words // 64)) if i not in special]
    device = input_device(owner)
    ids = torch.tensor([plain[:N_TOKENS]] * len(STREAMS), device=device)
    # Cross-attention reads random states in place of a picture: with none, its writes would be missing or zero.
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, tree.hidden, generator=generator, dtype=torch.float32)
    states = states.to(device=device, dtype=owner.dtype).repeat(len(STREAMS), 1, 1)
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs |= {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}  # pyright: ignore[reportArgumentType]
    else:
        inputs["input_ids"] = ids
    for name in ("encoder_hidden_states", "cross_attention_states"):
        wanted = name == "cross_attention_states" or getattr(text, "add_cross_attention", False)
        if name in takes and wanted and "encoder_outputs" not in inputs:
            inputs[name] = states
    return inputs


def _special(config: Any) -> Iterator[int]:
    """Iterate over the tokens that a config gives a meaning of their own: end of text, a picture, padding."""
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "token_ids")):
            yield from value if isinstance(value, list | tuple) else [value]


def _watch_block(block: nn.Module, seen: SeenBlock, hidden: int) -> Iterator[Callable[[], RemovableHandle]]:
    """Iterate over the setters of the hooks that watch one block and its parts."""

    # Every block reads the first row's stream at all sizes anew: the small rows that the block below has written are
    # dominated by its writes, and would not be small any more.
    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stream = args[0] if args else kwargs["hidden_states"]
        sizes = torch.tensor(STREAMS, dtype=stream.dtype, device=stream.device)
        stream = stream[:1] * sizes.view(-1, *[1] * (stream.ndim - 1))
        seen.entered = _rows(stream, hidden)
        return ((stream, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": stream})

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        seen.left = _rows(first(output), hidden)

    yield partial(block.register_forward_pre_hook, enter, with_kwargs=True)
    yield partial(block.register_forward_hook, leave)
    for module in visible(block, mixers=True):
        if is_linear(module) or holds_experts(module) or not list(module.children()):
            yield partial(module.register_forward_hook, _watcher(seen.parts, hidden, seen))


def _watcher(parts: list[Seen], hidden: int, block: SeenBlock | None = None):
    """Make a hook that keeps outputs as wide as the stream and, within a block, projections to one number."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        out = first(output)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.ndim < 2:
            return
        if out.shape[-1] == hidden and out.numel() % (N_ROWS * hidden) == 0:
            given = first(args) if is_norm(module) else None
            parts.append(Seen(module, _rows(out, hidden), None if given is None else _rows(given, hidden)))
            if block is not None:
                block.dtypes.add(out.dtype)
        elif out.shape[-1] == 1 and out.numel() == N_ROWS and block is not None:
            block.numbers.append(Seen(module, out.detach().float().cpu().reshape(N_ROWS, 1).clone()))

    return hook


def first(output: Any) -> Any:
    """Return the first of a module's outputs where it has several, else its output."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _rows(values: Tensor, hidden: int) -> Float[Tensor, "tokens hidden"]:
    """Return values as one float32 row per position on the CPU; of all experts' answers (Llama 4), their sum."""
    rows = values.detach().float().cpu().reshape(-1, hidden)
    return rows.view(-1, N_ROWS, hidden).sum(0) if len(rows) != N_ROWS else rows.clone()


def _add_gated(seen: SeenBlock, dense: set[int]) -> None:
    """Add to each dense FFN's output, as another candidate, that output times the sigmoid of each number seen."""
    for part in [part for part in seen.parts if id(part.module) in dense]:
        for number in seen.numbers:
            seen.parts.append(Seen(part.module, part.output * number.output.sigmoid(), gate=number.module))


def _distinct(block: SeenBlock, parts: list[Seen]) -> list[Seen]:
    """List the parts whose output is not that of an earlier one (dropout in evaluation mode returns its input)."""
    kept: list[Seen] = []
    for part in parts:
        if not any(torch.equal(part.output, other) for other in [block.entered, *(p.output for p in kept)]):
            kept.append(part)
    return kept


def _least_squares(matrix: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, float]:
    """Solve a least-squares fit; return the scales, their standard errors, and the relative error of the fit."""
    # By the normal equations: the matrix has few columns and many rows. The pseudoinverse shares the scale of
    # candidates that are multiples of each other, which would make an inverse fail.
    gram = matrix.T @ matrix
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-13)
    scales = inverse @ (matrix.T @ wanted)
    rest = wanted - matrix @ scales
    spread = rest.pow(2).mean().sqrt()
    errors = spread * inverse.diagonal().clamp_min(0).sqrt()
    return scales, errors, float(rest.norm() / wanted.norm().clamp_min(1e-30))


def _norms(values: Tensor) -> Tensor:
    """Return the norm of each column in each stream, (streams, columns)."""
    return values.view(len(STREAMS), -1, *values.shape[1:]).norm(dim=1)


def _ramp(heads: list[tuple[Tensor, Tensor]]):
    """Make a hook that notes what the head read, and replaces its output by a ramp."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given = args[0]
        ramp = torch.linspace(-60, 60, output.shape[-1], dtype=torch.float32).to(
            device=output.device, dtype=output.dtype
        )
        heads.append((given.detach().float().cpu().reshape(-1, given.shape[-1]), ramp.float().cpu()))
        return ramp.expand_as(output).clone()

    return hook


def _logit_rule(ramp: Tensor, logits: Tensor, limit: float) -> LogitRule | None:
    """Find the scale or softcap that sends the ramp to these logits; tokens that the model bars are told apart."""
    asked, given = ramp[: len(logits)].double(), logits[: len(ramp)].double()
    # Barred tokens are at minus infinity, or at the lowest number of their dtype.
    allowed = given.isfinite() & (given.abs() < 3e4)
    barred = tuple(torch.nonzero(~allowed).flatten().tolist())
    asked, given = asked[allowed], given[allowed]
    scale = float((asked * given).sum() / asked.pow(2).sum())
    if _apart(scale * asked, given) < limit:
        return LogitRule(scale=1.0 if abs(scale - 1) < limit else scale, barred=barred)
    # A softcap: cap * tanh(scale * x / cap). For a given cap, the logits near zero give the scale; bisection then finds
    # the cap with which the curve ends where it was seen to end.
    small = asked.abs() < 6
    low, high = float(given.abs().max()), 1e4
    cap = high
    for _ in range(200):
        cap = (low + high) / 2
        inner = cap * torch.atanh((given / cap).clamp(-1 + 1e-12, 1 - 1e-12))
        scale = float((asked * inner)[small].sum() / asked[small].pow(2).sum())
        end = float((cap * torch.tanh(scale * asked / cap)).abs().max())
        low, high = (cap, high) if end < float(given.abs().max()) else (low, cap)
    if _apart(cap * torch.tanh(scale * asked / cap), given) < limit:
        return LogitRule(scale=1.0 if abs(scale - 1) < limit else scale, cap=_whole(cap, limit), barred=barred)
    return None


def _whole(value: float, limit: float) -> float:
    """Round a cap that is a whole number up to rounding, as it is in every config."""
    return float(round(value)) if abs(value - round(value)) < limit * value else value


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two vectors, relative to the largest entry of the second."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
