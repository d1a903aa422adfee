"""Can a person read what `find` lists? Scores, baselines and readings, judged by rule: docs/measurements/reading.md.

    python -m benchmarks.quality.reading OUT.csv            # the pocket model on pocket:find-500
    python -m benchmarks.quality.reading OUT.csv --model photo --images pictures.csv --folder pictures --split val judge
    python -m benchmarks.quality.reading OUT.csv --table    # what is there so far, as Markdown
    python -m benchmarks.quality.reading --cost             # what a yardstick costs at its first use

Images are a folder `NOUN/*.jpg`, a CSV with the columns file, noun and split, or what `mmneurons inspect` takes. Nouns
that are judged are those of the list (of the folder, the CSV, the objects), wherever an answer says one; no neuron and
no noun is picked by eye. The reference is made of other images: --reference, the rows of --reference-split, or every
second one of a folder. A run that is stopped goes on behind the last image.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mmneurons as mmn
from mmneurons.attribution.ablation import replays
from mmneurons.attribution.controls import column_norms, loudness, matched
from mmneurons.data.dataset import Item, read_items
from mmneurons.editing.reference import Reference
from mmneurons.finding.baseline import baseline_of
from mmneurons.finding.batch import targets_of
from mmneurons.finding.reading import Reader, columns_of, reader_for, yardstick_of
from mmneurons.finding.rereading import blank_like, rescored, trace_again
from mmneurons.finding.scoring import Scored, Target, score_targets
from mmneurons.maths.ranking import top_k
from mmneurons.maths.statistics import estimate
from mmneurons.metrics.similarity import meaning
from mmneurons.settings import SAYS, FindSettings, Score
from mmneurons.vlm import weights
from mmneurons.vlm.asking import ask
from mmneurons.vlm.vlm import VLM
from mmneurons.words import same_stem

TOP = 10
"""Neurons of each noun."""
COUNTS = (10, 20)
"""Words of each neuron."""
SCORES: tuple[Score, ...] = ("logit", "logprob")
BASELINES = ("zero", "blank", "reference")
DRAWS = 3
"""Random sets for deletion."""
HALF = 0.5


@dataclass(frozen=True)
class Images:
    """What is judged, what the baseline is made of, and the nouns that count."""

    judged: list[Item]
    reference: list[Item]
    nouns: frozenset[str]


def images_of(asked: argparse.Namespace) -> Images:
    """The images that a command names; those of the reference are none of those judged."""
    source = Path(asked.images)
    if source.suffix == ".csv":
        with source.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        folder = Path(asked.folder or source.parent)

        def items(splits: Sequence[str]) -> list[Item]:
            return [Item(r["file"], folder / r["file"], (r["noun"],)) for r in rows if r["split"] in splits]

        judged, reference = items(asked.split), items([asked.reference_split])
    elif source.is_dir() and any(path.is_dir() for path in source.iterdir()):
        files = [path for path in sorted(source.glob("*/*")) if path.is_file()]
        every = [Item(str(path), path, (path.parent.name.replace("_", " "),)) for path in files]
        judged, reference = every[::2], every[1::2]
    else:
        judged, reference = read_items(asked.images), read_items(asked.reference)
    nouns = frozenset(noun.lower() for item in judged for noun in item.objects or ())
    return Images(_some(judged, asked.n), _some(reference, asked.n_reference), nouns)


def _some(items: list[Item], n: int) -> list[Item]:
    """So many in a fixed random order: lists can be in the order of their nouns, and runs can be stopped."""
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:n].tolist()]


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges one image after the other."""

    vlm: VLM
    nouns: frozenset[str]
    reference: Reference
    norms: list[Tensor]
    bert: Callable[[Sequence[str], Sequence[str]], list[float]] | None

    def image(self, item: Item, *, similar: bool) -> list[dict[str, object]]:
        """One row for each noun, ranking, and kind of neurons: its top ones, and random ones of the same blocks."""
        rows = list(self.rows(item))
        if not similar or self.bert is None:
            return [{name: value for name, value in row.items() if name in FIELDS} for row in rows]
        # The words of all rows are compared at once: neurons recur, and the text model is the slowest part.
        asked = [(row, f"{what} {says}", says, what) for row in rows for says in SAYS for what in ("noun", "caption")]
        told = [str(row["words " + says]).split("\n") for row, _, says, _ in asked]
        pairs = [(text, str(row[what])) for (row, _, _, what), texts in zip(asked, told, strict=True) for text in texts]
        if pairs:
            near = iter(self.bert(*map(list, zip(*pairs, strict=True))))
            for (row, name, _, _), texts in zip(asked, told, strict=True):
                # Where precision and recall have other signs, their harmonic mean is no number between 0 and 1.
                row[name] = float(np.mean([min(max(next(near), 0.0), 1.0) for _ in texts]))
        return [{name: value for name, value in row.items() if name in FIELDS} for row in rows]

    def rows(self, item: Item) -> Iterator[dict[str, object]]:
        """The same without the similarity of words, but with the words."""
        vlm, settings, picture = self.vlm, FindSettings(top=TOP), item.image()
        # 1. The answer, and the nouns of it that are in the list.
        (batch,) = ask(vlm, [picture], settings)
        targets = [t for t in targets_of(vlm, batch.answers, 0, settings) if t.word.lemma in self.nouns]
        caption = batch.answers.texts[0]
        if not targets:
            return
        kept = replays(vlm, batch.inputs, [target.step for target in targets])
        blank = vlm.encode([[blank_like(picture)]], settings.prompt, settings.prefix)
        for score in SCORES:
            choices = replace(settings, score=score)
            grey = trace_again(vlm, blank, kept.answers, targets, choices)
            without = rescored(vlm, grey, targets, choices)
            for name in BASELINES:
                # 2. All neurons scored, and random ones drawn that are about as loud as the top ones.
                now = replace(choices, baseline=self.reference if name == "reference" else name)
                over = baseline_of(vlm, targets, now, grey)
                scored = score_targets(vlm, kept.recording, kept.answers, targets, now, over)
                for i, target in enumerate(targets):
                    top = top_k(scored.scores[i], TOP).cpu()
                    random, as_loud = self.stand_ins(scored, i, top)
                    # 3. Each judged: what it says, whether it needs the image, what silence does.
                    sets = [top, *as_loud] if all(e is None for e in scored.trace.experts) else []
                    fallen = kept.replays[i].effects(sets).logprob.tolist() if sets else []
                    for kind, slots in (("top", top), ("random", random)):
                        places = scored.places(i, slots.tolist())
                        whole, left = scored.contributions[i, slots].tolist(), without.of(i, places)
                        lost = [1 - b / a >= HALF for a, b in zip(whole, left, strict=True) if a]
                        row: dict[str, object] = {
                            "image": item.name, "noun": target.word.lemma, "step": target.step, "score": score,
                            "baseline": name, "kind": kind, "dependence": np.mean(lost) if lost else "",
                            "caption": caption,
                            "neurons": " ".join(str(vlm.anatomy.ffns[f].neuron(n)) for f, n in places),
                        }  # fmt: skip
                        if fallen:
                            row["deletion"] = fallen[0] if kind == "top" else np.mean(fallen[1:])
                        for says in SAYS:
                            row |= self.words(scored, i, slots, target, reader_for(vlm, says))
                        yield row

    def stand_ins(self, scored: Scored, i: int, top: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As many random neurons of the same FFNs, one for one about as loud; and sets as loud as all together."""
        trace = scored.trace
        fired = [part[i].float().cpu() for part in trace.activations]
        loud = loudness(fired, [None if of is None else of[i].cpu() for of in trace.experts], self.norms)
        starts = torch.nn.functional.pad(scored.slot_ends, (1, 0))[:-1]
        (random,) = matched(starts, loud, top, 1, i, as_many=True).sets
        return random, [one for one in matched(starts, loud, top, DRAWS, i).sets if len(one)]

    def words(self, scored: Scored, i: int, slots: Tensor, target: Target, reader: Reader) -> dict[str, object]:
        """What the neurons say, and how many of them the noun among it."""
        vlm, places = self.vlm, scored.places(i, slots.tolist())
        excess = scored.activations[i] if scored.baseline is None else scored.activations[i] - scored.baseline[i]
        signs = torch.where(excess[slots.to(excess.device)] < 0, -1.0, 1.0)
        columns = columns_of(vlm.anatomy, places, scored.scores.device)
        told, _ = reader.tokens(reader.read(columns, places, signs), max(COUNTS))
        name, said = "raw" if reader.yardstick is None else "standardised", vlm.token_text(target.token_id)
        row: dict[str, object] = {}
        for count in COUNTS:
            hits = [any(same_stem(target.word.lemma, token, said) for token in tokens[:count]) for tokens in told]
            row[f"hit@{count} {name}"] = float(np.mean(hits))
        texts = [" ".join(token.strip() for token in tokens[: COUNTS[0]]) for tokens in told]
        row[f"words {name}"] = "\n".join(" ".join(text.split()) or "-" for text in texts)
        return row


FIELDS = [
    *("image", "noun", "step", "score", "baseline", "kind", "dependence", "deletion", "neurons"),
    *(f"{what} {says}" for what, says in product(("hit@10", "hit@20", "noun", "caption"), SAYS)),
]


def run(asked: argparse.Namespace) -> None:
    """Judge, and write rows image by image."""
    images = images_of(asked)
    vlm = mmn.load(asked.model, device=asked.device)
    path = Path(asked.out)
    done = {row["image"] for row in rows_of(path)} if path.exists() else set[str]()
    print(
        f"{len(images.judged)} images, {len(images.nouns)} nouns; {len(images.reference)} images of reference",
        flush=True,
    )
    reference = mmn.make_reference(vlm, [item.image() for item in images.reference])
    found = meaning()
    for name, why in found.missing.items():
        print(f"{name}: {why}", flush=True)
    judge = Judge(vlm, images.nouns, reference, column_norms(vlm.anatomy), found.bert)
    begun = time.monotonic()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for number, item in enumerate(images.judged, start=1):
            if item.name in done:
                continue
            rows = judge.image(item, similar=number % asked.similar_every == 0)
            # An image whose answer has no noun of the list is written too, so that it is not asked about again.
            writer.writerows(rows or [{"image": item.name, "kind": "none"}])
            file.flush()
            print(f"{number} of {len(images.judged)}, {time.monotonic() - begun:.0f} s", flush=True)
    print(table(path))


def rows_of(path: Path) -> list[dict[str, str]]:
    """What a file holds."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> str:
    """Markdown: for each ranking its top neurons and random ones; means over images of means over their nouns."""
    rows = rows_of(path)
    judged = [row for row in rows if row["kind"] != "none"]
    counted = {(row["image"], row["noun"], row["step"]) for row in judged}
    n_images, n_with = len({row["image"] for row in rows}), len({row["image"] for row in judged})
    n_similar = len({row["image"] for row in judged if row["noun raw"]})
    lines = [
        f"{n_images} images, {n_with} of whose answers say {len(counted)} nouns of the list; BERTScore of {n_similar}."
    ]
    measures = [*(f"{what} {says}" for what, says in product(("hit@10", "hit@20"), SAYS)), "dependence", "deletion"]
    similar = [f"{what} {says}" for what, says in product(("noun", "caption"), SAYS)]
    for names in (measures, similar):
        lines += ["", f"| score | baseline | neurons | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
        for score, baseline, kind in product(SCORES, BASELINES, ("top", "random")):
            mine = [row for row in judged if (row["score"], row["baseline"], row["kind"]) == (score, baseline, kind)]
            cells = [str(mean_over_images(mine, name) or "-") for name in names]
            lines.append(f"| {score} | {baseline} | {kind} | {' | '.join(cells)} |")
    lines += differences(judged)
    lines += ["", "| score | baseline | distinct neurons / listed, all nouns' top 10 | nouns |", "| --- " * 4 + "|"]
    for score, baseline in product(SCORES, BASELINES):
        first: dict[str, set[str]] = {}
        for row in judged:
            if (row["score"], row["baseline"], row["kind"]) == (score, baseline, "top"):
                first.setdefault(row["noun"], set(row["neurons"].split()))
        listed = sum(map(len, first.values()))
        cell = f"{len(set[str]().union(*first.values())) / listed:.3f}" if listed else "-"
        lines.append(f"| {score} | {baseline} | {cell} | {len(first)} |")
    return "\n".join(lines)


def differences(judged: list[dict[str, str]]) -> list[str]:
    """Markdown: what each ranking has over `logit` with the baseline `zero`, image by image."""
    names = [f"hit@10 {says}" for says in SAYS] + ["deletion"]
    lines = ["", f"| difference from logit, zero | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for score, baseline in list(product(SCORES, BASELINES))[1:]:
        cells = []
        for name in names:
            mine, first = (
                by_image([row for row in judged if (row["score"], row["baseline"], row["kind"]) == which], name)
                for which in ((score, baseline, "top"), (SCORES[0], BASELINES[0], "top"))
            )
            cells.append(str(estimate([mine[image] - first[image] for image in mine if image in first]) or "-"))
        lines.append(f"| {score}, {baseline} | {' | '.join(cells)} |")
    return lines


def mean_over_images(rows: list[dict[str, str]], name: str) -> object:
    """Mean and interval over images; None where it was not measured."""
    return estimate(list(by_image(rows, name).values()))


def by_image(rows: list[dict[str, str]], name: str) -> dict[str, float]:
    """Mean over the nouns of each image, where it was measured."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[name]:
            found[row["image"]].append(float(row[name]))
    return {image: float(np.mean(values)) for image, values in found.items()}


def cost() -> None:
    """Seconds of the first use, next to reading every `w_out` once for one direction."""
    print("| model | neurons x hidden, vocabulary | w_out read once, s | first use, s | ratio | second use, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, vlm in (("pocket", mmn.load(device="cpu")), ("LLaVA-7B at a quarter, 4 blocks", random_llava())):
        anatomy = vlm.anatomy
        direction = torch.randn(1, anatomy.hidden)

        def read(vlm: VLM = vlm, direction: Tensor = direction) -> None:
            for ffn in vlm.anatomy.ffns:
                weights.project(direction, ffn.module)

        read()
        once, first = timed(read), timed(lambda vlm=vlm: yardstick_of(vlm))
        again = timed(lambda vlm=vlm: yardstick_of(vlm))
        shape = f"{anatomy.n_neurons} x {anatomy.hidden}, {anatomy.vocab}"
        print(f"| {name} | {shape} | {once:.3f} | {first:.3f} | {first / once:.1f} | {again:.4f} |", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def random_llava() -> VLM:
    """Random weights in the shape of LLaVA-1.5-7B's language model divided by four; four blocks, bfloat16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=8000,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=7)  # pyright: ignore[reportCallIssue]
    return mmn.load(LlavaForConditionalGeneration(config).to(torch.bfloat16).eval())  # pyright: ignore[reportArgumentType]


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", metavar="OUT.csv", help="one row for each noun, ranking and kind of neurons")
    parser.add_argument("--model", help="hub id, folder or name; default: the pocket model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", default="pocket:find-500", help="what is judged")
    parser.add_argument("--folder", help="where the files of a CSV lie; default: beside it")
    parser.add_argument("--split", nargs="+", default=["val", "judge"], help="rows of a CSV that are judged")
    parser.add_argument("--reference", default="pocket:reference-400", help="other images, for the baseline")
    parser.add_argument("--reference-split", default="train", help="rows of a CSV for the baseline")
    parser.add_argument("--n", type=int, default=160, help="images judged")
    parser.add_argument("--n-reference", type=int, default=100, help="images of the reference")
    parser.add_argument("--similar-every", type=int, default=4, help="BERTScore of every so manieth image: it is slow")
    parser.add_argument("--table", action="store_true", help="print what OUT.csv holds")
    parser.add_argument("--cost", action="store_true", help="measure the first use of a yardstick")
    asked = parser.parse_args()
    if asked.cost:
        cost()
    elif asked.out is None:
        sys.exit("Name the file of results: python -m benchmarks.quality.reading OUT.csv")
    elif asked.table:
        print(table(Path(asked.out)))
    else:
        run(asked)


if __name__ == "__main__":
    main()
