"""What `score` measured, as pages: `python -m sdrpn_eval.demo.report --docs docs`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sdrpn_eval.demo import HERE
from sdrpn_eval.demo.score import GROUPS, markdown

RESULTS = HERE / "data" / "tiny_vstar.json"

PAGE = """# tiny_vstar, measured

{questions} held-out questions on {images} scenes, {fine:.0f} % of them about patterns too fine for
the first look (chosen so, as V* asks about small things); exact match, in percent; 95 % intervals
from a bootstrap that resamples images. One run of `python -m sdrpn_eval.demo.build`, float32 on a
CPU; the scores are those of the shipped float16 weights on the shipped WebP scenes.

{table}

Policy `strongest` where the row names none; `random` and `oracle` crop a given box. ViCrop's
windows are 1 to 2 times the model's 112 px.

| paired difference | all | fine | coarse |
|---|---|---|---|
{differences}

Over the thresholds shown, the score moves by {rpn_spread:.1f} points with the RPN and by
{attention_spread:.1f} with attention.

![Score over threshold](tiny_vstar_thresholds.png)

## How the model got there

{facts}
"""


def differences(result: Mapping[str, Any]) -> str:
    """Rows of the paired differences."""
    names = {
        "rpn_minus_stock": "RPN - stock",
        "rpn_minus_attention_best": "RPN - attention at its best threshold",
        "oracle_minus_rpn": "oracle box - RPN",
    }
    lines = []
    for key, name in names.items():
        cells = [
            f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for mean, low, high in (result[key][group] for group in GROUPS)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], out: Path) -> None:
    """Score over threshold, RPN and attention, with stock and oracle as lines."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=120)
    axis = figure.subplots()
    for proposer, colour in (("rpn", "#c2185b"), ("attention", "#1565c0")):
        rows = [r for r in result["rows"] if r["name"].startswith(f"{proposer}, t")]
        rows = [r for r in rows if r["policy"] == "strongest"]
        points = sorted((r["threshold"], *(100 * v for v in r["all"])) for r in rows)
        x, mean, low, high = zip(*points, strict=True)
        axis.plot(x, mean, marker="o", color=colour, label=proposer)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    for name, style in (("stock", ":"), ("oracle box, 168 px", "--")):
        row = next(r for r in result["rows"] if r["name"] == name)
        axis.axhline(100 * row["all"][0], color="grey", ls=style, label=name)
    axis.set_xlabel("threshold")
    axis.set_ylabel("exact match, %")
    axis.legend(loc="lower left", fontsize=8)
    figure.savefig(out)


def write(result: Mapping[str, Any], docs: Path) -> Path:
    """Write tiny_vstar.md and its figure into a folder."""
    docs.mkdir(parents=True, exist_ok=True)
    spread = result["spread_over_thresholds"]
    facts = "\n".join(f"- {k}: {v}" for k, v in result["labels_and_rpn"].items())
    page = PAGE.format(
        questions=result["questions"],
        images=result["images"],
        fine=100 * result["fine_share"],
        table=markdown(result),
        differences=differences(result),
        rpn_spread=100 * spread["rpn"],
        attention_spread=100 * spread["attention"],
        facts=f"{facts}\n- minutes for the whole build on 2 cores: {result['build_minutes']}",
    )
    plot(result, docs / "tiny_vstar_thresholds.png")
    path = docs / "tiny_vstar.md"
    path.write_text(page)
    return path


def main() -> None:
    """Read the command line and write the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON from the build")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write to")
    args = parser.parse_args()
    print(write(json.loads(args.results.read_text()), args.docs))


if __name__ == "__main__":
    main()
