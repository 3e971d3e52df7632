"""The command line `sdrpn-eval`: what lmms-eval leaves to the eye and to the exit code."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import console, errors_as_sentences, say
from sdrpn.io.extras import needs
from sdrpn.io.plurals import counted
from sdrpn_eval.report.ladder import ladder
from sdrpn_eval.report.options import SeedOption, at_least
from sdrpn_eval.report.replay import replay
from sdrpn_eval.report.score import score
from sdrpn_eval.threshold_curve import curve

if TYPE_CHECKING:
    from sdrpn_eval.report.gate import Rules

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Results of lmms-eval that can be believed. First: lmms-eval --model llava_sdrpn "
    "--model_args pretrained=tiny --tasks tiny_vstar --output_path out/rpn --log_samples",
)


@app.callback()
def _main(context: typer.Context) -> None:
    with errors_as_sentences():
        needs("lmms_eval", "matplotlib", extra="eval", what="sdrpn-eval")
    # The documents of tasks are looked up on this machine; only what evaluates may fetch some.
    if context.invoked_subcommand != "ladder":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Output folders of lmms-eval (or *_results.json files); all are compared with "
            "the first.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("comparison"),
    names: Annotated[
        str, typer.Option(help="Names of the runs, with commas; default: their folders'.")
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="Compare these tasks only, with commas; default: all in common.")
    ] = "",
    boxes: Annotated[
        Path | None,
        typer.Option(help=r"True boxes: JSON {task: {document id: \[x0, y0, x1, y1]}}, in pixels."),
    ] = None,
    budget_mb: Annotated[float, typer.Option(help="Largest page, in MB.")] = 50,
    seed: SeedOption = 0,
) -> None:
    """Is it better, where, by how much: a table, JSON, Markdown and an HTML page.

    Questions are paired by document. Runs that asked other documents or
    prompts, or were scored otherwise, are refused, and the refusal names what
    moved.

    Run lmms-eval with --output_path and --log_samples, once each way, then:

      sdrpn-eval compare out/stock out/rpn --out comparison

      sdrpn-eval compare out/stock out/rpn out/llava_hf --tasks textvqa_val
    """
    with errors_as_sentences():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.report.compared import show, write_comparison
        from sdrpn_eval.report.documents import load_data, read_boxes

        at_least(0, seed=seed)
        if not (budget_mb > 0 and math.isfinite(budget_mb)):
            raise ValueError(f"--budget-mb must be greater than 0, got {budget_mb:g}")
        given = read_boxes(boxes) if boxes else {}
        read = _read(runs, [n for n in names.split(",") if n], [t for t in tasks.split(",") if t])
        cli = read[0].results["config"].get("resolved_cli_args") or {}
        data, notes = load_data(_common(read), cli.get("include_path"))
        comparison, notes = write_comparison(
            read,
            data,
            out / "compare",
            boxes=given,
            budget_mb=budget_mb,
            seed=seed,
            notes=notes,
        )
        show(comparison, notes, console)
        say(f"{out / 'compare.html'}, compare.md and compare.json beside it")


@app.command()
def gate(
    run: Annotated[Path, typer.Argument(help="Output folder of lmms-eval.")],
    baseline: Annotated[Path, typer.Option(help="The file to hold the run against.")],
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline from this run instead.")
    ] = False,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest fall that passes, in the score's units: 0.02, or textvqa_val=0.03; may "
            "be repeated. Default: the baseline's, else the noise decides."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Without a tolerance: a fall with p below this fails.")
    ] = 0.05,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Hold a task by another metric than its first: TASK=METRIC."),
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(help="Hours; older results are not this job's.")
    ] = None,
    allow_skipped: Annotated[
        int, typer.Option(help="Documents of a task that on_error may have skipped.")
    ] = 0,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML to write.")] = None,
) -> None:
    """Exit with 0 when no task fell, 1 when one did, 2 when the run is not whole.

    A run is not whole when it is missing, partial or empty, when a score is
    NaN, or when it was asked or scored otherwise than the baseline: lmms-eval
    exits with 0 in all these cases. With $GITHUB_STEP_SUMMARY set, a table goes
    there.

    Once, from a run that is good, and then in CI:

      sdrpn-eval gate out/rpn --baseline baselines/tiny.json --update

      sdrpn-eval gate out/rpn --baseline baselines/tiny.json --max-age 2
    """
    with errors_as_sentences():
        from sdrpn_eval.report import gate_report
        from sdrpn_eval.report.gate import Rules, safely_check

        at_least(0, allow_skipped=allow_skipped)
        rules = Rules(
            {k: _number(v, k) for k, v in _named("--tolerance", tolerance or []).items()},
            alpha,
            _named("--metric", metric or []),
            _age(max_age),
            allow_skipped,
        )
        if "" in (rules.metrics or {}):
            raise ValueError(f"--metric must be TASK=METRIC, got {(rules.metrics or {})['']!r}")
        if update:
            unused = {"--junit": junit, "--metric": metric}
            if without := [option for option, value in unused.items() if value]:
                raise ValueError(
                    f"{without[0]} has no effect with --update: it is of a check and is not kept "
                    "in the baseline"
                )
            for text in _update(run, baseline, rules):
                typer.echo(text)
            return
        from sdrpn_eval.report.baseline import read_baseline

        stored = read_baseline(baseline)
        kept = rules.tolerance or stored.tolerance
        verdicts = safely_check(run, stored, replace(rules, tolerance=kept))
        for verdict in verdicts:
            typer.echo(f"{gate_report.WORDS[verdict.code]}: {gate_report.line(verdict)}")
        typer.echo(gate_report.conclusion(verdicts))
        if junit:
            gate_report.write_junit(verdicts, str(run), junit)
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary:
            gate_report.append_summary(verdicts, Path(summary))
    raise typer.Exit(gate_report.exit_code(verdicts))


def _update(run: Path, baseline: Path, rules: Rules) -> list[str]:
    """Write a baseline from a whole run; a tolerance that was in the old one stays.

    Returns lines about tasks too small to be held by their noise, then one about the file.
    """
    from sdrpn_eval.report.baseline import make_baseline, read_baseline
    from sdrpn_eval.report.comparison import gather
    from sdrpn_eval.report.gate import check_rules, check_run, metric_key, refuse_skipped, small
    from sdrpn_eval.report.runs import read_run

    old = baseline.exists() and not rules.tolerance
    kept = read_baseline(baseline).tolerance if old else rules.tolerance
    read = read_run(run)
    check_run(read, rules.max_age)
    evidence = gather(read)
    for name in read.tasks:
        refuse_skipped(evidence, name, rules.skipped)
    made = make_baseline(evidence, kept)
    rules = replace(rules, tolerance=kept)
    check_rules(rules, made.tasks)
    made.save(baseline)
    held = [f"{name} by {metric_key(name, task)}" for name, task in made.tasks.items()]
    left_out = [name for name in read.tasks if name not in made.tasks]
    more = f"; without a score a document: {', '.join(left_out)}" if left_out else ""
    told = [
        f"note: {name}: {why}; until then every fall fails, unless a --tolerance is given"
        for name, why in small(made.tasks, rules).items()
    ]
    return [*told, f"{baseline}: {', '.join(held)}, from {read.file}{more}"]


def _named(option: str, texts: list[str]) -> dict[str, str]:
    """`NAME=VALUE` by name; a value alone has the name ""."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and not name:
            raise ValueError(f"{option} {text}: there is no task before the =")
        if name in found:
            what = f"of {name} " if name else ""
            raise ValueError(f"{option} {what}is given twice: {found[name]} and {value}")
        found[name] = value
    return found


