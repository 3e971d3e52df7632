"""`sdrpn heads`: find the attention heads that point, without annotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn import model_registry
from sdrpn.cli.shared import (
    MODEL_HELP,
    DtypeOption,
    PaddingOption,
    report_errors,
    say,
    weights_hint,
)
from sdrpn.io.plurals import counted

if TYPE_CHECKING:
    from sdrpn.distill.head_search import Findings


def heads(
    out: Annotated[Path, typer.Option(help="Folder for heads.json, report.json, heads.png.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = model_registry.LLAVA_7B,
    scenes: Annotated[int, typer.Option(help="Number of probe pictures.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the probe pictures.")] = 0,
    side: Annotated[int, typer.Option(help="Side of a probe picture, in pixels.")] = 448,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer.")] = 128,
    max_heads: Annotated[int, typer.Option(help="Maximum number of heads.")] = 7,
    depth: Annotated[int, typer.Option(help="R, the depth of the RPN to train.")] = 3,
    dtype: DtypeOption = "auto",
    padding: PaddingOption = None,
) -> None:
    """Find the heads for a model's pseudo-labels, and the branch layer of its RPN.

    Draws pictures of patterned discs, asks the model about each disc, and scores every head by how
    well its attention matches that disc. Needs no annotation and no data.

    Example: sdrpn heads --model tiny --out heads/

    Then: sdrpn label --model tiny --heads heads/heads.json ...
    """
    with report_errors(weights_hint(model)):
        # Imported here to keep --help fast.
        from sdrpn.backbones.registry import load_backbone
        from sdrpn.distill.head_search import find_heads, save_findings
        from sdrpn.engine import ZoomModel

        out.mkdir(parents=True, exist_ok=True)  # fails before the work if it cannot be written
        folder, _ = model_registry.resolve(model, None)
        backbone = load_backbone(folder, dtype=dtype, padding=padding).as_trained()
        zoom = ZoomModel(backbone, proposer="none")
        zoom.backbone.name = model
        found = find_heads(
            zoom,
            scenes=scenes,
            seed=seed,
            side=side,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_heads=max_heads,
            depth=depth,
        )
        save_findings(found, out)
    say("\n".join(_summary(found, out)))


def _summary(found: Findings, out: Path) -> list[str]:
    chosen = "; ".join(f"layer {one.layer}: {one.heads}" for one in found.labels.grounding)
    lines = [f"heads that point: {chosen}"]
    for name, scores in found.held_out.items():
        lines.append(
            f"  {name}: IoU {scores['iou']:.3f}, mass inside {scores['mass']:.3f}, "
            f"maximum inside {scores['hits']:.3f}, labels kept {scores['kept']:.3f}"
        )
    lines.append(f"  on {counted(found.facts['questions']['held_out'], 'held-out question')}")
    if not found.follows_question:
        lines.append(
            "warning: these heads look at the disc in question hardly more than at other discs; "
            "labels from them will not teach an RPN to follow the question"
        )
    lines += [f"sinks: {found.sinks.why}", found.branch_why]
    lines.append(f"written: {out / 'heads.json'}, report.json, heads.png")
    return lines
