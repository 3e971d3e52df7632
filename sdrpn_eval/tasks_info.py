"""Properties of tasks by their names: published thresholds, protocols, which have a score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sdrpn.backbones import qwen25_vl_published as qwen
from sdrpn.config import PEAK
from sdrpn_eval.command_line import on_command_line

DEFAULT_THRESHOLD = 0.15
"""For tasks of no family below: the value published for most of them."""

THRESHOLDS: Mapping[str, float | str] = {
    # The paper's evaluation settings.
    "textvqa": 0.15,
    "infovqa": 0.15,
    "chartqa": 0.15,
    "pope": 0.15,
    "docvqa": 0.1,
    "vstar": 0.1,
    "hrbench": 0.1,
    "ocrbench": 0.05,
    # Ours: one rule, also where the map is all low, as on the embedded model's 8 x 8 cells.
    "tiny_vstar": PEAK,
    "tiny_trio": DEFAULT_THRESHOLD,
}
OURS = ("tiny_vstar", "tiny_trio")
"""Families without a published threshold."""

NO_OCR = "no OCR tokens in the prompt"
HARNESS_LETTERS = "graded as lmms-eval does"
OUR_LETTERS = "offered letters only"
NO_JUDGE = "letters, no judge"
PROTOCOLS: Mapping[str, str] = {
    "textvqa_val": NO_OCR,
    "textvqa_val_public": NO_OCR,
    "textvqa_val_lite": NO_OCR,
    "textvqa_ci": NO_OCR,
    "textvqa_val_ocr": "OCR tokens in the prompt",
    "vstar_bench": HARNESS_LETTERS,
    "vstar_bench_direct_attributes": HARNESS_LETTERS,
    "vstar_bench_relative_position": HARNESS_LETTERS,
    "vstar_harness": HARNESS_LETTERS,
    "vstar": OUR_LETTERS,
    "vstar_direct_attributes": OUR_LETTERS,
    "vstar_relative_position": OUR_LETTERS,
    "vstar_ci": OUR_LETTERS,
    "vstar_shuffled": "options shuffled",
    "vstar_likelihood": "loss of each option as a sentence",
    "hrbench4k": "a paid judge for unclear answers",
    "hrbench8k": "a paid judge for unclear answers",
    "hrbench4k_offline": NO_JUDGE,
    "hrbench8k_offline": NO_JUDGE,
    "hrbench4k_ci": NO_JUDGE,
    "hrbench8k_ci": NO_JUDGE,
}
"""How a task is scored, for benchmarks with several ways; a few words for tables."""


def family(task: str) -> str | None:
    """The family of a task, such as `textvqa` of `textvqa_val_lite`; None if it has none."""
    for name in sorted(THRESHOLDS, key=len, reverse=True):
        # hrbench4k, hrbench8k; but ocrbench_v2 is another benchmark.
        if re.fullmatch(rf"{name}(\d+k)?(_(?!v\d).*)?", task):
            return name
    return None


def threshold_of(task: str) -> float | str:
    """The threshold published for the task's family, else DEFAULT_THRESHOLD."""
    name = family(task)
    return DEFAULT_THRESHOLD if name is None else THRESHOLDS[name]


def threshold_origin(task: str, proposer: str) -> str:
    """The origin of `threshold_of`, in words; it was published for the RPN only."""
    name = family(task)
    if name is None:
        return "as none is published for it"
    if name in OURS:
        return "chosen on the embedded model"
    return f"as published for {name}" + ("" if proposer == "rpn" else ", of the RPN")


def qwen_threshold(
    task: str, hidden_size: int, layers: int, min_pixels: int, max_pixels: int
) -> tuple[float, str]:
    """The threshold published for Qwen2.5-VL (docs/method.md), and its origin in words.

    Args:
        task: Name of the task.
        hidden_size, layers: Of the language model; they determine the model's size.
        min_pixels, max_pixels: Limits of a resized image, in pixels.
    """
    size, name = qwen.size_of(hidden_size, layers), family(task)
    if size is None or name is None:
        return qwen.THRESHOLD, "as none is published for it"
    tokens = min_pixels // qwen.CELL_PIXELS, max_pixels // qwen.CELL_PIXELS
    which = re.match(r"hrbench\dk", task)
    for benchmark in (which[0] if which else name, name):
        for run in size.high_resolution.get(benchmark, ()):
            if (run.least, run.most) == tokens:
                limits = "{} to {}".format(*tokens)
                return run.threshold, f"as published for {name} at {limits} tokens"
    if name not in size.thresholds:
        return qwen.THRESHOLD, "as none is published for it"
    at = "" if tokens == (576, 576) else ", at 576 tokens"
    return size.thresholds[name], f"as published for {name}{at}"


def has_score(metrics: Iterable[str]) -> bool:
    """Whether any metric is a score, rather than a file to submit."""
    names = list(metrics)
    return not names or not all(re.search("submission|passthrough", name) for name in names)


def describe(scored: Mapping[str, bool]) -> str:
    """One line for the log: which tasks will have a score, and by which protocols."""
    with_score = ", ".join(name for name, yes in scored.items() if yes) or "none"
    without = ", ".join(name for name, yes in scored.items() if not yes)
    line = f"Tasks with a score: {with_score}."
    if without:
        line += (
            f" For submission only: {without}: no public answers, so a file to hand in is written "
            "and the score stays empty."
        )
    rules = [
        f"{name}: {PROTOCOLS[name]}" for name, yes in scored.items() if yes and name in PROTOCOLS
    ]
    return f"{line} Protocols: {'; '.join(rules)}." if rules else line


def requested(argv: list[str]) -> list[str]:
    """The names in `--tasks` on a command line; empty without it."""
    named = on_command_line("--tasks", argv)
    return [] if named is None else named.split(",")


def scored_parts(names: Iterable[str], index: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """The tasks of tasks, groups and tags in lmms-eval's index, and whether each has a score.

    Unknown names are skipped, as lmms-eval reports them.
    """
    found = {}
    for task in (task for name in names for task in parts(name, index)):
        listed = task_settings(index[task]).get("metric_list") or []
        found[task] = has_score(str(metric["metric"]) for metric in listed)
    return found


def parts(name: str, index: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the tasks of a group or tag, also of nested ones, or a task itself."""
    entry = index.get(name, {})
    if entry.get("type") == "task":
        yield name
    elif entry.get("type") == "tag":
        yield from entry["task"]
    elif entry.get("type") == "group":
        for member in task_settings(entry)["task"]:
            yield from parts(member if isinstance(member, str) else member.get("task", ""), index)


def task_settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML of an entry of lmms-eval's task index, without its functions."""
    # Imported here: takes seconds, which reports that look up a threshold do not need.
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(entry["yaml_path"], mode="simple")
