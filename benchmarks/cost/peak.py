"""Peak memory of one process that loads a model and captions, or finds.

python -m benchmarks.cost.peak MODEL {generate,find} BATCH [toy]

Prints two numbers in MiB: the peak until the model is loaded, and until the end.
"""

from __future__ import annotations

import resource
import sys

from .cases import Case
from .models import LARGE, TINY, build, pictures, side_of
from .vocabulary import nouns_of


def peak() -> float:
    """The most memory that this process has held, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    """Load, run once, print."""
    name, what, batch, toy = sys.argv[1], sys.argv[2], int(sys.argv[3]), "toy" in sys.argv
    case = Case(build(name, toy=toy), pictures(batch, side_of(name, TINY if toy else LARGE)), name)
    loaded = peak()
    with nouns_of(case.vlm):
        case.find() if what == "find" else case.generate()
    print(f"{loaded:.1f} {peak():.1f}")


if __name__ == "__main__":
    main()
