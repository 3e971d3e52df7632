"""The runs of a ladder: one run of lmms-eval per proposer, each in its own folder."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.command_line import parse_arguments
from sdrpn_eval.loading import revisions, sources
from sdrpn_eval.provenance.collect import hash_sources, weights_only
from sdrpn_eval.results.comparability import changes
from sdrpn_eval.results.read import RESULTS, BadRun, Run, read_run
from sdrpn_eval.results.records import read_facts
from sdrpn_eval.results.responses import arguments_of

NAMES: Mapping[str, str] = {"none": "stock", "box": "true box"}
"""Names of runs that are not named after their proposer."""
TAIL = 15
"""Last lines of the log that are shown if a run failed."""


class RunFailed(ValueError):
    """Raised if lmms-eval, which exits with 0 even then, left no complete results."""


@dataclass(frozen=True)
class Ladder:
    """What all runs have in common; `processes` of each run share its documents."""

    out: Path
    tasks: str
    model_args: str
    limit: int | None
    batch_size: str
    include_path: str | None = None
    model: str = "llava_sdrpn"
    processes: int = 1

    def __post_init__(self) -> None:
        if "proposer" in parse_arguments(self.model_args):
            raise ValueError("--model_args must not name a proposer; --proposers lists them")
        if "proposer" not in parse_arguments(self.arguments("rpn")):
            raise ValueError(
                f"--model_args {self.model_args!r} leaves a quotation mark or bracket open; put "
                "the value in quotes"
            )

    def folder(self, proposer: str) -> Path:
        return self.out / proposer

    def arguments(self, proposer: str) -> str:
        return ",".join(part for part in (self.model_args, f"proposer={proposer}") if part)

    def command(self, proposer: str) -> list[str]:
        """The command line of a proposer's run."""
        words = [sys.executable]
        if self.processes > 1:
            words += ["-m", "torch.distributed.run", "--standalone"]
            words += ["--nproc_per_node", str(self.processes)]
        words += ["-m", "lmms_eval", "--model", self.model, "--tasks", self.tasks]
        words += ["--model_args", self.arguments(proposer), "--batch_size", self.batch_size]
        words += ["--output_path", str(self.folder(proposer)), "--log_samples"]
        words += ["--limit", str(self.limit)] if self.limit else []
        return words + (["--include_path", self.include_path] if self.include_path else [])


def finished_run(ladder: Ladder, proposer: str) -> Run | None:
    """A proposer's run, if it is complete already.

    Raises:
        ValueError: If the folder holds another run: other tasks, arguments, limit or weights.
    """
    folder = ladder.folder(proposer)
    try:
        run = read_run(folder, NAMES.get(proposer, proposer))
    except BadRun:
        return None
    then = {"--model": run.model, "--tasks": run.cli.get("tasks"), "--limit": run.limit}
    now = {"--model": ladder.model, "--tasks": ladder.tasks, "--limit": ladder.limit}
    given = parse_arguments(ladder.arguments(proposer))
    moved = changes({**then, **run.arguments}, now | given)
    facts = read_facts(run)
    if facts is not None and run.model == ladder.model:
        values = ARGUMENTS[ladder.model].of(arguments_of(facts))
        weights = weights_only(hash_sources(sources(values), revisions(values)))
        pairs = changes(facts.weights, weights)
        moved |= {f"the weights {name}": pair for name, pair in pairs.items()}
    if moved:
        said = "; ".join(f"{name} {a} then, {b} now" for name, (a, b) in moved.items())
        raise ValueError(f"{folder} holds another run ({said}); give another --out, or remove it")
    return run


def make_run(ladder: Ladder, proposer: str) -> tuple[Run, float]:
    """Runs lmms-eval with a proposer.

    Returns:
        The run, and the seconds that the command took.

    Raises:
        RunFailed: If it left no results; with lmms-eval's exit code and the end of its log.
    """
    folder = ladder.folder(proposer)
    before = set(folder.rglob(f"*{RESULTS}"))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(ladder.command(proposer), stdout=file, stderr=file, check=False)
    seconds = time.perf_counter() - started
    try:
        if not set(folder.rglob(f"*{RESULTS}")) - before:
            raise BadRun(f"lmms-eval left no results in {folder}")
        return read_run(folder, NAMES.get(proposer, proposer)), seconds
    except BadRun as error:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(lines[-TAIL:])
        raise RunFailed(
            f"proposer={proposer}: {error}. lmms-eval's exit code was {done.returncode}; {log} "
            f"ends with:\n{end}"
        ) from None
