"""Reads the responses of a run: from its samples, else from our record.

lmms-eval logs what its filters left of a response. If they did more than take the first of several
answers, only our record holds the response itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.reasoning import parse_reasoning_tags_config

from sdrpn.io.atomic import parsed
from sdrpn.io.plurals import counted
from sdrpn_eval import request_types
from sdrpn_eval.command_line import written_arguments
from sdrpn_eval.provenance.model import Provenance, read_latest
from sdrpn_eval.record import RecordLine, read_all_records
from sdrpn_eval.results.read import (
    PLACES,
    BadRun,
    Run,
    TaskRun,
    find_results,
    parse_results,
    read_run,
    samples_file,
)
from sdrpn_eval.results.records import read_facts, record_folders, record_lines
from sdrpn_eval.results.scores import Document
from sdrpn_eval.schemas import SAMPLE

NOT_ARGUMENTS = ("record", "resume", "batch_size", "max_batch_size")
"""Arguments that say how a run was executed, and not what was asked."""


@dataclass(frozen=True)
class Source:
    """A run to score or ask again: lmms-eval's results with samples, our record, or both.

    Attributes:
        place: The results file, else the record's folder.
        names: Tasks and groups, as requested.
        config: `config` of the results; a record alone gives model, arguments, limit and seeds.
        lines: The lines of our record that belong to the run.
    """

    place: Path
    names: tuple[str, ...]
    config: Mapping[str, Any]
    run: Run | None
    facts: Provenance | None
    lines: Sequence[RecordLine]

    @property
    def include_path(self) -> Any:
        """lmms-eval's --include_path of the run: where the user's own tasks are."""
        return (self.config.get("resolved_cli_args") or {}).get("include_path")

    def lines_of(self, document: Document) -> list[RecordLine]:
        """The record's lines of a document: one, or one per option of a multiple choice."""
        return [line for line in self.lines if (line.task, line.doc_id) == document]


@dataclass(frozen=True)
class Answered:
    """The responses to one document.

    Attributes:
        given: In the order in which lmms-eval asks: every request, every repeat.
        prompt, target: From the samples; None from a record alone.
        by_words: Responses of a multiple choice by option, from a record, whose order differs.
    """

    given: tuple[GenerationResult, ...]
    prompt: str | None = None
    target: str | None = None
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
        file = find_results(path)
    except BadRun:
        places = (path, *(path / place for place in PLACES))
        folder = next((f for f in places if any(f.glob("record_*_rank*.jsonl"))), None)
        if folder is None:
            raise
        return _from_record(folder, tasks)
    groups = parse_results(file).get("group_subtasks") or {}
    inner = {member for members in groups.values() for member in members}
    names = tuple(tasks) or tuple(name for name in groups if name not in inner)
    leaves = [leaf for name in names for leaf in _leaves(name, groups)]
    # A file without groups: all of its tasks.
    run = read_run(path, tasks=dict.fromkeys(leaves) if leaves else None)
    lines, _ = record_lines(run)
    facts = read_facts(run, record_folders(run))
    return Source(file, names or tuple(run.tasks), run.results["config"], run, facts, lines)


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
    lines = [line for line in read_all_records(folder) if line.run == facts.run]
    held = {t: {line.doc_id for line in lines if line.task == t} for t in facts.documents}
    for task, ids in held.items():
        if len(ids) < facts.documents[task]:
            raise BadRun(
                f"{folder} holds {len(ids)} of the {counted(facts.documents[task], 'document')} "
                f"of {task}: "
                "start the same lmms-eval command again, it goes on there"
            )
    every = [i for ids in held.values() for i in ids]
    config = {
        "model": "llava_sdrpn",
        "model_args": written_arguments(arguments_of(facts)),
        "limit": max(every) - min(every) + 1,
        "offset": min(every),
        **_seeds(facts),
        "resolved_cli_args": {"timezone": "UTC"},
    }
    return Source(folder, tuple(tasks) or tuple(held), config, None, facts, lines)


def _seeds(facts: Provenance) -> dict[str, int]:
    """As lmms-eval's results name them; none if the run was not started by its command line."""
    names = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    given = facts.seeds if isinstance(facts.seeds, list) else []
    return dict(zip(names, given, strict=True)) if len(given) == len(names) else {}


def arguments_of(facts: Provenance) -> dict[str, Any]:
    """The model arguments that decide what is asked."""
    given = facts.arguments.items()
    return {k: v for k, v in given if v is not None and k not in NOT_ARGUMENTS}


