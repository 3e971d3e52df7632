"""Plot the throughput benchmark and format its Markdown tables.

    python -m benchmarks.plot_throughput docs/throughput.json --docs docs/

Writes docs/throughput.png and docs/throughput.md and prints the tables. --name sets another name
(docs/NAME.png, docs/NAME.md). Text outside the two marker comments of a page is preserved. --into
FILE writes the first table between the same markers of another page, such as docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]

LINES = {
    ("sdrpn", "fastest"): ("sdrpn, fastest", "#003f5c", "-"),
    ("sdrpn", "fast"): ("sdrpn, fast", "#0072b2", "-"),
    ("sdrpn", "paper"): ("sdrpn, paper", "#56b4e9", "-"),
    ("gated", "0"): ("sdrpn, fast, gate, 0 % stand", "#d8b365", "-"),
    ("gated", "25"): ("sdrpn, fast, gate, 25 % stand", "#c59b3b", "-"),
    ("gated", "50"): ("sdrpn, fast, gate, 50 % stand", "#a6761d", "-"),
    ("gated", "75"): ("sdrpn, fast, gate, 75 % stand", "#6b4a0f", "-"),
    ("none", None): ("no second look, ours", "#009e73", "-"),
    ("two_pass", "paper"): ("two passes, as published", "#d55e00", "--"),
    ("vicrop", None): ("ViCrop, over our prefix", "#cc79a7", "--"),
    ("stock", "1024"): ("stock, 1024 tokens an image", "#999999", ":"),
    ("stock", "576"): ("stock, 576 tokens an image", "#555555", ":"),
}
"""Name, colour and line style of each system, in table order; stock is the line at 1."""

FAMILIES = {
    "llava": ("LLaVA", "`llava_hf`, which does not support larger batches"),
    "qwen2_5_vl": ("Qwen2.5-VL, 4096 tokens an image,", "`qwen2_5_vl` at batch size 1"),
}
"""Names in prose; files without a family are of LLaVA."""

BEGIN, END = "<!-- throughput -->", "<!-- end of throughput -->"


def column_of(row: Row) -> str:
    """Return the name of a row's column."""
    mean = f"{row['questions_per_image']:g}"
    return f"{row['mix']}, {mean}" if row["mix"] else mean


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Sort columns by questions per image, with the mixes of benchmarks last."""
    in_order = sorted(rows, key=lambda row: (bool(row["mix"]), row["questions_per_image"]))
    return list(dict.fromkeys(column_of(row) for row in in_order))


def find(rows: Sequence[Row], key: tuple[str, str | None], batch: int, column: str) -> Row | None:
    """Return the row of a system at a batch size in a column, or None."""
    wanted = (*key, batch, column)
    own = ((r["system"], r["preset"], r["batch_size"], column_of(r)) for r in rows)
    return next((row for row, k in zip(rows, own, strict=True) if k == wanted), None)


def batches_of(rows: Sequence[Row]) -> list[int]:
    """Return the batch sizes of systems other than stock."""
    return sorted({row["batch_size"] for row in rows if row["system"] != "stock"})


# --- figure ----------------------------------------------------------------------------------


def figure(result: dict[str, Any]) -> Figure:
    """Plot throughput over stock at equal batch size, one panel per batch size."""
    rows = result["rows"]
    batches, columns = batches_of(rows), columns_of(rows)
    drawn = Figure(figsize=(2.2 + 2.4 * len(batches), 3.9), layout="constrained", dpi=130)
    panels = drawn.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        panel.axhline(1, color="0.35", linewidth=1)
        for key, (name, colour, dashes) in LINES.items():
            _draw_line(panel, rows, key, batch, columns, name, colour, dashes)
        panel.set_title(f"batch size {batch}", fontsize=10)
        panel.set_xticks(range(len(columns)), columns, fontsize=8)
        panel.set_xlabel("questions per image", fontsize=9)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("questions per second, stock = 1", fontsize=9)
    where = {"transform": panels[0].get_yaxis_transform(), "ha": "center", "va": "center"}
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    panels[0].text(0.5, 1, "stock", fontsize=8, color="0.3", bbox=white, **where)
    # The first panel has every line, since some systems are measured only at batch size 1.
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawn


def _draw_line(
    panel: Any,
    rows: Sequence[Row],
    key: tuple[str, str | None],
    batch: int,
    columns: Sequence[str],
    name: str,
    colour: str,
    dashes: str,
) -> None:
    found = [(i, find(rows, key, batch, column)) for i, column in enumerate(columns)]
    points = [(i, row) for i, row in found if row is not None]
    if not points:
        return
    ratios = [row["ratio_to_stock"] for _, row in points]
    below = [row["ratio_to_stock"] - row["ratio_spread"][0] for _, row in points]
    above = [row["ratio_spread"][1] - row["ratio_to_stock"] for _, row in points]
    panel.errorbar(
        [i for i, _ in points],
        ratios,
        yerr=[below, above],
        label=name,
        color=colour,
        linestyle=dashes,
        marker="o",
        markersize=4,
        linewidth=1.6,
        capsize=2,
    )


# --- tables ----------------------------------------------------------------------------------


def format_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _by_batch(rows: Sequence[Row], cell: Callable[[Row], str], *, stock: str) -> str:
    """A table of systems by columns, sorted by batch size. stock: the name of its rows."""
    columns, lines = columns_of(rows), []
    keys: list[tuple[tuple[str, str | None], str]] = [(key, LINES[key][0]) for key in LINES]
    for batch in sorted({row["batch_size"] for row in rows}):
        for key, name in [(("stock", None), stock), *keys]:
            found = [find(rows, key, batch, column) for column in columns]
            if any(found):
                cells = [cell(row) if row else "" for row in found]
                lines.append([str(batch), name, *cells])
    head = ["batch size", "system", *(f"{column} per image" for column in columns)]
    return format_table(head, lines)


def ratio_table(result: dict[str, Any]) -> str:
    """Format throughput over stock at equal batch size, with the spread of the repeats."""

    def cell(row: Row) -> str:
        if (row["system"], row["preset"]) == ("stock", None):
            return f"{row['ratio_to_stock_batch1']:.2f} ({row['seconds_per_question']:.3g} s)"
        low, high = row["ratio_spread"]
        value = f"{row['ratio_to_stock']:.2f}"
        shown = f"**{value}**" if row["ratio_to_stock"] >= 1 else value
        return f"{shown} ({low:.2f} to {high:.2f})"

    return _by_batch(result["rows"], cell, stock="*stock, over stock at batch size 1*")


def today_table(result: dict[str, Any]) -> str:
    """Format throughput over stock at batch size 1, the only one that llava_hf supports."""
    return _by_batch(
        result["rows"], lambda row: f"{row['ratio_to_stock_batch1']:.2f}", stock="stock"
    )


def work_table(result: dict[str, Any]) -> str:
    """Format counted operations, the lower bound, and time relative to the bound."""

    def cell(row: Row) -> str:
        counted, least = row["flops_per_question"] / 1e9, row["flops_floor"] / 1e9
        return f"{counted:,.0f} / {least:,.0f} / {row['time_over_floor']:.1f}"

    return _by_batch(result["rows"], cell, stock="stock")


def facts(result: dict[str, Any]) -> str:
    """Describe machine, shape and workload in one paragraph."""
    machine, shape, settings = result["machine"], result["shape"], result["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    zoomed = [row for row in result["rows"] if row["system"] == "sdrpn"]
    budgets = {row["preset"]: row["crop_tokens"] for row in zoomed}
    crops = ", ".join(f"{tokens} crop tokens ({preset})" for preset, tokens in budgets.items())
    return (
        f"Measured on {where}, torch {machine['torch']}, {shape['name']} ({shape['layers']} "
        f"layers, hidden size {shape['hidden']}, {shape['dtype']}, {shape['attention']}), B = "
        f"{shape['branch_layer']}, R = {shape['rpn_depth']}; {shape['image_tokens']} image tokens, "
        f"{settings['question_tokens']} of the question, {settings['new_tokens']} new ones"
        f"{', ' + crops if crops else ''}; medians of {settings['repeats']} repeats."
    )


def _family(result: dict[str, Any]) -> tuple[str, str]:
    """Return the family's name, and lmms-eval's model of it."""
    return FAMILIES[result["shape"].get("family", "llava")]


def short_page(result: dict[str, Any]) -> str:
    """Return the first table and its facts, for another page."""
    return "\n\n".join(
        [
            f"Questions per second relative to stock {_family(result)[0]} **at equal batch size** "
            "(lowest to highest repeat); 1 is stock.",
            ratio_table(result),
            facts(result),
        ]
    )


def page(result: dict[str, Any], picture: str) -> str:
    """Return all tables."""
    rate = result["achievable_flops_per_second"] / 1e9
    parts = [
        f"![Throughput over stock at equal batch size]({picture})",
        short_page(result),
        "### Relative to stock at batch size 1",
        f"For comparison with lmms-eval's {_family(result)[1]}.",
        today_table(result),
        "### Work",
        "GFLOP per question as counted / lower bound (each image, map, crop and question once, one "
        "step per new token, unmasked keys only) / time relative to the lower bound at "
        f"{rate:,.0f} GFLOP/s, the best rate of large matrix products on this machine in the same "
        "run.",
        work_table(result),
    ]
    memory = [r for r in result["rows"] if r.get("peak_memory_bytes")]
    if memory:
        table = _by_batch(
            memory, lambda row: f"{row['peak_memory_bytes'] / 2**30:.1f}", stock="stock"
        )
        parts += ["### Peak memory of the GPU, GiB", table]
    for preset, stations in result.get("profile", {}).items():
        lines = [[name, *_station_cells(row)] for name, row in stations.items()]
        head = ["stage", "ms", "lower bound, ms", "ratio"]
        parts += [f"### A question by stage, preset {preset}", format_table(head, lines)]
    return "\n\n".join(parts)


def _station_cells(row: dict[str, float]) -> list[str]:
    own, least = row["seconds"] * 1e3, row["floor_seconds"] * 1e3
    return [f"{own:.1f}", f"{least:.1f}", f"{own / least:.1f}" if least else ""]


def put(
    path: Path, text: str, *, title: str | None = None, markers: tuple[str, str] = (BEGIN, END)
) -> None:
    """Write text between the markers of a page; with a title, a missing page is created.

    Raises ValueError if the page has no markers.
    """
    first, last = markers
    if title is not None and not path.exists():
        path.write_text(f"# {title}\n\n{first}\n{last}\n")
    page_text = path.read_text()
    before, begin, rest = page_text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {first} and {last} to put the table between")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("file", type=Path, help="JSON file of throughput.py")
    p.add_argument("--docs", type=Path, default=Path("docs"), help="folder for figure and page")
    p.add_argument("--name", default="throughput", help="name of figure and page")
    p.add_argument("--into", type=Path, help="another page, for the first table")
    args = p.parse_args(arguments)
    result = json.loads(args.file.read_text())
    if not result["rows"]:
        p.error(f"{args.file} holds no rows: its run ended before the first cell did")
    args.docs.mkdir(parents=True, exist_ok=True)
    picture = args.docs / f"{args.name}.png"
    figure(result).savefig(picture)
    whole = page(result, picture.name)
    put(args.docs / f"{args.name}.md", whole, title="Throughput")
    if args.into is not None:
        put(args.into, short_page(result))
    print(whole)


if __name__ == "__main__":
    main()
