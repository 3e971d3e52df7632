"""Reads and validates an output folder of lmms-eval.

lmms-eval exits with 0 even after errors, so a run is complete only if its results file, a samples
file per task and all documents in it exist. Its `doc_hash` is the same on every line (0.7.3), so
documents are identified by id, prompt, target and the images in our record.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from sdrpn.io.atomic import parsed, read_bounded
from sdrpn.io.plurals import counted
from sdrpn_eval import schemas
from sdrpn_eval.command_line import parse_arguments
from sdrpn_eval.provenance.model import parsed_arguments
from sdrpn_eval.schemas import Counts, Results, SampleLine

RESULTS = "_results.json"
NOT_METRICS = {"doc_id", "doc", "target", "resps", "filtered_resps", "token_counts"}
NOT_METRICS |= {"doc_hash", "input", "input_media"}
"""Keys of a samples line that lmms-eval writes itself; all others are the task's metrics."""

PLACES = ("sdrpn_record", "record")
"""Folders beside lmms-eval's output where a record may be."""

BESIDE = " | "
"""Separates several answers to one document."""

TIMEZONE = "Asia/Singapore"
"""lmms-eval's default."""


class BadRun(ValueError):
    """Raised for a run that is missing, partial or broken; a sentence per problem."""


@dataclass(frozen=True)
class Sample:
    """One document of a task, as a run answered it.

    Attributes:
        values: What `process_results` returned for it, by "metric,filter"; anything at all.
        tokens: (input, output); None where the model did not count.
    """

    doc_id: int
    prompt: str
    target: str
    answer: str
    tokens: tuple[int | None, int | None]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class TaskRun:
    """One task of a run.

    Attributes:
        samples: By document id.
        totals: The score that lmms-eval printed, by "metric,filter"; None for what is no number.
        original: Documents in the data set; a limit leaves fewer in `samples`.
    """

    name: str
    samples: Mapping[int, Sample]
    totals: Mapping[str, float | None]
    higher_is_better: Mapping[str, bool | None]
    config: Mapping[str, Any]
    original: int


@dataclass(frozen=True)
class Run:
    """One evaluation; `results` is lmms-eval's own file, parsed."""

    name: str
    folder: Path
    file: Path
    results: Results
    tasks: Mapping[str, TaskRun]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """`--model_args` by name, as given. Raises BadRun if they cannot be read."""
        given = self.results["config"].get("model_args")
        try:
            known = parsed_arguments(beside(self), given)
            return parse_arguments(given) if known is None else known
        except ValueError as error:
            raise BadRun(f"{self.file}: {error}") from None

    @property
    def model(self) -> str:
        return str(self.results["config"]["model"])

    @property
    def limit(self) -> float | None:
        return self.results["config"].get("limit")

    @property
    def groups(self) -> dict[str, list[str]]:
        """Groups with a score of their own, and their tasks."""
        members = self.results.get("group_subtasks", {})
        return {name: tasks for name, tasks in members.items() if tasks}

    @property
    def scored_from(self) -> str | None:
        """The run or record whose answers `sdrpn-eval score` scored; None for any other run."""
        return (self.results.get("rescored") or {}).get("from")

    @property
    def began(self) -> datetime:
        """When lmms-eval began, in UTC, to the second. Raises BadRun if the file does not say."""
        return began_and_ended(self.file, self.results)[0]

    @property
    def ended(self) -> datetime:
        """When lmms-eval wrote the results, in UTC. Raises BadRun if the file does not say."""
        return began_and_ended(self.file, self.results)[1]

    @property
    def cli(self) -> dict[str, Any]:
        """lmms-eval's resolved command line; empty if it was called from Python."""
        return self.results["config"].get("resolved_cli_args") or {}


def output_root(run: Run) -> Path:
    """The --output_path of a run, to which lmms-eval appends the model's name."""
    name = str(run.results.get("model_name_sanitized") or "")
    above = run.file.resolve().parents
    return above[min(len(Path(name).parts), len(above) - 1)]


def beside(run: Run) -> list[Path]:
    """Folders next to a run's results where its record may be."""
    roots = (run.folder.resolve(), run.file.resolve().parent, output_root(run))
    return [folder / place for folder in dict.fromkeys(roots) for place in PLACES]


def began_and_ended(file: Path, results: Results) -> tuple[datetime, datetime]:
    """When a run began, to the second, and wrote its results, in UTC.

    From the file's content: copies have other file times. Raises BadRun if it does not say.
    """
    cli = results["config"].get("resolved_cli_args") or {}
    try:
        date = datetime.strptime(results["date"], "%Y%m%d_%H%M%S")
        began = date.replace(tzinfo=_zone(cli.get("timezone") or TIMEZONE)).astimezone(UTC)
        seconds = float(results.get("total_evaluation_time_seconds") or 0)
        return began, began + timedelta(seconds=seconds + 1)
    except (ValueError, TypeError, OverflowError, OSError, ZoneInfoNotFoundError) as error:
        raise BadRun(f"{file}: it does not say when it was written: {error}") from None


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except ZoneInfoNotFoundError:  # lmms-eval ignores case
        found = (one for one in available_timezones() if one.lower() == name.lower())
        return ZoneInfo(next(found, name))


