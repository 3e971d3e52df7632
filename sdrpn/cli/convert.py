"""`sdrpn convert`: published RPNs, pseudo-labels and base models to this project's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn.cli.shared import check_images, print_label_summary, report_errors, say

OUT_HELP = "New folder."
SIZES = ("7b", "13b", "qwen-3b", "qwen-7b")

convert = typer.Typer(
    no_args_is_help=True,
    help="Convert published RPNs, pseudo-labels and LLaVA-1.5 base models.",
)


@convert.command("rpn")
def convert_rpn(
    source: Annotated[str, typer.Argument(help="The authors' checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the Hub id.")
    ] = None,
) -> None:
    """Extract the RPN from a checkpoint of the paper's authors.

    Conversion is optional, since `rpn=` and --rpn also read the original checkpoint; it saves disk
    space.

    Example: sdrpn convert rpn
    YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled --out rpn-7b/
    """
    with report_errors():
        new_folder(out)
        # Imported here to keep --help and path errors fast.
        from sdrpn.rpn.checkpoint import RPN

        rpn = RPN.from_pretrained(source, revision=revision)
        rpn.save_pretrained(out)
        config = rpn.config
        say(
            f"RPN: {out} (B = {config.branch_layer}, R = {config.depth}, "
            f"{sum(p.numel() for p in rpn.parameters()):,} parameters)"
        )


@convert.command("labels")
def labels(
    file: Annotated[Path, typer.Argument(help="The authors' pickle of labelled questions.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths are relative to; saved for training."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help=f"Size of the LLaVA-1.5 or Qwen2.5-VL that was labelled: {', '.join(SIZES)}."
        ),
    ] = "7b",
) -> None:
    """Convert the authors' pseudo-labels to a labels folder, as `sdrpn label` writes it.

    No code in the pickle is executed: a pickle of anything but plain values and arrays is refused.

    Example: sdrpn convert labels llava_v1_5_7b_pseudo_roi_release.pkl --images images/ --out
    labels/, then sdrpn train --labels labels/ --out rpn-7b/
    """
    with report_errors():
        if size not in SIZES:
            raise ValueError(f"--size must be {', '.join(SIZES)}, got {size!r}")
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        check_images(images)
        new_folder(out)
        from sdrpn.backbones import qwen25_vl_published as qwen
        from sdrpn.config import LABELS_7B, LABELS_13B
        from sdrpn.convert.labels import convert_labels

        small, large = (one.labels for one in qwen.SIZES)
        configs = dict(zip(SIZES, (LABELS_7B, LABELS_13B, small, large), strict=True))
        found = convert_labels(
            file,
            out,
            images=images,
            config=configs[size],
            preprocessing=qwen.PREPROCESSING if size.startswith("qwen") else None,
        )
        print_label_summary(found)
        say(f"labels: {out}")


@convert.command("base")
def base_model(
    source: Annotated[
        str, typer.Argument(help="LLaVA-1.5 in the original layout: folder or Hub id.")
    ],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    base: Annotated[
        str | None,
        typer.Option(help="For a LoRA fine-tune: the base model, with which it is merged."),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the CLIP; default: mm_vision_tower in config.json."),
    ] = None,
) -> None:
    """Convert a LLaVA-1.5 from the original layout to the Hugging Face layout.

    Example: sdrpn convert base my-finetune/ --out my-llava/

    A LoRA fine-tune: sdrpn convert base my-lora/ --base liuhaotian/llava-v1.5-7b --out my-llava/
    """
    with report_errors():
        new_folder(out)
        from sdrpn.convert.base import convert_base

        convert_base(source, out, base=base, vision_tower=vision_tower)
        say(f"LLaVA-1.5: {out}")


def new_folder(out: Path) -> None:
    """Raise ValueError unless the output folder is new or empty."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: give a new folder")
