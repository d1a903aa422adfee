"""Plots of what an inspection found, as PNG files for a page or a paper; they need matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmneurons.data.table import Table
from mmneurons.errors import INSPECT_EXTRA, SettingError
from mmneurons.files import write_whole
from mmneurons.finding.result import Finding
from mmneurons.inspection.rows import ELSEWHERE, EQUAL_CHANGE, MATCHED
from mmneurons.maths import regions
from mmneurons.maths.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmneurons.inspection.run import Inspection

DPI = 110
"""The resolution of all plots, in pixels per inch."""
SHOWN_CONCEPTS = 40
"""The most concepts that the overlap matrix shows: the ones said most often."""
_GREY = "#8a8a8a"


def draw(found: Inspection, tables: Sequence[Table], folder: Path, examples: Sequence[Finding] = ()) -> list[Path]:
    """Draw a plot of everything that was measured.

    Args:
        found: The inspection.
        tables: The tables made of it.
        folder: The folder that the files are written into.
        examples: Findings with maps and views, drawn for each k.

    Returns:
        The paths of the files, in the order of the experiments.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingError("Plots need matplotlib.", fix=INSPECT_EXTRA) from None
    by_name = {table.name: table for table in tables}
    drawn: list[Path] = []

    def figure(name: str, width: float, height: float, paint: Callable[..., None], *what: Any) -> None:
        # A Figure of its own instead of pyplot, whose global state would choose a backend and open windows.
        made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        paint(made, *what)
        path, drawing = folder / f"{name}.png", io.BytesIO()
        # Without the version of matplotlib in it: the same results give the same bytes.
        made.savefig(drawing, format="png", metadata={"Software": None})
        write_whole(path, drawing.getvalue())
        drawn.append(path)

    # Sensitivity, specificity, causal effect, finders: whatever was not run has no table, and so no plot.
    for i, example in enumerate(examples):
        if example.nouns and example.nouns[0].regions and example.views and example.views[0] is not None:
            n = len(example.nouns)
            figure(f"example-{i}", 11, 3.4 * n, _example, example)
    if "regions" in by_name:
        figure("regions", 8, 4.4, _regions, by_name["regions"])
    if found.specificity is not None:
        figure("overlap", 6.5, 3.2, _overlap, by_name["overlap"])
        figure("matrix", 7, 6.5, _matrix, found)
        figure("layers", 6.5, 3, _layers, found)
    if "causal" in by_name:
        figure("causal", 11, 4.6, _causal, by_name["causal"])
    if "agreement" in by_name:
        figure("agreement", 8, 3.4, _agreement, by_name["agreement"])
        figure("deletion", 8, 4, _deletion, by_name["deletion"])
    return drawn


def _text(words: str) -> str:
    """Make a text that matplotlib can draw: bytes of a file name that are no text become question marks."""
    return words.encode("utf-8", "replace").decode()


def _tidy(axes: Axes) -> None:
    """Take away the upper and the right line around a plot."""
    axes.spines[["top", "right"]].set_visible(False)


def _ends(value: Estimate) -> tuple[float, float]:
    """Return the ends of an interval; the mean, twice, of an estimate without one."""
    if value.low is None or value.high is None:
        return value.mean, value.mean
    return value.low, value.high


