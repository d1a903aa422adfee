"""Peak memory of one process that loads a model and captions, or finds: `peak.py MODEL {generate,find} BATCH [tiny]`.

Prints two numbers in MiB: the peak until the model is loaded, and until the end.
"""

from __future__ import annotations

import resource
import sys

from models import LARGE, TINY, build, nouns_of, pictures

import mmneurons as mmn
from mmneurons.vlm.prompts import ANSWER_PREFIX, PROMPT


def peak() -> float:
    """The most memory that this process has held, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    """Load, run once, print."""
    name, what, batch, max_new_tokens, side = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    vlm = build(name, TINY if "tiny" in sys.argv else LARGE)
    images = pictures(batch, side)
    loaded = peak()
    if what == "find":
        with nouns_of(vlm):
            mmn.find(vlm, [*images], max_new_tokens=max_new_tokens, batch_size=batch)
    else:
        vlm.generate(vlm.encode(images, PROMPT, ANSWER_PREFIX), max_new_tokens)
    print(f"{loaded:.1f} {peak():.1f}")


if __name__ == "__main__":
    main()
