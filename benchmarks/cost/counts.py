"""What `find` adds to `generate`, counted and not timed: launches of kernels and calls of Python.

    python -m benchmarks.cost.counts

Both are the same on any machine. A launch is an operator of torch that computes or copies; views and new memory are
none. Recording is counted as it runs on a GPU, where tensors that last are kept without a copy. Writes its table
between the markers of docs/measurements/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmneurons as mmn
from mmneurons.finding.scoring import describe, score_targets
from mmneurons.settings import ANSWER_PREFIX, PROMPT
from mmneurons.vlm.hooks import recording

from .cases import NEW_TOKENS, choices_of, target_at
from .models import TINY, TITLES, build, pictures, side_of
from .tables import PAGE, Table, Tables, report, write

FEW, MANY = 2, 8
"""Numbers of nouns, and of steps, whose difference gives what one of them costs."""


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it unless its result is a view or memory that nothing was written to."""
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        if not is_view and "empty" not in str(func):
            self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object]) -> int:
    """How many kernels a call launches."""
    with Launches() as mode:
        run()
    return sum(mode.counted.values())


@contextmanager
def python_calls(source: Path):
    """Count the calls of functions that a file defines, hooks among them."""
    calls: Counter[str] = Counter()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename) == source:
            calls[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def count(vlm: mmn.VLM, side: int, name: str, table: Table) -> None:
    """What is added at each step and for each noun, for one model."""
    inputs, n_ffns = vlm.encode(pictures(1, side), PROMPT, ANSWER_PREFIX), len(vlm.anatomy.ffns)
    n_writes = len(vlm.anatomy.sources) + len(vlm.anatomy.norms) + 2  # the stream before the blocks and behind them

    def generate(n: int) -> None:
        vlm.generate(inputs, n)

    def recorded(n: int, *, writes: bool) -> None:
        with recording.record(vlm.anatomy, writes=writes):
            vlm.generate(inputs, n)

    # 1. Of a step: the difference between many and few of them, so that what is done once drops out.
    def each_step(run: Callable[[int], object]) -> float:
        return (launches(lambda: run(MANY)) - launches(lambda: run(FEW))) / (MANY - FEW)

    # The passes in which it is seen what lasts come before the few.
    plain = each_step(lambda n: generate(n + 1))
    alone, whole = (each_step(lambda n, w=w: recorded(n + 1, writes=w)) for w in (False, True))
    hooks = []
    for n in (FEW + 1, MANY + 1):
        with python_calls(Path(recording.__file__)) as calls:
            recorded(n, writes=True)
        hooks.append(calls["hook"])
    table["FFNs, other parts that write"][name] = f"{n_ffns}, {n_writes}"
    table["launches of a step of `generate`"][name] = f"{plain:g}"
    table["launches that recording activations adds to a step"][name] = f"{alone - plain:g}"
    table["launches that recording all writes adds to a step"][name] = f"{whole - plain:g}"
    table["calls of hooks in a step, for each FFN and other part"][name] = (
        f"{(hooks[1] - hooks[0]) / (MANY - FEW) / (n_ffns + n_writes):g}"
    )
    # 2. Of a noun: scoring and describing many and few of them.
    with recording.record(vlm.anatomy) as held:
        answers = vlm.generate(inputs, NEW_TOKENS)
    choices, ids = choices_of("logit"), torch.arange(MANY).tolist()
    targets = [target_at(i % held.n_passes, token) for i, token in enumerate(ids)]
    scored = {n: score_targets(vlm, held, answers, targets[:n], choices) for n in (FEW, MANY)}
    describe(vlm, scored[MANY])  # measures what all neurons say, once for the model
    for what, run in (
        ("scoring", lambda n: score_targets(vlm, held, answers, targets[:n], choices)),
        ("describing", lambda n: describe(vlm, scored[n])),
    ):
        few, many = (launches(lambda n=n, run=run: run(n)) for n in (FEW, MANY))
        table[f"launches of {what} {FEW} nouns"][name] = str(few)
        table[f"launches that each further noun adds to {what}"][name] = f"{(many - few) / (MANY - FEW):.1f}"


def main() -> None:
    """Count, print, write."""
    tables = Tables()
    with mock.patch.object(recording, "COPYING", ()):
        for name in TITLES:
            vlm = build(name, toy=True)
            count(vlm, side_of(name, TINY), TITLES[name], tables.counts)
    measured = report(
        "counts", tables, ["Toy sizes: counts depend on the number of blocks, not on their width."], toy=False
    )
    write(cast(Path, PAGE), "counts", measured)
    print(measured)


if __name__ == "__main__":
    main()
