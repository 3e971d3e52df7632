"""The figure of a ladder: scores with their intervals, a bar for each way to look."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sdrpn.io.plurals import counted
from sdrpn_eval.report.results import Comparison, MetricRow

COLOURS: dict[str, tuple[str, str]] = {
    "stock": ("#8c8c8c", ""),
    "vicrop": ("#e69f00", ""),
    "attention": ("#009e73", ""),
    "rpn": ("#0072b2", ""),
    "true box": ("#ffffff", "///"),
}
"""Fill and hatch by run: Okabe and Ito's colours, which the colour-blind can tell apart."""
WIDTH, HEIGHT = 8.0, 4.6
"""In inches; at 100 dots an inch the size of a README's column."""
DPI = 200
CAPTION_WIDTH = 118


def shown(comparison: Comparison) -> list[MetricRow]:
    """What gets a group of bars: all percentages that should be high, of a single task; the main
    metric of each, of several."""
    rows = [row for row in comparison.rows if row.percent and row.higher_is_better]
    tasks = {row.task for row in rows}
    return rows if len(tasks) == 1 else [row for row in rows if row.main]


def draw(comparison: Comparison, caption: str, paths: Sequence[Path]) -> None:
    """Write the figure, in the format that each path names. Raises ValueError without a score."""
    rows = shown(comparison)
    if not rows:
        raise ValueError("no task has a score a document between 0 and 1 to draw")
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axis = figure.subplots()
    names = [run["name"] for run in comparison.runs]
    width = 0.84 / len(names)
    for place, name in enumerate(names):
        fill, hatch = COLOURS.get(name, ("#cc79a7", ""))
        left = [group - 0.42 + width * (place + 0.5) for group in range(len(rows))]
        means = [100 * row.scores[place].mean for row in rows]
        lows, highs = ([100 * v for v in ends] for ends in _ends(rows, place))
        axis.bar(left, means, width * 0.9, color=fill, hatch=hatch, edgecolor="#333333", lw=0.6)
        whiskers = [[m - low for m, low in zip(means, lows, strict=True)]]
        whiskers += [[high - m for m, high in zip(means, highs, strict=True)]]
        axis.errorbar(
            left, means, whiskers, fmt="none", ecolor="#111111", elinewidth=1.1, capsize=3
        )
        for x, mean, high in zip(left, means, highs, strict=True):
            axis.text(x, high + 1.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=9)
        axis.bar([0], [0], color=fill, hatch=hatch, edgecolor="#333333", lw=0.6, label=name)
    axis.set_xticks(range(len(rows)), [_label(row, rows) for row in rows], fontsize=10.5)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel(f"{_metric(rows)}, %", fontsize=10.5)
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.7)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=10.5)
    figure.supxlabel(
        "\n".join(textwrap.wrap(caption, CAPTION_WIDTH)),
        fontsize=8,
        color="#444444",
        x=0.01,
        ha="left",
    )
    for path in paths:
        figure.savefig(path, dpi=DPI, facecolor="white")


def _ends(rows: Sequence[MetricRow], place: int) -> tuple[list[float], list[float]]:
    """Lower and upper ends; an interval that is not known, of a single image, has no length."""
    scores = [row.scores[place] for row in rows]
    lows = [s.mean if s.low is None else s.low for s in scores]
    highs = [s.mean if s.high is None else s.high for s in scores]
    return lows, highs


def _label(row: MetricRow, rows: Sequence[MetricRow]) -> str:
    """The task; or of one task's metrics, what sets them apart from its main one."""
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
