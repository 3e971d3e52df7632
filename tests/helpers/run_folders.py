"""Output folders as lmms-eval 0.7.3 leaves them, written by hand or by its own evaluator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.utils import get_datetime_str

from sdrpn_eval.model import LlavaSdrpn
from tests.helpers.local_benchmarks import manager

DATE = "20260301_120000"
FACTS = {
    "run": "20260301T120001.000000Z",
    "rank": 0,
    "versions": {"torch": "2"},
    "weights": {"rpn/rpn.safetensors": "ab"},
    "arguments": {},
    "device": {"type": "cpu"},
    "seeds": [0],
    "source": None,
    "tasks": {"toy": {"data": "1", "prompts": "2", "scorer": "3"}},
}
"""Run facts of a run on the task `toy`."""
SCORER_SETTINGS: dict[str, Any] = {
    "metric_list": [{"metric": "accuracy", "aggregation": "median"}],
    "filter_list": [{"name": "none", "filter": [{"function": "lowercase"}]}],
    "process_results": "<function strict at 0x7f>",
    "output_type": "multiple_choice",
    "score_key": "points",
    "doc_to_choice": ["A", "B"],
    "doc_to_target": "{{answers}}",
    "repeats": 3,
}
"""Each setting of a task that makes its score, and another value than the rows here have."""


def sample(doc_id: int, answer: str = "red", target: str = "red", **metrics: Any) -> dict[str, Any]:
    """A line of a samples file; metrics: what `process_results` returned, default `accuracy`."""
    return {
        "doc_id": doc_id,
        "target": target,
        "filtered_resps": answer,
        "token_counts": [{"input_tokens": 70, "output_tokens": 2}],
        "doc_hash": "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b",
        **(metrics or {"accuracy": float(answer == target)}),
        "input": f"question {doc_id}",
    }


def write_run(
    folder: Path,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    totals: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    model: str = "llava_sdrpn",
    model_args: str = "pretrained=tiny,proposer=rpn",
    date: str = DATE,
    limit: float | None = None,
    config: Mapping[str, Any] | None = None,
    better: Mapping[str, bool] | None = None,
    original: int | None = None,
    cli: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run; totals: "metric,filter" -> score, default: the mean of `accuracy`.

    cli: of the command line, beside the output path.
    """
    path = folder / "tiny"
    path.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {t: {"alias": t, **_totals(t, rows, totals)} for t, rows in tasks.items()},
        "group_subtasks": {t: [] for t in tasks},
        "configs": {
            t: {"task": t, **_config(t, rows, totals, config)} for t, rows in tasks.items()
        },
        "higher_is_better": {t: dict(better or {"accuracy": True}) for t in tasks},
        "n-samples": {
            t: {"original": original or len(rows), "effective": len(rows)}
            for t, rows in tasks.items()
        },
        "config": {
            "model": model,
            "model_args": model_args,
            "batch_size": "4",
            "limit": limit,
            "offset": 0,
            "resolved_cli_args": {"timezone": "UTC", "output_path": str(folder), **(cli or {})},
        },
        "date": date,
        "model_name_sanitized": "tiny",
        "total_evaluation_time_seconds": "10.0",
    }
    (path / f"{date}_results.json").write_text(json.dumps(results))
    for task, rows in tasks.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{date}_samples_{task}.jsonl").write_text(lines)
    return folder


def _totals(
    task: str, rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    if totals and task in totals:
        return dict(totals[task])
    return {
        "accuracy,none": sum(row["accuracy"] for row in rows) / len(rows),
        "accuracy_stderr,none": "N/A",
    }


def _config(
    task: str,
    rows: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Mapping[str, Any]] | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    names = [key.rpartition(",")[0] for key in _totals(task, rows, totals)]
    metrics = [
        {"metric": name, "aggregation": f"<function mean at 0x{id(rows):x}>"}
        for name in names
        if "stderr" not in name
    ]
    return {"metric_list": metrics, "output_type": "generate_until", "score_key": "score"} | dict(
        config or {}
    )


def record_line(doc_id: int, answer: str, **more: Any) -> dict[str, Any]:
    """A line of our record: two questions an image of 100 x 100 pixels, one region."""
    return {
        "run": "20260301T120001.000000Z",
        "task": "toy",
        "split": "test",
        "doc_id": doc_id,
        "images": [{"hash": f"image{doc_id // 2}", "size": [100, 100]}],
        "prompt": f"question {doc_id}",
        "proposer": "rpn",
        "policy": "strongest",
        "threshold": 0.1,
        "answer": answer,
        "regions": [[0, 0, 50, 50]],
        "no_zoom": None,
        "map": "AAAAgP8=",
        "grid": [1, 5],
        "map_max": 1.0,
        "tokens": {"image": 64, "crop": 64, "question": 10, "new": 2},
        "seconds": 0.5,
        **more,
    }


def write_record(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    place = folder / "sdrpn_record"
    place.mkdir(parents=True, exist_ok=True)
    for task in {line["task"] for line in lines}:
        own = "".join(json.dumps(line) + "\n" for line in lines if line["task"] == task)
        (place / f"record_{task}_rank0.jsonl").write_text(own)


def evaluate(out: Path, engine: Any, tasks: Sequence[str], index: Any = None, **more: Any) -> Path:
    """Run tasks in lmms-eval's evaluator and save with its own tracker, as its command line does.

    engine: what answers, a ZoomModel or a stand-in. index: of tasks, default: of the benchmarks
    that tests have data for. more: for the evaluator.
    """
    date = get_datetime_str()
    tracker = EvaluationTracker(output_path=str(out))
    model = LlavaSdrpn(pretrained=engine, batch_size=3, record=out / "sdrpn_record")
    model.clean = lambda: None  # seconds of garbage collection, for the memory of a large model
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=index or manager(),
        bootstrap_iters=10,
        evaluation_tracker=tracker,
        datetime_str=date,
        **more,
    )
    assert results
    tracker.general_config_tracker.model_name_sanitized = "tiny"
    results["config"]["model"] = "llava_sdrpn"
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=date)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return out


def write_facts(folder: Path, scorer: str, data: str = "1", **more: Any) -> None:
    """Write FACTS, with other fingerprints of scorer and data, beside a run's record."""
    marks = {"data": data, "prompts": "2", "scorer": scorer}
    (folder / "sdrpn_record").mkdir(exist_ok=True)
    path = folder / "sdrpn_record" / f"run_facts_{FACTS['run']}_rank0.json"
    path.write_text(json.dumps(FACTS | {"tasks": {"toy": marks}} | more))


def shade(question: Any) -> int:
    """The red of a question's image, by which the made-up rows tell theirs apart."""
    return question.images[0].getpixel((0, 0))[0]
