"""Edits of the pocket model, judged: every figure of docs/measurements/results.md, Editing.

    python -m benchmarks.quality.edits pairs DIR     # the 30 pairs; or closed, optimised, rivals, removal, many, cost
    python -m benchmarks.quality.edits table DIR     # what DIR holds, as Markdown
    python -m benchmarks.quality.edits against DIR   # the rivals' pairs alone, against `selective`
    python -m benchmarks.quality.edits undo DIR      # patches put on and taken off; flips: what they change in texts

Each edit's figures are kept as they come: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import mmneurons as mmn
from benchmarks.quality import elsewhere
from mmneurons import pocket
from mmneurons.baselines.baseline import NAMES, Change, Name, baseline
from mmneurons.data.dataset import read_items
from mmneurons.editing.edit import edit
from mmneurons.editing.evaluate import Before, Bench
from mmneurons.editing.evaluate_edits import Case, evaluate_edits
from mmneurons.editing.reference import Reference, default_reference
from mmneurons.maths.statistics import estimate
from mmneurons.patches.patch import Patch, stack
from mmneurons.settings import METHODS, EditSettings, Method, Question
from mmneurons.vlm.vlm import VLM
from mmneurons.words import says, turned

RIVAL_PAIRS = [pocket.EDIT_PAIRS[i] for i in (0, 2, 4, 12, 15, 18, 22, 26)]
"""Four near, four far."""
REMOVED = "dog car guitar cow lion rose train cup duck hat tree house bird ball banana".split()
SIZES = (1, 5, 10, 30)
FIGURES = (
    ("efficacy", "efficacy"),
    ("generality", "generality"),
    ("wordings", "other wordings"),
    ("locality", "locality"),
    ("m_locality", "M-locality@10"),
    ("t_locality", "T-locality@1"),
    ("t_locality_source", "names SOURCE"),
    ("bleed", "bleed"),
    ("rest_unchanged", "rest unchanged"),
    ("m_locality_ranked", "M-locality, MMEdit's"),
    *(
        (f"further/{kind}", f"locality, {kind}")
        for kind in ("unseen drawings", "other style", "other layouts", "stamps")
    ),
    ("further_texts/free text", "T-locality, free text"),
    ("size/mean", "change / column"),
    ("size/largest", "largest"),
    ("size/of_matrix", "change / matrix"),
)
HIGH_IS_BAD = ("bleed", "size/mean", "size/largest", "size/of_matrix")


def reference_for(vlm: VLM) -> Reference:
    """What `mmneurons edit` takes for the pocket model."""
    made = default_reference(vlm, Question(batch_size=50))
    assert made is not None
    return made


def images_of(source: str) -> list:
    """The eight images of an edit."""
    return [scene.image for scene in pocket.edit_set(source).edit]


def made(folder: Path, name: str, make: Callable[[], Patch]) -> Patch:
    """A patch, made once and kept."""
    path = folder / "patches" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make().save(path)
    return Patch.load(path)


def jobs(vlm: VLM, what: str, folder: Path) -> dict[str, Case]:
    """What is judged; each edit is made when its turn comes."""
    known: list[Reference] = []

    def reference() -> Reference:
        if not known:
            known.append(reference_for(vlm))
        return known[0]

    def patch(source: str, target: str | None, method: Method = "selective") -> Patch:
        def make() -> Patch:
            held = "own" if method == "closed_form" else reference()
            settings = EditSettings(method=method)
            return edit(vlm, images_of(source), source=source, target=target, reference=held, settings=settings)

        return made(folder, f"{method}-{source}-{target}", make)

    def rival(name: Name, pair: pocket.EditPair) -> Change:
        # Random columns stand in for 400: of all that an edit takes by default, there are not as many others.
        settings = EditSettings(top=400) if name == "random" else None
        images = images_of(pair.source)
        return baseline(
            vlm, name, images, source=pair.source, target=pair.target, reference=reference(), settings=settings
        )

    if what == "removal":
        return {f"removal {source}": Case(partial(patch, source, None), source, None) for source in REMOVED}
    if what == "rivals":
        return {
            f"{name} {pair.source}": Case(partial(rival, name, pair), pair.source, pair.target)
            for pair in RIVAL_PAIRS
            for name in NAMES
        }
    methods: dict[str, tuple[Method, Sequence[pocket.EditPair]]] = {
        "pairs": ("selective", pocket.EDIT_PAIRS),
        "closed": ("closed_form", RIVAL_PAIRS),
        "optimised": ("optimised", RIVAL_PAIRS),
    }
    method, pairs = methods[what]
    return {
        f"{method} {pair.source}": Case(partial(patch, pair.source, pair.target, method), pair.source, pair.target)
        for pair in pairs
    }


def many(vlm: VLM, folder: Path) -> None:
    """1, 5, 10, 30 edits at once: generality of each source's held-out images, locality where none is said."""
    reference = reference_for(vlm)
    scenes = [scene for name in ("locality-500", "find-500", "pope-500") for scene in pocket.evaluation_set(name)]
    before = vlm.caption([scene.image for scene in scenes], batch_size=50)
    for size in SIZES:
        pairs = pocket.EDIT_PAIRS[:size]
        patches = [
            made(
                folder,
                f"selective-{p.source}-{p.target}",
                lambda p=p: edit(vlm, images_of(p.source), source=p.source, target=p.target, reference=reference),
            )
            for p in pairs
        ]
        others = [i for i, text in enumerate(before) if not any(says(text, p.source) for p in pairs)]
        held = [[scene.image for scene in pocket.edit_set(p.source).held_out] for p in pairs]
        usual = [vlm.caption(images, batch_size=50) for images in held]
        with stack(patches).applied(vlm):
            after = vlm.caption([scenes[i].image for i in others], batch_size=50)
            edited = [vlm.caption(images, batch_size=50) for images in held]
        done = [
            turned(b, p.source, p.target)
            for p, first, second in zip(pairs, usual, edited, strict=True)
            for a, b in zip(first, second, strict=True)
            if says(a, p.source)
        ]
        same = [before[i] == text for i, text in zip(others, after, strict=True)]
        print(
            f"| {size} | {statistics.mean(done):.3f} of {len(done)} | {statistics.mean(same):.3f} of {len(same)} |",
            flush=True,
        )


