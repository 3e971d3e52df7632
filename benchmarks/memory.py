"""Resident memory of this process by stage and by type."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
FIELDS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}


def resident() -> dict[str, int]:
    """Current bytes. anonymous: allocated by the process. file: mapped pages that can be evicted.

    Raises RuntimeError on systems without /proc.
    """
    if not STATUS.exists():
        raise RuntimeError("resident memory is read from /proc/self/status, which is Linux's own")
    found = {}
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in FIELDS:
            found[FIELDS[name]] = int(value.split()[0]) * 1024
    return found


class Stages:
    """Seconds and memory of named stages, sampled by a thread.

    by_name: {stage: {seconds, peak_resident, peak_anonymous, peak_file, after_anonymous}}, bytes.
    The peaks of different types can be at different times. every: seconds between samples.
    """

    def __init__(self, every: float = 0.01) -> None:
        self.every = every
        self.by_name: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block."""
        peak, done = resident(), threading.Event()

        def sample() -> None:
            for kind, size in resident().items():
                peak[kind] = max(peak[kind], size)

        def watch() -> None:
            while not done.wait(self.every):
                sample()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            sample()
            done.set()
            watcher.join()
            self.by_name[name] = {
                "seconds": round(seconds, 3),
                **{f"peak_{kind}": size for kind, size in peak.items()},
                "after_anonymous": resident()["anonymous"],
            }


def stage_table(stages: dict[str, dict[str, float]]) -> str:
    """Format the stages as a Markdown table, in GiB."""
    lines = [
        "| stage | s | peak resident, GiB | of it held | mapped files | held after |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in stages.items():
        sizes = ("peak_resident", "peak_anonymous", "peak_file", "after_anonymous")
        cells = " | ".join(f"{row[size] / 2**30:.2f}" for size in sizes)
        lines.append(f"| {name} | {row['seconds']:.1f} | {cells} |")
    return "\n".join(lines)
