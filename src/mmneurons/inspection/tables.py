"""What an inspection found as tables: one number a row, with its interval over images, and how it was counted."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmneurons.inspection.sensitivity import unmeasured
from mmneurons.maths.statistics import Estimate, estimate, ratio, share

if TYPE_CHECKING:
    from mmneurons.data.dataset import Item
    from mmneurons.inspection.causal import NounCausal, Outcome
    from mmneurons.inspection.faithfulness import NounTruth
    from mmneurons.inspection.run import Inspection
    from mmneurons.inspection.sensitivity import NounSensitivity
    from mmneurons.inspection.specificity import Specificity
    from mmneurons.metrics.regions import RegionMatch
    from mmneurons.metrics.similarity import Meaning

MATCHED = "matched random"
T = TypeVar("T")
Cell = Estimate | float | None


@dataclass(frozen=True)
class Table:
    """Rows of labels with one value each; None where there is nothing to measure."""

    name: str
    """Also the stem of its file."""
    title: str
    labels: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Cell], ...]
    note: str = ""

    def value(self, *labels: str) -> Cell:
        """The value of the row with these labels."""
        return dict(self.rows)[labels]

    def to_csv(self) -> str:
        """Columns: labels, mean, low, high, n; empty where there is nothing."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*self.labels, "mean", "low", "high", "n"))
        for labels, value in self.rows:
            writer.writerow((*labels, *_numbers(value)))
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        names = (*self.labels, "mean", "low", "high", "n")
        rows = [dict(zip(names, (*labels, *_numbers(value)), strict=True)) for labels, value in self.rows]
        return {"name": self.name, "title": self.title, "note": self.note, "rows": rows}

    def to_markdown(self) -> str:
        """For a page of documentation: value, interval, n."""
        head = [*self.labels, "mean", "95 % interval", "n"]
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        lines += ["| " + " | ".join([*labels, *shown(value)]) + " |" for labels, value in self.rows]
        return "\n".join(lines)


def _numbers(value: Cell) -> tuple[float | int | None, ...]:
    if isinstance(value, Estimate):
        return value.mean, value.low, value.high, value.n
    return value, None, None, None


def shown(value: Cell) -> tuple[str, str, str]:
    """Mean, interval and n as a reader sees them."""
    if value is None:
        return "not measured", "", ""
    if isinstance(value, Estimate):
        interval = "" if value.low is None else f"{value.low:.3f} to {value.high:.3f}"
        return f"{value.mean:.3f}", interval, str(value.n)
    return f"{value:.4g}", "", ""


def tables(found: Inspection, meaning: Meaning, items: Sequence[Item] = ()) -> list[Table]:
    """All tables of what was run; the images are read for CLIPScore, if that was asked for."""
    made: list[Table] = []
    if found.sensitivity is not None:
        made += sensitivity_tables(found.sensitivity, items)
    if found.specificity is not None:
        made += specificity_tables(found.specificity)
    if found.causal is not None:
        made.append(causal_table(found.causal, meaning))
    if found.finders is not None:
        made += finder_tables(found.finders)
        made.append(meaning_table(found.finders, meaning, items))
    return made


def over_images(
    found: Mapping[str, Sequence[T]],
    value: Callable[[T], float | None],
    summary: Callable[[list[float]], Estimate | None] = estimate,
) -> Estimate | None:
    """The mean over an image's nouns, then over images, with an interval over images; None is left out."""
    return summary(list(by_image(found, value).values()))


def share_of_images(found: Mapping[str, Sequence[T]], value: Callable[[T], float | None]) -> Estimate | None:
    """The same of shares of yes and no."""
    return over_images(found, value, share)


def by_image(found: Mapping[str, Sequence[T]], value: Callable[[T], float | None]) -> dict[str, float]:
    """The mean over each image's nouns; images without a value are left out."""
    means = {}
    for image, ones in found.items():
        values = [number for one in ones if (number := value(one)) is not None]
        if values:
            means[image] = float(np.mean(values))
    return means


