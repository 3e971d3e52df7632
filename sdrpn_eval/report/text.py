"""A comparison in words and tables: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sdrpn.io.plurals import counted
from sdrpn_eval.report.boxes import HOLDS, Looking
from sdrpn_eval.report.columns import columns
from sdrpn_eval.report.results import Comparison, Difference, MetricRow, RunScore, TaskInfo
from sdrpn_eval.stats import with_interval

METHOD = (
    "Intervals are 95 %, clustered by image: of scores in [0, 1] Korn and Graubard's, of their "
    "differences from those of gains and losses, of other scores a bootstrap over images. p is "
    "two-sided, of a test that flips the signs of whole images' differences; wins and losses are "
    "questions scored higher and lower than by the first run."
)

FEW = 20
"""Images below which a bootstrap's interval is too narrow to be believed."""


@dataclass(frozen=True)
class Section:
    """A table with its title; cells are plain text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def blocks(comparison: Comparison) -> list[Section]:
    """The tables for a terminal: one a metric or task, named in its title, a row a run.

    The columns that matter most come first; what does not fit stands in the page.
    """
    found = [_score_block(row) for row in comparison.rows]
    for task in comparison.tasks:
        found += _look_blocks(task)
    return [_without_empty(block) for block in found]


def _score_block(row: MetricRow) -> Section:
    differences = [None, *row.differences]
    lines = [
        [
            score.run,
            _interval(row, score),
            _difference(row, difference) if difference else "",
            f"{difference.p:.2g}" if difference else "",
            f"{score.published:.1f}" if score.published is not None else "",
            f"{difference.wins} / {difference.losses}" if difference else "",
        ]
        for score, difference in zip(row.scores, differences, strict=True)
    ]
    header = ["run", "score", "difference", "p", "published", "won / lost"]
    metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
    named = ", ".join(part for part in (row.task, row.protocol, metric) if part)
    counts = f"{counted(row.questions, 'question')}, {counted(row.images, 'image')}"
    return Section(f"{named}: {counts}", header, lines)


def _look_blocks(task: TaskInfo) -> list[Section]:
    """What it cost, a row a run; then where each run looked, a row a size."""
    costs = [
        [run, _share(look["zoomed"]), _share(look["crop_share"]), *_cost(look)]
        for run, look in task.looks.items()
        if look["questions"]
    ]
    header = ["run", "questions zoomed", "crop's share of the image"]
    header += ["tokens a question", "seconds a question"]
    found = [Section(f"{task.task}: what it cost", header, costs)] if costs else []
    for run, rows in task.boxes.items():
        lines = [
            [
                _size(row),
                str(row.questions),
                _share(row.right / row.questions),
                _share(row.holds / row.questions) if row.zoomed else "",
                *_errors(row),
            ]
            for row in rows
        ]
        header = ["answer's share", "questions", "right", "region holds the answer"]
        header += ["wrong: no zoom", "wrong: looked wrong", "wrong: looked right, read wrong"]
        found.append(Section(f"{task.task}, {run}: where it looked", header, lines))
    return found


def sections(comparison: Comparison) -> list[Section]:
    """All tables that have rows, in reading order."""
    every = [_scores(comparison), _looks(comparison), _boxes(comparison), _missing(comparison)]
    return [_without_empty(section) for section in every if section.rows]


def _without_empty(section: Section) -> Section:
    """Columns that say nothing, such as published numbers where there are none, are left out."""
    filled = [i for i, _ in enumerate(section.header) if any(cells[i] for cells in section.rows)]
    return Section(
        section.title,
        [section.header[i] for i in filled],
        [[cells[i] for i in filled] for cells in section.rows],
    )


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence a task and run: is it better, by how much, and is that more than noise."""
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
        f"{row.metric} {_plain(row, first.mean)} to {_plain(row, score.mean)}, "
        f"{_difference(row, difference)}, p = {difference.decisive_p:.2g}{adjusted}; "
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
    """What a reader must know before believing the numbers."""
    found = [f"{run['name']}: {label}" for run in comparison.runs for label in run["labels"]]
    for task in comparison.tasks:
        if task.questions < task.original:
            found.append(
                f"{task.task}: {task.questions} of {counted(task.original, 'document')}, not to "
                "be held "
                "against published numbers"
            )
        if task.clusters == "single documents":
            found.append(
                f"{task.task}: no record names the images, so every question counts as independent "
                "and intervals may be too narrow"
            )
    bootstrapped = [row for row in comparison.rows if row.main and not row.percent]
    few = {row.task: row.images for row in bootstrapped if row.images < FEW}
    found += [
        f"{task}: {counted(n, 'image')}, too few for a bootstrap's intervals"
        for task, n in few.items()
    ]
    return [*found, *comparison.notes]


