"""Finds the record and the provenance of a run among those in its folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from sdrpn.io.plurals import counted
from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.provenance.model import (
    FILES,
    Provenance,
    begun_runs,
    moment,
    read_provenance,
)
from sdrpn_eval.record import RecordLine, read_all_records, read_records
from sdrpn_eval.results.read import (
    RESULTS,
    BadRun,
    Run,
    beside,
    output_root,
    parse_results,
    results_ended,
)
from sdrpn_eval.results.scores import Document

SET_BACK = timedelta(seconds=2)
"""Tolerance for a clock that is set back while a run starts."""


@dataclass(frozen=True)
class Record:
    """What a run saw.

    Attributes:
        looks: By document, see `_of_document`.
        notes: Sentences about missing or refused parts.
    """

    looks: Mapping[Document, RecordLine] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_looks(run: Run) -> Record:
    """Reads what a run saw from its record."""
    lines, notes = record_lines(run)
    return _as_record(run, lines) if lines else Record(notes=notes)


def record_lines(run: Run) -> tuple[list[RecordLine], tuple[str, ...]]:
    """Reads the lines of a run's record, next to its output or where `record=` put it.

    The run is identified by its provenance or by time, see `own_name`.

    Returns:
        The lines; and if there are none, sentences with the reasons.
    """
    if run.model not in ARGUMENTS:
        return [], ()
    folders = [f for f in record_folders(run) if any(f.glob("record_*_rank*.jsonl"))]
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
    named = None if run.scored_from else _named_record(run)
    places = [Path(named).expanduser()] if named else []
    return [p for p in dict.fromkeys([*places, *beside(run)]) if _is_record(p)]


def _named_record(run: Run) -> str | None:
    """The folder in `record=`; None without one."""
    # Without provenance, parsing arguments imports lmms-eval's parser, which takes seconds.
    if "record" not in str(run.results["config"].get("model_args")):
        return None
    named = str(run.arguments.get("record", "none"))
    return None if named.lower() in ("none", "false") else named


def _is_record(folder: Path) -> bool:
    names = ("record_*_rank*.jsonl", FILES)
    try:
        return any(any(folder.glob(name)) for name in names)
    except (OSError, ValueError):  # not a valid file name
        return False


def unfinished_later_run(run: Run) -> str | None:
    """The name of a run that began after these results in the same folder and left none."""
    begun = set()
    for folder in beside(run):
        begun |= set(begun_runs(folder))
        if any(folder.glob("record_*_rank*.jsonl")):
            begun |= {line.run for line in read_records(folder)}
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


def _as_record(run: Run, lines: list[RecordLine]) -> Record:
    by_document: dict[Document, list[RecordLine]] = {}
    for line in lines:
        by_document.setdefault((line.task, line.doc_id), []).append(line)
    asked = sum(len(task.samples) for task in run.tasks.values())
    notes = ()
    if len(by_document) < asked:
        notes = (
            f"{run.name}: the record covers {len(by_document)} of {counted(asked, 'question')}",
        )
    repeats = {name: task.config.get("repeats") or 1 for name, task in run.tasks.items()}
    return Record({d: _of_document(some, repeats[d[0]]) for d, some in by_document.items()}, notes)


def _of_document(lines: list[RecordLine], repeats: int) -> RecordLine:
    """Merges the lines of a document: the first one, with the seconds and tokens of one answer.

    Seconds and tokens are summed over the options of a multiple choice, and averaged over repeats.

    Args:
        lines: One per repeat, or per option and repeat.
        repeats: How often lmms-eval asked the document.
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


def read_facts(run: Run, folders: list[Path]) -> Provenance | None:
    """Reads the provenance of a run, see `own_name`; None if no folder holds it.

    Another model's results may lie next to ours; it leaves no provenance.
    """
    if run.model not in ARGUMENTS:
        return None
    for folder in folders:
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

    Args:
        run: The run.
        names: From records and provenance; those that are not times are ignored.
        folder: Where their provenance is.

    Returns:
        One of the names; None if all belong to other runs.
    """
    times = {name: at for name in set(names) if (at := moment(name)) and at <= run.ended}
    files = begun_runs(folder)
    facts = {name: _merged(files[name]) for name in times if name in files}
    own = [name for name, of in facts.items() if _lists(of, run)]
    if own:
        return max(own)
    old = sorted(name for name in times if name not in facts or not facts[name].evaluations)
    if run.by_command_line:
        return next((name for name in old if times[name] >= run.began - SET_BACK), None)
    return old[-1] if old else None


def _lists(facts: Provenance, run: Run) -> bool:
    """Whether a run's provenance lists the evaluation of these results, with the same arguments."""
    given = run.results["config"].get("model_args")
    same = facts.model_args is None or facts.model_args.text == given
    return same and run.results["date"] in facts.evaluations


def _merged(files: list[Path]) -> Provenance:
    try:
        return read_provenance(files)
    except ValueError as error:
        raise BadRun(str(error)) from None
