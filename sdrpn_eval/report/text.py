"""A comparison as sentences and tables, for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from sdrpn.io.plurals import counted
from sdrpn_eval.report.tables import columns, escaped, markdown_table
from sdrpn_eval.results.comparison import Comparison, Difference, MetricRow, RunScore, TaskInfo
from sdrpn_eval.results.regions import HOLDS, Looking
from sdrpn_eval.results.stats import Estimate, with_interval
from sdrpn_eval.results.threshold_curve import Point

VERSIONS = ("sdrpn", "lmms_eval", "transformers", "torch")
"""Packages whose versions stand beside a score; a run's record has all."""
METHOD = (
    "Intervals are 95 %, clustered by image: of scores in [0, 1] Korn and Graubard's, of their "
    "differences from those of gains and losses, of other scores a bootstrap over images. p is "
    "two-sided, of a test that flips the signs of whole images' differences; wins and losses are "
    "questions scored higher and lower than by the first run."
)
FEW = 20
"""Number of images below which bootstrap intervals are too narrow."""

Cells = dict[str, str]
"""A row of a table: text by the title of its column."""
SCORES = ("task", "protocol", "metric", "questions / images", "run", "score", "difference")
SCORES += ("p", "won / lost", "published")
COSTS = ("task", "run", "questions zoomed", "crop's share of the image", "tokens a question")
COSTS += ("seconds a question",)
WHOLE = "answer's share of the image"
LOOKED = ("task", "run", WHOLE, "questions", "right", "region holds the answer")
LOOKED += ("wrong: no zoom", "wrong: looked wrong", "wrong: looked right, read wrong")


@dataclass(frozen=True)
class Section:
    """A table with its title; cells are plain text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def versions_line(versions: Mapping[str, str]) -> str:
    """Name the versions that stand beside a score, as far as they are known."""
    return ", ".join(f"{name} {versions[name]}" for name in VERSIONS if name in versions)


def _section(title: str, header: Sequence[str], cells: Sequence[Cells]) -> Section:
    return _filled(title, header, [[row.get(name, "") for name in header] for row in cells])


def _filled(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Section:
    """A table without its empty columns."""
    kept = [i for i, _ in enumerate(header) if any(row[i] for row in rows)]
    return Section(title, [header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def sections(comparison: Comparison) -> list[Section]:
    """All tables that have rows, in reading order."""
    tasks = comparison.tasks
    every = [
        _section("Scores", SCORES, [c for row in comparison.rows for c in _score_cells(row)]),
        _section("What it cost", COSTS, [c for task in tasks for c in _cost_cells(task)]),
        _section(
            f"Where it looked (to hold the answer: to cover {HOLDS:.0%} of its box)",
            LOOKED,
            [c for task in tasks for c in _look_cells(task)],
        ),
        _missing(comparison),
    ]
    return [section for section in every if section.rows]


def blocks(comparison: Comparison) -> list[Section]:
    """The tables for a terminal: one per metric or task, a row per run.

    The most important columns come first; the page has those that do not fit.
    """
    found = []
    header = ("run", "score", "difference", "p", "published", "won / lost")
    for row in comparison.rows:
        named = ", ".join(part for part in (row.task, row.protocol, metric_name(row)) if part)
        title = f"{named}: {counted(row.questions, 'question')}, {counted(row.images, 'image')}"
        found.append(_section(title, header, _score_cells(row)))
    for task in comparison.tasks:
        found.append(_section(f"{task.task}: what it cost", COSTS[1:], _cost_cells(task)))
        for run in task.boxes:
            short = [{"answer's share": c[WHOLE], **c} for c in _look_cells(task, run)]
            title = f"{task.task}, {run}: where it looked"
            found.append(_section(title, ("answer's share", *LOOKED[3:]), short))
    return [block for block in found if block.rows]


def _score_cells(row: MetricRow) -> list[Cells]:
    """A row per run; the metric is named in the first."""
    named = {"task": row.task, "protocol": row.protocol, "metric": metric_name(row)}
    named["questions / images"] = f"{row.questions} / {row.images}"
    found: list[Cells] = []
    for score, change in zip(row.scores, [None, *row.differences], strict=True):
        cells = {"run": score.run, "score": interval(score, row.percent)}
        if change is not None:
            cells["difference"] = interval(change, row.percent, "+")
            cells |= {"p": f"{change.p:.2g}", "won / lost": f"{change.wins} / {change.losses}"}
        if score.published is not None:
            cells["published"] = f"{score.published:.1f}"
        found.append(cells if found else named | cells)
    return found


def metric_name(row: MetricRow) -> str:
    """A metric's name, with its filter if it has one."""
    return row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"


def _cost_cells(task: TaskInfo) -> list[Cells]:
    return [
        {
            "task": task.task,
            "run": run,
            "questions zoomed": _share(look["zoomed"]),
            "crop's share of the image": _share(look["crop_share"]),
            "tokens a question": "" if look["tokens"] is None else f"{look['tokens']:.0f}",
            "seconds a question": "" if look["seconds"] is None else f"{look['seconds']:.3f}",
        }
        for run, look in task.looks.items()
        if look["questions"]
    ]


