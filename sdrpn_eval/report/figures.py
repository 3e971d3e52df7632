"""matplotlib figures: the bars of a ladder, the lines of threshold curves, a sweep."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from sdrpn.io.plurals import counted
from sdrpn_eval.results.comparison import Comparison, MetricRow, RunScore
from sdrpn_eval.results.stats import Estimate
from sdrpn_eval.results.threshold_curve import Curve, Point

if TYPE_CHECKING:  # brings torch, which the other figures do not need
    from sdrpn_eval.results.sweep import Swept

COLOURS: dict[str, tuple[str, str]] = {
    "stock": ("#8c8c8c", ""),
    "vicrop": ("#e69f00", ""),
    "attention": ("#009e73", ""),
    "rpn": ("#0072b2", ""),
    "true box": ("#ffffff", "///"),
}
"""Fill and hatch by run: Okabe and Ito's colours, which the colour-blind can tell apart."""
WIDTH, HEIGHT = 8.0, 4.6
"""In inches."""
DPI = 200
CAPTION_WIDTH = 118
STOCK, PUBLISHED = "#8c8c8c", "published thresholds"
LINES = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
COLUMNS = 3
"""Plots of threshold curves side by side."""


def shown(comparison: Comparison) -> list[MetricRow]:
    """The rows to draw: of one task all percentages of which higher is better; of several, the main
    metric of each."""
    rows = [row for row in comparison.rows if row.percent and row.higher_is_better]
    tasks = {row.task for row in rows}
    return rows if len(tasks) == 1 else [row for row in rows if row.main]


def draw_ladder(comparison: Comparison, caption: str, paths: Sequence[Path]) -> None:
    """Draws scores with their intervals, a bar for each way to look.

    Each file is in the format that its name ends in.

    Raises:
        ValueError: If no task has a score per document between 0 and 1.
    """
    rows = shown(comparison)
    if not rows:
        raise ValueError("no task has a score a document between 0 and 1 to draw")
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axis = figure.subplots()
    names = [run.name for run in comparison.runs]
    for place, name in enumerate(names):
        _draw_run(axis, rows, place, name, 0.84 / len(names))
    axis.set_xticks(range(len(rows)), [_label(row, rows) for row in rows], fontsize=10.5)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel(f"{_metric(rows)}, %", fontsize=10.5)
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.7)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=10.5)
    wrapped = "\n".join(textwrap.wrap(caption, CAPTION_WIDTH))
    figure.supxlabel(wrapped, fontsize=8, color="#444444", x=0.01, ha="left")
    for path in paths:
        figure.savefig(path, dpi=DPI, facecolor="white")


def _draw_run(axis: Any, rows: Sequence[MetricRow], place: int, name: str, width: float) -> None:
    """Draws a run's bars, one per group."""
    fill, hatch = COLOURS.get(name, ("#cc79a7", ""))
    style: dict[str, Any] = {"color": fill, "hatch": hatch, "edgecolor": "#333333", "lw": 0.6}
    left = [group - 0.42 + width * (place + 0.5) for group in range(len(rows))]
    scores = [row.scores[place] for row in rows]
    means = [100 * score.mean for score in scores]
    axis.bar(left, means, width * 0.9, **style)
    ends = _whiskers(scores, 100)
    axis.errorbar(left, means, ends, fmt="none", ecolor="#111111", elinewidth=1.1, capsize=3)
    for x, mean, above in zip(left, means, ends[1], strict=True):
        axis.text(x, mean + above + 1.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=9)
    axis.bar([0], [0], **style, label=name)


def _whiskers(scores: Sequence[RunScore | Point | Estimate], scale: float) -> list[list[float]]:
    """Lengths of intervals below and above the means; 0 without an interval."""
    below = [0.0 if s.low is None else max(0.0, scale * (s.mean - s.low)) for s in scores]
    above = [0.0 if s.high is None else max(0.0, scale * (s.high - s.mean)) for s in scores]
    return [below, above]


