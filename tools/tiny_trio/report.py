"""What `score` measured, in the pages: `python -m tools.tiny_trio.report --readme README.md`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdrpn_eval.demo import HERE
from sdrpn_eval.results.stats import with_interval
from tools.tiny_trio.score import PUBLISHED, THRESHOLDS

FACTS = HERE / "trio" / "facts.json"
FRESH, PAGE = Path("docs") / "tiny_trio_fresh.json", Path("docs") / "tiny_trio.md"
COST = Path("docs") / "editions.json"
"""What `benchmarks.editions` measured."""
MARKS = ("<!-- results -->", "<!-- end of results -->")
RPN = f"rpn, t = {PUBLISHED}"
GROUPS = {
    "all": "all",
    "fine": "fine",
    "coarse": "coarse",
    "vstar": "shapes",
    "relation": "neighbours",
    "textvqa": "signs",
    "docvqa": "pages",
}
"""Groups of questions in the order of the columns, and their headings."""
MOST_SPREAD = 0.02
CLAIMS = {
    "RPN - stock": ("rpn - stock", "mean at least +25", lambda v: v[0] >= 0.25),
    "RPN - ViCrop": ("rpn - vicrop", "mean at least +15", lambda v: v[0] >= 0.15),
    "RPN - attention at its best threshold": (
        "rpn - attention_best",
        "lower end above -0.5",
        lambda v: v[1] > -0.005,
    ),
    "oracle - RPN": ("oracle - rpn", "", lambda v: True),
}
"""Paired differences: key of the result, what was asked of it, whether it holds."""


def shown(result: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the tables: heading by the name in the result."""
    rows = {
        "stock": "stock model",
        "random 4 x 4 cells": "second look at a random region",
        "vicrop": "second look, ViCrop",
        result["attention_best"]: "second look, attention at its best threshold",
        RPN: "**second look, RPN**",
        "oracle": "second look at the true region",
    }
    return {name: title for name, title in rows.items() if name in result["rows"]}


def columns(result: Mapping[str, Any]) -> list[str]:
    """The groups that the result has."""
    return [group for group in GROUPS if group in result["counts"]]


