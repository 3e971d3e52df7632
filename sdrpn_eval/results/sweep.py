"""A grid of zoom settings on the same questions: score over cost, and the settings worth taking.

One evaluation asks every question under all settings, sharing what they have in common
(`sdrpn.sweep`). Its record holds all answers; each setting's are then scored as a run of its own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdrpn.config import ZoomConfig
from sdrpn.costs import Costs, Parts, relative_costs
from sdrpn.engine import Question, ZoomModel
from sdrpn.io.atomic import read_object, write_json
from sdrpn.sweep import ask_settings
from sdrpn_eval.model import MODEL_CLASSES, SdrpnModel
from sdrpn_eval.record import RecordLine, describe_answer
from sdrpn_eval.request_types import Fields, GenerateUntil
from sdrpn_eval.requests import Request, parse
from sdrpn_eval.results.compare import cluster_keys, gather
from sdrpn_eval.results.evaluate import evaluate_again
from sdrpn_eval.results.read import PLACES, BadRun, Run
from sdrpn_eval.results.rescore import score_again
from sdrpn_eval.results.responses import Source, read_source
from sdrpn_eval.results.scores import Document, all_scores
from sdrpn_eval.results.stats import Estimate, clustered, clustered_difference

BASE = "base"
"""The setting that changes nothing: published thresholds and the RPN's own settings."""

ASKED = "asked"
"""Folder of the record that holds all answers."""

Changes = Mapping[str, Any]
"""Values of `ZoomConfig` that a setting changes."""


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Make the settings of a grid: changes by name, such as `threshold=peak gate=0.9`, BASE first.

    Args:
        axes: For each field of `ZoomConfig`, its values; None leaves the base's.

    Raises:
        ValueError: If a value is invalid.
    """
    settings: dict[str, dict[str, Any]] = {BASE: {}}
    for values in itertools.product(*axes.values()):
        changes = {k: v for k, v in zip(axes, values, strict=True) if v is not None}
        ZoomConfig(**changes)  # raises ValueError
        name = " ".join(f"{k}={v}" for k, v in changes.items()) or BASE
        settings.setdefault(name, changes)
    return settings


# Asking


class _AskedUnderAll(GenerateUntil):
    """Requests whose line holds the answers under all settings."""

    def __init__(self, requests: Sequence[Request], settings: Mapping[str, Changes]) -> None:
        super().__init__(requests)
        self._settings = settings

    def asked(self, request: Request) -> Any:
        arguments = super().asked(request)
        if arguments is None:
            raise ValueError(f"{request.task} samples its answers: they differ by chance")
        return {**arguments, "settings": self._settings}

    def ask(
        self, engine: ZoomModel, requests: Sequence[Request], questions: Sequence[Question]
    ) -> list[Fields]:
        generation = self._arguments[requests[0].index]
        costs = Costs.of(engine.backbone, engine.rpn)
        by_base: dict[ZoomConfig, list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            by_base[question.zoom or engine.zoom].append(place)
        fields: dict[int, Fields] = {}
        for base, places in by_base.items():
            settings = [replace(base, **changes) for changes in self._settings.values()]
            own = [questions[place] for place in places]
            answers = ask_settings(engine, own, settings, generation)
            for place, of_question in zip(places, zip(*answers, strict=True), strict=True):
                by_name = dict(zip(self._settings, of_question, strict=True))
                swept = {
                    name: {**answer.to_dict(), "cost": asdict(costs.parts(answer))}
                    for name, answer in by_name.items()
                }
                fields[place] = describe_answer(by_name[BASE]) | {"swept": swept}
        return [fields[place] for place in range(len(questions))]


class _Sweeping(SdrpnModel):
    """A model that answers every question under all settings."""

    settings: Mapping[str, Changes]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        parsed = parse(requests)
        return self._run(parsed, _AskedUnderAll(parsed, self.settings))

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise ValueError("a sweep asks for answers; tasks that score given words are not swept")


def ask_all(
    out: Path,
    tasks: Sequence[str],
    settings: Mapping[str, Changes],
    *,
    model: str,
    arguments: Mapping[str, Any],
    limit: int | None,
    manager: Any,
) -> Source:
    """Ask the questions of tasks under all settings; answers of an interrupted sweep are kept.

    Returns:
        The record of all answers in OUT/asked.

    Raises:
        ValueError: If arguments of the model are invalid, or a task cannot be swept.
    """
    folder = out / ASKED
    kind = type("Sweeping", (_Sweeping, MODEL_CLASSES[model]), {"settings": settings})
    asking = kind(**{**arguments, "record": str(folder)})
    config = {"model": model, "limit": limit}
    evaluate_again(asking, tasks, config, manager, out, predict_only=True)
    source = read_source(folder)
    return replace(source, names=tuple(tasks), config={**source.config, **config})


# Scoring


def score_all(
    source: Source,
    out: Path,
    settings: Mapping[str, Changes],
    manager: Any,
    progress: Callable[[Sequence[str]], Any] = iter,
) -> dict[str, Run]:
    """Score the answers of each setting, from `ask_all`, as a run in a folder of its own.

    `progress` wraps the settings' names.
    """
    runs = {}
    for name in progress([*settings]):
        folder = out / folder_name(name)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier sweep, maybe of other answers
        lines = [_under(line, name) for line in source.lines]
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of lmms-eval
            runs[name] = score_again(replace(source, lines=lines), folder, manager)
        for file in (folder / PLACES[0]).glob("run_facts_*.json"):
            facts = read_object(file)
            facts["arguments"] = {**facts["arguments"], **settings[name]}
            write_json(file, facts)
    return runs


def folder_name(name: str) -> str:
    """Name of a setting's folder: `threshold=peak gate=0.9` -> `threshold-peak_gate-0.9`."""
    return name.replace("=", "-").replace(" ", "_")


