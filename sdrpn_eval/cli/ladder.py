"""`sdrpn-eval ladder`: all proposers, measured with one command and shown in one figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import console, report_errors, say
from sdrpn.config import PROPOSERS as PROPOSERS_OF_MODEL
from sdrpn_eval.cli.options import (
    BatchSizeOption,
    LimitOption,
    ModelInLmmsEvalOption,
    SeedOption,
    TaskFolderOption,
    TasksOption,
    check_run,
    model_args_option,
    split_names,
)

if TYPE_CHECKING:
    from sdrpn_eval.results.comparison import Comparison
    from sdrpn_eval.results.ladder import Ladder
    from sdrpn_eval.results.read import Run

PROPOSERS = "none,vicrop,attention,rpn,box"


def ladder(
    out: Annotated[
        Path, typer.Option(help="Folder for the runs, one folder each, and the result.")
    ],
    tasks: TasksOption = "tiny_vstar",
    model_args: Annotated[str, model_args_option(", without the proposer.")] = "pretrained=tiny",
    model: ModelInLmmsEvalOption = "llava_sdrpn",
    proposers: Annotated[
        str,
        typer.Option(
            help="Ways to look, comma-separated; all are compared with the first. box is the "
            "oracle, the document's own box, and left out for documents without one."
        ),
    ] = PROPOSERS,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "16",
    include_path: TaskFolderOption = None,
    processes: Annotated[
        str, typer.Option(help="Processes of each run, or auto: one for each GPU.")
    ] = "1",
    seed: SeedOption = 0,
) -> None:
    """Stock, ViCrop, attention, RPN and oracle: run, compared question by question, drawn.

    Each is a run of lmms-eval in OUT/PROPOSER. Complete runs are kept, so the same command resumes
    an interrupted ladder. Writes ladder.png, ladder.svg and
    comparison.html, .md and .json.

      sdrpn-eval ladder --out out/ladder

      sdrpn-eval ladder --tasks textvqa_val,vstar --model_args dtype=bfloat16 --out out/7b
    """
    with report_errors():
        check_run(tasks, model, limit, seed)
        names = _proposers(proposers)
        for name, value in (("batch-size", batch_size), ("processes", processes)):
            if value != "auto" and not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"--{name} must be 1 or more, or auto, got {value!r}")
        # Imported here, so that --help answers at once.
        from sdrpn_eval.report.figures import draw_ladder
        from sdrpn_eval.report.html import write_comparison
        from sdrpn_eval.report.text import show
        from sdrpn_eval.results.documents import load_data
        from sdrpn_eval.results.ladder import Ladder

        count = _processes(processes)
        plan = Ladder(out, tasks, model_args, limit, batch_size, include_path, model, count)
        runs = [_run(plan, names[0])]
        data, notes = load_data(runs[0].tasks, include_path)
        for name in names[1:]:
            if name == "box" and (bare := [t for t, of in data.items() if not of.has_boxes]):
                notes.append(f"box is left out: the documents of {', '.join(bare)} have none")
            else:
                runs.append(_run(plan, name))
        comparison, notes = write_comparison(runs, data, out / "comparison", seed=seed, notes=notes)
        draw_ladder(comparison, caption(comparison, plan), [out / "ladder.png", out / "ladder.svg"])
        show(comparison, notes, console)
        say(f"{out / 'ladder.png'}, ladder.svg, comparison.html, .md and .json beside it")


def _proposers(text: str) -> list[str]:
    names = split_names(text)
    if len(set(names)) < max(len(names), 2):
        raise ValueError(f"--proposers needs two different ones or more, got {text!r}")
    known = (*PROPOSERS_OF_MODEL, "box")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--proposers must be of {', '.join(known)}, got {unknown[0]!r}")
    return names


def _processes(text: str) -> int:
    if text != "auto":
        return int(text)
    import torch

    return max(torch.cuda.device_count(), 1)


def _run(plan: Ladder, proposer: str) -> Run:
    from sdrpn_eval.results.ladder import finished_run, make_run

    done = finished_run(plan, proposer)
    if done is not None:
        say(f"{proposer}: done before, {plan.folder(proposer)}")
        return done
    with console.status(f"lmms-eval --tasks {plan.tasks}: proposer={proposer}"):
        run, seconds = make_run(plan, proposer)
    say(f"{proposer}: {seconds:.0f} s, {plan.folder(proposer)}")
    return run


def caption(comparison: Comparison, plan: Ladder) -> str:
    """The caption of the figure: how it was measured."""
    from sdrpn_eval.report.text import versions_line

    first = comparison.runs[0]
    facts = first.facts or {}
    device = facts.get("device") or {}
    made = versions_line(facts.get("versions") or {})
    where = device.get("name") or device.get("type")
    parts = [
        f"Measured by lmms-eval --model {plan.model} --model_args {plan.model_args or 'none'} "
        f"--tasks {plan.tasks}{f' --limit {plan.limit}' if plan.limit else ''}, one run for each "
        "proposer.",
        "Whiskers: 95 % intervals, clustered by image.",
        "true box: the box that each document carries, cropped as it is."
        if any(run.name == "true box" for run in comparison.runs)
        else "",
        f"{made}{f', on {where}' if where else ''}." if made else "",
    ]
    return " ".join(part for part in parts if part)