def _look_cells(task: TaskInfo, only: str | None = None) -> list[Cells]:
    """A row per size of the answer, with wrong answers split by cause.

    For runs that never zoom, columns about regions stay empty.
    """
    found: list[Cells] = []
    for run, rows in task.boxes.items():
        for place, row in enumerate(rows) if only in (None, run) else ():
            cells = {"task": "" if found else task.task, "run": "" if place else run}
            cells |= {WHOLE: _size(row), "questions": str(row.questions)}
            cells["right"] = _share(row.right / row.questions)
            cells["wrong: no zoom"] = str(row.wrong_no_zoom)
            if row.zoomed:
                cells["region holds the answer"] = _share(row.holds / row.questions)
                cells["wrong: looked wrong"] = str(row.wrong_look)
                cells["wrong: looked right, read wrong"] = str(row.wrong_read)
            found.append(cells)
    return found


def _size(row: Looking) -> str:
    return row.size if row.size == "all" else f"{row.size}, to {100 * row.to_share:.2g} %"


def _missing(comparison: Comparison) -> Section:
    names = [run.name for run in comparison.runs]
    rows = [
        [one.task, one.protocol, one.metric, one.reason]
        + [_total(one.totals[name], one.published[name]) for name in names]
        for one in comparison.not_compared
    ]
    header = ["task", "protocol", "metric", "why", *names]
    return _filled("Not compared question by question", header, rows)


def _left_out(comparison: Comparison) -> Iterator[str]:
    """A sentence for each metric that is not compared question by question."""
    for one in comparison.not_compared:
        totals = ", ".join(f"{n} {_total(t, one.published[n])}" for n, t in one.totals.items())
        yield (
            f"{one.task}: {one.metric} is not compared question by question ({one.reason}): "
            f"{totals}"
        )


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence per task and run: whether it is better, by how much, and whether that is noise."""
    return [
        f"{row.task}: {_verdict(row, score, difference)}"
        for row in comparison.rows
        if row.main
        for score, difference in zip(row.scores[1:], row.differences, strict=True)
    ]


def _verdict(row: MetricRow, score: RunScore, difference: Difference) -> str:
    first = row.scores[0]
    adjusted = " (Holm)" if difference.decisive_p != difference.p else ""
    facts = (
        f"{row.metric} {plain(first, row.percent)} to {plain(score, row.percent)}, "
        f"{interval(difference, row.percent, '+')}, p = {difference.decisive_p:.2g}{adjusted}; "
        f"{difference.wins} won, {difference.losses} lost of {counted(row.questions, 'question')}"
    )
    if difference.verdict == "few":
        count = counted(row.images, "image")
        need = f", {difference.images_needed} are needed" if difference.images_needed else ""
        return f"too few to tell {score.run} from {first.run}: {count}{need} ({facts})"
    if difference.verdict == "same":
        return f"no difference shown between {score.run} and {first.run} ({facts})"
    return f"{score.run} is {difference.verdict} than {first.run} ({facts})"


def cautions(comparison: Comparison) -> list[str]:
    """Sentences that qualify the numbers."""
    found = [f"{run.name}: {label}" for run in comparison.runs for label in run.labels]
    for task in comparison.tasks:
        if task.questions < task.original:
            found.append(
                f"{task.task}: {task.questions} of {counted(task.original, 'document')}, not to "
                "be held against published numbers"
            )
        if task.clusters == "single documents":
            found.append(
                f"{task.task}: no record names the images, so every question counts as independent "
                "and intervals may be too narrow"
            )
    found += [
        f"{row.task}: {counted(row.images, 'image')}, too few for a bootstrap's intervals"
        for row in comparison.rows
        if row.main and not row.percent and row.images < FEW
    ]
    return [*found, *comparison.notes]


def _total(total: float | None, published: float | None) -> str:
    text = "none" if total is None else f"{total:.4g}"
    return text if published is None else f"{text} (published {published:.1f} %)"


def plain(score: RunScore, percent: bool) -> str:
    """A mean without its interval; in percent if scores lie in [0, 1]."""
    return f"{100 * score.mean:.1f}" if percent else f"{score.mean:.4g}"


def interval(of: RunScore | Difference | Point | Estimate, percent: bool, sign: str = "") -> str:
    """`mean [low, high]`; in percent if scores lie in [0, 1]."""
    scale, digits = (100, ".1f") if percent else (1, ".4g")
    return with_interval((of.mean, of.low, of.high), scale, sign + digits)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show(comparison: Comparison, notes: Sequence[str], console: Console) -> None:
    """Prints tables, verdicts, cautions and notes."""
    say = partial(console.print, highlight=False, markup=False)
    for section in blocks(comparison):
        say(section.title)
        for line in columns(section.header, section.rows, console.width):
            say(line, soft_wrap=True)
        say()
    for line in [*_left_out(comparison), *verdicts(comparison)]:
        say(line)
    for line in [*cautions(comparison), *notes]:
        say(f"note: {line}")


def markdown(comparison: Comparison) -> str:
    """Formats verdicts, tables and cautions as Markdown, for pull requests."""
    parts = ["\n".join(f"- **{escaped(line)}**" for line in verdicts(comparison))]
    for section in sections(comparison):
        table = markdown_table(section.header, section.rows)
        parts.append(f"### {section.title}\n\n{table}")
    parts.append("\n".join(f"- {escaped(line)}" for line in cautions(comparison)))
    parts.append(METHOD)
    return "\n\n".join(part for part in parts if part) + "\n"
