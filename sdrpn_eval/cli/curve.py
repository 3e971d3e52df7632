"""`sdrpn-eval curve`: score over threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn.cli.shared import console, report_errors, say
from sdrpn_eval.cli.options import SeedOption, at_least, split_names


def curve(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Output folders of lmms-eval that differ in threshold."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("curve"),
    tasks: Annotated[
        str, typer.Option(help="These tasks only, comma-separated; default: all in common.")
    ] = "",
    seed: SeedOption = 0,
) -> None:
    """Score over threshold, with the published thresholds beside one for all.

    Run lmms-eval with --output_path and --log_samples, once without threshold=
    and once with each of some, stock beside them if you like, then:

      sdrpn-eval curve out/stock out/published out/t005 out/t015 --out curve
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.report.curve import lines, write
        from sdrpn_eval.results.threshold_curve import curves

        at_least(0, seed=seed)
        found = curves(runs, split_names(tasks), seed)
        if not found:
            raise ValueError("the runs have no metric with a score a document in common")
        write(found, out)
        for line in lines(found, console.width):
            say(line)
        say(f"{out / 'curve.png'}, curve.md and curve.json beside it")
