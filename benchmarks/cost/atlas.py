"""What the atlas costs: making the index of synthetic runs of 1e5, 1e6 and 1e7 rows, and each of its questions.

    python -m benchmarks.cost.atlas              ten minutes on two cores, no download, no model
    python -m benchmarks.cost.atlas --rows 1e5   small: shows that it runs

Every size runs in a process of its own, whose peak memory is told. Its table is in
docs/measurements/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmneurons.atlas.atlas import Atlas
from mmneurons.data.run import Run, RunFacts, names_hash
from mmneurons.data.run_writer import ImageRow, NounColumns, image_table, neuron_table, write_shard, write_words
from mmneurons.files import CACHE, write_whole

TOP, NOUNS, LEMMAS, LAYERS, WIDTH = 100, 3, 2000, 32, 11008
"""Neurons of a noun, nouns of an image, different nouns, and the neurons of a model of 7B parameters."""
POOL = 4000
"""How many neurons a noun draws its top from, the first ones far more often."""
SHARD = 1024
ROUNDS = 5


def make_run(folder: Path, n_rows: int) -> Run:
    """Write a run of random rows, nouns by Zipf's law."""
    import msgspec

    n_images = n_rows // (TOP * NOUNS)
    names = [f"images/{i:08d}.jpg" for i in range(n_images)]
    made_by = {"model": {"id": "synthetic"}, "settings": {"top": TOP, "score": "logit"}}
    facts = RunFacts(1, made_by, "synthetic", n_images, SHARD, names_hash(iter(names)))
    folder.mkdir(parents=True)
    write_whole(folder / "run.json", msgspec.json.encode(facts))
    run, random = Run(folder), np.random.default_rng(0)
    share = 1 / np.arange(1, LEMMAS + 1)
    share /= share.sum()
    pools = random.integers(0, LAYERS * WIDTH, (LEMMAS, POOL))
    for shard in range(run.n_shards):
        images, nouns = list[ImageRow](), NounColumns()
        for place in run.slice_of(shard):
            said = random.choice(LEMMAS, NOUNS, p=share)
            text = " and ".join(f"noun{lemma}" for lemma in said)
            content = random.bytes(32).hex()
            images.append(ImageRow(place, names[place], content, 640, 480, "What?", "", text, False, (1, 2), NOUNS, (),
                                   None, ()))  # fmt: skip
            for i, lemma in enumerate(said):
                # Of 300 draws that favour the pool's beginning, the first 100 different ones.
                draws = np.unique((POOL * random.random(300) ** 3).astype(int))[:TOP]
                neurons = random.permutation(pools[lemma, draws])
                score = np.sort(random.exponential(0.3, len(draws)).astype(np.float32))[::-1] + np.float32(0.01)
                for name, value in (
                    ("image", len(images) - 1), ("noun", i), ("word", f"noun{lemma}"), ("lemma", f"noun{lemma}"),
                    ("start", 0), ("token", f" noun{lemma}"), ("token_id", lemma), ("step", i), ("n_tokens", 1),
                    ("probability", random.random()), ("logit", 20 * random.random()), ("layer", neurons // WIDTH),
                    ("expert", np.full(len(draws), -1)), ("index", neurons % WIDTH), ("score", score),
                    ("activation", random.standard_normal(len(draws)).astype(np.float32)),
                ):  # fmt: skip
                    getattr(nouns, name).append(value)
        constants = {"score_name": "logit", "against": None, "says": "raw", "baseline": "zero"}
        write_shard(run, shard, image_table(images), neuron_table(images, nouns, constants), failures=(),
                    smaller_batches=(), stamps=(), seconds=())  # fmt: skip
    used = np.unique(pools)
    said = [f" word{i}" for i in range(13)]
    write_words(run, [
        {"layer": n // WIDTH, "expert": None, "index": n % WIDTH, "below": False, "tokens": said[:10],
         "suppressed": said[10:]} for n in used.tolist()
    ])  # fmt: skip
    return Run(folder)


def measure(folder: Path) -> dict[str, float]:
    """Make the index, then ask each question: the first time in this process, and the median of the next."""
    found: dict[str, float] = {}
    began = time.perf_counter()
    Atlas(folder).close()
    found["index made, s"] = time.perf_counter() - began
    (index,) = Path(os.environ[CACHE]).rglob("*.duckdb")
    found["index, MB"] = index.stat().st_size / 1e6
    found["peak of making it, MB"] = peak()
    atlas = Atlas(folder)
    best = atlas.word("noun3", 1)["neuron"][0].as_py()
    rare = atlas.concepts()["lemma"][-1].as_py()
    atlas.close()
    questions: dict[str, Callable[[Atlas], object]] = {
        "word": lambda atlas: atlas.word("noun3"),
        "word, a rare one": lambda atlas: atlas.word(rare),
        "neuron": lambda atlas: atlas.neuron(best),
        "image": lambda atlas: atlas.image(7),
        "concepts": lambda atlas: atlas.concepts(50),
        "similar": lambda atlas: atlas.similar(best),
        "sql, a group-by over all rows": lambda atlas: atlas.sql(
            "SELECT layer, count(*), avg(score) FROM top JOIN neurons ON neurons.id = neuron_id GROUP BY layer"
        ),
        "open": lambda atlas: atlas,
    }
    for name, ask in questions.items():
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with Atlas(folder) as atlas:
                opened = time.perf_counter()
                ask(atlas)
                seconds.append((opened - began) if name == "open" else time.perf_counter() - opened)
        found[f"{name}, s"] = statistics.median(seconds)
        found[f"{name}, slowest, s"] = max(seconds)
    return found


def peak() -> float:
    """The most memory that this process has held, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Measure each size in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, action="append")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        found = measure(asked.measure)
        print(json.dumps(found | {"peak, MB": peak()}))
        return
    for n_rows in asked.rows or (1e5, 1e6, 1e7):
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            run = make_run(Path(place) / "run", int(n_rows))
            made = time.perf_counter() - began
            rows = sum(facts.neurons.rows for facts in run.done.values())
            n_bytes = sum(facts.neurons.bytes + facts.images.bytes for facts in run.done.values())
            environment = os.environ | {CACHE: str(Path(place) / "cache")}
            command = [sys.executable, "-m", "benchmarks.cost.atlas", "--measure", str(run.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise RuntimeError(done.stderr)
            print(f"{rows:,} rows, {run.facts.n_images:,} images, {n_bytes / 1e6:.0f} MB, written in {made:.0f} s")
            for name, value in json.loads(done.stdout).items():
                print(f"  {name:40s} {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
