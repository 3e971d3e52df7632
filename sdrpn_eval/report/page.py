"""One HTML page that holds everything: summary, charts, and a gallery of the questions.

Nothing is fetched and nothing runs but the page's own script. What comes from data sets and models
reaches the page as JSON that cannot end its script element, and is put on it as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdrpn.io.atomic import as_json as valid_json
from sdrpn_eval.report import text
from sdrpn_eval.report.chart import differences_chart, scores_chart
from sdrpn_eval.report.checks import established
from sdrpn_eval.report.documents import Documents
from sdrpn_eval.report.gallery import add_pictures, all_questions, description
from sdrpn_eval.report.pictures import Album
from sdrpn_eval.report.results import Comparison

BUDGET_MB = 50
LONG = 30
"""Characters from which a cell of a table may break."""
SPARE = 0.97
"""Of the budget that is used: base64 and JSON are counted exactly, the page around them is not."""


def write_page(
    comparison: Comparison,
    data: Mapping[str, Documents],
    out: Path,
    *,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> list[str]:
    """Write compare.html; returns sentences about the questions it shows without a picture.

    notes: what else to say about data that is not here.
    """
    questions = all_questions(comparison)
    meta = description(comparison)
    text_size = len(as_json([meta, list(questions.values())]).encode())
    album = Album(int(budget_mb * 1e6 * SPARE) - text_size)
    left_out = [*notes, *add_pictures(comparison, data, questions, album, seed)]
    payload = {**meta, "questions": list(questions.values()), "pictures": album.pictures}
    page = fill(
        _asset("page.html"),
        TITLE=escape(" / ".join(run["name"] for run in comparison.runs)),
        STYLE=_asset("page.css"),
        SUMMARY=_summary(comparison, left_out),
        DATA=as_json(payload),
        SCRIPT=_asset("page.js"),
    )
    out.write_text(page, encoding="utf-8")
    return left_out


def fill(template: str, **parts: str) -> str:
    """Put parts in the places of a template, in one pass: what is put in is not searched again."""
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], template)


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element, whatever text it holds."""
    plain = valid_json(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return plain


def _asset(name: str) -> str:
    return files("sdrpn_eval.report").joinpath("assets", name).read_text(encoding="utf-8")


def _summary(comparison: Comparison, left_out: Sequence[str]) -> str:
    main = [row for row in comparison.rows if row.main]
    tasks = [info.task for info in comparison.tasks]
    known = established(comparison.evidence, tasks)
    sections = "".join(_table(s.title, s.header, s.rows) for s in text.sections(comparison))
    return "".join(
        [
            _verdicts(comparison),
            f'<div class="charts">{scores_chart(main)}{differences_chart(main)}</div>',
            sections,
            "<h2>Can it be trusted</h2>",
            _list([*known, *text.cautions(comparison), *left_out]),
            f'<p class="method">{escape(text.METHOD)}</p>',
            _runs(comparison),
        ]
    )


def _verdicts(comparison: Comparison) -> str:
    words = {"better": "better", "worse": "worse", "same": "no difference shown"}
    words["few"] = "too few to tell"
    kinds = [d.verdict for row in comparison.rows if row.main for d in row.differences]
    lines = zip(kinds, text.verdicts(comparison), strict=True)
    items = (
        f'<li><span class="badge {kind}">{words[kind]}</span> {escape(line)}</li>'
        for kind, line in lines
    )
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_td, cells)) + "</tr>" for cells in rows)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _td(cell: str) -> str:
    return f"<td{' class=long' if len(cell) > LONG else ''}>{escape(cell)}</td>"


def _runs(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        facts = run["facts"] or {}
        device = facts.get("device") or {}
        made = [f"{k} {v}" for k, v in (facts.get("versions") or {}).items()]
        weights = [f"{k} {v}" for k, v in (facts.get("weights") or {}).items()]
        rows.append(
            [
                run["name"],
                run["model"],
                str(run["model_args"] or ""),
                run["date"],
                "none" if run["limit"] is None else f"{run['limit']:g}",
                str(device.get("name") or device.get("type") or "not recorded"),
                ", ".join(made) or "not recorded",
                ", ".join(weights) or "not recorded",
            ]
        )
    header = ["run", "model", "arguments", "date", "limit", "device", "versions", "weights"]
    return _table("The runs", header, rows)
