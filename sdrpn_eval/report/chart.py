"""The two charts of the page as inline SVG: scores with intervals, differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sdrpn_eval.report.results import MetricRow

WIDTH, LEFT, RIGHT = 560, 150, 110
BAR, GAP, HEAD = 16, 22, 26


def scores_chart(rows: Sequence[MetricRow]) -> str:
    """A bar a run and task, with its interval, and a mark where the paper published a number."""
    body, y = [], HEAD
    for row in rows:
        ends = [s.mean if s.high is None else s.high for s in row.scores]
        top = 1.0 if row.percent else max(ends, default=1.0) or 1.0
        body.append(_label(row.task, y + BAR * len(row.scores) / 2))
        for index, score in enumerate(row.scores):
            middle = y + BAR / 2
            text = f"{100 * score.mean:.1f}" if row.percent else f"{score.mean:.4g}"
            body.append(
                f'<g class="run{index}"><title>{escape(score.run)}: {text}</title>'
                f'<rect x="{LEFT}" y="{y + 2}" width="{_along(score.mean / top):.1f}" '
                f'height="{BAR - 4}" rx="2"/></g>'
            )
            if score.low is not None and score.high is not None:
                low, high = (LEFT + _along(min(v / top, 1)) for v in (score.low, score.high))
                body.append(_whisker(low, high, middle))
            if score.published is not None and row.percent:
                at = LEFT + _along(score.published / 100)
                body.append(
                    f'<line class="published" x1="{at:.1f}" x2="{at:.1f}" y1="{y}" '
                    f'y2="{y + BAR}"><title>published: {score.published}</title></line>'
                )
            body.append(_value(f"{text} {escape(score.run)}", middle))
            y += BAR
        y += GAP
    ticks = [(LEFT + _along(v / 100), f"{v}") for v in range(0, 101, 25)]
    return _svg("Scores with 95 % intervals", body, y, ticks)


def differences_chart(rows: Sequence[MetricRow]) -> str:
    """A point a run and task, with its interval, on both sides of zero: the first run."""
    pairs = [(row, i, d) for row in rows if row.percent for i, d in enumerate(row.differences)]
    if not pairs:
        return ""
    ends = [end for _, _, d in pairs for end in (d.low, d.high, d.mean) if end is not None]
    reach = max(0.01, *map(abs, ends)) * 1.05

    def place(value: float) -> float:
        return LEFT + _along((value + reach) / (2 * reach))

    body, y, previous = [], HEAD, ""
    for row, index, difference in pairs:
        if row.task != previous:
            y += GAP / 2 if previous else 0
            body.append(_label(row.task, y + BAR * len(row.differences) / 2))
            previous = row.task
        middle = y + BAR / 2
        if difference.low is not None and difference.high is not None:
            body.append(_whisker(place(difference.low), place(difference.high), middle))
        body.append(
            f'<circle class="run{index + 1} {difference.verdict}" cx="{place(difference.mean):.1f}"'
            f' cy="{middle}" r="5"><title>{escape(difference.run)}</title></circle>'
        )
        body.append(_value(f"{100 * difference.mean:+.1f} {escape(difference.run)}", middle))
        y += BAR
    body.append(f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="18" y2="{y}"/>')
    ticks = [(place(v), f"{100 * v:+.0f}" if v else "0") for v in (-reach / 1.05, 0, reach / 1.05)]
    return _svg("Differences to the first run, in points", body, y + GAP, ticks)


def _along(share: float) -> float:
    return (WIDTH - LEFT - RIGHT) * max(share, 0)


def _label(text: str, y: float) -> str:
    short = text if len(text) <= 22 else text[:21] + "…"
    return (
        f'<text class="label" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short)}'
        f"<title>{escape(text)}</title></text>"
    )


def _value(text: str, y: float) -> str:
    return f'<text class="value" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{text[:20]}</text>'


def _whisker(low: float, high: float, y: float) -> str:
    ends = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 3}"/>' for x in (low, high)
    )
    line = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
    return f'<g class="whisker">{line}{ends}</g>'


def _svg(title: str, body: Sequence[str], height: float, ticks: Sequence[tuple[float, str]]) -> str:
    grid = "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height - GAP}"/>'
        f'<text class="tick" x="{x:.1f}" y="12" text-anchor="middle">{name}</text>'
        for x, name in ticks
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title)}">{grid}{"".join(body)}</svg></figure>'
    )
