"""`sdrpn-eval compare`: runs compared question by question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import console, report_errors, say
from sdrpn.io.plurals import counted
from sdrpn_eval.cli.options import SeedOption, at_least, split_names

if TYPE_CHECKING:
    from sdrpn_eval.results.read import Run


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Output folders of lmms-eval (or *_results.json files); all are compared with "
            "the first.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the results; those in it are replaced.")
    ] = Path("comparison"),
    names: Annotated[
        str, typer.Option(help="Names of the runs, comma-separated; default: their folders'.")
    ] = "",
    tasks: Annotated[
        str,
        typer.Option(help="Compare only these tasks, comma-separated; default: all in common."),
    ] = "",
    boxes: Annotated[
        Path | None,
        typer.Option(help=r"True boxes: JSON {task: {document id: \[x0, y0, x1, y1]}}, in pixels."),
    ] = None,
    budget_mb: Annotated[float, typer.Option(help="Maximum size of the page, in MB.")] = 50,
    seed: SeedOption = 0,
) -> None:
    """Is it better, where, by how much: a table, JSON, Markdown and an HTML page.

    Questions are paired by document. Runs that asked other documents or
    prompts, or were scored otherwise, are refused, and the refusal names what
    moved. Writes compare.html, .md and .json into --out, by default the folder
    comparison of the working directory.

    Run lmms-eval with --output_path and --log_samples, once each way, then:

      sdrpn-eval compare out/stock out/rpn --out comparison

      sdrpn-eval compare out/stock out/rpn out/llava_hf --tasks textvqa_val
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.report.html import write_comparison
        from sdrpn_eval.report.text import show
        from sdrpn_eval.results.comparability import common_tasks
        from sdrpn_eval.results.compare import gather
        from sdrpn_eval.results.documents import documents_of, read_boxes

        at_least(0, seed=seed)
        if not (budget_mb > 0 and math.isfinite(budget_mb)):
            raise ValueError(f"--budget-mb must be greater than 0, got {budget_mb:g}")
        given = read_boxes(boxes) if boxes else {}
        read = _read(runs, split_names(names), split_names(tasks))
        common, _ = common_tasks(read)
        evidence = [gather(run) for run in read]
        data, notes = documents_of(evidence, common)
        stem = out / "compare"
        comparison, notes = write_comparison(
            evidence, data, stem, boxes=given, budget_mb=budget_mb, seed=seed, notes=notes
        )
        show(comparison, notes, console)
        say(f"wrote {stem}.html, compare.md and compare.json beside it")


def _read(folders: list[Path], names: list[str], tasks: list[str]) -> list[Run]:
    from sdrpn_eval.results.read import read_run

    if len(folders) < 2:
        raise ValueError(f"compare needs two runs or more, got {len(folders)}")
    if names and len(names) != len(folders):
        raise ValueError(
            f"--names has {counted(len(names), 'name')} for {counted(len(folders), 'run')}"
        )
    names = names or run_names(folders)
    if len(set(names)) < len(names):
        raise ValueError(f"runs need different names, got {', '.join(names)}; give --names")
    return [read_run(f, n, tasks or None) for f, n in zip(folders, names, strict=True)]


def run_names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in folders]
    for length in range(1, max(len(p) for p in parts)):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in folders]
