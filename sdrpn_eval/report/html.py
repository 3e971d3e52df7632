"""The files of a comparison: JSON, Markdown, and an HTML page with charts and all questions.

The page fetches nothing and runs no script but its own. Templates escape what they print; text from
datasets and models reaches the page's script as JSON that cannot end its element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdrpn.boxes import PixelBox
from sdrpn.io.atomic import as_json as valid_json
from sdrpn_eval.report import text
from sdrpn_eval.report.gallery import Album, add_pictures, all_questions, description
from sdrpn_eval.results.comparability import Evidence, established
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison, MetricRow
from sdrpn_eval.results.documents import Documents
from sdrpn_eval.results.read import Run
from sdrpn_eval.results.scores import Document

BUDGET_MB = 50
SPARE = 0.97
"""Share of the budget for data, which is counted exactly; the rest is for the page around it."""
BADGES = {"better": "better", "worse": "worse", "same": "no difference shown"}
BADGES |= {"few": "too few to tell"}


def write_comparison(
    runs: Sequence[Run | Evidence],
    data: Mapping[str, Documents],
    stem: Path,
    *,
    boxes: Mapping[Document, PixelBox] | None = None,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> tuple[Comparison, list[str]]:
    """Compares runs with the first, see `compare`; writes STEM.json, STEM.md and STEM.html.

    Returns:
        The comparison, and what `write_page` returns.
    """
    comparison = compare(runs, data, boxes, seed)
    stem.parent.mkdir(parents=True, exist_ok=True)
    comparison.save(stem.with_suffix(".json"))
    stem.with_suffix(".md").write_text(text.markdown(comparison), encoding="utf-8")
    page = stem.with_suffix(".html")
    notes = write_page(comparison, data, page, budget_mb=budget_mb, seed=seed, notes=notes)
    return comparison, notes


def write_page(
    comparison: Comparison,
    data: Mapping[str, Documents],
    out: Path,
    *,
    budget_mb: float = BUDGET_MB,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> list[str]:
    """Writes the page of a comparison.

    Args:
        comparison: What the page shows.
        data: Documents by task, for pictures; tasks without are shown as text.
        out: File to write.
        budget_mb: Maximum size of the page; pictures are left out to stay within it.
        seed: Of the order in which questions get their pictures.
        notes: Sentences about data that is missing here.

    Returns:
        These sentences, and those about questions without pictures.
    """
    questions = all_questions(comparison)
    meta = description(comparison)
    text_size = len(as_json([meta, list(questions.values())]).encode())
    album = Album(int(budget_mb * 1e6 * SPARE) - text_size)
    left_out = [*notes, *add_pictures(comparison, data, questions, album, seed)]
    payload = {**meta, "questions": list(questions.values()), "pictures": album.pictures}
    out.write_text(_render(comparison, left_out, as_json(payload)), encoding="utf-8")
    return left_out


def as_json(value: Any) -> str:
    """Serialises to JSON that is safe inside a script element."""
    plain = valid_json(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return plain


def _render(comparison: Comparison, left_out: Sequence[str], payload: str) -> str:
    main = [row for row in comparison.rows if row.main]
    verdicts = [d.verdict for row in main for d in row.differences]
    known = established(comparison.evidence, [info.task for info in comparison.tasks])
    environment = Environment(
        loader=PackageLoader("sdrpn_eval.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=" / ".join(run.name for run in comparison.runs),
        verdicts=list(zip(verdicts, text.verdicts(comparison), strict=True)),
        badges=BADGES,
        scores=[_score_bars(row) for row in main],
        differences=_difference_marks(main),
        sections=text.sections(comparison),
        trust=[*known, *text.cautions(comparison), *left_out],
        method=text.METHOD,
        runs=comparison.runs,
        payload=payload,
    )


def _score_bars(row: MetricRow) -> dict[str, Any]:
    """A task's bars, in percent of the chart's width."""
    ends = [s.mean if s.high is None else s.high for s in row.scores]
    top = 1.0 if row.percent else max(ends, default=1.0) or 1.0
    bars = [
        {
            "run": score.run,
            "text": text.plain(score, row.percent),
            "length": _clipped(score.mean / top),
            "ends": _ends(score.low, score.high, top),
            "published": score.published if row.percent else None,
        }
        for score in row.scores
    ]
    return {"task": row.task, "bars": bars}


def _difference_marks(rows: Sequence[MetricRow]) -> dict[str, Any]:
    """Differences to the first run, with zero in the middle of the chart."""
    every = [d for row in rows if row.percent for d in row.differences]
    ends = [end for d in every for end in (d.low, d.high, d.mean) if end is not None]
    reach = 1.05 * max(0.01, *map(abs, ends)) if ends else 1.0
    marks = [
        {
            "task": row.task,
            "run": difference.run,
            "index": index,
            "text": f"{100 * difference.mean:+.1f}",
            "place": _clipped((difference.mean + reach) / (2 * reach)),
            "ends": _ends(difference.low, difference.high, 2 * reach, reach),
        }
        for row in rows
        if row.percent
        for index, difference in enumerate(row.differences, start=1)
    ]
    return {"marks": marks, "reach": f"{100 * reach / 1.05:.0f}"}


def _ends(
    low: float | None, high: float | None, scale: float, shift: float = 0.0
) -> tuple[float, float] | None:
    """(left end, length) of an interval, in percent."""
    if low is None or high is None:
        return None
    left, right = _clipped((low + shift) / scale), _clipped((high + shift) / scale)
    return left, round(right - left, 2)


def _clipped(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2)
