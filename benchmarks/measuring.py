"""Time systems on the same questions: seconds, ratios to stock, operations, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.flops import FORMULAS, Work, counted, floor
from benchmarks.systems import Said, System
from benchmarks.workload import Cell, Clock
from sdrpn.engine import Question


@dataclass(frozen=True)
class Job:
    """A system at a batch size, on the questions of a table cell."""

    system: System
    batch_size: int

    def run(self, asked: Sequence[Question]) -> list[Said]:
        """Answer all questions, with an empty prefix cache."""
        self.system.cool()
        # Copies, since a Question caches the keys of its images.
        fresh, answers = [replace(question) for question in asked], []
        for start in range(0, len(fresh), self.batch_size):
            answers += self.system.run(fresh[start : start + self.batch_size])
        return answers


@dataclass
class Measured:
    """Measurements of one job. seconds: per question, for each repeat."""

    job: Job
    crop_tokens: float
    flops: float
    seconds: list[float]
    peak_memory: int | None = None


def jobs_of(systems: Sequence[System], names: Sequence[str], sizes: Sequence[int]) -> list[Job]:
    """Build jobs for systems at every batch size; stock at batch size 1 is always included.

    names: systems, or one preset of them (`System.label`).
    """
    return [
        Job(system, size)
        for size in sorted({1, *sizes})
        for system in systems
        if system.name == "stock" or ({system.name, system.label} & {*names} and size in sizes)
        if size <= (system.largest_batch or size)
    ]


def measure(
    jobs: Sequence[Job], asked: Sequence[Question], clock: Clock, repeats: int, progress: Any
) -> list[Measured]:
    """Warm up, count operations once, then time the jobs round-robin, rotating the first."""
    results = []
    for job in jobs:
        said: list[Said] = []
        flops = counted(lambda job=job, said=said: said.extend(job.run(asked)))
        crops = sum(one.crop_tokens for one in said) / len(asked)
        results.append(Measured(job, crops, flops / len(asked), []))
        job.system.cool()
        progress.update()
    for repeat in range(repeats):
        turn = repeat * len(results) // repeats
        gc.collect()
        for result in [*results[turn:], *results[:turn]]:
            clock.reset_memory()
            started = clock.now()
            result.job.run(asked)
            result.seconds.append((clock.now() - started) / len(asked))
            peak = clock.peak_memory()
            if peak is not None:
                result.peak_memory = max(peak, result.peak_memory or 0)
            # Otherwise the memory of the next system would include this one's images.
            result.job.system.cool()
            progress.update()
    return results


def _ratio(of: Measured, to: Measured) -> float:
    return median(to.seconds) / median(of.seconds)


def rows_of(
    results: Sequence[Measured],
    cell: Cell,
    work_of: Callable[[System, float], Work],
    rate: float,
) -> list[dict[str, Any]]:
    """Return the JSON rows of one cell, relative to the stock without a preset.

    work_of: maps a system and its crop tokens per question to sizes and token counts.
    """
    reference = ("stock", None)
    systems = [(r.job.system, r) for r in results]
    stock = {r.job.batch_size: r for s, r in systems if (s.name, s.preset) == reference}
    rows = []
    for result in results:
        equal, own = stock[result.job.batch_size], median(result.seconds)
        paired = [s / o for s, o in zip(equal.seconds, result.seconds, strict=True)]
        name = result.job.system.name
        sizes, work = work_of(result.job.system, result.crop_tokens)
        least = sum(floor(name, sizes, work).values())
        rows.append(
            {
                "system": name,
                "preset": result.job.system.preset,
                "batch_size": result.job.batch_size,
                "questions_per_image": cell.mean,
                "mix": cell.mix,
                "crop_tokens": round(result.crop_tokens),
                "seconds_per_question": own,
                "seconds_each": result.seconds,
                "ratio_to_stock": _ratio(result, equal),
                "ratio_to_stock_batch1": _ratio(result, stock[1]),
                "ratio_spread": [min(paired), max(paired)],
                "flops_per_question": result.flops,
                "flops_formula": sum(FORMULAS[name](sizes, work).values()),
                "flops_floor": least,
                "time_over_floor": own * rate / least,
                "peak_memory_bytes": result.peak_memory,
            }
        )
    return rows
