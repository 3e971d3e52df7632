"""`sdrpn convert`: what others published, into this project's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrpn.cli.shared import check_images, print_label_summary, report_errors, say

OUT_HELP = "A new folder."
SIZES = ("7b", "13b")

convert = typer.Typer(
    no_args_is_help=True,
    help="Published RPNs, pseudo-labels and LLaVA-1.5 bases -> folders that everything here reads.",
)


@convert.command("rpn")
def convert_rpn(
    source: Annotated[str, typer.Argument(help="The authors' checkpoint: folder or hub id.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the hub id.")
    ] = None,
) -> None:
    """Keep only the RPN of a checkpoint by the paper's authors, once and for all.

    `rpn=` and --rpn read such a checkpoint as it is, too; this saves the disk the rest of it.

    Example: sdrpn convert rpn
    YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled --out rpn-7b/
    """
    with report_errors():
        new_folder(out)
        # Imported here, so that --help and a wrong path answer at once.
        from sdrpn.rpn.checkpoint import RPN

        rpn = RPN.from_pretrained(source, revision=revision)
        rpn.save_pretrained(out)
        config = rpn.config
        say(
            f"RPN: {out} (R = {config.depth} behind B = {config.branch_layer}, "
            f"{sum(p.numel() for p in rpn.parameters()):,} parameters)"
        )


@convert.command("labels")
def labels(
    file: Annotated[Path, typer.Argument(help="The authors' pickle of labelled questions.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that its image paths start from; noted for training."),
    ] = None,
    size: Annotated[
        str, typer.Option(help=f"LLaVA-1.5 whose attention it holds: {' or '.join(SIZES)}; noted.")
    ] = "7b",
) -> None:
    """Turn the authors' pseudo-labels into a folder of labels, as `sdrpn label` makes them.

    Nothing in the pickle is run: one that asks for more than numpy arrays is refused.

    Example: sdrpn convert labels llava_v1_5_7b_pseudo_roi_release.pkl --images images/ --out
    labels/, then sdrpn train --labels labels/ --out rpn-7b/
    """
    with report_errors():
        if size not in SIZES:
            raise ValueError(f"--size must be {' or '.join(SIZES)}, got {size!r}")
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        check_images(images)
        new_folder(out)
        from sdrpn.config import LABELS_7B, LABELS_13B
        from sdrpn.convert.labels import convert_labels

        config = LABELS_7B if size == "7b" else LABELS_13B
        found = convert_labels(file, out, images=images, config=config)
        print_label_summary(found)
        say(f"labels: {out}")


@convert.command("base")
def base_model(
    source: Annotated[str, typer.Argument(help="LLaVA-1.5 in its first layout: folder or hub id.")],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    base: Annotated[
        str | None,
        typer.Option(help="For a LoRA fine-tune: what it was trained on, merged with it."),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="The CLIP's folder, where config.json's mm_vision_tower is not."),
    ] = None,
) -> None:
    """Turn a LLaVA-1.5 in the layout of its authors' code into the Hugging Face layout.

    Example: sdrpn convert base my-finetune/ --out my-llava/

    A LoRA fine-tune: sdrpn convert base my-lora/ --base liuhaotian/llava-v1.5-7b --out my-llava/
    """
    with report_errors():
        new_folder(out)
        from sdrpn.convert.base import convert_base

        convert_base(source, out, base=base, vision_tower=vision_tower)
        say(f"LLaVA-1.5: {out}")


def new_folder(out: Path) -> None:
    """Refuse a folder that holds something: a source must not be written over, nor mixed with."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} holds something already: give a new folder")
