"""`make demo`: tiny_vstar through lmms-eval, stock and with the second look, compared.

Leaves lmms-eval's own output folders, the records, a contact sheet of eight questions and
`summary.json` in the output folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from rich.console import Console
from rich.table import Table

from sdrpn.boxes import PixelBox
from sdrpn.draw import Card, sheet
from sdrpn.io.atomic import write_json
from sdrpn.io.plurals import counted
from sdrpn_eval.command_line import written_arguments
from sdrpn_eval.demo import BENCHMARK
from sdrpn_eval.record import read_records
from sdrpn_eval.results.ladder import end_of, run_logged
from sdrpn_eval.results.stats import (
    Estimate,
    clustered,
    clustered_difference,
    rounded,
    with_interval,
)

TASK = "tiny_vstar"
PROPOSERS = {"stock": "none", "rpn": "rpn", "attention": "attention"}
"""What is run, by its name in the summary."""
PATTERN = "**/*_samples_tiny_vstar.jsonl"


class EvaluationFailed(RuntimeError):
    """lmms-eval left no results; it exits with 0 all the same."""


def evaluate(name: str, out: Path, batch_size: int, limit: int | None) -> float:
    """Run lmms-eval with one proposer into out/name; returns the seconds it took."""
    folder = out / name
    arguments = {"pretrained": "tiny", "proposer": PROPOSERS[name]}
    arguments |= {"record": str(folder / "record"), "resume": False}  # what is timed is asked
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_sdrpn", "--tasks", TASK]
    command += ["--model_args", str(written_arguments(arguments)), "--batch_size", str(batch_size)]
    command += ["--output_path", str(folder), "--log_samples"]
    if limit:
        command += ["--limit", str(limit)]
    before = set(folder.glob(PATTERN))
    log = folder / "log.txt"
    _, seconds = run_logged(command, log)
    if not set(folder.glob(PATTERN)) - before:
        raise EvaluationFailed(
            f"lmms-eval wrote no results for {name}; {log} ends with:\n{end_of(log)}"
        )
    return seconds


def read_scores(folder: Path) -> dict[int, float]:
    """Score by document of the latest run in an lmms-eval output folder."""
    latest = max(folder.glob(PATTERN), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in latest.read_text().splitlines()]
    return {line["doc_id"]: line["accuracy"]["score"] for line in lines}


def summarise(
    scores: Mapping[str, Mapping[int, float]], rows: Any, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Accuracies and gains, with 95 % intervals clustered by image."""
    docs = sorted(scores["stock"])
    images = [rows[i]["image_id"] for i in docs]
    groups = {"all": docs} | {
        group: [i for i in docs if rows[i]["category"] == group] for group in ("fine", "coarse")
    }

    def by_group(
        values: Mapping[int, float], how: Callable[..., Estimate] = clustered
    ) -> dict[str, list[float | None]]:
        return {
            group: rounded(how([values[i] for i in some], [rows[i]["image_id"] for i in some]))
            for group, some in groups.items()
            if some
        }

    gain = {i: scores["rpn"][i] - scores["stock"][i] for i in docs}
    gains = by_group(gain, clustered_difference)
    return {
        "task": TASK,
        "n": len(docs),
        "images": len(set(images)),
        "accuracy": {name: by_group(one)["all"][0] for name, one in scores.items()},
        "accuracy_by_group": {name: by_group(one) for name, one in scores.items()},
        "gain": gains["all"][0],
        "gain_interval_95": gains["all"][1:],
        "gain_by_group": gains,
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
    }


def contact_sheet(out: Path, rows: Any, count: int = 8) -> Path:
    """Draw questions that the second look changed, then others: image, box, crop, both answers."""
    seen = {line.doc_id: line for line in read_records(out / "rpn" / "record")}
    stock = {line.doc_id: line for line in read_records(out / "stock" / "record")}
    changed = [i for i in seen if seen[i].answer != stock[i].answer]
    chosen = _different_images([*changed, *seen], rows)[:count]
    cards = []
    for i in chosen:
        row, image = rows[i], rows[i]["image"].convert("RGB")
        cards.append(
            Card(
                image=image,
                question=row["question"],
                answers={
                    "stock": stock[i].answer,
                    "second look": seen[i].answer,
                    "right": f"{row['colour']} {row['answer']}",
                },
                regions=[*seen[i].regions],
                extent=(0, 0, *image.size),  # scenes are square, so they are not padded
                roi_map=seen[i].roi_map,
                truth=PixelBox(*row["box"]),
                note="pink: where it looked; green: the true box",
            )
        )
    return sheet(cards, out / "contact_sheet.png", columns=2)


def _different_images(docs: list[int], rows: Any) -> list[int]:
    """Of each image the first document only, in the order given."""
    first: dict[str, int] = {}
    for i in docs:
        first.setdefault(rows[i]["image_id"], i)
    return list(first.values())


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the comparison."""
    table = Table(
        title=f"{TASK}: {counted(summary['n'], 'question')} on "
        f"{counted(summary['images'], 'image')}"
    )
    groups = list(summary["gain_by_group"])
    for column in ("", *groups, "seconds"):
        table.add_column(column)
    for name, by_group in summary["accuracy_by_group"].items():
        table.add_row(name, *(_cell(by_group[g]) for g in groups), str(summary["seconds"][name]))
    table.add_section()
    table.add_row("rpn - stock", *(_cell(summary["gain_by_group"][g]) for g in groups), "")
    console.print(table)
    console.print("Exact match, 95 % intervals clustered by image; seconds of the whole command.")


def _cell(estimate: Sequence[Any]) -> str:
    return with_interval(estimate, 100, ".1f")


def demo(out: Path, *, batch_size: int = 32, limit: int | None = None) -> dict[str, Any]:
    """Evaluate every proposer, compare, draw; returns what summary.json holds."""
    console = Console()
    seconds = {}
    for name in PROPOSERS:
        with console.status(f"lmms-eval --model llava_sdrpn --tasks {TASK}: {name}"):
            seconds[name] = evaluate(name, out, batch_size, limit)
        console.print(f"{name}: {seconds[name]:.0f} s, {out / name}", highlight=False)
    rows = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    scores = {name: read_scores(out / name) for name in PROPOSERS}
    summary = summarise(scores, rows, seconds)
    write_json(out / "summary.json", summary)
    show(summary, console)
    console.print(f"contact sheet: {contact_sheet(out, rows)}", highlight=False)
    console.print(f"summary: {out / 'summary.json'}", highlight=False)
    return summary
