"""`sdrpn-eval score`: recorded answers, rescored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import console, report_errors, say
from sdrpn.io.plurals import agree, counted
from sdrpn_eval.cli.options import IncludePathOption

if TYPE_CHECKING:
    from sdrpn_eval.results.rescore import Change


def score(
    run: Annotated[
        Path,
        typer.Argument(
            help="Output folder of lmms-eval with samples, one of its *_results.json files, or a "
            "record of ours."
        ),
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="This task or group only; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new folder; default: the run's with -rescored behind its name."),
    ] = None,
    include_path: IncludePathOption = None,
) -> None:
    """Score recorded answers anew: a corrected grader costs no GPU hours.

    Applies the tasks' present filters, graders and aggregation to recorded answers, writes results
    and samples to a new folder that compare and gate read like any run, and shows what changed.
    Refused if documents or prompts have changed. The record of a run that crashed before it was
    scored can be scored too, and so can runs of llava_hf and other models, on tasks that are
    answered in words and filter nothing.

      sdrpn-eval score out/rpn

      sdrpn-eval score out/stock --task docvqa_val --include_path my_tasks --out out/stock-mended
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.report.tables import columns
        from sdrpn_eval.results.documents import task_manager
        from sdrpn_eval.results.rescore import beside, changes, score_again
        from sdrpn_eval.results.responses import read_source

        source = read_source(run, task or [])
        manager = task_manager(include_path or source.include_path)
        scored = score_again(source, out or beside(source), manager)
        found = changes(source, scored)
        rows = []
        for one in found:
            numbers = ["none" if v is None else f"{v:.4f}" for v in (one.before, one.after)]
            changed = "" if one.changed is None else str(one.changed)
            rows.append([f"{one.task}, {_plain(one.metric)}", *numbers, changed])
        header = ["task, metric", "before", "after", "documents changed"]
        for line in ("Scored anew", *columns(header, rows, console.width), _summary(found)):
            say(line)
        say(f"scored anew from {source.place}: {scored.file}")


def _summary(found: Sequence[Change]) -> str:
    changed = [one for one in found if one.changed]
    if any(one.changed is None for one in found):
        return "Nothing is known of how the documents were scored before."
    if not changed:
        return "No document's score changed."
    most = max(changed, key=lambda one: one.changed or 0)
    count = most.changed or 0
    documents = f"{counted(count, 'document')} {agree(count, 'has', 'have')}"
    return f"{documents} another {_plain(most.metric)} in {most.task}."


def _plain(metric: str) -> str:
    """The metric without the filter `none`."""
    return metric.removesuffix(",none")