def read_run(path: Path, name: str | None = None, tasks: Iterable[str] | None = None) -> Run:
    """Reads a run.

    Args:
        path: An output folder of lmms-eval, of which the latest run is read, or a
            `*_results.json` file.
        name: What to call the run; default: its folder's name.
        tasks: Reads only these tasks.

    Raises:
        BadRun: If the run is incomplete; names the folder and every problem.
    """
    file = find_results(path)
    results = parse_results(file)
    read: dict[str, TaskRun] = {}
    problems = []
    for task in results["configs"] if tasks is None else tasks:
        try:
            read[task] = _read_task(file, results, task)
        except BadRun as error:
            problems.append(str(error))
    if problems:
        raise BadRun("; ".join(problems))
    if not read:
        raise BadRun(f"{file} holds no task")
    folder = path if path.is_dir() else path.parent
    return Run(name or folder.name, folder, file, results, read)


def find_results(path: Path) -> Path:
    """The latest results file under a folder, by the time stamp in its name."""
    if not path.exists():
        raise BadRun(f"{path} does not exist; give the --output_path of an lmms-eval run")
    if path.is_file():
        return path
    files = list(path.rglob(f"*{RESULTS}"))
    if not files:
        raise BadRun(
            f"{path} holds no *{RESULTS}: lmms-eval failed there (it exits with 0 all the same) or "
            "ran without --output_path; look into its log"
        )
    return max(files, key=lambda file: (file.name, str(file)))


def parse_results(file: Path) -> Results:
    """Parses a results file of lmms-eval. Raises BadRun, naming it, if it is none."""
    try:
        results = parsed(schemas.RESULTS, read_bounded(file))
    except OSError as error:
        raise BadRun(f"{file} cannot be read: {error}") from None
    except ValueError as error:
        raise BadRun(f"{file} is no results file of lmms-eval: {error}") from None
    if not results["configs"]:
        raise BadRun(f"{file} holds no task")
    return results


def _read_task(file: Path, results: Results, task: str) -> TaskRun:
    if task not in results["configs"]:
        raise BadRun(f"{file} has no results for {task}")
    scores = results["results"].get(task)
    if scores is None:
        raise BadRun(f"{file} lists {task} without a score")
    totals = read_totals(scores)
    path = file.with_name(file.name.removesuffix(RESULTS) + f"_samples_{task}.jsonl")
    if not path.exists():
        raise BadRun(f"{file} has no samples of {task} beside it; run with --log_samples")
    counts = results.get("n-samples", {}).get(task, Counts())
    samples = _read_samples(path, list(dict.fromkeys(key.rpartition(",")[2] for key in totals)))
    original = counts.get("original", len(samples))
    asked, offset = counts.get("effective", original), results["config"].get("offset") or 0
    end = min(offset + asked, original) if asked > 0 else original
    _check_complete(path, samples, range(offset, end))
    better = results.get("higher_is_better", {}).get(task, {})
    return TaskRun(task, samples, totals, better, results["configs"][task], original)


def read_totals(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """A task's scores by "metric,filter"; None for those that are not numbers."""
    totals: dict[str, float | None] = {}
    for key, value in scores.items():
        metric = key.rpartition(",")[0]
        if metric and not re.search(r"_stderr(_clt|_clustered)?$", metric):
            totals[key] = None if isinstance(value, bool) else as_number(value)
    return totals


def _read_samples(path: Path, filters: list[str]) -> dict[int, Sample]:
    """Samples by document, which has a line for each filter."""
    seen: Counter[int] = Counter()
    samples: dict[int, Sample] = {}
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = parsed(schemas.SAMPLE, text)
            except ValueError as error:
                raise BadRun(f"{path} is cut off or broken in line {number}: {error}") from None
            doc_id = line["doc_id"]
            if seen[doc_id] >= max(len(filters), 1):
                raise BadRun(f"{path} holds document {doc_id} more than once")
            used = filters[seen[doc_id]] if filters else "none"
            values = {f"{k},{used}": v for k, v in line.items() if k not in NOT_METRICS}
            seen[doc_id] += 1
            if doc_id in samples:
                values = {**samples[doc_id].values, **values}
            samples[doc_id] = _sample(line, values)
    return samples


def _sample(line: SampleLine, values: Mapping[str, Any]) -> Sample:
    counts = [c for c in line.get("token_counts") or [] if c]
    read = [n for c in counts if (n := c.get("input_tokens")) is not None]
    written = [n for c in counts if (n := c.get("output_tokens")) is not None]
    return Sample(
        line["doc_id"],
        prompt=str(line.get("input", "")),
        target=str(line.get("target", "")),
        answer=as_text(line.get("filtered_resps")),
        tokens=(sum(read) if read else None, sum(written) if written else None),
        values=values,
    )


def as_text(response: Any) -> str:
    """An answer as text; several, as of multiple choice, joined by BESIDE."""
    if isinstance(response, list):
        return BESIDE.join(as_text(one) for one in response)
    return "" if response is None else str(response)


def _check_complete(path: Path, samples: Mapping[int, Sample], expected: range) -> None:
    missing = next((i for i in expected if i not in samples), None)
    if missing is not None:
        raise BadRun(
            f"{path} holds {len(samples)} of {counted(len(expected), 'document')} (first missing: "
            f"{missing}): the run is partial or the file was cut off"
        )
    beyond = [i for i in samples if i not in expected]
    if beyond:
        raise BadRun(f"{path} holds document {beyond[0]}, which the results file does not count")


def as_number(value: Any) -> float | None:
    """A JSON number or boolean as a float; None for anything else."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def is_number(value: float | None) -> bool:
    """Whether a score is a finite number."""
    return value is not None and math.isfinite(value)