def undo(vlm: VLM, folder: Path, n_moves: int = 1000) -> None:
    """Patches of the folder put on and taken off in random order; whenever none is on, every bit is compared."""
    patches = [Patch.load(path) for path in sorted((folder / "patches").glob("*.safetensors"))]
    random, active = np.random.default_rng(0), set[int]()
    usual = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    looked = 0
    for move in range(n_moves + len(patches)):
        # Few at a time, so that none is on every few moves; in the end all are taken off.
        off = bool(active) and (move >= n_moves or random.random() < 0.3 + 0.1 * len(active))
        if off:
            i = int(random.choice(sorted(active)))
            patches[i].revert(vlm)
            active.remove(i)
        elif move < n_moves:
            i = int(random.choice(sorted(set(range(len(patches))) - active)))
            patches[i].apply(vlm)
            active.add(i)
        if not active:
            looked += 1
            for name, tensor in vlm.model.state_dict().items():
                assert torch.equal(tensor, usual[name]), f"{name} differs after {move} moves"
    print(f"{n_moves} moves of {len(patches)} patches; {looked} times none was on: all bits as before")


def flips(vlm: VLM, folder: Path) -> None:
    """For each patch of the folder, behind which words of the texts the likeliest token changes, most often first."""
    texts = pocket.facts()[1::4]
    ids = [vlm.tokenizer(text).input_ids for text in texts]
    read = [vlm.tokenizer.decode(mine[: i + 1]) for mine in ids for i in range(len(mine))]
    bench = Bench([], [], [], texts)
    before = torch.cat(Before(vlm, bench).texts)
    for path in sorted((folder / "patches").glob("*.safetensors")):
        with Patch.load(path).applied(vlm):
            after = torch.cat(Before(vlm, bench).texts)
        changed = Counter(text for text, same in zip(read, (before == after).tolist(), strict=True) if not same)
        print(f"{path.stem}: {sum(changed.values())} of {len(read)}, {changed.most_common(1)}", flush=True)


