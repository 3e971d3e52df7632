"""What a run saw, from our record: only where the record is of this very run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from sdrpn.boxes import PixelBox
from sdrpn.io.plurals import counted
from sdrpn_eval.record import read_all_records, read_records
from sdrpn_eval.report.facts import begun_runs, moment, own_name
from sdrpn_eval.results.read import RESULTS, Run, parse_results, results_ended
from sdrpn_eval.results.scores import Document
from sdrpn_eval.schemas import RecordLine

PLACES = ("sdrpn_record", "record")
"""Folders beside lmms-eval's output where a record may be."""


@dataclass(frozen=True)
class Look:
    """One question's line of the record. size: (width, height) of its first image, in pixels.

    images: content hashes. seconds and tokens are of one answer: summed over the options of a
    multiple choice, the mean over its repeats.
    heat: the RoI map as recorded, base64, with its grid (rows, columns).
    """

    images: tuple[str, ...]
    size: tuple[int, int] | None
    regions: tuple[PixelBox, ...]
    reason: str | None
    seconds: float
    tokens: Mapping[str, float]
    heat: str | None
    grid: tuple[int, int] | None
    map_max: float | None

    @property
    def share(self) -> float | None:
        """Part of the image that the regions cover, in (0, 1]; None without a zoom."""
        if not self.regions or self.size is None:
            return None
        return covered(self.regions, PixelBox(0, 0, *self.size))


@dataclass(frozen=True)
class Record:
    """The looks of a run by document. notes: what there is to say about the record."""

    looks: Mapping[Document, Look] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def covered(regions: Sequence[PixelBox], box: PixelBox) -> float:
    """The share of a box that lies inside at least one region, exact in whole pixels."""
    xs = sorted({box.x0, box.x1, *(min(max(x, box.x0), box.x1) for r in regions for x in r[::2])})
    ys = sorted({box.y0, box.y1, *(min(max(y, box.y0), box.y1) for r in regions for y in r[1::2])})
    area = 0
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            if any(r.x0 <= x0 and x1 <= r.x1 and r.y0 <= y0 and y1 <= r.y1 for r in regions):
                area += (x1 - x0) * (y1 - y0)
    return area / box.area


def read_looks(run: Run) -> Record:
    """What a run saw, by the record that belongs to it."""
    lines, notes = record_lines(run)
    return _as_record(run, lines) if lines else Record(notes=notes)


def record_lines(run: Run) -> tuple[list[RecordLine], tuple[str, ...]]:
    """Lines of the record that belongs to a run, beside its output or where `record=` put it.

    They are found by the run's name and time, see `own_name`, whatever they answer. Without any,
    sentences that say why: a record whose answers contradict the samples is not used either.
    """
    if run.model != "llava_sdrpn":
        return [], ()
    folders = [f for f in record_folders(run) if any(f.glob("record_*_rank*.jsonl"))]
    if not folders:
        return [], (f"{run.name}: no record found",)
    refused = []
    for folder in folders:
        every = [line for line in read_all_records(folder) if line["task"] in run.tasks]
        names = {line["run"] for line in every}
        name = own_name(run, names, folder)
        lines = [line for line in every if line["run"] == name]
        wrong = _contradictions(run, lines)
        if every and not lines:
            refused.append(
                f"{run.name}: the record in {folder} is of other runs, the latest of which began "
                f"at {max(names)}, and is not used"
            )
        if lines and not wrong:
            return lines, ()
        if wrong:
            refused.append(
                f"{run.name}: the record in {folder} is of another run ({wrong} of "
                f"{counted(len(lines), 'answer')} "
                "differ) and is not used"
            )
    return [], tuple(refused) or (f"{run.name}: the record holds none of its questions",)


def output_root(run: Run) -> Path:
    """The --output_path of a run: lmms-eval adds the model's name, which may be two folders."""
    name = str(run.results.get("model_name_sanitized") or "")
    above = run.file.resolve().parents
    return above[min(len(Path(name).parts), len(above) - 1)]


def record_folders(run: Run) -> list[Path]:
    """Folders that may hold this run's record and facts: `record=`, then beside its output.

    A run scored anew has its own copy, with the new scorer in its facts.
    """
    named = None if run.scored_from else _named_record(run)
    places = [Path(named).expanduser()] if named else []
    return [p for p in dict.fromkeys([*places, *_beside(run)]) if _is_record(p)]