def _scores(comparison: Comparison) -> Section:
    lines = []
    for row in comparison.rows:
        for i, score in enumerate(row.scores):
            difference = row.differences[i - 1] if i else None
            metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
            first = [row.task, row.protocol, metric, f"{row.questions} / {row.images}"]
            lines.append(
                [
                    *(first if i == 0 else [""] * len(first)),
                    score.run,
                    _interval(row, score),
                    _difference(row, difference) if difference else "",
                    f"{difference.p:.2g}" if difference else "",
                    f"{difference.wins} / {difference.losses}" if difference else "",
                    f"{score.published:.1f}" if score.published is not None else "",
                ]
            )
    header = ["task", "protocol", "metric", "questions / images", "run", "score", "difference"]
    return Section("Scores", [*header, "p", "won / lost", "published"], lines)


def _looks(comparison: Comparison) -> Section:
    lines = [
        [
            task.task,
            run,
            _share(look["zoomed"]),
            _share(look["crop_share"]),
            *_cost(look),
        ]
        for task in comparison.tasks
        for run, look in task.looks.items()
        if look["questions"]
    ]
    header = ["task", "run", "questions zoomed", "crop's share of the image", "tokens a question"]
    return Section("What it cost", [*header, "seconds a question"], lines)


def _cost(look: Mapping[str, Any]) -> list[str]:
    """Tokens and seconds a question."""
    return [
        "" if look["tokens"] is None else f"{look['tokens']:.0f}",
        "" if look["seconds"] is None else f"{look['seconds']:.3f}",
    ]


def _size(row: Looking) -> str:
    return row.size if row.size == "all" else f"{row.size}, to {100 * row.to_share:.2g} %"


def _boxes(comparison: Comparison) -> Section:
    lines = [
        [
            task.task if i == j == 0 else "",
            run if j == 0 else "",
            _size(row),
            str(row.questions),
            _share(row.right / row.questions),
            _share(row.holds / row.questions) if row.zoomed else "",
            *_errors(row),
        ]
        for task in comparison.tasks
        for i, (run, rows) in enumerate(task.boxes.items())
        for j, row in enumerate(rows)
    ]
    header = ["task", "run", "answer's share of the image", "questions", "right"]
    header += ["region holds the answer", "wrong: no zoom", "wrong: looked wrong"]
    title = f"Where it looked (to hold the answer: to cover {HOLDS:.0%} of its box)"
    return Section(title, [*header, "wrong: looked right, read wrong"], lines)


def _errors(row: Looking) -> list[str]:
    """The wrong answers three ways; a run that never zooms looked neither right nor wrong."""
    looked = [str(row.wrong_look), str(row.wrong_read)] if row.zoomed else ["", ""]
    return [str(row.wrong_no_zoom), *looked]


def _missing(comparison: Comparison) -> Section:
    names = [run["name"] for run in comparison.runs]
    lines = [
        [
            one.task,
            one.protocol,
            one.metric,
            one.reason,
            *(_total(one.totals[n], one.published[n]) for n in names),
        ]
        for one in comparison.not_compared
    ]
    header = ["task", "protocol", "metric", "why", *names]
    return Section("Not compared question by question", header, lines)


def _left_out(comparison: Comparison) -> list[str]:
    """What is not compared question by question, a sentence a metric."""
    return [
        f"{one.task}: {one.metric} is not compared question by question ({one.reason}): "
        + ", ".join(f"{n} {_total(t, one.published[n])}" for n, t in one.totals.items())
        for one in comparison.not_compared
    ]


def _total(total: float | None, published: float | None) -> str:
    text = "none" if total is None else f"{total:.4g}"
    return text if published is None else f"{text} (published {published:.1f} %)"


def _plain(row: MetricRow, value: float) -> str:
    return f"{100 * value:.1f}" if row.percent else f"{value:.4g}"


def _interval(row: MetricRow, score: RunScore) -> str:
    scale, digits = (100, ".1f") if row.percent else (1, ".4g")
    return with_interval((score.mean, score.low, score.high), scale, digits)


def _difference(row: MetricRow, difference: Difference) -> str:
    scale, digits = (100, ".1f") if row.percent else (1, ".4g")
    ends = (difference.mean, difference.low, difference.high)
    return with_interval(ends, scale, f"+{digits}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show(comparison: Comparison, console: Console) -> None:
    """Print verdicts, tables and cautions."""
    for section in blocks(comparison):
        console.print(section.title, highlight=False, markup=False)
        for line in columns(section.header, section.rows, console.width):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()
    for line in [*_left_out(comparison), *verdicts(comparison)]:
        console.print(line, highlight=False, markup=False)
    for line in cautions(comparison):
        console.print(f"note: {line}", highlight=False, markup=False)


def markdown(comparison: Comparison) -> str:
    """The same, ready to paste into a pull request."""
    parts = ["\n".join(f"- **{_cell(line)}**" for line in verdicts(comparison))]
    for section in sections(comparison):
        lines = [section.header, ["---"] * len(section.header), *section.rows]
        table = "\n".join("| " + " | ".join(_cell(c) for c in cells) + " |" for cells in lines)
        parts.append(f"### {section.title}\n\n{table}")
    parts.append("\n".join(f"- {_cell(line)}" for line in cautions(comparison)))
    parts.append(METHOD)
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    """Text that Markdown takes as it stands."""
    for character in "\\`*_|<>":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
