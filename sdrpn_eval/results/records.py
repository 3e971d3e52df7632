"""Finds the record and the provenance of a run among those in its folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from sdrpn.io.plurals import counted
from sdrpn_eval import record
from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.provenance import model as provenance
from sdrpn_eval.provenance.model import Provenance, begun_runs, moment
from sdrpn_eval.record import RecordLine, read_all_records, read_records
from sdrpn_eval.results import read
from sdrpn_eval.results.read import BadRun, Run, beside
from sdrpn_eval.results.scores import Document

SET_BACK = timedelta(seconds=2)
"""Tolerance for a clock that is set back while a run starts."""


@dataclass(frozen=True)
class Record:
    """What a run saw: a merged line per document, and notes about missing or refused parts."""

    looks: Mapping[Document, RecordLine] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_looks(run: Run) -> Record:
    """Reads what a run saw from its record."""
    lines, notes = record_lines(run)
    if not lines:
        return Record(notes=notes)
    by_document = by_documents(lines)
    asked = sum(len(task.samples) for task in run.tasks.values())
    if len(by_document) < asked:
        held = f"{len(by_document)} of {counted(asked, 'question')}"
        notes = (f"{run.name}: the record covers {held}",)
    repeats = {name: task.config.get("repeats") or 1 for name, task in run.tasks.items()}
    return Record({d: _of_document(some, repeats[d[0]]) for d, some in by_document.items()}, notes)


def by_documents(lines: Iterable[RecordLine]) -> dict[Document, list[RecordLine]]:
    """The lines of each document: several for a multiple choice, and for repeats."""
    found: dict[Document, list[RecordLine]] = {}
    for line in lines:
        found.setdefault((line.task, line.doc_id), []).append(line)
    return found


def record_lines(run: Run) -> tuple[list[RecordLine], tuple[str, ...]]:
    """Reads the lines of a run's record, next to its output or where `record=` put it.

    The run is identified by its provenance or by time, see `own_name`.

    Returns:
        The lines; and if there are none, sentences with the reasons.
    """
    if run.model not in ARGUMENTS:
        return [], ()
    folders = [f for f in record_folders(run) if any(f.glob(record.FILES))]
    if not folders:
        return [], (f"{run.name}: no record found",)
    notes = []
    for folder in folders:
        every = [line for line in read_all_records(folder) if line.task in run.tasks]
        names = {line.run for line in every}
        name = own_name(run, names, folder)
        lines = [line for line in every if line.run == name]
        if lines:
            return lines, ()
        if every:
            notes.append(
                f"{run.name}: the record in {folder} is of other runs, the latest of which began "
                f"at {max(names)}, and is not used"
            )
    return [], tuple(notes) or (f"{run.name}: the record holds none of its questions",)


def record_folders(run: Run) -> list[Path]:
    """Folders that may hold a run's record and provenance: `record=`, then next to its output.

    A rescored run has its own copy, with the new scorer in its provenance.
    """
    places = beside(run)
    # Without provenance, parsing arguments imports lmms-eval's parser, which takes seconds.
    if not run.scored_from and "record" in str(run.results["config"].get("model_args")):
        named = str(run.arguments.get("record", "none"))
        if named.lower() not in ("none", "false"):
            places.insert(0, Path(named).expanduser())
    return [place for place in dict.fromkeys(places) if _is_record(place)]


def _is_record(folder: Path) -> bool:
    try:
        return any(any(folder.glob(name)) for name in (record.FILES, provenance.FILES))
    except (OSError, ValueError):  # not a valid file name
        return False


def unfinished_later_run(run: Run) -> str | None:
    """The name of a run that began after these results in the same folder and left none."""
    begun = set()
    for folder in beside(run):
        begun |= set(begun_runs(folder))
        if any(folder.glob(record.FILES)):
            begun |= {line.run for line in read_records(folder)}
    later = [(at, name) for name in begun if (at := moment(name)) and at > run.ended]
    if not later:
        return None
    at, name = max(later)
    # Another model's finished run may share the folder.
    ends = [_ended(file) for file in read.output_root(run).rglob(f"*{read.RESULTS}")]
    return name if all(at > end for end in ends if end) else None


def _ended(file: Path) -> datetime | None:
    try:
        return read.began_and_ended(file, read.parse_results(file))[1]
    except BadRun:
        return None


def _of_document(lines: list[RecordLine], repeats: int) -> RecordLine:
    """Merges the lines of a document: the first one, with the seconds and tokens of one answer.

    Seconds and tokens are summed over the options of a multiple choice, and averaged over repeats.
    """
    options = max(1, round(len(lines) / repeats)) if lines[0].is_loss else 1
    times = len(lines) / options
    tokens = {k: sum(line.tokens.get(k, 0) for line in lines) / times for k in lines[0].tokens}
    seconds = sum(line.seconds for line in lines) / times
    return lines[0].model_copy(update={"tokens": tokens, "seconds": seconds})


def averages(record: Record, documents: Sequence[Document]) -> dict[str, float | int | None]:
    """Averages over questions: share zoomed, crop share of the zoomed, tokens, seconds."""
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


# Provenance


def read_facts(run: Run) -> Provenance | None:
    """Reads the provenance of a run, see `own_name`; None if no folder holds it.

    Another model's results may lie next to ours; it leaves no provenance.
    """
    if run.model not in ARGUMENTS:
        return None
    for folder in record_folders(run):
        begun = begun_runs(folder)
        name = own_name(run, begun, folder)
        if name is not None:
            return _merged(begun[name])
    return None


def own_name(run: Run, names: Iterable[str], folder: Path) -> str | None:
    """Finds the name of a run among those in a record's folder.

    Provenance lists the dates of the evaluations that asked the model, one of which is that of the
    results. Older versions did not record them: there it is the first run that began during the
    evaluation, whose command line makes the model right after its date; or, from Python, where the
    model may be older, the last one that began before the results were written.

    Returns:
        One of the names; None if all belong to other runs or are no times.
    """
    times = {name: at for name in set(names) if (at := moment(name)) and at <= run.ended}
    files = begun_runs(folder)
    facts = {name: _merged(files[name]) for name in times if name in files}
    given, date = run.results["config"].get("model_args"), run.results["date"]
    own = [
        name
        for name, of in facts.items()
        if date in of.evaluations and (of.model_args is None or of.model_args.text == given)
    ]
    if own:
        return max(own)
    old = sorted(name for name in times if name not in facts or not facts[name].evaluations)
    if run.cli and not run.scored_from:
        return next((name for name in old if times[name] >= run.began - SET_BACK), None)
    return old[-1] if old else None


def _merged(files: list[Path]) -> Provenance:
    try:
        return provenance.read_provenance(files)
    except ValueError as error:
        raise BadRun(str(error)) from None
