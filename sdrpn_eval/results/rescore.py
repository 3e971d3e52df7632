"""Rescores recorded responses: lmms-eval evaluates a model that replays them.

Filters, `process_results`, aggregation and groups are lmms-eval's own, and so are the results and
samples, which `compare` and `gate` read like those of any run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.utils import sanitize_model_name

from sdrpn.io.atomic import read_object, write_json
from sdrpn.io.plurals import agree, counted
from sdrpn_eval.provenance import fingerprints
from sdrpn_eval.record import RecordWriter
from sdrpn_eval.requests import parse
from sdrpn_eval.results.evaluate import evaluate_again
from sdrpn_eval.results.read import PLACES, RESULTS, Run, output_root, read_run, read_totals
from sdrpn_eval.results.responses import Source, answers_of
from sdrpn_eval.results.scores import Document, document_value


class Moved(ValueError):
    """Raised if tasks now ask something else than the run was asked; names what."""


class RecordedAnswers(lmms):
    """A model of lmms-eval that replays the responses of a run.

    Its methods raise Moved if documents or prompts differ, or, for a run with provenance, the
    content of the data.

    Attributes:
        scorers: Fingerprints of the tasks' present scorers, for a run with provenance.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        # Tasks can render prompts in two ways; the results name the one used.
        self.is_simple = "(chat)" not in str(source.config.get("model_backend", ""))
        self.scorers: dict[str, dict[str, str]] = {}
        self._source = source
        self._answers = answers_of(source)

    def clean(self) -> None:
        """Does nothing, as there is no model to free, which takes seconds."""

    def generate_until(self, requests: list[Any]) -> list[Any]:
        by_task: dict[str, list[Any]] = defaultdict(list)
        for instance in requests:
            by_task[instance.task_name].append(instance)
        for task, instances in by_task.items():
            self._check(task, instances)
        waiting = {document: iter(one.given) for document, one in self._answers.items()}
        return [self._next(instance, waiting) for instance in requests]

    loglikelihood = generate_until_multi_round = generate_until

    def _next(self, instance: Any, waiting: Mapping[Document, Any]) -> GenerationResult:
        document = instance.task_name, instance.doc_id
        words = self._answers[document].by_words
        found = next(waiting[document], None) if words is None else words.get(instance.args[1])
        if found is None:
            raise Moved(
                f"{instance.task_name}: document {instance.doc_id} is asked more, or with other "
                "options, than was answered"
            )
        return found

    def _check(self, task: str, instances: Sequence[Any]) -> None:
        first: dict[int, Any] = {}
        for instance in instances:
            first.setdefault(instance.doc_id, instance)
        answered = {doc_id for name, doc_id in self._answers if name == task}
        for verbs, what, odd in (
            (("was", "were"), "not answered", sorted(set(first) - answered)),
            (("is", "are"), "no longer asked", sorted(answered - set(first))),
        ):
            if odd:
                said = f"{counted(len(odd), 'document')} {agree(len(odd), *verbs)} {what}"
                raise Moved(f"{task}: {said}, such as {odd[0]}")
        prompts = {i: (self._answers[task, i].prompt, str(first[i].args[0])) for i in first}
        moved = [i for i, (was, now) in prompts.items() if was not in (None, now)]
        if moved:
            was, now = prompts[moved[0]]
            raise Moved(
                f"{task}: another prompt in {counted(len(moved), 'document')}, such as "
                f"{moved[0]}: it was {was!r}, and is {now!r}"
            )
        self._check_facts(task, instances)

    def _check_facts(self, task: str, instances: Sequence[Any]) -> None:
        facts = self._source.facts
        if facts is None or task not in facts.tasks:
            return
        recorded = facts.tasks[task]
        requests = parse(instances)
        rows = self.task_dict[task][requests[0].split]
        data = fingerprints.data_fingerprint(rows, (r.doc_id for r in requests))
        prompts = fingerprints.prompts_fingerprint(requests)
        for what, then, now in (
            ("data", recorded.data, data),
            ("prompts", recorded.prompts, prompts),
        ):
            if then != now:
                raise Moved(
                    f"{task}: other {what} than the run was asked (fingerprint {then} then, "
                    f"{now} now)"
                )
        scorer = requests[0].task_object
        self.scorers[task] = {
            "scorer": fingerprints.scorer_fingerprint(scorer),
            "scorer_source": fingerprints.scorer_source_fingerprint(scorer),
        }


