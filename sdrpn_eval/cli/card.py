"""`sdrpn-eval card`: results for a model's repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn.cli.shared import report_errors, say
from sdrpn_eval.cli.options import SeedOption, at_least, split_names


def card(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Output folders of lmms-eval.")],
    to: Annotated[Path, typer.Option(help="Folder of the model's repository.")],
    name: Annotated[str, typer.Option(help="Name of the model; default: the folder's.")] = "",
    tasks: Annotated[
        str, typer.Option(help="These tasks only, comma-separated; default: all.")
    ] = "",
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=ID", help="Hub id of a task's dataset, if it was read locally."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="URL of the evaluation, such as a report page.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Publish scores: evaluation entries, the model card's table, a leaderboard row.

    Protocol, interval, threshold rule, commit and versions stand beside each
    score. A card that is in the folder keeps its text and metadata; nothing
    is uploaded.

      sdrpn-eval card out/rpn --to my-rpn --name you/my-rpn
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.cli.compare import run_names
        from sdrpn_eval.report.card import leaderboard, scores_of, write_card
        from sdrpn_eval.results.compare import gather
        from sdrpn_eval.results.read import read_run

        at_least(0, seed=seed)
        datasets = _datasets(dataset or [])
        found = [
            score
            for folder, run in zip(runs, run_names(runs), strict=True)
            for score in scores_of(
                gather(read_run(folder, run, split_names(tasks) or None)), datasets, seed
            )
        ]
        name = name or to.resolve().name
        files, without = write_card(found, to, name, source)
        say(leaderboard(found, name))
        for task in without:
            say(
                f"note: {task} has no entry, since its dataset has no id on the Hub; "
                f"--dataset {task}=OWNER/NAME gives one"
            )
        say(f"{', '.join(str(file) for file in files)}")


def _datasets(given: list[str]) -> dict[str, str]:
    found = {}
    for pair in given:
        task, _, dataset = pair.partition("=")
        if dataset.count("/") != 1 or not all(dataset.split("/")):
            raise ValueError(f"--dataset must be TASK=OWNER/NAME, got {pair}")
        found[task] = dataset
    return found
