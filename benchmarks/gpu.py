"""Run the tests marked gpu and the benchmarks on one GPU, within a time limit and offline.

The models have the shape of LLaVA-1.5-7B and Qwen2.5-VL-7B and random weights. Steps run in order
of importance, each in a process of its own; report.md names those that there was no time for. A
step that fails does not stop the others, but the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.plot_throughput import facts, format_table, ratio_table
from benchmarks.workload import describe_machine
from sdrpn.io.atomic import atomic_write, write_json

LEAST_SECONDS = 20
"""A step is not begun with less time than this."""


@dataclass(frozen=True)
class Step:
    """A command that writes NAME.json, but for the tests.

    Args:
        name: Its name, which is that of its files.
        title: Heading in the report.
        command: Module and arguments.
    """

    name: str
    title: str
    command: tuple[str, ...]


def steps(args: argparse.Namespace) -> list[Step]:
    """The steps of a command line, in order of importance."""
    where = ["--device", args.device]
    sized = ["--shape", args.shape, *where, "--repeats", str(args.repeats)]
    if args.layers is not None:
        sized += ["--layers", str(args.layers)]
    batches = [str(size) for size in args.batch_sizes]
    llava = ["--systems", "stock", "sdrpn-paper", "sdrpn-fast", "sdrpn-fastest"]
    asked = ["--per-image", "1", "4"]

    def throughput(*more: str) -> tuple[str, ...]:
        return ("benchmarks.throughput", *sized, *asked, *more)

    tests = ("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py")
    found = []
    half = args.dtypes[0]
    for dtype in args.dtypes:
        command = throughput("--dtype", dtype, "--batch-sizes", *batches, *llava)
        found.append(Step(f"llava-{dtype}", f"LLaVA-1.5, {dtype}", command))
    family = ["--family", "qwen2_5_vl", "--systems", "stock", "two_pass", "sdrpn"]
    command = throughput("--dtype", args.dtypes[-1], "--batch-sizes", batches[0], *family)
    found.append(Step("qwen", f"Qwen2.5-VL, {args.dtypes[-1]}", command))
    changes = ["benchmarks.batch_changes", *where, "--batch-size", batches[-1]]
    limit = ["--limit", str(args.questions)] if args.questions else []
    found.append(
        Step(
            "batch_changes",
            f"Answers of the embedded model that differ between batch size 1 and {batches[-1]}",
            (*changes, *limit, "--dtypes", *dict.fromkeys(["float32", *args.dtypes])),
        )
    )
    command = ("benchmarks.compiled", *sized, "--dtype", half)
    found.append(Step("compiled", f"torch.compile of the decoder layers, {half}", command))
    if importlib.util.find_spec("flash_attn") is not None:
        only = ["--dtype", half, "--batch-sizes", *batches, "--attention", "flash_attention_2"]
        command = throughput(*only, *llava)
        found.append(Step("flash", f"LLaVA-1.5, {half}, flash_attention_2", command))
    written = [
        replace(step, command=(*step.command, "--out", str(args.out / f"{step.name}.json")))
        for step in found
    ]
    every = [Step("tests", "Tests", tests), *written]
    return [step for step in every if not args.steps or step.name in args.steps]


def run(step: Step, out: Path, seconds: float, device: str) -> str:
    """Run a step; returns `ok`, or what went wrong."""
    log = out / f"{step.name}.log"
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *step.command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env={**os.environ, "SDRPN_TEST_DEVICE": device},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "cut off by the time limit"
    return "ok" if done.returncode == 0 else f"failed, see {log.name}"


def section(step: Step, out: Path) -> str:
    """Format what a step wrote, if it wrote anything."""
    if step.name == "tests":
        log = out / "tests.log"
        lines = log.read_text().strip().splitlines() if log.exists() else []
        return "\n".join(f"    {line}" for line in lines[-3:])
    path = out / f"{step.name}.json"
    if not path.exists():
        return ""
    result: Any = json.loads(path.read_text())
    if isinstance(result, list):
        return format_table(list(result[0]), [[str(v) for v in row.values()] for row in result])
    if not result["rows"]:
        return ""
    if step.name == "compiled":
        rows = [
            [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
            for row in result["rows"]
        ]
        return format_table(list(result["rows"][0]), rows)
    parts = [ratio_table(result), facts(result)]
    peaks = [row for row in result["rows"] if row.get("peak_memory_bytes")]
    if peaks:
        most = max(peaks, key=lambda row: row["peak_memory_bytes"])
        name = " ".join(filter(None, (most["system"], most["preset"])))
        parts.append(
            f"Peak GPU memory: {most['peak_memory_bytes'] / 2**30:.1f} GiB ({name}, batch size "
            f"{most['batch_size']}); by system in {path.name}."
        )
    return "\n\n".join(parts)


def report(machine: dict[str, Any], outcomes: Sequence[tuple[Step, str]], out: Path) -> str:
    """Format all steps as Markdown."""
    name = machine.get("gpu") or machine["cpu"]
    lines = [f"# {name}, torch {machine['torch']}", ""]
    for step, outcome in outcomes:
        lines += [f"## {step.title}", ""]
        if outcome != "ok":
            lines += [f"**{outcome}**", ""]
        lines += [section(step, out), ""]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    p = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder [out/gpu]")
    p.add_argument("--device", default="cuda")
    p.add_argument("--shape", default="7b", help="7b, or small for a CPU")
    p.add_argument("--layers", type=int, help="cut the shape to so many decoder layers")
    p.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    p.add_argument("--repeats", type=int, default=3, help="timed rounds")
    p.add_argument("--questions", type=int, help="questions whose answers are compared [all]")
    p.add_argument("--minutes", type=float, default=8, help="time limit of all steps")
    p.add_argument("--steps", nargs="+", help="only these: tests, llava-float16, qwen, ...")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps from the command line."""
    p = parser()
    args = p.parse_args(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        p.error("torch finds no GPU here; --device cpu --shape small runs the steps on the CPU")
    planned = steps(args)
    if not planned:
        p.error(f"--steps names no step: {' '.join(args.steps)}")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(torch.device(args.device))
    end = time.monotonic() + args.minutes * 60
    outcomes: list[tuple[Step, str]] = []
    for step in (bar := tqdm(planned, unit="step")):
        bar.set_description(step.name)
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            outcomes.append((step, "not run: no time left"))
        else:
            outcomes.append((step, run(step, args.out, left, args.device)))
        with atomic_write(args.out / "report.md") as part:
            part.write_text(report(machine, outcomes, args.out))
    states = {step.name: outcome for step, outcome in outcomes}
    write_json(args.out / "gpu.json", {"machine": machine, "steps": states})
    print((args.out / "report.md").read_text())
    return int(any(outcome.startswith("failed") for outcome in states.values()))


if __name__ == "__main__":
    raise SystemExit(main())
