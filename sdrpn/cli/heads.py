"""`sdrpn heads`: which attention heads of a model point, found without annotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrpn import model_registry as names
from sdrpn.cli.shared import MODEL_HELP, PaddingOption, report_errors, say, weights_hint
from sdrpn.io.plurals import counted

if TYPE_CHECKING:
    from sdrpn.distill.head_search import Findings


def heads(
    out: Annotated[Path, typer.Option(help="Folder for heads.json, report.json, heads.png.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = names.LLAVA_7B,
    scenes: Annotated[int, typer.Option(help="Probe pictures; each has 3 to 6 discs.")] = 60,
    seed: Annotated[int, typer.Option(help="Decides the probe pictures.")] = 0,
    side: Annotated[int, typer.Option(help="Side of a probe picture in pixels.")] = 448,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that is read.")] = 128,
    max_heads: Annotated[int, typer.Option(help="Most heads to choose.")] = 7,
    depth: Annotated[int, typer.Option(help="R of the RPN that will be trained.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    padding: PaddingOption = None,
) -> None:
    """Find the heads whose attention makes a model's pseudo-labels, and where an RPN branches off.

    Draws pictures of patterned discs, asks the model about each, and scores every head by how well
    it looks at the disc that was asked about. No annotation, no download but the model.

    Example: sdrpn heads --model tiny --out heads/

    Then: sdrpn label --model tiny --heads heads/heads.json ...
    """
    with report_errors(weights_hint(model)):
        # Imported here, so that --help answers at once.
        from sdrpn.distill.head_search import find_heads, save_findings
        from sdrpn.engine import ZoomModel

        out.mkdir(parents=True, exist_ok=True)  # before the work, so that it is not in vain
        folder, _ = names.resolve(model, None)
        zoom = ZoomModel.from_pretrained(folder, proposer="none", dtype=dtype, padding=padding)
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
    say("\n".join(_told(found, out)))


def _told(found: Findings, out: Path) -> list[str]:
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
            "warning: these heads hardly look at what was asked more than at other discs; labels "
            "from them will not teach an RPN to follow the question"
        )
    lines += [f"sinks: {found.sinks.why}", found.branch_why]
    lines.append(f"written: {out / 'heads.json'}, report.json, heads.png")
    return lines
