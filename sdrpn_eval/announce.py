"""Logs before a run which tasks will have a score, and with which thresholds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from loguru import logger

from sdrpn_eval import tasks_info
from sdrpn_eval.args import WITHOUT_THRESHOLD, ModelArguments
from sdrpn_eval.data_access import check_data
from sdrpn_eval.loading import EMBEDDED
from sdrpn_eval.plugin import TaskIndex


class Announcer:
    """Logs each message once, on the main process only."""

    def __init__(self, args: ModelArguments, *, main_process: bool) -> None:
        self.args = args
        self.main_process = main_process
        self._announced = False

    def early_tasks(self) -> list[str]:
        """The tasks in `--tasks`, as far as the command line and the index show."""
        names = tasks_info.requested(sys.argv)
        index = TaskIndex.latest or {}
        return [task for n in names for task in (list(tasks_info.parts(n, index)) or [n])]

    def announce_early(self, tasks: Sequence[str]) -> None:
        """Logs what will be scored before anything is downloaded, and checks access to the data.

        Raises ValueError if the data of one of the `early_tasks` cannot be fetched.
        """
        if TaskIndex.latest is not None and self.main_process:
            scored = tasks_info.scored_parts(tasks, TaskIndex.latest)
            if scored:
                self._log_tasks(scored)
            check_data(scored, TaskIndex.latest)

    def announce(
        self, tasks: Mapping[str, Any], thresholds: Mapping[str, tuple[float | str, str]]
    ) -> None:
        """Logs what will be scored, unless done before, and new thresholds with their origins.

        `tasks` are lmms-eval's task objects by name; None if unknown.
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
        own = EMBEDDED.get(str(self.args.pretrained))
        strange = [t for t in scored if tasks_info.family(t) != own]
        if own and strange:
            logger.warning(
                f"pretrained={self.args.pretrained} knows what {own} asks about only: its scores "
                f"on {', '.join(strange)} say nothing about LLaVA-1.5"
            )
