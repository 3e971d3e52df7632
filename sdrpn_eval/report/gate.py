"""Reports of a gate: lines for the log, JUnit XML for CI systems, a summary for GitHub."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from sdrpn_eval.report.tables import escaped, markdown_table
from sdrpn_eval.results.verdicts import BROKEN, FELL, PASSED, Verdict

WORDS = {PASSED: "passed", FELL: "fell", BROKEN: "broken"}
_NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """2 if anything is broken, else 1 if a task fell, else 0."""
    return max((v.code for v in verdicts), default=BROKEN)


def line(verdict: Verdict) -> str:
    """A verdict in one line."""
    place = " ".join(part for part in (verdict.task, verdict.metric.removesuffix(",none")) if part)
    return f"{place}: {' '.join(_scores(verdict).split() + verdict.reason.split())}"


def _scores(verdict: Verdict) -> str:
    if verdict.before is None or verdict.after is None:
        return ""
    return f"{verdict.before:.4f} -> {verdict.after:.4f},"


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """All verdicts in one line, with the reasons that decided."""
    code = exit_code(verdicts)
    if code == PASSED:
        return f"gate: passed, {len(verdicts)} task(s) stand"
    reasons = "; ".join(line(v) for v in verdicts if v.code == code)
    return f"gate: {WORDS[code]}: {reasons}"


def write_junit(verdicts: Sequence[Verdict], run: str, path: Path) -> None:
    """Writes one test case per task: a fall is a failure, a broken run an error."""
    suite = ElementTree.Element(
        "testsuite",
        name="sdrpn-eval gate",
        tests=str(len(verdicts)),
        failures=str(sum(v.code == FELL for v in verdicts)),
        errors=str(sum(v.code == BROKEN for v in verdicts)),
    )
    for verdict in verdicts:
        name = f"{verdict.task} {verdict.metric}".strip()
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(run), name=_xml(name))
        if verdict.code != PASSED:
            kind = "failure" if verdict.code == FELL else "error"
            ElementTree.SubElement(case, kind, message=_xml(line(verdict)))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(line(verdict))
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(whole).write(path, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("?", text)


def append_summary(verdicts: Sequence[Verdict], path: Path) -> None:
    """Appends a table to the file that GitHub shows with a job ($GITHUB_STEP_SUMMARY)."""
    rows = []
    for verdict in verdicts:
        numbers = [f"{v:.4f}" if v is not None else "" for v in (verdict.before, verdict.after)]
        said = f"{WORDS[verdict.code]}: {verdict.reason}"
        rows.append([verdict.task, verdict.metric, *numbers, said])
    table = markdown_table(["task", "metric", "baseline", "now", "verdict"], rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"### {escaped(conclusion(verdicts))}\n\n{table}\n")
