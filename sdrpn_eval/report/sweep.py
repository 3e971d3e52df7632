"""The files of a sweep: a table, a figure, JSON, and the frontier's settings for `zoom=FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sdrpn.io.atomic import write_json
from sdrpn.io.plurals import counted
from sdrpn_eval.report.tables import columns
from sdrpn_eval.results.stats import rounded, with_interval
from sdrpn_eval.results.sweep import BASE, Sweep, Swept, folder_name

CHOSEN = "zoom.json"


def write(sweep: Sweep, folder: Path) -> None:
    """Write sweep.json, sweep.md, sweep.png, zoom.json and frontier/NAME.json.

    Args:
        sweep: The settings.
        folder: Folder of the sweep.
    """
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
    draw(sweep, folder / "sweep.png")


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
            with_interval(one.score, 100, ".1f"),
            "" if one.name == BASE else with_interval(one.against_base, 100, "+.1f"),
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
    lines = [HEAD, ["---"] * len(HEAD), *_rows(sweep)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
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


def draw(sweep: Sweep, path: Path) -> None:
    """Draw score over cost, with the frontier as a line.

    Args:
        sweep: The settings.
        path: Picture to write.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Any = figure.subplots()
    other = [one for one in sweep.swept if not one.on_frontier]
    frontier = sorted((o for o in sweep.swept if o.on_frontier), key=lambda one: one.cost)
    _points(axis, other, "#9e9e9e", "other settings", "o")
    _points(axis, frontier, "#0072b2", "frontier", "o-")
    base = [one for one in sweep.swept if one.name == BASE]
    _points(axis, base, "#d55e00", "base: as in --model_args", "s")
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


def _points(axis: Any, swept: Sequence[Swept], colour: str, label: str, style: str) -> None:
    if not swept:
        return
    scores = [one.score for one in swept]
    below = [0.0 if s.low is None else 100 * (s.mean - s.low) for s in scores]
    above = [0.0 if s.high is None else 100 * (s.high - s.mean) for s in scores]
    axis.errorbar(
        [one.cost for one in swept],
        [100 * s.mean for s in scores],
        yerr=[below, above],
        fmt=style,
        color=colour,
        label=label,
        capsize=2,
        markersize=5,
        elinewidth=0.8,
    )
