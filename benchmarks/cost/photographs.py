"""Peak memory of `find` over many large photographs: it must not grow with their number.

python -m benchmarks.cost.photographs

Fresh processes over 8, 40 and 400 JPEGs of 12 megapixels, in batches of 8; the same file under many names.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import mmneurons as mmn

SIZE = (4000, 3000)
NUMBERS = (8, 40, 400)


def peak(folder: Path, n: int) -> None:
    """Of this process, in kilobytes, printed."""
    vlm = mmn.load(device="cpu")
    mmn.find(vlm, [folder / f"{i}.jpg" for i in range(n)], max_new_tokens=8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(SIZE).save(folder / "0.jpg", quality=90)
        for i in range(1, max(NUMBERS)):
            (folder / f"{i}.jpg").hardlink_to(folder / "0.jpg")
        print("| photographs | peak memory, MB | over that of the fewest |\n| --- | --- | --- |")
        first = 0
        for n in NUMBERS:
            command = [sys.executable, "-m", "benchmarks.cost.photographs", name, str(n)]
            kilobytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            first = first or kilobytes
            print(f"| {n} | {kilobytes // 1024} | {kilobytes / first:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        peak(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
