"""What `find` costs on a GPU: LLaVA-1.5's shapes, 7B and 13B, with random bfloat16 weights made on the device.

    python -m benchmarks.cost.gpu                      about ten minutes on a GPU of 80 GB, no download
    python -m benchmarks.cost.gpu --models 7B          about four; needs 40 GB for the released projections
    python -m benchmarks.cost.gpu --edits              edits instead; between markers of its own
    python -m benchmarks.cost.gpu --quick --out FILE   toy sizes on the CPU: shows that it runs, measures nothing

Writes its tables between its markers in docs/measurements/benchmarks.md, which says what each number means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from mmneurons.vlm.vlm import VLM

from .cases import NEW_TOKENS, Case, check_baseline, check_gradients, check_integrated, check_released
from .measuring import build_projections, measure_edits, measure_extras, measure_growth, measure_pairs, measure_rivals
from .models import TINY, Geometry, pictures, random_vlm, scenes
from .tables import PAGE, Tables, report, write
from .timing import device_peak, say
from .vocabulary import NOUNS_PER_CAPTION, nouns_of

BATCHES = (1, 8)
N_REFERENCE = 32
"""Images that an edit is to leave as they are."""
TOWER = {"tower_hidden": 1024, "tower_layers": 24, "tower_head": 64, "side": 336}
LLAVA = {
    "7B": Geometry("llava", 4096, 11008, 32, 32064, head=128, **TOWER),
    "13B": Geometry("llava", 5120, 13824, 40, 32064, head=128, **TOWER),
}
SPARE = 16 * 2**30
"""Bytes of the device that projections leave to activations."""
MISSING = """benchmarks.cost.gpu measures on a CUDA GPU, and torch finds none here (torch {version}).
To see that it runs, at toy sizes on the CPU: python -m benchmarks.cost.gpu --quick --out FILE"""


def measure(geometry: Geometry, title: str, device: str, n: int, tables: Tables) -> str:
    """Everything about one model; how large it is."""
    vlm = random_vlm(geometry, torch.bfloat16, device)
    images = pictures(max(BATCHES), 3 * geometry.side)
    with nouns_of(vlm):
        for batch in BATCHES:
            case = Case(vlm, images[:batch], title)
            say(case.column)
            measure_pairs(case, n, tables)
            if device == "cuda":
                plain, found = device_peak(case.generate), device_peak(case.find)
                cell = f"{found / plain:.3f} (+{found - plain:.0f} MiB)"
                tables.memory["peak device memory, `find` / `generate`"][case.column] = cell
        one = Case(vlm, images[:1], title)
        measure_extras(one, n, tables)
        projections, built = build_projections(one, _fitting(one) if device == "cuda" else None)
        measure_rivals(one, n, tables, projections, built)
        measure_growth(one, n, tables)
    return _told(vlm, geometry, title)


def measure_editing(geometry: Geometry, title: str, device: str, n: int, tables: Tables) -> str:
    """What edits of one model cost; how large it is."""
    vlm = random_vlm(geometry, torch.bfloat16, device)
    images, others = (make(k, 3 * geometry.side) for make, k in ((pictures, max(BATCHES)), (scenes, N_REFERENCE)))
    measure_edits(Case(vlm, images, title), others, n, tables)
    return _told(vlm, geometry, title)


def _told(vlm: VLM, geometry: Geometry, title: str) -> str:
    millions = sum(part.numel() for part in vlm.model.parameters()) / 1e6
    return f"{title}: {millions:.1f} M parameters: {geometry}."


def check(device: str) -> None:
    """The rivals say what they should: on a toy in float32, on the same device; bfloat16 rounds too much."""
    vlm = random_vlm(TINY["llava"], torch.float32, device)
    images = pictures(max(BATCHES), 3 * TINY["llava"].side)
    case = Case(vlm, images[:1], "toy")
    with nouns_of(vlm):
        check_baseline(Case(vlm, images, "toy"))
        said = case.said()
        check_gradients(case, said)
        check_integrated(case, said)
        check_released(case, build_projections(case)[0])


def _fitting(case: Case) -> int:
    """Blocks whose projections fit on the device beside the model, float32 copies while they are made included."""
    torch.cuda.empty_cache()
    ffn = case.vlm.anatomy.ffns[0]
    each = 2 * case.vlm.anatomy.vocab * ffn.n_neurons
    return max(1, int((torch.cuda.mem_get_info()[0] - SPARE) // each))


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds, on the CPU")
    parser.add_argument("--edits", action="store_true", help="measure edits instead of finding")
    parser.add_argument("--models", nargs="+", choices=list(LLAVA), default=list(LLAVA))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    if not asked.quick and not torch.cuda.is_available():
        print(MISSING.format(version=torch.__version__), file=sys.stderr)
        return 2
    device, n = ("cpu", 2) if asked.quick else ("cuda", asked.rounds)
    geometries: Mapping[str, Geometry] = {"toy": TINY["llava"]} if asked.quick else LLAVA
    tables, facts = Tables(), [f"{NOUNS_PER_CAPTION} nouns a caption; at most {NEW_TOKENS} new tokens."]
    place = "gpu --edits" if asked.edits else "gpu"
    if not asked.edits:
        check(device)
    for name in geometries if asked.quick else asked.models:
        run = measure_editing if asked.edits else measure
        facts.append(run(geometries[name], f"random LLaVA {name} bfloat16", device, n, tables))
        if device == "cuda":
            torch.cuda.empty_cache()
        write(asked.out, place, report("gpu", tables, facts, toy=asked.quick))
    print(report("gpu", tables, facts, toy=asked.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