def sensitivity_tables(found: Mapping[str, Sequence[NounSensitivity]], items: Sequence[Item] = ()) -> list[Table]:
    """Image dependence, decoded hits, shuffled patches; and the regions, where masks are known."""
    rows: list[tuple[tuple[str, ...], Cell]] = [
        (("top neurons that lose half with a blank image",), share_of_images(found, lambda one: one.dependence)),
        (
            ("the same, of objects that the image truly shows",),
            share_of_images(found, lambda one: one.dependence if one.is_shown else None),
        ),
        (("top neurons that lose half with another image",), share_of_images(found, lambda one: one.dependence_other)),
        (("decoded hit@10",), share_of_images(found, lambda one: float(np.mean(one.hits)) if one.hits else None)),
    ]
    rows += [
        ((f"top {k} that stay when patches are shuffled",), share_of_images(found, lambda one, k=k: one.stays.get(k)))
        for k in sorted({k for ones in found.values() for one in ones for k in one.stays})
    ]
    alone = " Of a single image: there is no other one to read its words with." if len(found) == 1 else ""
    made = [Table("sensitivity", "Sensitivity", ("measure",), tuple(rows), f"Shares; intervals over images.{alone}")]
    regions = _regions_table(found, items)
    return made if regions is None else [*made, regions]


def _regions_table(found: Mapping[str, Sequence[NounSensitivity]], items: Sequence[Item]) -> Table | None:
    sizes = sorted({k for ones in found.values() for one in ones for k in one.regions})
    measures: tuple[
        tuple[str, Callable[[RegionMatch], float | None], Callable[[list[float]], Estimate | None]], ...
    ] = (
        ("pointing game", lambda r: r.pointing, share),
        ("the mask's share of the image", lambda r: r.area, estimate),
        ("pointing game - the mask's share", lambda r: r.pointing - r.area, estimate),
        ("IoU, strongest 5 %", lambda r: r.iou, estimate),
        ("IoU at equal area", lambda r: r.iou_equal_area, estimate),
        ("patch AUROC", lambda r: r.auroc, estimate),
    )
    rows: list[tuple[tuple[str, ...], Cell]] = []
    for name, get, summary in measures:
        for k in sizes:

            def top(one: NounSensitivity, k: int = k, get: Callable[[RegionMatch], float | None] = get) -> float | None:
                return get(one.regions[k]) if k in one.regions else None

            rows.append(((name, "top", str(k)), over_images(found, top, summary)))
        if name == "the mask's share of the image":  # the same whatever the map
            continue
        for k in sizes:

            def other(
                one: NounSensitivity, k: int = k, get: Callable[[RegionMatch], float | None] = get
            ) -> float | None:
                return get(one.matched[k].match) if k in one.matched else None

            rows.append(((name, MATCHED, str(k)), over_images(found, other, summary)))
    rows += [
        (
            ("loudness / the top's", MATCHED, str(k)),
            over_images(found, lambda one, k=k: one.matched[k].loudness if k in one.matched else None),
        )
        for k in sizes
    ]
    rows += [((reason, "", ""), float(count)) for reason, count in unmeasured(found, items)]
    note = (
        "Mean map of the top k against the object's mask, next to as many random neurons of the same blocks, the "
        "nearest in loudness (20 draws); nouns that the image truly shows."
    )
    return Table("regions", "Where the neurons look", ("measure", "neurons", "k"), tuple(rows), note) if rows else None


def specificity_tables(found: Specificity) -> list[Table]:
    """Overlaps, own share and layers."""
    rows: list[tuple[tuple[str, ...], Cell]] = []
    for overlap in found.overlaps:
        k = str(overlap.k)
        rows += [
            (("pairs of images that say the same noun", k), overlap.within),
            (("pairs of images that say different nouns", k), overlap.between),
            (("pairs of concepts", k), overlap.concepts),
            (("chance", k), overlap.chance),
        ]
        within, between = overlap.within, overlap.between
        share = within.mean / between.mean if within is not None and between is not None and between.mean > 0 else None
        rows.append((("same noun / different nouns", k), share))
    made = [
        Table("overlap", "Shared top neurons", ("pairs", "k"), tuple(rows), _pairs_note(found)),
        Table(
            "own-share",
            "Own share",
            ("measure",),
            ((("own share of the top 10",), found.own_share),),
            "Interval over concepts.",
        ),
    ]
    layers = tuple(
        ((str(k), str(layer)), float(share)) for k, shares in found.layers.items() for layer, share in enumerate(shares)
    )
    return [*made, Table("layers", "Blocks of the top neurons", ("k", "block"), layers, "Share of the top k.")]


