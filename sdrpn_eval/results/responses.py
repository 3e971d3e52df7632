"""Reads the responses of a run: as our record holds them, else from lmms-eval's samples.

The record holds each response as the model gave it. lmms-eval logs what its filters left of a
response, which is the response itself only where they take the first of several and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts

from sdrpn.io.plurals import counted
from sdrpn_eval import record, request_types
from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.provenance.model import Provenance, read_latest
from sdrpn_eval.record import RecordLine
from sdrpn_eval.results import read
from sdrpn_eval.results.read import BadRun, Run, Sample, TaskRun
from sdrpn_eval.results.records import by_documents, read_facts, record_lines
from sdrpn_eval.results.scores import Document

NOT_ARGUMENTS = ("record", "resume", "batch_size", "max_batch_size")
"""Arguments that do not affect the questions or answers."""


@dataclass(frozen=True)
class Source:
    """A run to rescore or replay: lmms-eval's results with samples, our record, or both.

    Attributes:
        place: The results file, else the record's folder.
        date: In the run's own files.
        names: Tasks and groups, as requested.
        config: `config` of the results; a record alone gives model, arguments, limit and seeds.
        lines: The lines of our record that belong to the run.
    """

    place: Path
    date: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    run: Run | None
    facts: Provenance | None
    lines: Sequence[RecordLine]

    @property
    def include_path(self) -> Any:
        """lmms-eval's --include_path of the run: where the user's own tasks are."""
        return (self.config.get("resolved_cli_args") or {}).get("include_path")


@dataclass(frozen=True)
class Answered:
    """The responses to one document.

    Attributes:
        given: One per repeat.
        prompt: From the samples; None from a record alone.
        by_words: Responses of a multiple choice by option, whose order in the record differs.
    """

    given: tuple[GenerationResult, ...]
    prompt: str | None = None
    by_words: Mapping[str, GenerationResult] | None = None


def read_source(path: Path, tasks: Sequence[str] = ()) -> Source:
    """Reads a run of lmms-eval, or the record of a run that crashed before it wrote results.

    Args:
        path: An output folder of lmms-eval, a results file, or the folder of a record.
        tasks: Reads only these tasks or groups.

    Raises:
        BadRun: If the run or the record is incomplete.
    """
    try:
        file = read.find_results(path)
    except BadRun:
        places = (path, *(path / place for place in read.PLACES))
        folder = next((f for f in places if any(f.glob(record.FILES))), None)
        if folder is None:
            raise
        return _from_record(folder, tasks)
    groups = read.parse_results(file).get("group_subtasks") or {}
    inner = {member for members in groups.values() for member in members}
    names = tuple(tasks) or tuple(name for name in groups if name not in inner)
    leaves = [leaf for name in names for leaf in _leaves(name, groups)]
    # Without groups, all tasks of the file are read.
    run = read.read_run(path, tasks=dict.fromkeys(leaves) if leaves else None)
    lines, _ = record_lines(run)
    date, config = run.results["date"], run.results["config"]
    return Source(file, date, names or tuple(run.tasks), config, run, read_facts(run), lines)


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    members = groups.get(name) or []
    if not members:
        yield name
    for member in members:
        yield from _leaves(member, groups)


def _from_record(folder: Path, tasks: Sequence[str]) -> Source:
    facts = read_latest(folder, asked=True)
    if facts is None:
        raise BadRun(f"{folder} holds a record without run facts: nothing says what was asked")
    lines = [line for line in record.read_all_records(folder) if line.run == facts.run]
    held = {t: {line.doc_id for line in lines if line.task == t} for t in facts.tasks}
    for task, ids in held.items():
        asked = facts.tasks[task].documents
        if len(ids) < asked:
            raise BadRun(
                f"{folder} holds {len(ids)} of the {counted(asked, 'document')} of {task}: start "
                "the same lmms-eval command again, it goes on there"
            )
    every = [i for ids in held.values() for i in ids]
    known = {name: kind.model_fields.keys() for name, kind in ARGUMENTS.items()}
    config = {
        # The one whose arguments the run has.
        "model": max(known, key=lambda name: len(known[name] & facts.arguments.keys())),
        "model_args": facts.model_args.text if facts.model_args else arguments_of(facts),
        "limit": max(every) - min(every) + 1,
        "offset": min(every),
        **_seeds(facts),
        "resolved_cli_args": {"timezone": "UTC"},
    }
    return Source(folder, facts.run, tuple(tasks) or tuple(held), config, None, facts, lines)


def _seeds(facts: Provenance) -> dict[str, int]:
    """Seeds by their names in lmms-eval's results; empty if it was not started by command line."""
    names = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    given = facts.seeds if isinstance(facts.seeds, list) else []
    return dict(zip(names, given, strict=True)) if len(given) == len(names) else {}


def arguments_of(facts: Provenance) -> dict[str, Any]:
    """The model arguments that affect questions or answers."""
    given = facts.arguments.items()
    return {k: v for k, v in given if v is not None and k not in NOT_ARGUMENTS}


def answers_of(source: Source) -> dict[Document, Answered]:
    """The responses to every document. Raises BadRun if neither record nor samples hold them."""
    found = {document: _recorded(own) for document, own in by_documents(source.lines).items()}
    for task in source.run.tasks.values() if source.run else ():
        for doc_id, sample in task.samples.items():
            document = task.name, doc_id
            answered = found.get(document) or _logged(sample, task, source.place)
            found[document] = replace(answered, prompt=sample.prompt or None)
    return found


def _recorded(lines: Sequence[RecordLine]) -> Answered:
    given = tuple(request_types.result(line) for line in lines)
    if not lines[0].is_loss:
        return Answered(given)
    words = [str(line.continuation) for line in lines]
    return Answered(given, by_words=dict(zip(words, given, strict=True)))


def _logged(sample: Sample, task: TaskRun, place: Path) -> Answered:
    """The response in lmms-eval's samples, of a run without a record of ours."""
    config = task.config
    filters = config.get("filter_list") or []
    steps = [step["function"] for one in filters for step in one["filter"]]
    in_words = (config.get("output_type") or "generate_until") == "generate_until"
    if not in_words or set(steps) - {"take_first"} or (config.get("repeats") or 1) > 1:
        raise BadRun(
            f"{place}: the samples of {task.name} hold what its filters left of the answers "
            f"({config.get('output_type')}, {filters}), and no record of the run tells the whole"
        )
    counts = None if sample.tokens == (None, None) else TokenCounts(*sample.tokens)
    return Answered((GenerationResult(sample.answer, counts),))
