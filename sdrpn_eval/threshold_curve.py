"""Score over threshold: what the choice of a threshold is worth, task by task.

`python -m sdrpn_eval.threshold_curve RUN RUN ... --out curve` reads runs that differ in their
threshold and writes curve.json, curve.md and curve.png. A run without `threshold=` took the
published one of each task and has a row of its own; a run that needs none (stock, ViCrop) is a
level line. Intervals are clustered by image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrpn.cli.shared import console, errors_as_sentences, say
from sdrpn.io.atomic import as_json
from sdrpn.io.plurals import counted
from sdrpn_eval.args import WITHOUT_THRESHOLD, LlavaArguments
from sdrpn_eval.report.options import SeedOption, at_least

if TYPE_CHECKING:
    from sdrpn_eval.report.checks import Evidence
    from sdrpn_eval.report.scores import Document, Scores

NO_MATTER = ("threshold", "record", "batch_size", "max_batch_size", "prefix_cache", "device")
"""Arguments that make no other series; the first is what a curve is over."""
STOCK, PUBLISHED = "#8c8c8c", "published thresholds"
COLOURS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
COLUMNS = 3


@dataclass(frozen=True)
class Point:
    """A run's score on a task, with its 95 % interval.

    series: what the run has in common with those it is joined to. threshold: None where it has
    none. published: the run was given none, so every task had the one published for it.
    zoomed: share of the questions, None without a record.
    """

    run: str
    series: str
    threshold: float | None
    published: bool
    mean: float
    low: float | None
    high: float | None
    zoomed: float | None


@dataclass(frozen=True)
class Curve:
    """A task's or group's points. percent: scores lie in [0, 1] and are shown times 100."""

    task: str
    metric: str
    percent: bool
    questions: int
    images: int
    published_threshold: float
    points: list[Point]


def curves(folders: Sequence[Path], tasks: Sequence[str] = (), seed: int = 0) -> list[Curve]:
    """The curve of every task that the runs have in common, by its first metric.

    Raises NotComparable where the runs were asked or scored otherwise, ValueError where two of
    them tell the same.
    """
    from sdrpn_eval.report.checks import common_tasks, refuse_moved
    from sdrpn_eval.report.comparison import cluster_keys, gather
    from sdrpn_eval.report.runs import read_run
    from sdrpn_eval.report.scores import all_scores

    if len(folders) < 2:
        raise ValueError(f"a curve needs two runs or more, got {len(folders)}")
    evidence = [gather(read_run(f, str(f), tasks or None)) for f in folders]
    common, _ = common_tasks([one.run for one in evidence])
    for other in evidence[1:]:
        refuse_moved(evidence[0], other, common)
    scores = [all_scores(one.run, common) for one in evidence]
    keys = {d: k for t in common for d, k in cluster_keys(evidence, t)[1].items()}
    names = series_names([arguments(one) for one in evidence])
    found = []
    for key in _main_metrics(scores):
        same = [by_key[key] for by_key in scores]
        found.append(_curve(evidence, same, names, keys, seed))
        _refuse_twins(found[-1])
    return found


def arguments(evidence: Evidence) -> Mapping[str, Any]:
    """As resolved where the run left its facts, else as given over the defaults."""
    if evidence.run.model != "llava_sdrpn":
        return {"model": evidence.run.model, "proposer": "none"}
    given = evidence.facts.arguments if evidence.facts else evidence.run.arguments
    return LlavaArguments.defaults() | dict(given)


def series_names(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each run the arguments, beside the threshold, in which not all runs are alike."""
    names = dict.fromkeys(n for one in every for n in one if n not in NO_MATTER)
    telling = [n for n in names if len({str(one.get(n)) for one in every}) > 1]
    return [", ".join(f"{n}={one[n]}" for n in telling if n in one) for one in every]


def _main_metrics(
    scores: Sequence[Mapping[tuple[str, str, str], Scores]],
) -> list[tuple[str, str, str]]:
    """The first metric of each task and group that should be high and has a score a document."""
    chosen: dict[str, tuple[str, str, str]] = {}
    for key, first in scores[0].items():
        values = [s.values for by_key in scores if (s := by_key.get(key)) and s.values]
        alike = len(values) == len(scores) and len({frozenset(v) for v in values}) == 1
        if first.higher_is_better and alike:
            chosen.setdefault(first.task, key)
    return list(chosen.values())


def _curve(
    evidence: Sequence[Evidence],
    scores: Sequence[Scores],
    names: Sequence[str],
    clusters: Mapping[Document, Hashable],
    seed: int,
) -> Curve:
    from sdrpn_eval.report.looks import averages
    from sdrpn_eval.stats import clustered
    from sdrpn_eval.tasks_info import threshold_of

    task = scores[0].task
    documents = list(scores[0].values or {})
    keys = [clusters[d] for d in documents]
    columns = [[(s.values or {})[d] for d in documents] for s in scores]
    points = []
    for one, name, column in zip(evidence, names, columns, strict=True):
        given = arguments(one)
        own = given.get("threshold")
        has_one = given["proposer"] not in WITHOUT_THRESHOLD
        points.append(
            Point(
                one.run.name,
                name,
                float(own or threshold_of(task)) if has_one else None,
                has_one and own is None,
                *clustered(column, keys, seed),
                zoomed=averages(one.record, documents)["zoomed"],
            )
        )
    percent = all(0 <= value <= 1 for column in columns for value in column)
    counts = len(documents), len(set(keys))
    return Curve(task, scores[0].metric, percent, *counts, threshold_of(task), points)