def score_again(source: Source, out: Path, manager: Any) -> Run:
    """Rescores the responses of a run, writes results and samples, and reads them back.

    Raises:
        ValueError: If the folder `out` holds results or lies inside the run's own.
        Moved: If the tasks now ask something else.
    """
    if out.exists() and any(out.rglob(f"*{RESULTS}")):
        raise ValueError(f"{out} holds results already; give another --out")
    # The latest results in a run's folder are taken for the run's.
    if _root(source) in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} lies inside the run's own folder; give an --out beside it")
    model = RecordedAnswers(source)
    results = evaluate_again(model, source.names, source.config, manager, out)
    samples = results.pop("samples")
    if not model.scorers:
        _refuse_other_targets(source, samples)
    cli = dict(source.config.get("resolved_cli_args") or {}) | {"output_path": str(out)}
    results["config"] = dict(source.config) | {"resolved_cli_args": cli}
    results["rescored"] = {"from": str(source.place), "date": source.date}
    _save(source, results, samples, out)
    if model.scorers:
        _copy_record(source, model.scorers, str(results["date"]), out / PLACES[0])
    return read_run(out)


def beside(source: Source) -> Path:
    """The default output folder, next to the run's own."""
    root = _root(source)
    return root.with_name(f"{root.name}-rescored")


def _root(source: Source) -> Path:
    """The --output_path of the run, as far as its files say."""
    if source.run is not None:
        return output_root(source.run)
    folder = source.place.resolve()
    return folder.parent if folder.name in PLACES else folder


def _refuse_other_targets(source: Source, samples: Mapping[str, Sequence[Any]]) -> None:
    """Without provenance, a corrected target cannot be told from other data."""
    tasks = source.run.tasks if source.run else {}
    for task, lines in samples.items():
        then = tasks[task].samples
        moved = [s["doc_id"] for s in lines if str(s["target"]) != then[s["doc_id"]].target]
        if moved:
            raise Moved(
                f"{task}: another target in {counted(len(moved), 'document')}, such as "
                f"{moved[0]}, and the run left no facts that would tell a mended target from other "
                "data"
            )


def _save(source: Source, results: dict[str, Any], samples: Mapping[str, Any], out: Path) -> None:
    tracker = EvaluationTracker(output_path=str(out))
    known = tracker.general_config_tracker
    old: dict[str, Any] = {**source.run.results} if source.run else {}
    name = str(source.facts.arguments.get("pretrained")) if source.facts else "model"
    known.model_source = old.get("model_source") or str(source.config["model"])
    known.model_name = old.get("model_name") or name
    known.model_name_sanitized = old.get("model_name_sanitized") or sanitize_model_name(name)
    # The cost of the responses is that of the original run.
    results |= {k: old[k] for k in ("usage", "throughput", "efficiency") if k in old}
    date = results["date"]
    tracker.save_results_aggregated(results=results, samples=dict(samples), datetime_str=date)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def _copy_record(
    source: Source, scorers: Mapping[str, Mapping[str, str]], date: str, folder: Path
) -> None:
    """Copies record and provenance of the scored tasks, with the present scorers and date."""
    for file in source.facts.files if source.facts else ():
        facts = read_object(file)
        own = {t: marks for t, marks in facts["tasks"].items() if t in scorers}
        facts["tasks"] = {t: marks | dict(scorers[t]) for t, marks in own.items()}
        write_json(folder / file.name, facts | {"evaluations": [date]})
    lines = [line for line in source.lines if line.task in scorers]
    if lines:
        RecordWriter(folder, 0).append(lines)


@dataclass(frozen=True)
class Change:
    """A metric before and after; `changed` counts documents, None if they cannot be compared."""

    task: str
    metric: str
    before: float | None
    after: float | None
    changed: int | None


def changes(source: Source, scored: Run) -> list[Change]:
    """Every metric of every task and group, before and after."""
    old = source.run
    found = []
    for name in [*scored.groups, *scored.tasks]:
        after = read_totals(scored.results["results"].get(name, {}))
        before = read_totals(old.results["results"].get(name, {})) if old else {}
        for key in dict.fromkeys([*before, *after]):
            changed = _changed(old, scored, name, key) if old else None
            found.append(Change(name, key, before.get(key), after.get(key), changed))
    return found


def _changed(old: Run, scored: Run, name: str, key: str) -> int | None:
    tasks = scored.groups.get(name, [name])
    if not all(task in old.tasks and task in scored.tasks for task in tasks):
        return None
    pairs = [
        (sample.values.get(key), scored.tasks[task].samples[doc_id].values.get(key))
        for task in tasks
        for doc_id, sample in old.tasks[task].samples.items()
    ]
    return sum(_score(one) != _score(other) for one, other in pairs)


def _score(value: Any) -> str:
    """A document's score, or else its value, as text, in which NaN equals itself."""
    score = document_value(value)
    return json.dumps(value if score is None else score, sort_keys=True)
