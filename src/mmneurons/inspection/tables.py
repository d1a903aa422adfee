"""Tables hold what an inspection found: one number a row, with its interval over images and how it was counted.

Each table is a group-by over rows (`inspection.rows`): the mean over an image's nouns, then over images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmneurons.data.table import Cell, Table
from mmneurons.inspection.faithfulness import left_out_finders
from mmneurons.inspection.rows import (
    AGREEMENT,
    ALIKE,
    ANY,
    AREA,
    AUROC,
    CHANGE,
    DECODED,
    DIFFERENT,
    ELSEWHERE,
    EQUAL_CHANGE,
    FALL,
    GONE,
    IOU,
    IOU_EQUAL_AREA,
    LEAD,
    LOST_BLANK,
    LOST_OTHER,
    LOUDNESS,
    MATCHED,
    NEURONS,
    POINTING,
    STAYS,
    TIMES,
    TOP,
    UNCHANGED,
    FinderRow,
    by_image,
    rows_of,
)
from mmneurons.inspection.sensitivity import unmeasured
from mmneurons.inspection.similarity import BERT, BERT_CAPTION, BERT_NOUN, CLIP, bert_rows, caption_rows, clip_rows
from mmneurons.maths.statistics import Estimate, estimate, ratio, share

if TYPE_CHECKING:
    from mmneurons.data.dataset import Item
    from mmneurons.inspection.causal import NounCausal
    from mmneurons.inspection.faithfulness import NounTruth
    from mmneurons.inspection.run import Inspection
    from mmneurons.inspection.sensitivity import NounSensitivity
    from mmneurons.inspection.specificity import Specificity
    from mmneurons.metrics.similarity import Meaning

REGIONS = (POINTING, AREA, LEAD, IOU, IOU_EQUAL_AREA, AUROC, LOUDNESS)
EFFECTS = (GONE, UNCHANGED, BERT, LOUDNESS, NEURONS, CHANGE, TIMES)
MEANINGS = (DECODED, BERT_NOUN, BERT_CAPTION, CLIP)
"""Measures in the order in which tables have them."""
NEXT_TO = (TOP, MATCHED, ELSEWHERE, EQUAL_CHANGE)
"""What a figure of the top neurons is compared with, in that order."""
SHARES = {POINTING, GONE, UNCHANGED, DECODED}
"""Measures that are a plain yes or no where an image has one noun and nothing is drawn."""


def tables(found: Inspection, meaning: Meaning, items: Sequence[Item] = ()) -> list[Table]:
    """Make all tables of what was run; the images are read for CLIPScore, if that was asked for."""
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


def sensitivity_tables(found: Mapping[str, Sequence[NounSensitivity]], items: Sequence[Item] = ()) -> list[Table]:
    """Make the tables of image dependence, decoded hits and shuffled patches, and of regions where masks are known."""
    rows = rows_of(found)
    # 1. Of every noun; of those alone that the image truly shows; and, of shuffled patches, for each k.
    means = by_image(rows, "measure")
    of_shown = by_image([row for row in rows if row["is_shown"]], "measure")
    stay = by_image([row for row in rows if row["measure"] == STAYS], "k")
    values = {
        f"top neurons that {LOST_BLANK}": means.get((LOST_BLANK,)),
        "the same, of objects that the image truly shows": of_shown.get((LOST_BLANK,)),
        f"top neurons that {LOST_OTHER}": means.get((LOST_OTHER,)),
        DECODED: means.get((DECODED,)),
        **{f"top {k} that {STAYS}": shares for (k,), shares in sorted(stay.items())},
    }
    # 2. A line for each question, whatever could be measured: where nothing could, it says so.
    cells = tuple(((name,), share(shares.values()) if shares else None) for name, shares in values.items())
    alone = " Of a single image: there is no other one to read its words with." if len(found) == 1 else ""
    made = Table("sensitivity", "Sensitivity", ("measure",), cells, f"Shares; intervals over images.{alone}")
    regions = _regions_table(found, items)
    return [made] if regions is None else [made, regions]


def _regions_table(found: Mapping[str, Sequence[NounSensitivity]], items: Sequence[Item]) -> Table | None:
    """Make the table of what the maps have in common with masks; None where no image has masks."""
    means = by_image([row for row in rows_of(found) if row["measure"] in REGIONS], "measure", "neurons", "k")
    # Measure by measure, the top neurons before those that they are compared with.
    cells = [
        ((measure, neurons, str(k)), _over(means[measure, neurons, k], measure))
        for measure, neurons, k in sorted(means, key=lambda key: (REGIONS.index(key[0]), NEXT_TO.index(key[1]), key[2]))
    ]
    # What has no map or no mask is counted, so that nobody takes the rest for all.
    cells += [((reason, "", ""), float(count)) for reason, count in unmeasured(found, items)]
    note = (
        "Mean map of the top k against the object's mask, next to as many random neurons of the same blocks, the "
        "nearest in loudness (20 draws), and next to the same map against the mask of another object of the picture "
        "(only pictures with two objects or more); nouns that the image truly shows."
    )
    labels = ("measure", "neurons", "k")
    return Table("regions", "Where the neurons look", labels, tuple(cells), note) if cells else None


def _over(images: Mapping[str, float], measure: str = "") -> Estimate | None:
    """Take the mean over images with its interval; None without any."""
    return (share if measure in SHARES else estimate)(list(images.values()))


def specificity_tables(found: Specificity) -> list[Table]:
    """Make the tables of overlaps, own share and layers."""
    cells: list[tuple[tuple[str, ...], Cell]] = []
    for overlap in found.overlaps:
        k, within = str(overlap.k), overlap.within
        others = {DIFFERENT: overlap.between, ALIKE: overlap.alike}
        cells += [
            (("pairs of images that say the same noun", k), within),
            *(((f"pairs of images that say {name}", k), value) for name, value in others.items()),
            (("pairs of concepts", k), overlap.concepts),
            (("chance", k), overlap.chance),
            *(((f"same noun / {name}", k), _times(within, value)) for name, value in others.items()),
        ]
    own = ((("own share of the top 10",), found.own_share),)
    layers = tuple(
        ((str(k), str(layer)), float(share)) for k, shares in found.layers.items() for layer, share in enumerate(shares)
    )
    return [
        Table("overlap", "Shared top neurons", ("pairs", "k"), tuple(cells), _pairs_note(found)),
        Table("own-share", "Own share", ("measure",), own, "Interval over concepts."),
        Table("layers", "Blocks of the top neurons", ("k", "block"), layers, "Share of the top k."),
    ]


def _times(above: Estimate | None, below: Estimate | None) -> float | None:
    """Divide two means; a ratio to nothing would be infinite: it is left out, and the note says why."""
    return None if above is None or below is None or below.mean <= 0 else above.mean / below.mean


def _pairs_note(found: Specificity) -> str:
    """Say how many concepts there are, and what has no pair, with the reason."""
    n, once = len(found.concepts), found.counts.count(1)
    note = f"{n} concepts."
    if once:
        note += f" {once} of them said of one image only: no pair of images says the same noun there."
    if n == 1:
        note += " No pair of different nouns."
    note += " Means over pairs; intervals resample the images, or the concepts, that the pairs are of."
    note += " As frequent: said of 1, of 2 to 3, of 4 to 7 images and so on; place: as many tokens stand before it."
    others = [pairs for overlap in found.overlaps for pairs in (overlap.between, overlap.alike)]
    if any(pairs is not None and pairs.mean == 0 for pairs in others):
        note += " No ratio where different nouns share none."
    return note


def causal_table(found: Mapping[str, Sequence[NounCausal]], meaning: Meaning) -> Table:
    """Make the table of what disturbing neurons does to the caption, top ones and matched random ones."""
    means = by_image([*rows_of(found), *caption_rows(found, meaning)], "disturbance", "k", "neurons", "measure")
    # Disturbances as they were made; of each the top neurons first.
    places = {key: i for i, key in enumerate(dict.fromkeys(labels[:2] for labels in means))}
    ordered = sorted(means, key=lambda key: (places[key[:2]], NEXT_TO.index(key[2]), EFFECTS.index(key[3])))
    cells = tuple((tuple(map(str, labels)), _over(means[labels], labels[3])) for labels in ordered)
    note = (
        "Noise in units of a column's root mean square; times 0 silences, times 2 doubles. Matched random: of the same "
        "blocks, together as loud, as far as their blocks have it; equal change: the same neurons, their activations "
        "so scaled that the residual stream changes as far as by silence of the top k. Means over 20 draws, of noise "
        "and of random neurons."
    )
    labels = ("disturbance", "k", "neurons", "measure")
    return Table("causal", "Causal effect", labels, cells, _note(note, meaning, "BERTScore"))


def _note(text: str, meaning: Meaning, *metrics: str) -> str:
    """Add to the note of a table why a metric is missing."""
    missing = [f"{metric} missing: {meaning.missing[metric]}." for metric in metrics if metric in meaning.missing]
    return " ".join([text, *missing])


def finder_tables(found: Mapping[str, Sequence[NounTruth]]) -> list[Table]:
    """Make the tables of rank agreement with the true effects, of its paired differences, and of deletion."""
    rows = rows_of(found)
    rho = [row for row in rows if row["measure"] == AGREEMENT]
    labels = ("effect on", "scope", "finder")
    # Two scores are of the same nouns: their difference at each noun varies less than they do.
    agreement, differences = (
        tuple((key, _over(images)) for key, images in by_image(part, "effect", "scope", "finder").items())
        for part in (rho, list(_against_logprob(rho)))
    )
    note = " ".join(left_out_finders(found))
    return [
        Table("agreement", "Rank agreement with the true effect (Spearman)", labels, agreement, note),
        Table("agreement-differences", "The same, noun by noun against logprob", labels, differences),
        _deletion_table([row for row in rows if row["k"] is not None and row["measure"] != DECODED]),
    ]


def _against_logprob(rows: Sequence[FinderRow]) -> Iterator[dict[str, Any]]:
    """Yield, noun by noun, by how much `logprob` agrees better than each other finder; None where either is unknown."""
    ours = {_question(row): row["value"] for row in rows if row["finder"] == "logprob"}
    for row in rows:
        if row["finder"] != "logprob" and _question(row) in ours:
            mine, other = ours[_question(row)], row["value"]
            value = None if mine is None or other is None else mine - other
            yield {**row, "finder": f"logprob - {row['finder']}", "value": value}


def _question(row: FinderRow) -> tuple[Any, ...]:
    """Name what finders are compared in: the same noun, effect and neurons."""
    return row["image"], row["noun"], row["effect"], row["scope"]


def _deletion_table(rows: Sequence[FinderRow]) -> Table:
    """Make the table of how far log p falls with the top k silent, next to matched and to any random neurons."""
    means = by_image(rows, "finder", "k", "measure", "neurons")
    cells: list[tuple[tuple[str, ...], Cell]] = []
    for finder, k in dict.fromkeys(labels[:2] for labels in means):
        # Images in order of name: top and matched neurons are compared image by image.
        fall, matched = (means[finder, k, FALL, neurons] for neurons in (TOP, MATCHED))
        images = sorted(fall)
        top, stand_in = ([values[image] for image in images] for values in (fall, matched))
        more = [fall[image] - matched[image] for image in images]
        # A ratio says something only where what it divides by is surely above 0.
        by_name: dict[str, Cell] = {
            TOP: estimate(top),
            MATCHED: estimate(stand_in),
            f"{TOP} - {MATCHED}": estimate(more),
            f"{TOP} / {MATCHED}": ratio(top, stand_in) if _is_above_zero(stand_in) else None,
            LOUDNESS: _over(means[finder, k, LOUDNESS, MATCHED]),
            "matched neurons": _over(means[finder, k, NEURONS, MATCHED]),
            ANY: _over(means[finder, k, FALL, ANY]),
        }
        cells += [((finder, str(k), measure), value) for measure, value in by_name.items()]
    note = (
        "Fall of log p (nats) when the top k are silent together at the scored position. Matched random: of the same "
        "blocks, together as loud, as far as their blocks have it (20 draws); any random: k of any block and loudness. "
        "No ratio where matched random neurons do not lower log p."
    )
    return Table("deletion", "Deletion", ("finder", "k", "measure"), tuple(cells), note)


def _is_above_zero(values: Sequence[float]) -> bool:
    """Tell whether a mean's whole interval lies above 0."""
    value = estimate(values)
    return value is not None and value.low is not None and value.low > 0


def meaning_table(found: Mapping[str, Sequence[NounTruth]], meaning: Meaning, items: Sequence[Item] = ()) -> Table:
    """Make the table of what the top 10 of each finder say, against noun, caption and image."""
    # What needs no second model, and beside it what does.
    hits = [row for row in rows_of(found) if row["measure"] == DECODED]
    means = by_image([*hits, *bert_rows(found, meaning), *clip_rows(found, meaning, items)], "finder", "measure")
    finders = list(dict.fromkeys(row["finder"] for row in hits))
    cells = tuple(
        ((finder, measure), _over(means.get((finder, measure), {}), measure))
        for finder in finders
        for measure in MEANINGS
    )
    note = f"The ten tokens of each of the top 10 neurons; BERTScore with {meaning.text_model}."
    return Table(
        "meaning", "What the neurons say", ("finder", "measure"), cells, _note(note, meaning, "BERTScore", "CLIPScore")
    )
