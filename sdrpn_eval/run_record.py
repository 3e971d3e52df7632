"""Location of the record and the provenance of a run, and when each is started."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sdrpn_eval.args import ModelArguments
from sdrpn_eval.command_line import on_command_line
from sdrpn_eval.journal import Journal
from sdrpn_eval.loading import revisions, sources
from sdrpn_eval.provenance.collect import Collector, hash_in_background
from sdrpn_eval.record import check_writable


class RunRecord:
    """The record of one process of a run, from before its weights are loaded to its last answer.

    Args:
        run: Name of the run, the same on all ranks; names must sort by time.
        rank, world_size: Of this process.
    """

    def __init__(self, run: str, rank: int, world_size: int) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.provenance: Collector | None = None
        self.journal: Journal | None = None

    def begin(self, given: Mapping[str, Any], device: torch.device) -> None:
        """Writes that a run with the given `--model_args` began, if its folder is known already."""
        outputs = [on_command_line("--output_path", sys.argv)]
        folder = _folder(outputs, given.get("record"), given.get("on_error"))
        if folder is not None:
            check_writable(folder)
            self.provenance = self._collector(folder, given, device)
            self.provenance.write()

    def loaded(self, args: ModelArguments, device: torch.device) -> None:
        """Starts to hash the weights, whose files are now on this machine and in the page cache."""
        if self.provenance is not None:
            self.provenance.arguments, self.provenance.device = dict(args), device
            self.provenance.hashes = hash_in_background(sources(args), revisions(args))

    def open(
        self, tasks: Iterable[Any], args: ModelArguments, device: torch.device, dtype: str
    ) -> Journal | None:
        """Opens the journal at the first call and returns it; None for a run without a record.

        Args:
            tasks: lmms-eval's task objects, which hold the output folder of a run from Python.
            args, device, dtype: Of the loaded model; dtype is "" for a model in memory.
        """
        if self.journal is not None:
            return self.journal
        outputs = [getattr(getattr(task, "args", None), "output_path", None) for task in tasks]
        folder = _folder(outputs, args.record, args.on_error)
        if folder is None:
            return None
        check_writable(folder)
        if self.rank == 0:
            logger.info(f"record of this run ({self.run}): {folder}")
        if self.provenance is None or self.provenance.folder != folder:  # from Python
            self.provenance = self._collector(folder, dict(args), device)
            self.loaded(args, device)
        uses = [use for use, source in sources(args).items() if source]
        self.journal = Journal(self.provenance, uses, dtype)
        return self.journal

    def _collector(
        self, folder: Path, arguments: Mapping[str, Any], device: torch.device
    ) -> Collector:
        return Collector(
            *(folder, self.run, self.rank, self.world_size, arguments, Future(), device),
            model_args=on_command_line("--model_args", sys.argv),
        )


def _folder(outputs: Iterable[str | None], record: Any, on_error: Any) -> Path | None:
    """`record=`, else `sdrpn_record` in lmms-eval's output folder; None for no record."""
    if record is None:
        return next((Path(path) / "sdrpn_record" for path in outputs if path), None)
    if str(record).lower() not in ("none", "false"):
        return Path(str(record)).expanduser()
    if (on_error or "raise") != "raise":
        raise ValueError(
            f"on_error={on_error} needs a record, which tells what was skipped; leave record=none "
            "out"
        )
    return None
