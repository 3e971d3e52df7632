"""Profile zoomed questions by stage: image, map, crop, prefill, decode."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

import sdrpn.engine
import sdrpn.inference.generation
import sdrpn.second_look
from benchmarks.flops import STATIONS, Load, Sizes, floor
from benchmarks.systems import forget_images
from benchmarks.workload import Clock
from sdrpn.engine import Question, ZoomModel

SHOWN_OPERATORS = 15


@contextmanager
def labelled(engine: ZoomModel) -> Iterator[dict[str, float]]:
    """Label stages for torch's profiler while the block runs, and collect seconds by stage.

    pixels: pad and resize the image. Of generate(), prefill is the forward pass over the suffix,
    and decode are those over single tokens. On a GPU each stage waits for its kernels, so that
    times are attributed correctly.
    """
    seconds: dict[str, float] = defaultdict(float)
    clock, forward = Clock(engine.backbone.device), engine.backbone.model.forward

    def timed(station: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # generate() reads the signature of forward()
        def call(*args: Any, **kwargs: Any) -> Any:
            embeds = kwargs.get("inputs_embeds")
            one_token = function == forward and (embeds is None or embeds.shape[1] == 1)
            place = "decode" if one_token else station
            started = clock.now()
            with record_function(f"station {place}"):
                result = function(*args, **kwargs)
            seconds[place] += clock.now() - started
            return result

        return call

    places = (
        (engine.backbone, "preprocess", "pixels"),
        (sdrpn.engine, "prefill", "read"),
        (engine.second_look, "look", "look"),
        (sdrpn.second_look, "crop_tokens", "crop"),
        # Of answers from contexts: the lower layers, then the upper ones.
        (sdrpn.second_look, "run_lower", "prefill"),
        (sdrpn.second_look, "thinned", "prefill"),
        (sdrpn.second_look, "resume", "prefill"),
        (sdrpn.second_look, "filled", "prefill"),
        (sdrpn.inference.generation, "first_tokens", "decode"),
        (engine.backbone.model, "forward", "prefill"),
    )
    with ExitStack() as stack:
        for owner, name, station in places:
            stack.enter_context(patch.object(owner, name, timed(station, getattr(owner, name))))
        yield seconds


def station_seconds(
    engine: ZoomModel, ask: Callable[[], Any], repeats: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each stage of one call, and in total; `other` is the remainder.

    ask: empties the prefix cache and asks.
    """
    clock, rounds = Clock(engine.backbone.device), []
    ask()
    for _ in range(repeats):
        with labelled(engine) as seconds:
            started = clock.now()
            ask()
            whole = clock.now() - started
        rounds.append({**seconds, "other": whole - sum(seconds.values()), "whole": whole})
    medians = {name: median(r[name] for r in rounds) for name in rounds[0]}
    return medians, medians.pop("whole")


def operator_table(engine: ZoomModel, ask: Callable[[], Any]) -> str:
    """Return torch.profiler's tables of one call: the stages and the most expensive operators."""
    cuda = engine.backbone.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen, labelled(engine):
        ask()
    averages: Any = seen.key_averages()
    kind = "cuda" if cuda else "cpu"
    events = sorted(averages, key=lambda e: e.cpu_time_total, reverse=True)
    rows = [
        f"{event.key:<20} {event.cpu_time_total / 1e3:10.1f} ms"
        for event in events
        if event.key.startswith("station ") and event.cpu_time_total
    ]
    operators = averages.table(sort_by=f"self_{kind}_time_total", row_limit=SHOWN_OPERATORS)
    return "\n".join([*rows, operators])


def profile_batch(
    engine: ZoomModel,
    questions: Sequence[Question],
    generation: dict[str, Any],
    sizes: Sizes,
    rate: float,
    repeats: int,
) -> dict[str, Any]:
    """Profile a batch with an empty cache; prints tables, returns seconds and bounds by stage.

    questions: one per image. rate: achievable operations per second, which turn a stage's minimal
    operations into its bound. Seconds are those of a question.
    """
    answers: list[Any] = []

    def ask() -> None:
        forget_images(engine)
        answers[:] = engine.ask_batch([replace(one) for one in questions], generation)

    seconds, whole = station_seconds(engine, ask, repeats)
    seconds = {name: value / len(questions) for name, value in seconds.items()}
    seen = answers[0]
    load = Load(1, seen.question_tokens, seen.crop_tokens, seen.new_tokens)
    least = floor("sdrpn", sizes, load)
    result: dict[str, Any] = {
        name: {"seconds": seconds.get(name, 0.0), "floor_seconds": least.get(name, 0.0) / rate}
        for name in ("pixels", *STATIONS, "other")
    }
    result["whole"] = {
        "seconds": whole / len(questions),
        "floor_seconds": sum(least.values()) / rate,
    }
    print(operator_table(engine, ask))
    print(station_table(result))
    return result


def station_table(result: dict[str, dict[str, float]]) -> str:
    """Format a Markdown table of seconds per stage and their ratio to the lower bound."""
    lines = ["| station | ms | floor, ms | over floor |", "|---|---|---|---|"]
    for name, row in result.items():
        own, least = row["seconds"] * 1e3, row["floor_seconds"] * 1e3
        over = f"{own / least:.2f}" if least else ""
        lines.append(f"| {name} | {own:.1f} | {least:.1f} | {over} |")
    return "\n".join(lines)