def _age(hours: float | None) -> timedelta | None:
    if hours is None:
        return None
    most = timedelta.max.total_seconds() / 3600
    if not 0 < hours < most:
        raise ValueError(f"--max-age must be in (0, {most:.0f}) hours, got {hours:g}")
    return timedelta(hours=hours)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value >= 0 and math.isfinite(value)):
        of = f" of {name}" if name else ""
        raise ValueError(f"--tolerance{of} must be 0 or more, and finite, got {text}")
    return value


def _read(folders: list[Path], names: list[str], tasks: list[str]) -> list:
    from sdrpn_eval.report.runs import read_run

    if len(folders) < 2:
        raise ValueError(f"compare needs two runs or more, got {len(folders)}")
    if names and len(names) != len(folders):
        raise ValueError(
            f"--names has {counted(len(names), 'name')} for {counted(len(folders), 'run')}"
        )
    names = names or _names(folders)
    if len(set(names)) < len(names):
        raise ValueError(f"runs need different names, got {', '.join(names)}; give --names")
    return [read_run(f, n, tasks or None) for f, n in zip(folders, names, strict=True)]


def _names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in folders]
    for length in range(1, max(len(p) for p in parts)):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in folders]


def _common(runs: list) -> list[str]:
    return [task for task in runs[0].tasks if all(task in run.tasks for run in runs)]


app.command()(score)
app.command()(replay)
app.command()(ladder)
app.command()(curve)
