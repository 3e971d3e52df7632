"""`sdrpn-eval sweep`: a grid of zoom settings on your own documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sdrpn.cli.shared import console, report_errors, say
from sdrpn.config import PEAK
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

NONE = "none"


def sweep(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the result.")],
    tasks: TasksOption = "tiny_vstar",
    model_args: Annotated[
        str, model_args_option(". They are the base; proposer is rpn.")
    ] = "pretrained=tiny",
    model: ModelInLmmsEvalOption = "llava_sdrpn",
    threshold: Annotated[
        str, typer.Option(help="Thresholds: numbers, peak, or base (that of --model_args).")
    ] = "base,peak",
    gate: Annotated[str, typer.Option(help="Confidence gates, or none.")] = "none,0.9",
    learned_gate: Annotated[str, typer.Option(help="Thresholds of the learned gate.")] = NONE,
    crop_tokens: Annotated[str, typer.Option(help="Budgets of crop tokens.")] = "none,64",
    tiles: Annotated[str, typer.Option(help="Tiles of large regions: 1, 2 or 4.")] = NONE,
    keep_tokens: Annotated[
        str, typer.Option(help="Image tokens that upper layers see in a zoomed answer.")
    ] = NONE,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = "16",
    tolerance: Annotated[
        float,
        typer.Option(help="Loss to accept for a cheaper setting, in points of 100."),
    ] = 0.5,
    include_path: TaskFolderOption = None,
    seed: SeedOption = 0,
) -> None:
    """Find the zoom settings that pay: score over cost, question by question.

    Asks every question under all combinations of the given values (`none` or `base`: as in
    --model_args). The image and the map are computed once, and equal answers too. Writes
    sweep.png, sweep.md and sweep.json, one run per setting for `compare`, and zoom.json, the
    cheapest setting within --tolerance of the best. The same command resumes an interrupted sweep.

      sdrpn-eval sweep --out out/sweep

      sdrpn-eval sweep --tasks textvqa_ci,docvqa_ci --model_args dtype=bfloat16 --threshold
      base,0.05,0.1,0.2,peak --out out/sweep_7b

      lmms-eval --model llava_sdrpn --model_args zoom=out/sweep_7b/zoom.json --tasks textvqa_val
    """
    with report_errors():
        check_run(tasks, model, limit, seed)
        if not 0 <= tolerance < 100:
            raise ValueError(f"--tolerance must be in [0, 100), got {tolerance:g}")
        axes = {
            "threshold": _values("threshold", threshold, _threshold),
            "gate": _values("gate", gate, float),
            "learned_gate": _values("learned-gate", learned_gate, float),
            "crop_tokens": _values("crop-tokens", crop_tokens, int),
            "tiles": _values("tiles", tiles, int),
            "keep_tokens": _values("keep-tokens", keep_tokens, int),
        }
        # Imported here, so that --help answers at once.
        from rich.progress import track

        from sdrpn_eval.command_line import parse_arguments
        from sdrpn_eval.report import sweep as report
        from sdrpn_eval.results.documents import task_manager
        from sdrpn_eval.results.sweep import ask_all, grid, judge, score_all

        settings, names = grid(axes), split_names(tasks)
        arguments = parse_arguments(model_args)
        if arguments.get("proposer", "rpn") != "rpn":
            raise ValueError(f"--model_args: proposer must be rpn, got {arguments['proposer']}")
        arguments |= {"batch_size": batch_size}
        manager = task_manager(include_path)
        say(f"{len(settings)} settings, {', '.join(names)}")
        source = ask_all(
            out, names, settings, model=model, arguments=arguments, limit=limit, manager=manager
        )
        progress = partial(track, description="Scoring", console=console, transient=True)
        runs = score_all(source, out, settings, manager, progress)
        found = judge(source, runs, settings, tolerance=tolerance / 100, seed=seed)
        report.write(found, out)
        for line in report.lines(found, console.width):
            say(line)
        say(report.note(found))
        chosen = f"{found.chosen}, {out / report.CHOSEN}"
        say(f"chosen: {chosen}; {out / 'sweep.png'}, sweep.md, sweep.json")


def _threshold(text: str) -> float | str:
    return text if text == PEAK else float(text)


def _values(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """The values of an option; None for none and base."""
    values = []
    for name in split_names(text):
        try:
            values.append(None if name in (NONE, "base") else read(name))
        except ValueError:
            raise ValueError(f"--{option} must list values, got {name!r}") from None
    return values or [None]