def _pairs_note(found: Specificity) -> str:
    """How many concepts; and what has no pair, with the reason."""
    n, once = len(found.concepts), found.counts.count(1)
    note = f"{n} concepts."
    if once:
        note += f" {once} of them said of one image only: no pair of images says the same noun there."
    if n == 1:
        note += " No pair of different nouns."
    note += " Means over pairs; intervals resample the images, or the concepts, that the pairs are of."
    if any(overlap.between is not None and overlap.between.mean == 0 for overlap in found.overlaps):
        note += " No ratio where different nouns share none."
    return note


def causal_table(found: Mapping[str, Sequence[NounCausal]], meaning: Meaning) -> Table:
    """What disturbing neurons does to the caption, top ones and matched random ones."""
    bert = _caption_scores(found, meaning)
    keys = dict.fromkeys(
        (outcome.how, outcome.k) for ones in found.values() for one in ones for outcome in one.outcomes
    )

    def like_before(one: NounCausal, outcome: Outcome) -> float | None:
        return float(np.mean([bert[one.caption, caption] for caption in outcome.captions])) if bert else None

    measures: tuple[tuple[str, Callable[..., float | None], Callable[[list[float]], Estimate | None]], ...] = (
        ("no longer says the noun", lambda one, o: o.gone, share),
        ("the rest unchanged", lambda one, o: o.rest_unchanged, share),
        ("BERTScore to the caption before", like_before, estimate),
    )
    controls: tuple[tuple[str, Callable[..., float | None], Callable[[list[float]], Estimate | None]], ...] = (
        ("loudness / the top's", lambda one, o: o.loudness, estimate),
        ("neurons", lambda one, o: o.n_neurons, estimate),
    )
    rows: list[tuple[tuple[str, ...], Cell]] = []
    for how, k in keys:
        for is_top, which in ((True, "top"), (False, MATCHED)):
            for name, get, summary in measures if is_top else measures + controls:

                def value(
                    one: NounCausal,
                    key: tuple[str, int, bool] = (how, k, is_top),
                    get: Callable[..., float | None] = get,
                ) -> float | None:
                    return next((get(one, o) for o in one.outcomes if (o.how, o.k, o.is_top) == key), None)

                rows.append(((how, str(k), which, name), over_images(found, value, summary)))
    note = (
        "Noise in units of a column's root mean square; times 0 silences, times 2 doubles. Matched random: of the same "
        "blocks, together as loud, as far as their blocks have it. Means over 20 draws, of noise and of random neurons."
    )
    return Table(
        "causal", "Causal effect", ("disturbance", "k", "neurons", "measure"), tuple(rows), _note(note, meaning)
    )


def _caption_scores(found: Mapping[str, Sequence[NounCausal]], meaning: Meaning) -> dict[tuple[str, str], float]:
    if meaning.bert is None:
        return {}
    outcomes = [(one.caption, o.captions) for ones in found.values() for one in ones for o in one.outcomes]
    pairs = sorted({(before, after) for before, captions in outcomes for after in captions})
    scores = meaning.bert([after for _, after in pairs], [before for before, _ in pairs])
    return dict(zip(pairs, scores, strict=True))


def _note(text: str, meaning: Meaning, metric: str = "BERTScore") -> str:
    return f"{text} {metric} missing: {meaning.missing[metric]}." if metric in meaning.missing else text


def finder_tables(found: Mapping[str, Sequence[NounTruth]]) -> list[Table]:
    """Rank agreement with the true effects, its paired differences, and deletion."""
    some = [one for ones in found.values() for one in ones]
    keys = dict.fromkeys((a.effect, a.scope, a.finder) for one in some for a in one.agreements)

    def rho(one: NounTruth, effect: str, scope: str, finder: str) -> float | None:
        return next((a.rho for a in one.agreements if (a.effect, a.scope, a.finder) == (effect, scope, finder)), None)

    agreement = tuple((key, over_images(found, lambda one, key=key: rho(one, *key))) for key in keys)
    differences: list[tuple[tuple[str, ...], Cell]] = []
    for effect, scope, finder in keys:
        if finder != "logprob" and (effect, scope, "logprob") in keys:

            def more(one: NounTruth, effect: str = effect, scope: str = scope, finder: str = finder) -> float | None:
                ours, other = rho(one, effect, scope, "logprob"), rho(one, effect, scope, finder)
                return None if ours is None or other is None else ours - other

            differences.append(((effect, scope, f"logprob - {finder}"), over_images(found, more)))
    labels = ("effect on", "scope", "finder")
    return [
        Table("agreement", "Rank agreement with the true effect (Spearman)", labels, agreement),
        Table("agreement-differences", "The same, noun by noun against logprob", labels, tuple(differences)),
        _deletion_table(found),
    ]


