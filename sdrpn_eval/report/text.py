"""A comparison in words and tables: for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdrpn.plurals import counted
from sdrpn_eval.report.boxes import HOLDS, Looking
from sdrpn_eval.report.results import Comparison, Difference, MetricRow, RunScore

METHOD = (
    "Intervals are 95 %, from a bootstrap that resamples whole images; p is two-sided, of a test "
    "that flips the signs of whole images' differences; wins and losses are questions scored "
    "higher and lower than by the first run."
)

FEW = 20
"""Images below which a bootstrap's interval is too narrow to be believed."""


@dataclass(frozen=True)
class Section:
    """A table with its title; cells are plain text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


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
    few = {r.task: r.images for r in comparison.rows if r.main and r.images < FEW}
    found += [
        f"{task}: {counted(n, 'image')}, too few for these intervals" for task, n in few.items()
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
            "" if look["tokens"] is None else f"{look['tokens']:.0f}",
            "" if look["seconds"] is None else f"{look['seconds']:.3f}",
        ]
        for task in comparison.tasks
        for run, look in task.looks.items()
        if look["questions"]
    ]
    header = ["task", "run", "questions zoomed", "crop's share of the image", "tokens a question"]
    return Section("What it cost", [*header, "seconds a question"], lines)


def _boxes(comparison: Comparison) -> Section:
    lines = [
        [
            task.task if i == j == 0 else "",
            run if j == 0 else "",
            row.size if row.size == "all" else f"{row.size}, to {100 * row.to_share:.2g} %",
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


def _total(total: float | None, published: float | None) -> str:
    text = "none" if total is None else f"{total:.4g}"
    return text if published is None else f"{text} (published {published:.1f} %)"


def _plain(row: MetricRow, value: float) -> str:
    return f"{100 * value:.1f}" if row.percent else f"{value:.4g}"


def _interval(row: MetricRow, score: RunScore) -> str:
    mean, low, high = (_plain(row, value) for value in (score.mean, score.low, score.high))
    return f"{mean} [{low}, {high}]"


def _difference(row: MetricRow, difference: Difference) -> str:
    scale, digits = (100, ".1f") if row.percent else (1, ".4g")
    values = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{scale * v:+{digits}}" for v in values)
    return f"{mean} [{low}, {high}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def show(comparison: Comparison, console: Console) -> None:
    """Print verdicts, tables and cautions."""
    for section in sections(comparison):
        table = Table(title=section.title, title_justify="left")
        for name in section.header:
            table.add_column(escape(name), overflow="fold")  # names cut short are alike
        for cells in section.rows:
            table.add_row(*(escape(cell) for cell in cells))
        console.print(table)
    for line in verdicts(comparison):
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
