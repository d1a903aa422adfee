"""What `find` costs: against `generate` alone, the released algorithm and gradients; memory; growth with nouns.

    python -m benchmarks.cost.find                      about twenty minutes on two cores, no download
    python -m benchmarks.cost.find --quick --out FILE   toy sizes: shows that it runs, measures nothing

Writes its tables between the markers of docs/measurements/benchmarks.md, which says what each number means.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import mmneurons as mmn

from .cases import NEW_TOKENS, Case, check_gradients, check_integrated, check_released
from .measuring import build_projections, measure_extras, measure_growth, measure_pairs, measure_rivals
from .models import LARGE, TINY, TITLES, build, pictures, side_of
from .tables import PAGE, Tables, report, write
from .timing import Ratio, say
from .vocabulary import NOUNS_PER_CAPTION, nouns_of

BATCHES = (1, 8)
MEMORY_ROUNDS = 3
"""How often peaks are measured: a C library keeps more or less of what was freed."""
WITH_RIVALS = ("pocket", "llava")


@dataclass(frozen=True)
class Effort:
    """How often things are repeated."""

    pairs: int
    """Rounds of `find` and `generate` for one image."""
    others: int
    """Rounds of all else."""


FULL = {"pocket": Effort(25, 9), "llava": Effort(9, 5), "qwen2_5_vl": Effort(9, 5)}
QUICK = dict.fromkeys(FULL, Effort(2, 1))


def measure_memory(names: Sequence[str], batches: Sequence[int], toy: bool, tables: Tables) -> None:
    """Peaks of fresh processes, one that generates and one that finds.

    First of all: on Linux a child's peak counts what this process held when the child was started.
    """
    for name in names:
        for batch in batches:
            peaks: dict[str, list[float]] = {"generate": [], "find": []}
            for _ in range(1 if toy else MEMORY_ROUNDS):
                for what, mine in peaks.items():
                    command = [sys.executable, "-m", "benchmarks.cost.peak", name, what, str(batch)]
                    command += ["toy"] if toy else []
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise RuntimeError(done.stderr)
                    mine.append(float(done.stdout.split()[1]))
            say(f"  peaks of {name}, batch {batch}: {peaks} MiB")
            ratio = Ratio.of(peaks["find"], peaks["generate"])
            column = f"{TITLES[name]} float32, batch {batch}"
            tables.memory["peak memory, `find` / `generate`"][column] = str(ratio)


def measure(case: Case, name: str, effort: Effort, tables: Tables, *, more: bool) -> None:
    """One case; with `more`, also what is measured of one image only."""
    measure_pairs(case, effort.pairs if len(case.images) == 1 else effort.others, tables)
    if not more:
        return
    measure_extras(case, effort.others, tables)
    if name in WITH_RIVALS:
        said = case.said()
        check_gradients(case, said)
        missed = check_integrated(case, said)
        projections, built = build_projections(case)
        check_released(case, projections)
        measure_rivals(case, effort.others, tables, projections, built)
        tables.rivals["- integrated gradients: most missed of a block's share, %"][case.name] = f"{100 * missed:.2g}"
        measure_growth(case, effort.others, tables)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--bfloat16", action="store_true", help="the random models also in bfloat16")
    asked = parser.parse_args()
    toy: bool = asked.quick
    geometries, efforts = (TINY, QUICK) if toy else (LARGE, FULL)
    tables, facts = (
        Tables(),
        [f"{NOUNS_PER_CAPTION} nouns a caption of a random model; at most {NEW_TOKENS} new tokens."],
    )
    measure_memory(["llava", "qwen2_5_vl"] if toy else list(efforts), BATCHES[: 1 if toy else None], toy, tables)
    for name, effort in efforts.items():
        vlm = build(name, toy=toy)
        millions = sum(part.numel() for part in vlm.model.parameters()) / 1e6
        shape = f": {geometries[name]}" if name in geometries else ""
        facts.append(f"{TITLES[name]}: {millions:.1f} M parameters{shape}.")
        images = pictures(max(BATCHES), side_of(name, geometries))
        for dtype in ("float32", "bfloat16") if asked.bfloat16 and not vlm.is_pocket else ("float32",):
            if dtype == "bfloat16":
                vlm = mmn.load(cast(Any, vlm.model).to(torch.bfloat16), processor=vlm.processor)
            for batch in BATCHES:
                case = Case(vlm, images[:batch], f"{TITLES[name]} {dtype}")
                say(case.column)
                with nouns_of(vlm):
                    measure(case, name, effort, tables, more=dtype == "float32" and batch == 1)
                # A run cut short leaves what it measured.
                write(asked.out, "find", report("find", tables, facts, toy=toy))
    print(report("find", tables, facts, toy=toy))


if __name__ == "__main__":
    main()