def _label(row: MetricRow, rows: Sequence[MetricRow]) -> str:
    """Label of a group: the task; for several metrics of one task, the suffix of the metric."""
    if len({one.task for one in rows}) > 1:
        name = row.task
    else:
        main = next((one.metric for one in rows if one.main), row.metric)
        rest = row.metric.removeprefix(main).strip("_").replace("_", " ")
        name = rest or "all questions"
    return f"{name}\n{counted(row.questions, 'question')}, {counted(row.images, 'image')}"


def _metric(rows: Sequence[MetricRow]) -> str:
    metrics = {row.metric for row in rows if row.main} or {row.metric for row in rows}
    return metrics.pop().replace("_", " ") if len(metrics) == 1 else "score"


def draw_curves(found: Sequence[Curve], path: Path) -> None:
    """Draws a plot per task: lines with intervals, and the published threshold as dotted line."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).ravel()
    for plot, curve in zip(plots, found, strict=False):
        _draw_one(plot, curve)
    for plot in plots[len(found) :]:
        plot.axis("off")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_one(plot: Any, curve: Curve) -> None:
    scale = 100 if curve.percent else 1
    for i, series in enumerate(dict.fromkeys(p.series for p in curve.points)):
        own = [p for p in curve.points if p.series == series]
        level = [p for p in own if not isinstance(p.threshold, float)]
        given = [p for p in own if isinstance(p.threshold, float) and not p.published]
        colour = STOCK if len(level) == len(own) else LINES[i % len(LINES)]
        for p in level:
            named = f"{series}, {p.threshold}" if series else str(p.threshold)
            label = named if p.threshold else series or "no zoom"
            plot.axhline(scale * p.mean, color=colour, linestyle="--", label=label)
            if p.low is not None and p.high is not None:
                plot.axhspan(scale * p.low, scale * p.high, color=colour, alpha=0.15, linewidth=0)
        swept = sorted(given, key=lambda p: float(p.threshold or 0))
        named = series or "one threshold for all"
        style: dict[str, Any] = {"color": colour, "capsize": 3}
        _draw_points(plot, [p.threshold for p in swept], swept, scale, "o-", label=named, **style)
        published = [p for p in own if p.published]
        at = [p.threshold for p in published]
        style |= {"label": f"{series}, {PUBLISHED}" if series else PUBLISHED}
        _draw_points(plot, at, published, scale, "D", markerfacecolor="white", **style)
    if isinstance(curve.published_threshold, float):
        plot.axvline(curve.published_threshold, color="black", linestyle=":", linewidth=1)
    plot.set_title(f"{curve.task}, {curve.metric}", fontsize=10)
    plot.set_xlabel("threshold")


def draw_sweep(swept: Sequence[Swept], base: str, path: Path) -> None:
    """Draws the settings' score over cost, with the frontier as a line; `base` changes nothing."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Any = figure.subplots()
    frontier = sorted((o for o in swept if o.on_frontier), key=lambda one: one.cost)
    for some, colour, label, style in (
        ([one for one in swept if not one.on_frontier], "#9e9e9e", "other settings", "o"),
        (frontier, "#0072b2", "frontier", "o-"),
        ([o for o in swept if o.name == base], "#d55e00", "base: as in --model_args", "s"),
    ):
        more = {"color": colour, "label": label, "capsize": 2, "markersize": 5, "elinewidth": 0.8}
        _draw_points(axis, [o.cost for o in some], [o.score for o in some], 100, style, **more)
    for one in frontier:
        axis.annotate(
            one.name.replace(" ", "\n"),
            (one.cost, 100 * one.score.mean),
            xytext=(6, -6),
            textcoords="offset points",
            fontsize=7,
            va="top",
        )
    axis.axvline(1, color="black", linestyle=":", linewidth=1)
    axis.set_xlabel("cost per question, relative to the stock model")
    axis.set_ylabel("score, %")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_points(
    plot: Any,
    places: Sequence[Any],
    points: Sequence[Point | Estimate],
    scale: int,
    style: str,
    **more: Any,
) -> None:
    """Draws means at places on the x-axis, with their intervals; nothing without points."""
    if points:
        means = [scale * p.mean for p in points]
        plot.errorbar(places, means, yerr=_whiskers(points, scale), fmt=style, **more)