def cost(vlm: VLM, repeats: int = 5) -> None:
    """Edit against one batched generate over its images, paired, medians."""
    reference = reference_for(vlm)
    pair = pocket.EDIT_PAIRS[0]
    images = images_of(pair.source)
    ways: dict[Method, Reference | Literal["own"]] = {"selective": reference, "closed_form": "own"}
    for method, held in ways.items():
        ratios = []
        for _ in range(repeats):
            start = time.perf_counter()
            vlm.caption(images)
            middle = time.perf_counter()
            settings = EditSettings(method=method)
            edit(vlm, images, source=pair.source, target=pair.target, reference=held, settings=settings)
            ratios.append((time.perf_counter() - middle) / (middle - start))
        print(f"| {method} | {statistics.median(ratios):.1f} x generate |", flush=True)
    peaks = {}
    for name in ("generate", "edit"):
        command = [sys.executable, "-m", "benchmarks.quality.edits", f"peak-{name}", "."]
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(f"| peak memory | {peaks['edit'] / peaks['generate']:.2f} x generate ({peaks['generate'] // 1024} MB) |")


def peak(vlm: VLM, what: str) -> None:
    """Of one process, in kilobytes."""
    images = [item.image() for item in read_items("pocket:reference-400")]
    if what == "peak-generate":
        vlm.caption(images, batch_size=50)
    else:
        edit(vlm, images_of("dog"), source="dog", target="cat", reference=reference_for(vlm))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def kept(folder: Path) -> dict[str, dict]:
    """What a folder holds, by name; of one name the last."""
    lines = (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return {name: judged for _, (_, name, judged) in map(json.loads, lines)}


def table(folder: Path) -> None:
    """Means, medians and worst cases of what a folder holds, by the way of editing."""
    rows: dict[str, list[dict]] = {}
    for name, judged in kept(folder).items():
        rows.setdefault(name.split()[0], []).append(judged)
    print(f"| way | n | {' | '.join(label for _, label in FIGURES)} |")
    print("| --- " * (len(FIGURES) + 2) + "|")
    for way, found in rows.items():
        cells = []
        for field, _ in FIGURES:
            values = values_of(found, field)
            worst = (max if field in HIGH_IS_BAD else min)(values, default=None)
            cells.append(
                f"{statistics.mean(values):.3f}, {statistics.median(values):.3f} ({worst:.3f})" if values else "-"
            )
        print(f"| {way} | {len(found)} | {' | '.join(cells)} |")


def values_of(found: Sequence[dict], field: str) -> list[float]:
    """One figure of several edits, where it was measured: of an estimate its mean."""
    values = []
    for one in found:
        for name in field.split("/"):
            one = one.get(name) if one else None
        if one is not None:
            values.append(one["mean"] if isinstance(one, dict) else one)
    return values


def against(folder: Path) -> None:
    """Means over the rivals' pairs, and by how much generality + locality of `selective` is larger, pair by pair."""
    found = {tuple(name.split()[:2]): judged for name, judged in kept(folder).items()}
    sources = [pair.source for pair in RIVAL_PAIRS]
    sums = {key: judged["generality"]["mean"] + judged["locality"]["mean"] for key, judged in found.items()}
    print(f"| way | {' | '.join(label for _, label in FIGURES)} | gen + loc | `selective` better by |")
    print("| --- " * (len(FIGURES) + 3) + "|")
    for way in dict.fromkeys((*METHODS, *NAMES)):
        mine = [found[way, source] for source in sources]
        cells = []
        for field, _ in FIGURES:
            values = values_of(mine, field)
            cells.append(f"{statistics.mean(values):.3f}" if values else "-")
        total = statistics.mean(sums[way, source] for source in sources)
        better = estimate([sums["selective", source] - sums[way, source] for source in sources])
        print(f"| {' | '.join([way, *cells, f'{total:.3f}', str(better)])} |")


def main() -> None:
    """Run one of them."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what in ("table", "against"):
        (table if what == "table" else against)(folder)
        return
    vlm = mmn.load()
    if what == "many":
        many(vlm, folder)
    elif what == "undo":
        undo(vlm, folder)
    elif what == "flips":
        flips(vlm, folder)
    elif what == "cost":
        cost(vlm)
    elif what.startswith("peak-"):
        peak(vlm, what)
    else:
        evaluate_edits(
            vlm,
            jobs(vlm, what, folder),
            folder,
            edit=lambda source: read_items(f"pocket:edit/{source}"),
            held_out=lambda source: read_items(f"pocket:held-out/{source}"),
            unrelated=read_items("pocket:locality-500"),
            texts=pocket.facts()[1::4],
            further=elsewhere.images(),
            further_texts={"free text": elsewhere.sentences()},
            batch_size=50,
            progress=lambda name, done, total: print(f"{done:.1f} of {total}", flush=True),
        )


if __name__ == "__main__":
    main()
