"""The files of a sweep: a table, a figure, JSON, and the frontier's settings for `zoom=FILE`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import write_json
from sdrpn.io.plurals import counted
from sdrpn_eval.report.figures import draw_sweep
from sdrpn_eval.report.tables import columns, markdown_table
from sdrpn_eval.report.text import interval
from sdrpn_eval.results.stats import rounded
from sdrpn_eval.results.sweep import BASE, Sweep, Swept, folder_name

CHOSEN = "zoom.json"


def write(sweep: Sweep, folder: Path) -> None:
    """Write sweep.json, sweep.md, sweep.png, zoom.json and frontier/NAME.json."""
    facts = {"questions": sweep.questions, "images": sweep.images, "metrics": dict(sweep.metrics)}
    write_json(
        folder / "sweep.json",
        facts
        | {"chosen": sweep.chosen, "tolerance": sweep.tolerance}
        | {"settings": [_as_json(one) for one in sweep.swept]},
    )
    (folder / "sweep.md").write_text(markdown(sweep), encoding="utf-8")
    for one in sweep.swept:
        if one.on_frontier:
            write_json(folder / "frontier" / f"{folder_name(one.name)}.json", zoom_of(one, facts))
    chosen = next(one for one in sweep.swept if one.name == sweep.chosen)
    write_json(folder / CHOSEN, zoom_of(chosen, facts))
    draw_sweep(sweep.swept, BASE, folder / "sweep.png")


def zoom_of(one: Swept, facts: dict[str, Any]) -> dict[str, Any]:
    """Make the content of a file that `zoom=FILE` reads; only `zoom` is read."""
    return {"zoom": dict(one.changes), "measured": _as_json(one) | facts}


def _as_json(one: Swept) -> dict[str, Any]:
    return asdict(one) | {
        "score": rounded(one.score),
        "against_base": rounded(one.against_base),
        "cost": round(one.cost, 4),
        "extra": round(one.extra, 4),
        "zoomed": round(one.zoomed, 4),
        "crop_tokens": round(one.crop_tokens, 1),
    }


def _rows(sweep: Sweep) -> list[list[str]]:
    by_cost = sorted(sweep.swept, key=lambda one: one.cost)
    return [
        [
            f"{one.name}{' *' if one.on_frontier else ''}",
            interval(one.score, percent=True),
            "" if one.name == BASE else interval(one.against_base, percent=True, sign="+"),
            f"{one.cost:.2f}",
            f"{100 * one.extra:.0f} %",
            f"{100 * one.zoomed:.0f} %",
            f"{one.crop_tokens:.0f}",
        ]
        for one in by_cost
    ]


HEAD = ["setting", "score", "against base", "cost", "extra cost", "zoomed", "crop tokens"]


def markdown(sweep: Sweep) -> str:
    """A table with one row per setting, cheapest first."""
    table = markdown_table(HEAD, _rows(sweep), escape=False)
    metrics = ", ".join(f"{task}: {metric}" for task, metric in sweep.metrics.items())
    return f"{table}\n\n{note(sweep)} Metrics: {metrics}.\n"


def note(sweep: Sweep) -> str:
    """What the columns are, and what they cannot say."""
    return (
        f"{counted(sweep.questions, 'question')} on {counted(sweep.images, 'image')}; 95 % "
        "intervals clustered by image. Cost: multiplications per question relative to the stock "
        "model, with images prefilled once; extra cost: what the second look adds, relative to "
        "base. * No setting scores more at the same or a lower cost. Settings chosen here score "
        "too high here: report them on other documents."
    )


def lines(sweep: Sweep, width: int) -> list[str]:
    """The table for a terminal."""
    return columns(HEAD, _rows(sweep), width)