def _named_record(run: Run) -> str | None:
    """What `record=` names."""
    # To read the arguments takes lmms-eval's own parser, whose import takes seconds.
    if "record" not in str(run.results["config"].get("model_args")):
        return None
    named = str(run.arguments.get("record", "none"))
    return None if named.lower() in ("none", "false") else named


def _beside(run: Run) -> list[Path]:
    roots = (run.folder.resolve(), run.file.resolve().parent, output_root(run))
    return [folder / place for folder in dict.fromkeys(roots) for place in PLACES]


def _is_record(folder: Path) -> bool:
    names = ("record_*_rank*.jsonl", "run_facts_*_rank*.json")
    try:
        return any(any(folder.glob(name)) for name in names)
    except (OSError, ValueError):  # a name that no file can have
        return False


def unfinished_later_run(run: Run) -> str | None:
    """The name of a run that began in this output folder after its results, and left none."""
    begun = set()
    for folder in _beside(run):
        begun |= set(begun_runs(folder))
        if any(folder.glob("record_*_rank*.jsonl")):
            begun |= {line["run"] for line in read_records(folder)}
    later = {name for name in begun if (at := moment(name)) and at > run.ended}
    if not later:
        return None
    # Another model's finished run may share the folder.
    ends = [end for f in output_root(run).rglob(f"*{RESULTS}") if (end := _ended(f))]
    return next((n for n in sorted(later, reverse=True) if _after_all(n, ends)), None)


def _ended(file: Path) -> datetime | None:
    try:
        return results_ended(parse_results(file))
    except ValueError:
        return None


def _after_all(name: str, ends: Sequence[datetime]) -> bool:
    at = moment(name)
    return at is not None and all(at > end for end in ends)


def _contradictions(run: Run, lines: list[RecordLine]) -> int:
    """Lines of documents that the run has not, or answered otherwise.

    The answer must stand in the samples' response, which a task's filter may have shortened.
    """
    wrong = 0
    for line in lines:
        sample = run.tasks[line["task"]].samples.get(line["doc_id"])
        if sample is None:
            wrong += 1
        elif "continuation" not in line:
            said, recorded = sample.answer.strip(), str(line["answer"]).strip()
            wrong += said not in recorded and recorded not in said
    return wrong


def _as_record(run: Run, lines: list[RecordLine]) -> Record:
    by_document: dict[Document, list[RecordLine]] = {}
    for line in lines:
        by_document.setdefault((line["task"], line["doc_id"]), []).append(line)
    asked = sum(len(task.samples) for task in run.tasks.values())
    notes = ()
    if len(by_document) < asked:
        notes = (
            f"{run.name}: the record covers {len(by_document)} of {counted(asked, 'question')}",
        )
    repeats = {name: task.config.get("repeats") or 1 for name, task in run.tasks.items()}
    return Record({d: _look(some, repeats[d[0]]) for d, some in by_document.items()}, notes)


def _look(lines: list[RecordLine], repeats: int) -> Look:
    """repeats: how often lmms-eval asked the document: it writes down as many lines, or as many
    for each option."""
    first = lines[0]
    options = max(1, round(len(lines) / repeats)) if "continuation" in first else 1
    times = len(lines) / options
    images, grid = first["images"], first["grid"]
    return Look(
        images=tuple(image["hash"] for image in images),
        size=(images[0]["size"][0], images[0]["size"][1]) if images else None,
        regions=tuple(PixelBox(*box) for box in first["regions"]),
        reason=first["no_zoom"],
        seconds=sum(line["seconds"] for line in lines) / times,
        tokens={
            k: sum(line["tokens"].get(k, 0) for line in lines) / times for k in first["tokens"]
        },
        heat=first["map"],
        grid=(grid[0], grid[1]) if grid else None,
        map_max=first["map_max"],
    )


def averages(record: Record, documents: Sequence[Document]) -> dict[str, float | int | None]:
    """Share of questions zoomed, mean crop share of the zoomed, tokens and seconds a question."""
    looks = [record.looks[d] for d in documents if d in record.looks]
    shares = [look.share for look in looks if look.share is not None]
    if not looks:
        return {"questions": 0, "zoomed": None, "crop_share": None, "tokens": None, "seconds": None}
    return {
        "questions": len(looks),
        "zoomed": len(shares) / len(looks),
        "crop_share": float(np.mean(shares)) if shares else None,
        "tokens": float(np.mean([sum(look.tokens.values()) for look in looks])),
        "seconds": float(np.mean([look.seconds for look in looks])),
    }