def _refuse_twins(curve: Curve) -> None:
    seen: dict[tuple[str, float | None, bool], str] = {}
    for point in curve.points:
        place = (point.series, point.threshold, point.published)
        if place in seen:
            raise ValueError(
                f"{seen[place]} and {point.run} differ in no threshold: both have "
                f"{point.threshold} on {curve.task}; give one of them"
            )
        seen[place] = point.run


# What is written


def as_dict(found: Sequence[Curve]) -> dict[str, Any]:
    """What curve.json holds; the interval of a single image, which has none, is null."""
    return {"curves": [asdict(curve) for curve in found]}


def markdown(found: Sequence[Curve]) -> str:
    """A row a run, the published thresholds' beside those of one threshold for all tasks."""
    head = ["", "threshold", *(curve.task for curve in found)]
    lines = [head, ["---"] * len(head)]
    for points in zip(*(curve.points for curve in found), strict=True):
        first, own = points[0], _threshold(points[0])
        cells = [_cell(c, p, first.published) for c, p in zip(found, points, strict=True)]
        lines.append([first.series, own, *cells])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    counts = ", ".join(f"{c.task} {c.questions} / {c.images}" for c in found)
    return (
        f"{table}\n\nFirst metric of each task, in percent where it is a share; 95 % intervals "
        f"clustered by image. Questions / images: {counts}.\n"
    )


def lines(found: Sequence[Curve], width: int) -> list[str]:
    """The same for a terminal, a table a task."""
    # Imported here, so that --help answers at once.
    from sdrpn_eval.report.columns import columns

    told: list[str] = []
    for curve in found:
        rows = [
            [", ".join(filter(None, (p.series, _threshold(p)))), _cell(curve, p, p.published)]
            for p in curve.points
        ]
        told.append(
            f"{curve.task}, {curve.metric}: {counted(curve.questions, 'question')}, "
            f"{counted(curve.images, 'image')}"
        )
        told += [*columns(["threshold", "score"], rows, width), ""]
    return told


def _threshold(point: Point) -> str:
    if point.published:
        return "published, by task"
    return "none" if point.threshold is None else f"{point.threshold:g} for all"


def _cell(curve: Curve, point: Point, with_threshold: bool) -> str:
    from sdrpn_eval.stats import with_interval

    scale, digits = (100, ".1f") if curve.percent else (1, ".4g")
    at = f" (t = {point.threshold:g})" if with_threshold else ""
    return with_interval((point.mean, point.low, point.high), scale, digits) + at


def draw(found: Sequence[Curve], path: Path) -> None:
    """One plot a task: lines with intervals, and a dotted line at the published threshold."""
    from matplotlib.figure import Figure

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
        level = [p for p in own if p.threshold is None]
        given = [p for p in own if p.threshold is not None and not p.published]
        colour = STOCK if level else COLOURS[i % len(COLOURS)]
        for p in level:
            plot.axhline(scale * p.mean, color=colour, linestyle="--", label=series or "no zoom")
            if p.low is not None and p.high is not None:
                plot.axhspan(scale * p.low, scale * p.high, color=colour, alpha=0.15, linewidth=0)
        swept = sorted(given, key=lambda p: p.threshold or 0)
        _draw_points(plot, swept, scale, colour, series or "one threshold for all", "o-")
        published = [p for p in own if p.published]
        label = f"{series}, {PUBLISHED}" if series else PUBLISHED
        _draw_points(plot, published, scale, colour, label, "D")
    plot.axvline(curve.published_threshold, color="black", linestyle=":", linewidth=1)
    plot.set_title(f"{curve.task}, {curve.metric}", fontsize=10)
    plot.set_xlabel("threshold")


def _draw_points(
    plot: Any, points: Sequence[Point], scale: int, colour: str, label: str, style: str
) -> None:
    if not points:
        return
    plot.errorbar(
        [p.threshold for p in points],
        [scale * p.mean for p in points],
        yerr=[
            [0 if p.low is None else max(0, scale * (p.mean - p.low)) for p in points],
            [0 if p.high is None else max(0, scale * (p.high - p.mean)) for p in points],
        ],
        fmt=style,
        capsize=3,
        color=colour,
        markerfacecolor=colour if style == "o-" else "white",
        label=label,
    )


def write(found: Sequence[Curve], folder: Path) -> None:
    """curve.json, curve.md and curve.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = as_json(as_dict(found), indent=2, ensure_ascii=False) + "\n"
    (folder / "curve.json").write_text(text, encoding="utf-8")
    (folder / "curve.md").write_text(markdown(found), encoding="utf-8")
    draw(found, folder / "curve.png")


def curve(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Output folders of lmms-eval that differ in threshold."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("curve"),
    tasks: Annotated[
        str, typer.Option(help="These tasks only, with commas; default: all in common.")
    ] = "",
    seed: SeedOption = 0,
) -> None:
    """Score over threshold, with the published thresholds beside one for all.

    Run lmms-eval with --output_path and --log_samples, once without threshold=
    and once with each of some, stock beside them if you like, then:

      sdrpn-eval curve out/stock out/published out/t005 out/t015 --out curve
    """
    with errors_as_sentences():
        at_least(0, seed=seed)
        found = curves(runs, [name for name in tasks.split(",") if name], seed)
        if not found:
            raise ValueError("the runs have no metric with a score a document in common")
        write(found, out)
        for line in lines(found, console.width):
            say(line)
        say(f"{out / 'curve.png'}, curve.md and curve.json beside it")


if __name__ == "__main__":
    typer.run(curve)