def date_of(source: Source) -> str:
    """When the run was made, by its own account."""
    if source.run is not None:
        return str(source.run.results["date"])
    return source.facts.run if source.facts else datetime.now(UTC).isoformat()


def answers_of(source: Source) -> dict[Document, Answered]:
    """The responses to every document. Raises BadRun if neither samples nor record hold them."""
    lines: dict[Document, list[RecordLine]] = {}
    for line in source.lines:
        lines.setdefault((line.task, line.doc_id), []).append(line)
    if source.run is None:
        return {document: _recorded(own) for document, own in lines.items()}
    found: dict[Document, Answered] = {}
    for task in source.run.tasks.values():
        for doc_id, written in _written(samples_file(source.place, task.name)).items():
            document = task.name, doc_id
            found[document] = _answered(written, task, source, lines.get(document, []))
    return found


def _written(path: Path) -> dict[int, list[dict[str, Any]]]:
    """The lines of a samples file by document: one per filter of the task, in its order."""
    found: dict[int, list[dict[str, Any]]] = {}
    with path.open("rb") as file:
        for text in file:
            line = parsed(SAMPLE, text)
            found.setdefault(line["doc_id"], []).append(dict(line))
    return found


def _answered(
    written: Sequence[Mapping[str, Any]],
    task: TaskRun,
    source: Source,
    recorded: Sequence[RecordLine],
) -> Answered:
    prompt, target = written[0].get("input"), str(written[0].get("target"))
    said = _as_said(written, task.config, source.config)
    if said is None and recorded:
        return replace(_recorded(recorded), prompt=prompt, target=target)
    if said is None:
        raise BadRun(
            f"{source.place}: the samples of {task.name} hold what its filters left of the answers "
            f"({task.config.get('filter_list')}), and no record of the run tells the whole"
        )
    counts = [_token_counts(count) for count in written[0].get("token_counts") or []]
    return Answered(tuple(_given(said, counts, task.config)), prompt, target)


def _as_said(
    written: Sequence[Mapping[str, Any]], config: Mapping[str, Any], run: Mapping[str, Any]
) -> list[list[Any]] | None:
    """The responses as the model gave them, [request][repeat]; None if only filtered ones are left.

    `resps` is the input of the filters, `filtered_resps` their output, one per request. lmms-eval
    omits `resps` if both are equal, and the outer list if there is one request. If it strips
    reasoning tags, as its command line does by default, `resps` is already filtered.
    """
    several = config.get("output_type") == "multiple_choice"
    cut = parse_reasoning_tags_config(
        (run.get("resolved_cli_args") or {}).get("reasoning_tags"), config.get("reasoning_tags")
    )
    if cut is not None:
        place = _taking_the_first(config)
        if place is None or (config.get("repeats") or 1) > 1:
            return None
        value = written[place].get("resps", written[place]["filtered_resps"])
        return [[one] for one in (_options(value) if several else [value])]
    line = written[0]
    if "resps" in line:
        return list(line["resps"]) if several else [list(line["resps"])]
    return [[line["filtered_resps"]]]


def _options(value: Any) -> list[Any]:
    """The (loss, greedy) pairs of a multiple choice; lmms-eval unwraps a single one."""
    return [value] if value and isinstance(value[0], str) else list(value)


def _taking_the_first(config: Mapping[str, Any]) -> int | None:
    """The first of a task's filters that leaves a response unchanged."""
    filters = config.get("filter_list")
    if not filters:
        return 0
    for place, one in enumerate(filters):
        if all(step["function"] == "take_first" for step in one["filter"]):
            return place
    return None


def _token_counts(count: Mapping[str, int] | None) -> TokenCounts | None:
    return TokenCounts(**count) if count else None


def _given(
    said: Sequence[Sequence[Any]], counts: Sequence[TokenCounts | None], config: Mapping[str, Any]
) -> Iterator[GenerationResult]:
    losses = config.get("output_type") in ("multiple_choice", "loglikelihood")
    for request, repeats in enumerate(said):
        for one in repeats:
            count = counts[request] if request < len(counts) else None
            yield GenerationResult(_pair(one) if losses else one, count)


def _pair(written: Sequence[str]) -> Any:
    """(loss, greedy), which lmms-eval writes as strings."""
    loss, greedy = written
    return request_types.LossAndGreedy((float(loss), str(greedy) == "True"))


def _recorded(lines: Sequence[RecordLine]) -> Answered:
    given = tuple(request_types.result(line) for line in lines)
    if not lines[0].is_loss:
        return Answered(given)
    words = [str(line.continuation) for line in lines]
    return Answered(given, by_words=dict(zip(words, given, strict=True)))
