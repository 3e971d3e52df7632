"""`sdrpn-eval gate`: a run checked against a baseline, for CI."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn.cli.shared import report_errors
from sdrpn_eval.cli.options import at_least

if TYPE_CHECKING:
    from sdrpn_eval.results.gate import Rules


def gate(
    run: Annotated[Path, typer.Argument(help="Output folder of lmms-eval.")],
    baseline: Annotated[Path, typer.Option(help="Baseline file to hold the run against.")],
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
    junit: Annotated[Path | None, typer.Option(help="JUnit XML file to write.")] = None,
) -> None:
    """Exit with 0 when no task fell, 1 when one did, 2 when the run is incomplete.

    A run is incomplete when it is missing, partial or empty, when a score is
    NaN, or when it was asked or scored otherwise than the baseline: lmms-eval
    exits with 0 in all these cases. With $GITHUB_STEP_SUMMARY set, a table goes
    there.

    Once, from a run that is good, and then in CI:

      sdrpn-eval gate out/rpn --baseline baselines/tiny.json --update

      sdrpn-eval gate out/rpn --baseline baselines/tiny.json --max-age 2
    """
    with report_errors():
        # Imported here, so that --help answers at once.
        from sdrpn_eval.results.gate import update_baseline

        at_least(0, allow_skipped=allow_skipped)
        rules = _rules(tolerance or [], alpha, metric or [], max_age, allow_skipped)
        if update:
            unused = {"--junit": junit, "--metric": metric}
            if without := [option for option, value in unused.items() if value]:
                raise ValueError(
                    f"{without[0]} has no effect with --update: it is of a check and is not kept "
                    "in the baseline"
                )
            for text in update_baseline(run, baseline, rules):
                typer.echo(text)
            return
        code = _check(run, baseline, rules, junit)
    raise typer.Exit(code)


def _check(run: Path, baseline: Path, rules: Rules, junit: Path | None) -> int:
    """Checks a run, reports the verdicts and returns the exit code."""
    from sdrpn_eval.report import gate as report
    from sdrpn_eval.results.baseline import read_baseline
    from sdrpn_eval.results.gate import safely_check

    stored = read_baseline(baseline)
    rules = replace(rules, tolerance=rules.tolerance or stored.tolerance)
    verdicts = safely_check(run, stored, rules)
    for verdict in verdicts:
        typer.echo(f"{report.WORDS[verdict.code]}: {report.line(verdict)}")
    typer.echo(report.conclusion(verdicts))
    if junit:
        report.write_junit(verdicts, str(run), junit)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        report.append_summary(verdicts, Path(summary))
    return report.exit_code(verdicts)


def _rules(
    tolerance: list[str], alpha: float, metric: list[str], max_age: float | None, skipped: int
) -> Rules:
    from sdrpn_eval.results.gate import Rules

    tolerances = {k: _number(v, k) for k, v in _named("--tolerance", tolerance).items()}
    metrics = _named("--metric", metric)
    if "" in metrics:
        raise ValueError(f"--metric must be TASK=METRIC, got {metrics['']!r}")
    return Rules(tolerances, alpha, metrics, _age(max_age), skipped)


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
