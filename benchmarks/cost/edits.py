"""What an edit costs: over one `generate` of its images; beside it the reference, worked out once for a model.

    python -m benchmarks.cost.edits                    about five minutes on two cores, no download
    python -m benchmarks.cost.edits --quick --out FILE a small reference and one round: shows that it runs

The pocket model, its default reference, the eight images of an edit, a near and a far pair. Writes its table between
its markers in docs/measurements/benchmarks.md. Larger models: `python -m benchmarks.cost.gpu --edits`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.editing.reference import sentences

from .cases import NEW_TOKENS, Case
from .measuring import measure_edits
from .tables import PAGE, Tables, report, write

PAIRS = (0, 15)
"""Of `pocket.EDIT_PAIRS`."""
ROUNDS = 9


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small reference and one round")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    vlm, tables = mmn.load(device="cpu"), Tables()
    others = [scene.image for scene in pocket.evaluation_set("reference-400")]
    texts = [*pocket.facts()[::4], *sentences()]
    if asked.quick:
        others, texts = others[:8], texts[:8]
    facts = [f"At most {NEW_TOKENS} new tokens.", "Everything but the reference counts, trials of strengths too."]
    for i in PAIRS[: 1 if asked.quick else None]:
        pair = pocket.EDIT_PAIRS[i]
        images = [scene.image for scene in pocket.edit_set(pair.source).edit]
        case = Case(vlm, images, f"pocket, {pair.source} -> {pair.target}")
        measure_edits(case, others, 1 if asked.quick else ROUNDS, tables, texts, (pair.source, pair.target))
    measured = report("edits", tables, facts, toy=asked.quick)
    write(asked.out, "edits", measured)
    print(measured)


if __name__ == "__main__":
    main()
