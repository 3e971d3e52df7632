"""Threshold curves in Markdown, in tables for a terminal, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sdrpn.io.atomic import as_json
from sdrpn.io.plurals import counted
from sdrpn_eval.report.tables import columns, markdown_table
from sdrpn_eval.report.text import interval
from sdrpn_eval.results.threshold_curve import Curve, Point


def write(curves: Sequence[Curve], folder: Path) -> None:
    """Writes curve.json, curve.md and curve.png."""
    # Imported here: the tables need no figures.
    from sdrpn_eval.report.figures import draw_curves

    folder.mkdir(parents=True, exist_ok=True)
    content = {"curves": [asdict(curve) for curve in curves]}
    text = as_json(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "curve.json").write_text(text, encoding="utf-8")
    (folder / "curve.md").write_text(markdown(curves), encoding="utf-8")
    draw_curves(curves, folder / "curve.png")


def markdown(curves: Sequence[Curve]) -> str:
    """A table with a row per run: published thresholds next to one threshold for all tasks."""
    rows = []
    for points in zip(*(curve.points for curve in curves), strict=True):
        first, own = points[0], _threshold(points[0])
        cells = [_cell(c, p, first.published) for c, p in zip(curves, points, strict=True)]
        rows.append([first.series, own, *cells])
    head = ["", "threshold", *(curve.task for curve in curves)]
    table = markdown_table(head, rows, escape=False)
    counts = ", ".join(f"{c.task} {c.questions} / {c.images}" for c in curves)
    return (
        f"{table}\n\nFirst metric of each task, in percent where it is a share; 95 % intervals "
        f"clustered by image. Questions / images: {counts}.\n"
    )


def lines(curves: Sequence[Curve], width: int) -> list[str]:
    """Tables for a terminal, one per task."""
    told: list[str] = []
    for curve in curves:
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
    return "none" if point.threshold is None else f"{_value(point)} for all"


def _value(point: Point) -> str:
    return f"{point.threshold:g}" if isinstance(point.threshold, float) else str(point.threshold)


def _cell(curve: Curve, point: Point, with_threshold: bool) -> str:
    at = f" (t = {_value(point)})" if with_threshold else ""
    return interval(point, curve.percent) + at