def table(result: Mapping[str, Any], groups: Sequence[str], *, intervals: bool) -> str:
    """Markdown table of scores in percent."""
    lines = [
        f"| exact match, % | {' | '.join(GROUPS[g] for g in groups)} |",
        f"|---|{'---|' * len(groups)}",
    ]
    for name, title in shown(result).items():
        cells = []
        for group in groups:
            value = result["rows"][name][group]
            cell = with_interval(value, 100, ".1f") if intervals else f"{100 * value[0]:.1f}"
            cells.append(f"**{cell}**" if name == RPN and not intervals else cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(result: Mapping[str, Any], groups: Sequence[str]) -> str:
    """Table of the paired differences, what was asked of them and whether it holds."""
    differences: dict[str, Any] = dict(result["differences"])
    if "rpn - oracle" in differences:
        turned = differences["rpn - oracle"]
        differences["oracle - rpn"] = {g: [-v[0], -v[2], -v[1]] for g, v in turned.items()}
    lines = [
        f"| points | {' | '.join(GROUPS[g] for g in groups)} | asked of all | |",
        f"|---|{'---|' * (len(groups) + 2)}",
    ]
    for title, (key, asked, holds) in CLAIMS.items():
        values = differences[key]
        cells = " | ".join(with_interval(values[g], 100, "+.1f") for g in groups)
        verdict = ("holds" if holds(values["all"]) else "**fails**") if asked else ""
        lines.append(f"| {title} | {cells} | {asked} | {verdict} |")
    return "\n".join(lines)


def thresholds(result: Mapping[str, Any]) -> str:
    """Table of the scores over the published thresholds; the spread is best minus worst."""
    lines = [
        f"| all, % | {' | '.join(f't = {t}' for t in THRESHOLDS)} | spread | asked of the RPN | |",
        f"|---|{'---|' * (len(THRESHOLDS) + 3)}",
    ]
    spread = result["rpn_spread_over_thresholds"]
    verdict = "holds" if spread[0] <= MOST_SPREAD else "**fails**"
    claim = f"{with_interval(spread, 100, '.1f')} | at most {100 * MOST_SPREAD:.0f} | {verdict}"
    for proposer in ("rpn", "attention"):
        scores = [100 * result["rows"][f"{proposer}, t = {t}"]["all"][0] for t in THRESHOLDS]
        cells = " | ".join(f"{score:.1f}" for score in scores)
        last = claim if proposer == "rpn" else f"{max(scores) - min(scores):.1f} |  | "
        lines.append(f"| {proposer} | {cells} | {last} |")
    return "\n".join(lines)


def seeds(result: Mapping[str, Any]) -> str:
    """Table of each seed alone."""
    lines = [
        "| seed | RPN | RPN - stock | RPN - ViCrop | RPN - attention at the seed's best |",
        "|---|---|---|---|---|",
    ]
    for row in result["by_seed"]:
        best = next(key for key in row if key.startswith("rpn - attention"))
        cells = [with_interval(row["rpn"], 100, ".1f")]
        keys = ("rpn - stock", "rpn - vicrop", best)
        cells += [with_interval(row[key], 100, "+.1f") if key in row else "" for key in keys]
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(measured: Mapping[str, Any]) -> str:
    """Table of both editions' cost per question."""
    lines = ["| | stock | RPN | image tokens | crop tokens |", "|---|---|---|---|---|"]
    for name, ways in measured["editions"].items():
        seconds = " | ".join(f"{1000 * ways[way]['seconds']:.1f} ms" for way in ("stock", "rpn"))
        tokens = " | ".join(f"{ways['rpn'][key]:.0f}" for key in ("image_tokens", "crop_tokens"))
        lines.append(f"| `{name}` | {seconds} | {tokens} |")
    return "\n".join(lines)


def section(
    result: Mapping[str, Any], facts: Mapping[str, Any], measured: Mapping[str, Any]
) -> str:
    """The page's results; `facts` are those of `build`, `measured` is both editions' cost."""
    labels, training = facts["labels"], facts["training"]
    groups = columns(result)
    numbers = [row["seed"] for row in result["by_seed"]]
    seconds = {
        name: result["rows"][name]["seconds_per_question"]
        for name in ("stock", RPN, result["attention_best"])
    }
    kept, precision, recall, iou = (
        f"{100 * labels[name]:.0f} %" for name in ("kept", "precision", "recall", "iou")
    )
    counts = ", ".join(f"{GROUPS[g]} {result['counts'][g]}" for g in groups if g != "all")
    return f"""{result["questions"]:,} questions on {result["images"]} scenes of the seeds \
{", ".join(map(str, numbers))}, from which
nothing else was drawn ({counts}). Published settings: policy `mask`, threshold {PUBLISHED},
at least 2 cells, at most 225/576 of the grid. Exact match in percent with 95 % intervals clustered
by image ([statistics](statistics.md)); float32 on a CPU, the shipped float16 weights.

{table(result, groups, intervals=True)}

{claims(result, groups)}

{thresholds(result)}

{seeds(result)}

Seconds per question on 2 cores, in batches of 16 questions: stock {seconds["stock"]:.3f}, RPN
{seconds[RPN]:.3f}, attention {seconds[result["attention_best"]]:.3f}. The RPN decodes nothing
before the zoom; attention decodes a whole answer first. Both editions, each on the first
{measured["questions"]} questions of its benchmark, medians of {measured["repeats"]} runs in turns
(`python -m benchmarks.editions`):

{costs(measured)}

Labels: {labels["questions"]:,} questions, of which {kept} were kept; of the labelled cells
{precision} lie on the asked thing, and they cover {recall} of it (IoU {iou}).
The RPN took {training["steps"]:,} steps on {training["samples"]:,} of them."""


def brief(result: Mapping[str, Any]) -> str:
    """The README's table and what it was measured on."""
    groups = columns(result)
    over = {
        name: with_interval(result["differences"][f"rpn - {name}"]["all"], 100, "+.1f")
        for name in ("stock", "vicrop", "attention_best")
    }
    spread = with_interval(result["rpn_spread_over_thresholds"], 100, ".1f")
    return f"""{table(result, groups, intervals=False)}

Measured with the paper's own settings on {result["questions"]:,} questions about \
{result["images"]} scenes of
{len(result["by_seed"])} seeds that nothing else was drawn from, with `tiny-trio`, an embedded
LLaVA of 1.8 M parameters; *fine* is what its first look cannot resolve. The RPN is
{over["stock"]} points over stock, {over["vicrop"]} over ViCrop and
{over["attention_best"]} against the attention that it was trained on, at that attention's best
threshold; over thresholds 0.05 to 0.2 its score varies by {spread} points.
[Intervals, seeds, recipe and what was tried](docs/tiny_trio.md).
**No score of the real LLaVA-1.5 was measured here.**"""


def between_marks(path: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Read the command line and write into the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=FRESH, help="JSON of score --out")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks")
    parser.add_argument("--readme", type=Path, help="README with the marks")
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    facts, measured = json.loads(FACTS.read_text()), json.loads(COST.read_text())
    between_marks(args.page, section(result, facts, measured))
    if args.readme:
        between_marks(args.readme, brief(result))


if __name__ == "__main__":
    main()
