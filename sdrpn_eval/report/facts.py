"""The provenance that belongs to a run: that of all its processes put together."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.provenance.model import Provenance as Facts
from sdrpn_eval.provenance.model import begun_runs, moment, read_provenance
from sdrpn_eval.report.runs import BadRun, Run

SET_BACK = timedelta(seconds=2)
"""What a clock may be set back by while a run starts."""


def read_facts(run: Run, folders: list[Path]) -> Facts | None:
    """The run's own facts, see `own_name`; None where no folder holds them.

    Another model may have written its results beside ours: it leaves no facts.
    """
    if run.model != "llava_sdrpn":
        return None
    for folder in folders:
        begun = begun_runs(folder)
        name = own_name(run, begun, folder)
        if name is not None:
            return _merged(begun[name])
    return None


def own_name(run: Run, names: Iterable[str], folder: Path) -> str | None:
    """Which of the runs that left something in a folder is the one that left these results.

    A run is named by the time when its model was made. lmms-eval's command line makes it right
    after the time that stands in the results, so it is the first one of those that began while the
    evaluation ran, and that has its arguments: others may run in the same folder at the same time.
    From Python the model may be older, and a run scored anew has the record of the one it is from:
    there it is the last one that began before the results were written.

    Args:
        names: of runs, as in facts and records; those that are no time are left out.
        folder: where their facts are.

    Returns:
        One of the names; None where all are other runs'.
    """
    begun = sorted(name for name in set(names) if (at := moment(name)) and at <= run.ended)
    if not run.by_command_line:
        return begun[-1] if begun else None
    inside = [name for name in begun if _moment(name) >= run.began - SET_BACK]
    if len(inside) > 1:
        inside = [name for name in inside if not _has_other_arguments(run, name, folder)]
    # After its time stands before just before it.
    return min(inside, key=lambda name: (_moment(name) < run.began, name), default=None)


def _has_other_arguments(run: Run, name: str, folder: Path) -> bool:
    """Whether a run's facts tell of other arguments than the results do."""
    files = begun_runs(folder).get(name)
    recorded = _merged(files).arguments if files else {}
    for argument, value in run.arguments.items():
        # A prompt may be named by its file, and is recorded as its text.
        if argument in recorded and argument != "system_prompt":
            try:
                given = getattr(LlavaArguments.of({argument: value}), argument)
            except ValueError:  # of another version
                continue
            if given != recorded[argument]:
                return True
    return False


def _moment(name: str) -> datetime:
    at = moment(name)
    assert at is not None  # names that are no time are left out before
    return at


def _merged(files: list[Path]) -> Facts:
    try:
        return read_provenance(files)
    except ValueError as error:
        raise BadRun(str(error)) from None