def _bars(values: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Compute how far the intervals of some values reach down and up; plain numbers have none."""
    ends = [(value.mean, *_ends(value)) if isinstance(value, Estimate) else (0.0, 0.0, 0.0) for value in values]
    return [mean - low for mean, low, _ in ends], [high - mean for mean, _, high in ends]


def _line(axes: Axes, points: Mapping[int, Any], label: str, **style: Any) -> None:
    """Draw a line over k, with its intervals as a band."""
    # A k of which nothing could be measured is left out: the line must not fall to zero there.
    known = {k: value for k, value in sorted(points.items()) if isinstance(value, Estimate)}
    if not known:
        return
    (line,) = axes.plot(list(known), [v.mean for v in known.values()], marker="o", markersize=3, label=label, **style)
    axes.fill_between(
        list(known),
        [_ends(v)[0] for v in known.values()],
        [_ends(v)[1] for v in known.values()],
        color=line.get_color(),
        alpha=0.15,
    )


def _example(figure: Figure, finding: Finding) -> None:
    """Draw the regions of a finding: for each noun a row of heat maps and, below it, a row of their masks."""
    view = finding.views[0]
    assert view is not None
    picture = np.asarray(view.convert("RGB"))
    sizes = sorted(finding.nouns[0].regions)
    axes = figure.subplots(2 * len(finding.nouns), 1 + len(sizes), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    grey = picture.mean(-1, keepdims=True).repeat(3, -1) / 255
    for i, noun in enumerate(finding.nouns):
        axes[2 * i, 0].imshow(picture)
        axes[2 * i, 0].set_title(_text(noun.word), fontsize=9, parse_math=False)
        for j, k in enumerate(sizes, start=1):
            heat = regions.upsample(np.asarray(noun.regions[k][0], dtype=float), picture.shape[:2])
            bound = float(np.abs(heat).max()) or 1.0  # each map on its own scale: means over more neurons are fainter
            axes[2 * i, j].imshow(grey)
            axes[2 * i, j].imshow(regions.overlay(heat, bound))
            axes[2 * i, j].set_title(f"top {k}", fontsize=9)
            axes[2 * i + 1, j].imshow(np.where(regions.mask(heat)[..., None], picture / 255, 0.25 * grey))
    title = f"{finding.images[0]}: {finding.answer_prefix} {finding.caption}"
    figure.suptitle(_text(title), fontsize=9, parse_math=False)


def _regions(figure: Figure, table: Table) -> None:
    """Draw over k how well maps find their objects: left the pointing game, right overlaps and AUROC."""
    left, right = figure.subplots(1, 2)
    rows = dict(table.rows)
    for axes, names in ((left, ("pointing game", "the mask's share of the image")), (right, _IOUS)):
        # Solid: the top neurons; dotted: matched random ones; dash-dotted: the top ones at another object's mask;
        # dashed: what a guess would hit by chance.
        for i, name in enumerate(names):
            for which, style in (("top", "-"), (MATCHED, ":"), (ELSEWHERE, "-.")):
                points = {int(k): v for (measure, of, k), v in rows.items() if (measure, of) == (name, which)}
                grey = (
                    {"color": _GREY, "linestyle": "--"} if "share" in name else {"color": f"C{i}", "linestyle": style}
                )
                _line(axes, points, name if which == "top" else f"{name}, {which}", **grey)
        axes.set(xscale="log", xlabel="k neurons")
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        _tidy(axes)


_IOUS = ("IoU, strongest 5 %", "IoU at equal area", "patch AUROC")


def _overlap(figure: Figure, table: Table) -> None:
    """Draw for each k what share of the top k pairs of nouns have in common, a bar for each kind of pair."""
    axes = figure.subplots()
    sizes = sorted({int(k) for (_, k), _ in table.rows})
    # A row with "/" in its name is a ratio of two others, which has another scale and stands in the table only.
    names = [name for name in dict.fromkeys(pairs for (pairs, _), _ in table.rows) if "/" not in name]
    rows = dict(table.rows)
    for i, name in enumerate(names):
        values = [rows.get((name, str(k))) for k in sizes]
        means = [v.mean if isinstance(v, Estimate) else np.nan if v is None else v for v in values]  # no bar, not 0
        places = np.arange(len(sizes)) + (i - (len(names) - 1) / 2) * 0.16
        axes.bar(places, means, 0.14, yerr=_bars(values), label=name, error_kw={"lw": 0.8})
    axes.set(ylabel="share of the top k in common")
    axes.set_xticks(np.arange(len(sizes)), [f"k = {k}" for k in sizes])
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)


def _matrix(figure: Figure, found: Inspection) -> None:
    """Draw what share of the top 10 each two concepts have in common."""
    assert found.specificity is not None
    it = found.specificity
    # The concepts said most, shown in the order of the matrix, which is that of the alphabet.
    most = sorted(np.argsort([-n for n in it.counts], kind="stable")[:SHOWN_CONCEPTS])
    axes = figure.subplots()
    image = axes.imshow(it.matrix[np.ix_(most, most)], vmin=0, vmax=1, cmap="viridis")
    names = [it.concepts[c] for c in most]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, label="share of the top 10 in common", shrink=0.7)


def _layers(figure: Figure, found: Inspection) -> None:
    """Draw the share of top neurons that lies in each block."""
    assert found.specificity is not None
    axes = figure.subplots()
    layers = found.specificity.layers
    for i, (k, shares) in enumerate(layers.items()):
        axes.bar(np.arange(len(shares)) + (i - (len(layers) - 1) / 2) * 0.4, shares, 0.38, label=f"top {k}")
    axes.set(xlabel="block", ylabel="share of the top k")
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _causal(figure: Figure, table: Table) -> None:
    """Draw how often the noun is lost: left over k, a line for each intervention; right over the strength of noise."""
    left, right = figure.subplots(1, 2)
    rows = dict(table.rows)
    measure = "no longer says the noun"
    ways = list(dict.fromkeys(how for (how, *_), _ in table.rows))
    sizes = sorted({int(k) for (_, k, *_), _ in table.rows})
    for i, how in enumerate(ways):
        for which, style in (("top", "-"), (MATCHED, ":"), (EQUAL_CHANGE, "-.")):
            points = {k: rows.get((how, str(k), which, measure)) for k in sizes}
            _line(left, points, f"{how}, {which}", linestyle=style, color=f"C{i}")
    # A little more than 0 to 1, so that lines at either end are seen whole.
    left.set(xscale="log", xlabel="k neurons", ylabel=f"share of captions: {measure}", ylim=(-0.02, 1.02))
    left.legend(fontsize=6, frameon=False, ncols=2)
    # The name of an intervention carries its strength: "noise 0.5".
    noise = {float(how.split()[1]): how for how in ways if how.startswith("noise")}
    for i, k in enumerate(sizes):
        for which, style in (("top", "-"), (MATCHED, ":")):
            points: dict[Any, Any] = {sigma: rows.get((how, str(k), which, measure)) for sigma, how in noise.items()}
            _line(right, points, f"k = {k}, {which}", linestyle=style, color=f"C{i}")
    right.set(xlabel="noise, in units of the column's root mean square", ylim=(-0.02, 1.02))
    right.legend(fontsize=6, frameon=False, ncols=2)
    for axes in (left, right):
        _tidy(axes)


def _agreement(figure: Figure, table: Table) -> None:
    """Draw how far each finder's ranking agrees with the ablation effect, a bar for each scope."""
    axes = figure.subplots()
    # The table has the effect on the logit as well; log p is what a reader of one plot needs.
    rows = {labels: value for labels, value in table.rows if labels[0] == "logprob" and isinstance(value, Estimate)}
    scopes = list(dict.fromkeys(scope for _, scope, _ in rows))
    finders = list(dict.fromkeys(finder for *_, finder in rows))
    for i, scope in enumerate(scopes):
        values: list[Any] = [rows.get(("logprob", scope, finder)) for finder in finders]
        known = [(j, v) for j, v in enumerate(values) if v is not None]
        axes.bar(
            [j + (i - (len(scopes) - 1) / 2) * 0.4 for j, _ in known],
            [v.mean for _, v in known],
            0.38,
            yerr=_bars([v for _, v in known]),
            label=scope,
            error_kw={"lw": 0.8},
        )
    axes.set(ylabel="Spearman with the true effect on log p")
    axes.set_xticks(range(len(finders)), finders, rotation=20, fontsize=8)
    axes.axhline(0, color="black", lw=0.6)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _deletion(figure: Figure, table: Table) -> None:
    """Draw how far log p falls with the top k ablated together, a line for each finder."""
    axes = figure.subplots()
    rows = dict(table.rows)
    finders = list(dict.fromkeys(finder for (finder, *_), _ in table.rows))
    sizes = sorted({int(k) for (_, k, _), _ in table.rows})
    for finder in finders:
        style = {"color": "black", "linestyle": "--"} if finder == "true effect" else {}
        _line(axes, {k: rows[finder, str(k), "top"] for k in sizes}, finder, **style)
    # One line of matched random neurons is enough: those of `logit`, the finder that `find` uses by default.
    matched = {k: rows["logit" if "logit" in finders else finders[0], str(k), MATCHED] for k in sizes}
    _line(axes, matched, MATCHED, color=_GREY, linestyle=":")
    axes.set(xscale="log", xlabel="top k silent together", ylabel="fall of log p (nats)")
    axes.legend(fontsize=7, frameon=False)
    _tidy(axes)
