"""What a run says before it begins: which tasks will have a score, with which thresholds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from loguru import logger

from sdrpn_eval import tasks_info
from sdrpn_eval.args import WITHOUT_THRESHOLD, ModelArguments
from sdrpn_eval.data_access import check_data
from sdrpn_eval.loading import TINY
from sdrpn_eval.plugin import TaskIndex


class Announcer:
    """Says each thing once, on the main process alone."""

    def __init__(self, args: ModelArguments, *, main_process: bool) -> None:
        self.args = args
        self.main_process = main_process
        self._announced = False

    def early_tasks(self) -> list[str]:
        """The tasks behind `--tasks`, as far as the command line and the index tell."""
        names = tasks_info.requested(sys.argv)
        index = TaskIndex.latest or {}
        return [task for n in names for task in (list(tasks_info.parts(n, index)) or [n])]

    def announce_early(self, tasks: Sequence[str]) -> None:
        """Say what will be scored before anything is fetched, where the command line tells.

        Raises:
            ValueError: Where the data of a task cannot be had.
        """
        if TaskIndex.latest is not None and self.main_process:
            scored = tasks_info.scored_parts(tasks, TaskIndex.latest)
            if scored:
                self._log_tasks(scored)
            check_data(scored, TaskIndex.latest)

    def announce(
        self, tasks: Mapping[str, Any], thresholds: Mapping[str, tuple[float | str, str]]
    ) -> None:
        """Say what will be scored, and with which thresholds.

        Args:
            tasks: Name -> lmms-eval's object, None where it is not known.
            thresholds: Of the tasks that were not asked before, with where each is from.
        """
        if not self.main_process:
            return
        if not self._announced:
            metrics = {t: getattr(o, "aggregation", dict)() for t, o in tasks.items()}
            self._log_tasks({t: tasks_info.has_score(m) for t, m in metrics.items()})
        if thresholds and self.args.proposer not in WITHOUT_THRESHOLD:
            said = [f"{task} {value} ({origin})" for task, (value, origin) in thresholds.items()]
            logger.info(f"Thresholds: {', '.join(said)}")

    def _log_tasks(self, scored: dict[str, bool]) -> None:
        self._announced = True
        logger.info(tasks_info.describe(scored))
        strange = [t for t in scored if tasks_info.family(t) != "tiny_vstar"]
        if self.args.pretrained == TINY and strange:
            logger.warning(
                f"pretrained=tiny knows discs and patterns only: its scores on "
                f"{', '.join(strange)} say nothing about LLaVA-1.5"
            )