def _deletion_table(found: Mapping[str, Sequence[NounTruth]]) -> Table:
    keys = dict.fromkeys((d.finder, d.k) for ones in found.values() for one in ones for d in one.deletions)
    rows: list[tuple[tuple[str, ...], Cell]] = []
    for finder, k in keys:

        def of(get: Callable[[Any], float], finder: str = finder, k: int = k) -> dict[str, float]:
            return by_image(
                found, lambda one: next((get(d) for d in one.deletions if (d.finder, d.k) == (finder, k)), None)
            )

        fall, matched = of(lambda d: d.fall), of(lambda d: d.matched)
        together = sorted(fall)
        top, stand_in = [fall[image] for image in together], [matched[image] for image in together]
        rows += [
            ((finder, str(k), "top"), estimate(top)),
            ((finder, str(k), MATCHED), estimate(stand_in)),
            ((finder, str(k), f"top - {MATCHED}"), estimate([a - b for a, b in zip(top, stand_in, strict=True)])),
            ((finder, str(k), f"top / {MATCHED}"), ratio(top, stand_in) if _is_above_zero(stand_in) else None),
            ((finder, str(k), "loudness / the top's"), estimate(list(of(lambda d: d.matched_loudness).values()))),
            ((finder, str(k), "matched neurons"), estimate(list(of(lambda d: d.n_matched).values()))),
            ((finder, str(k), "any random"), estimate(list(of(lambda d: d.unmatched).values()))),
        ]
    note = (
        "Fall of log p (nats) when the top k are silent together at the scored position. Matched random: of the same "
        "blocks, together as loud, as far as their blocks have it (20 draws); any random: k of any block and loudness. "
        "No ratio where matched random neurons do not lower log p."
    )
    return Table("deletion", "Deletion", ("finder", "k", "measure"), tuple(rows), note)


def _is_above_zero(values: Sequence[float]) -> bool:
    value = estimate(values)
    return value is not None and value.low is not None and value.low > 0


def meaning_table(found: Mapping[str, Sequence[NounTruth]], meaning: Meaning, items: Sequence[Item] = ()) -> Table:
    """What the top 10 of each finder say, against noun, caption and image."""
    images = {item.name: item for item in items if item.name in found} if meaning.clip is not None else {}
    finders = dict.fromkeys(finder for ones in found.values() for one in ones for finder in one.says)
    rows: list[tuple[tuple[str, ...], Cell]] = []
    for finder in finders:

        def hit(one: NounTruth, finder: str = finder) -> float:
            return float(np.mean([one.token in words for words in one.says[finder]]))

        rows.append(((finder, "decoded hit@10"), share_of_images(found, hit)))
        for against, reference in (("noun", lambda one: one.word), ("caption", lambda one: one.caption)):
            scores: dict[tuple[str, str], float] = {}
            if meaning.bert is not None:
                pairs = sorted(
                    {(_text(w), reference(one)) for ones in found.values() for one in ones for w in one.says[finder]}
                )
                scores = dict(zip(pairs, meaning.bert(*map(list, zip(*pairs, strict=True))), strict=True))

            def score(
                one: NounTruth,
                finder: str = finder,
                scores: Mapping[tuple[str, str], float] = scores,
                reference: Callable[[NounTruth], str] = reference,
            ) -> float | None:
                values = [scores[_text(words), reference(one)] for words in one.says[finder]] if scores else []
                return float(np.mean(values)) if values else None

            rows.append(((finder, f"BERTScore F1 to the {against}"), over_images(found, score)))
        seen: list[float] = []
        for name, item in images.items():
            texts = [_text(words) for one in found[name] for words in one.says[finder]]
            if meaning.clip is not None and texts:
                seen.append(float(np.mean(meaning.clip([item.image()] * len(texts), texts))))
        rows.append(((finder, "CLIPScore to the image"), estimate(seen)))
    note = f"The ten tokens of each of the top 10 neurons; BERTScore with {meaning.text_model}."
    return Table(
        "meaning",
        "What the neurons say",
        ("finder", "measure"),
        tuple(rows),
        _note(_note(note, meaning), meaning, "CLIPScore"),
    )


def _text(words: Sequence[str]) -> str:
    return " ".join(word.strip() for word in words)
