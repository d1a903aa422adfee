"""What a sweep costs: images a second against batched `generate` of the same JPEG files, bytes an image, memory.

    python -m benchmarks.cost.sweep                       the pocket model: minutes on two cores, no download
    python -m benchmarks.cost.sweep --memory 300 3000     peak memory of sweeps of so many files, one in 100 broken
    python -m benchmarks.cost.sweep --model qwen2_5_vl    random weights of its geometry

Pairs are run in turn, and the ratio is of each pair; `generate` decodes the same files, batch by batch.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mmneurons as mmn
from mmneurons import pocket
from mmneurons.data.images import open_image
from mmneurons.vlm.asking import ask
from mmneurons.vlm.vlm import VLM

BATCH = 8
BROKEN_IN = 100
"""One file of so many is broken, in ten ways by turns."""


def write_images(folder: Path, n_images: int, *, broken: bool) -> None:
    """Write scenes as JPEG files; with `broken`, one of a hundred is no image."""
    scenes = pocket.evaluation_set("find-500")
    held = []
    for i in range(min(n_images, len(scenes))):
        file = io.BytesIO()
        scenes[i].image.save(file, "JPEG", quality=92)
        held.append(file.getvalue())
    for i in range(n_images):
        path, content = folder / f"{i:06d}.jpg", held[i % len(held)]
        if not broken or i % BROKEN_IN:
            path.write_bytes(content)
        else:
            break_file(path, content, i // BROKEN_IN % 10)


def break_file(path: Path, content: bytes, way: int) -> None:
    """Put something at a path that is no whole image."""
    if way == 8:
        path.symlink_to("nowhere.jpg")
    elif way == 9:
        path.mkdir()
    else:
        huge = b"P6 40000 40000 255\n"
        path.write_bytes(
            [b"", b"text", content[:200], content[: len(content) // 2], content[2:], b"<html></html>", b"%PDF-1.4",
             huge][way]
        )  # fmt: skip


def generate(vlm: VLM, paths: list[Path]) -> float:
    """Caption all files in batches; return the seconds."""
    began = time.perf_counter()
    for _ in ask(vlm, [str(path) for path in paths], mmn.Question(batch_size=BATCH)):
        pass
    return time.perf_counter() - began


def compare(vlm: VLM, n_images: int, rounds: int, workers: int) -> None:
    """Print images a second of both, and their ratio."""
    ratios, rates, last = [], [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        write_images(folder, n_images, broken=False)
        paths = sorted(folder.iterdir())
        generate(vlm, paths[:BATCH])
        for i in range(rounds):
            marks: dict[str, float] = {}

            def told(stage: str, done: float, total: int, marks: dict[str, float] = marks) -> None:
                if done == total:
                    marks[stage] = time.perf_counter()

            plain = generate(vlm, paths)
            began = time.perf_counter()
            run = mmn.sweep(vlm, folder, Path(place) / f"run{i}", batch_size=BATCH, workers=workers, progress=told)
            swept, whole = marks["images"] - began, time.perf_counter() - began
            ratios.append(plain / swept)
            rates.append((n_images / plain, n_images / swept, n_images / whole))
            tables = list(run.done.values())
            n_bytes = sum(facts.images.bytes + facts.neurons.bytes for facts in tables)
            n_rows = sum(facts.neurons.rows for facts in tables)
            last = {"bytes an image": n_bytes / n_images, "rows an image": n_rows / n_images,
                    "words, bytes": (run.folder / "words.parquet").stat().st_size}  # fmt: skip
            print(f"  round {i}: generate {rates[-1][0]:.2f}, sweep {rates[-1][1]:.2f}, with the words of the neurons "
                  f"{rates[-1][2]:.2f} images/s", flush=True)  # fmt: skip
    print(
        f"  sweep / generate, images a second: {statistics.median(ratios):.3f} of {sorted(round(r, 3) for r in ratios)}"
    )
    print(f"  {last}", flush=True)


def remember(n_images: int) -> None:
    """Print the peak memory of a process that sweeps so many files, and what became of the broken ones."""
    import resource

    vlm = mmn.load(device="cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        write_images(folder, n_images, broken=True)
        for path in folder.iterdir():  # once, so that what is allocated at first use is not counted as growth
            if path.is_file() and path.stat().st_size > 1000:
                vlm.caption([open_image(path).image] * BATCH, max_new_tokens=8)
                break
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        run = mmn.sweep(vlm, f"{folder}/*.jpg", Path(place) / "run", batch_size=BATCH, max_new_tokens=8, says="raw")
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        reasons = {failure.reason.split("'")[-1][:40] for failure in run.failures}
        print(json.dumps({"files": n_images, "images": run.images().num_rows, "failures": len(run.failures),
                          "reasons": sorted(reasons), "MB before": before, "MB after": after}), flush=True)  # fmt: skip


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a geometry of benchmarks/models.py")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="*", help="numbers of files")
    parser.add_argument("--remember", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.remember:
        remember(asked.remember)
    elif asked.memory:
        for n_images in asked.memory:  # each in a process of its own
            subprocess.run([sys.executable, "-m", "benchmarks.cost.sweep", "--remember", str(n_images)], check=True)
    else:
        if asked.model == "pocket":
            vlm = mmn.load(device="cpu")
        else:
            from .models import build

            vlm = build(asked.model, toy=False)
        print(f"{asked.model}, {asked.images} images, batch {BATCH}")
        compare(vlm, asked.images, asked.rounds, asked.workers)


if __name__ == "__main__":
    main()
