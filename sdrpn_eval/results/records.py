"""The record and the provenance that belong to a run: only where they are of this very run."""

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
"""What a clock may be set back by while a run starts."""


@dataclass(frozen=True)
class Record:
    """What a run saw, by document; see `_of_document`. notes: what there is to say about it."""

    looks: Mapping[Document, RecordLine] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_looks(run: Run) -> Record:
    """What a run saw, by the record that belongs to it."""
    lines, notes = record_lines(run)
    return _as_record(run, lines) if lines else Record(notes=notes)


def record_lines(run: Run) -> tuple[list[RecordLine], tuple[str, ...]]:
    """Lines of the record that belongs to a run, beside its output or where `record=` put it.

    They are found by the run's name and time, see `own_name`, whatever they answer. Without any,
    sentences that say why: a record whose answers contradict the samples is not used either.
    """
    if run.model not in ARGUMENTS:
        return [], ()
    folders = [f for f in record_folders(run) if any(f.glob("record_*_rank*.jsonl"))]
    if not folders:
        return [], (f"{run.name}: no record found",)
    refused = []
    for folder in folders:
        every = [line for line in read_all_records(folder) if line.task in run.tasks]
        names = {line.run for line in every}
        name = own_name(run, names, folder)
        lines = [line for line in every if line.run == name]
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
                f"{counted(len(lines), 'answer')} differ) and is not used"
            )
    return [], tuple(refused) or (f"{run.name}: the record holds none of its questions",)


def record_folders(run: Run) -> list[Path]:
    """Folders that may hold this run's record and facts: `record=`, then beside its output.

    A run scored anew has its own copy, with the new scorer in its facts.
    """
    named = None if run.scored_from else _named_record(run)
    places = [Path(named).expanduser()] if named else []
    return [p for p in dict.fromkeys([*places, *beside(run)]) if _is_record(p)]


def _named_record(run: Run) -> str | None:
    """What `record=` names."""
    # Where no provenance holds the arguments, reading them takes lmms-eval's parser, and seconds.
    if "record" not in str(run.results["config"].get("model_args")):
        return None
    named = str(run.arguments.get("record", "none"))
    return None if named.lower() in ("none", "false") else named


def _is_record(folder: Path) -> bool:
    names = ("record_*_rank*.jsonl", FILES)
    try:
        return any(any(folder.glob(name)) for name in names)
    except (OSError, ValueError):  # a name that no file can have
        return False


def unfinished_later_run(run: Run) -> str | None:
    """The name of a run that began in this output folder after its results, and left none."""
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


def _contradictions(run: Run, lines: list[RecordLine]) -> int:
    """Counts documents that the run does not have, or none of whose answers is the run's.

    One must contain the other: a task's filter may have shortened the answer in the samples, which
    hold the first of several repeats.
    """
    agree: dict[Document, bool] = {}
    for line in lines:
        document = line.task, line.doc_id
        sample = run.tasks[line.task].samples.get(line.doc_id)
        said, recorded = sample.answer.strip() if sample else "", line.answer.strip()
        same = sample is not None and (line.is_loss or said in recorded or recorded in said)
        agree[document] = same or agree.get(document, False)
    return list(agree.values()).count(False)


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
    """The lines of a document as one: the first, with the seconds and tokens of one answer.

    Those are summed over the options of a multiple choice, and the mean over its repeats.

    repeats: how often lmms-eval asked the document: it writes down as many lines, or as many for
        each option.
    """
    options = max(1, round(len(lines) / repeats)) if lines[0].is_loss else 1
    times = len(lines) / options
    tokens = {k: sum(line.tokens.get(k, 0) for line in lines) / times for k in lines[0].tokens}
    seconds = sum(line.seconds for line in lines) / times
    return lines[0].model_copy(update={"tokens": tokens, "seconds": seconds})


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


# Provenance


def read_facts(run: Run, folders: list[Path]) -> Provenance | None:
    """The run's own facts, see `own_name`; None where no folder holds them.

    Another model may have written its results beside ours: it leaves no facts.
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
    """Which of the runs that left something in a folder is the one that left these results.

    A run is named by the time when its model was made. lmms-eval's command line makes it right
    after the time that stands in the results, so it is the first one of those that began while the
    evaluation ran, and that has its arguments: others may run in the same folder at the same time.
    From Python the model may be older, and a run scored anew has the record of the one it is from:
    there it is the last one that began before the results were written.

    Args:
        names: of runs, as in facts and records; those that are no time are left out.
        folder: where their facts are.

    Returns:
        One of the names; None where all are other runs'.
    """
    begun = sorted(name for name in set(names) if (at := moment(name)) and at <= run.ended)
    if not run.by_command_line:
        return begun[-1] if begun else None
    inside = [name for name in begun if _moment(name) >= run.began - SET_BACK]
    if len(inside) > 1:
        inside = [name for name in inside if not _has_other_arguments(run, name, folder)]
    # After its time stands before just before it.
    return min(inside, key=lambda name: (_moment(name) < run.began, name), default=None)


def _has_other_arguments(run: Run, name: str, folder: Path) -> bool:
    """Whether a run's facts tell of other arguments than the results do."""
    files = begun_runs(folder).get(name)
    recorded = _merged(files).arguments if files else {}
    for argument, value in run.arguments.items():
        # A prompt may be named by its file, and is recorded as its text.
        if argument in recorded and argument != "system_prompt":
            try:
                given = getattr(ARGUMENTS[run.model].of({argument: value}), argument)
            except ValueError:  # of another version
                continue
            if given != recorded[argument]:
                return True
    return False


def _moment(name: str) -> datetime:
    at = moment(name)
    assert at is not None  # names that are no time are left out before
    return at


def _merged(files: list[Path]) -> Provenance:
    try:
        return read_provenance(files)
    except ValueError as error:
        raise BadRun(str(error)) from None