def _swept(line: RecordLine, name: str) -> dict[str, Any]:
    """The answer to a line's question under a setting."""
    return (line.model_extra or {})["swept"][name]


def _under(line: RecordLine, name: str) -> RecordLine:
    """The line as if the setting alone had been asked."""
    other = {"swept", "confidence", "gate"}
    held = line.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=other)
    held |= {"map": None, "grid": None, "map_max": None, **_swept(line, name)}
    return RecordLine.model_validate(held)


# Judging


@dataclass(frozen=True)
class Swept:
    """A setting, measured.

    Attributes:
        score: Mean over all documents, with its 95 % interval clustered by image.
        against_base: Paired difference to BASE.
        cost: Multiplications per question, relative to the stock model.
        extra: Cost above that of answering without a zoom from the same prefixes, relative to that
            of BASE; negative if thinned prefixes save more than the zooms cost.
        zoomed: Share of questions that were zoomed.
        crop_tokens: Mean number of crop tokens per question.
        on_frontier: Whether no setting scores more at the same or a lower cost.
    """

    name: str
    changes: Changes
    score: Estimate
    against_base: Estimate
    cost: float
    extra: float
    zoomed: float
    crop_tokens: float
    on_frontier: bool = False


@dataclass(frozen=True)
class Sweep:
    """All settings, the base first.

    Attributes:
        chosen: Name of the cheapest setting that scores at most `tolerance` below the best.
        tolerance: In points of the score, of 1.
        metrics: The metric of each task.
    """

    swept: Sequence[Swept]
    chosen: str
    tolerance: float
    questions: int
    images: int
    metrics: Mapping[str, str]


def judge(
    source: Source,
    runs: Mapping[str, Run],
    settings: Mapping[str, Changes],
    *,
    tolerance: float,
    seed: int,
) -> Sweep:
    """Compare settings by score and cost, from the record of all answers and the settings' runs.

    Args:
        tolerance: Loss to accept against the best score, in points of the score.

    Raises:
        BadRun: If a task has no metric with a score per document.
    """
    scores = {name: _main_scores(run) for name, run in runs.items()}
    base, metrics = scores[BASE]
    evidence = [gather(runs[BASE])]
    clusters: dict[Document, Hashable] = {}
    for task in runs[BASE].tasks:
        clusters |= cluster_keys(evidence, task)[1]
    keys = [clusters[document] for document in base]
    columns = {name: [values[d] for d in base] for name, (values, _) in scores.items()}
    shares = all(0 <= value <= 1 for column in columns.values() for value in column)
    base_extra = _cost(source.lines, BASE)[1]
    swept = []
    for name, column in columns.items():
        lost = [a - b for a, b in zip(column, columns[BASE], strict=True)]
        seen = [_swept(line, name) for line in source.lines]
        cost, extra = _cost(source.lines, name)
        swept.append(
            Swept(
                name,
                settings[name],
                clustered(column, keys, seed),
                clustered_difference(lost, keys, seed, shares=shares),
                cost,
                extra / base_extra if base_extra else 1.0,
                float(np.mean([bool(one["regions"]) for one in seen])),
                float(np.mean([one["tokens"]["crop"] for one in seen])),
            )
        )
    swept = [replace(one, on_frontier=_undominated(one, swept)) for one in swept]
    best = max(one.score.mean for one in swept)
    good = [one for one in swept if one.score.mean >= best - tolerance - 1e-9]
    chosen = min(good, key=lambda one: (one.cost, -one.score.mean)).name
    return Sweep(swept, chosen, tolerance, len(keys), len(set(keys)), metrics)


def _main_scores(run: Run) -> tuple[dict[Document, float], dict[str, str]]:
    """Scores by the first metric of each task that is better when higher and has one a document.

    Returns:
        Them by document, and the metrics by task.
    """
    values: dict[Document, float] = {}
    metrics: dict[str, str] = {}
    for (task, metric, _), one in all_scores(run, [*run.tasks]).items():
        if task in run.tasks and task not in metrics and one.higher_is_better and one.values:
            metrics[task] = metric
            values |= one.values
    if missing := [task for task in run.tasks if task not in metrics]:
        raise BadRun(f"{missing[0]} has no metric with a score per document; leave it out")
    return values, metrics


def _cost(lines: Sequence[RecordLine], name: str) -> tuple[float, float]:
    """Multiplications relative to the stock model's: all, and those that the second look adds.

    An image is prefilled once for all its questions.
    """
    parts = [Parts(**_swept(line, name)["cost"]) for line in lines]
    return relative_costs(parts, [line.images for line in lines])


def _undominated(one: Swept, every: Sequence[Swept]) -> bool:
    return not any(
        other.cost <= one.cost
        and other.score.mean >= one.score.mean
        and (other.cost, other.score.mean) != (one.cost, one.score.mean)
        for other in every
    )
