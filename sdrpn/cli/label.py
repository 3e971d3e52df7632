"""`sdrpn label` and `sdrpn relabel`: pseudo-labels from the model's own attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdrpn import model_registry as names
from sdrpn.cli.shared import (
    MODEL_HELP,
    PaddingOption,
    check_images,
    print_label_summary,
    report_errors,
    say,
)
from sdrpn.config import KINDS


def label(
    data: Annotated[
        str,
        typer.Option(
            help="LLaVA's conversations or plain questions (`image`, `question`), as a JSON list "
            "or JSON lines; or a dataset (.parquet, a saved folder, a Hub id) with columns `image` "
            "and `question`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the labels; resumes if it exists.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = names.LLAVA_7B,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the image paths in DATA start from.")
    ] = None,
    subset: Annotated[
        str, typer.Option(help="Only images below these folders, such as gqa,ocr_vqa.")
    ] = "",
    samples: Annotated[
        int | None, typer.Option(help="Number of questions, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the preview.")] = 0,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Heads to read, from `sdrpn heads`; default: the published ones of 7B and 13B."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Questions per batch and process; halved if they do not fit.")
    ] = 16,
    shard_size: Annotated[
        int, typer.Option(help="Questions per file, which is what an interruption may repeat.")
    ] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    padding: PaddingOption = None,
    kind: Annotated[
        str,
        typer.Option(help="Kind of the images: natural, text, or auto, by their folders."),
    ] = "auto",
    preview: Annotated[int, typer.Option(help="Number of samples to draw to OUT/preview.png.")] = 0,
) -> None:
    """Label questions with the frozen model's own attention while it answers; no annotation needed.

    Example: sdrpn label --data llava_v1_5_mix665k.json --images images/ --subset gqa,ocr_vqa
    --samples 10000 --out labels/

    Several GPUs: accelerate launch -m sdrpn.cli label ...  If interrupted, the same command
    resumes. OUT/summary.json counts the labels and the reasons for questions without one.
    """
    # Imported here to keep --help and path errors fast.
    with report_errors():
        check_images(images)
        if kind not in ("auto", *KINDS):
            raise ValueError(f"kind must be auto, {' or '.join(KINDS)}, got {kind!r}")
        from accelerate import PartialState

        from sdrpn.backbones.fingerprint import base_hash
        from sdrpn.distill.label_job import LabelJob
        from sdrpn.distill.questions import fingerprint, read_items

        state = PartialState()

        def tell(text: str) -> None:
            if state.is_main_process:
                say(text)

        chosen = [name.strip() for name in subset.split(",") if name.strip()]
        items = read_items(data, subset=chosen, samples=samples, seed=seed, tell=tell)
        embedded = all(item.content for item in items)
        if images is None and not embedded:
            raise ValueError(f"{data} names image files: give their folder with --images")
        zoom = _engine(model, heads, dtype, padding, state.device)
        job = LabelJob(
            zoom,
            items,
            out,
            images=None if embedded else images,
            batch_size=batch_size,
            shard_size=shard_size,
            kind=None if kind == "auto" else kind,
            about={
                "model": model,
                "model_hash": base_hash(zoom.backbone, zoom.backbone.num_layers),
                "dtype": str(zoom.backbone.dtype).removeprefix("torch."),
                "data": data,
                "data_hash": fingerprint(items),
            },
        )
        job.run()
        if state.is_main_process:
            _finish(out, preview, seed)


def _engine(model: str, heads: Path | None, dtype: str, padding: str | None, device: Any) -> Any:
    from sdrpn.backbones.registry import load_backbone
    from sdrpn.distill.head_search import load_label_config
    from sdrpn.engine import ZoomModel
    from sdrpn.rpn.checkpoint import RPN

    folder, rpn = names.resolve(model, None)
    labels = load_label_config(heads) if heads else None
    if labels is None and rpn:
        labels = RPN.from_pretrained(rpn).config.labels
    backbone = load_backbone(folder, dtype=dtype, device=device, padding=padding).as_trained()
    zoom = ZoomModel(backbone, proposer="none", labels=labels)
    zoom.backbone.name = model
    if zoom.models.labels is None:
        raise ValueError(
            f"which attention heads of {model} point at the answer is not known: find them with "
            f"`sdrpn heads --model {model} --out heads/` and pass --heads heads/heads.json"
        )
    return zoom


def _finish(out: Path, preview: int, seed: int) -> None:
    """Write and print the summary. Raises ValueError if too many images could not be used."""
    from sdrpn.distill import label_job as labelling
    from sdrpn.distill.label_dataset import SUMMARY_FILE
    from sdrpn.io.atomic import write_json

    found = labelling.report(out)
    write_json(out / SUMMARY_FILE, found)
    print_label_summary(found)
    say(f"mean foreground share of the kept: {found['mean_foreground_share']:.1%}")
    if preview and found["kept"]:
        say(f"preview: {labelling.preview(out, preview, seed)}")
    say(f"labels: {out}")
    if found["bad_image_share"] > labelling.MAX_BAD_SHARE:
        raise ValueError(
            f"{found['bad_image_share']:.1%} of the images could not be used; see the reasons "
            f"above and in {out / SUMMARY_FILE}, and check --images"
        )


def relabel(
    labels: Annotated[Path, typer.Argument(help="A finished folder of `sdrpn label`.")],
    out: Annotated[Path, typer.Option(help="Folder for the new labels.")],
    sink_threshold: Annotated[float | None, typer.Option(help="Minimum value of a sink.")] = None,
    foreground: Annotated[
        float | None,
        typer.Option(help="Foreground cells: above this share of the maximum."),
    ] = None,
    background: Annotated[
        float | None,
        typer.Option(help="Background cells: below this share of the maximum."),
    ] = None,
    max_box_fraction: Annotated[
        float | None,
        typer.Option(help="Ignore questions whose foreground box covers this share of the grid."),
    ] = None,
    max_components: Annotated[
        int | None,
        typer.Option(help="Ignore questions with more foreground components than this."),
    ] = None,
    strongest: Annotated[
        float | None,
        typer.Option(
            help="Label only the component with the most attention; ignore questions where it has "
            "less than this share."
        ),
    ] = None,
) -> None:
    """Compute labels again from the stored maps, with other thresholds and without the model.

    Example: sdrpn relabel labels/ --out labels-strict/ --foreground 0.3
    """
    given = {
        "sink_threshold": sink_threshold,
        "foreground": foreground,
        "background": background,
        "max_box_fraction": max_box_fraction,
        "max_components": max_components,
        "strongest": strongest,
    }
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    with report_errors():
        from sdrpn.distill.label_dataset import read_label_config
        from sdrpn.distill.label_job import relabel as run

        run(labels, out, replace(read_label_config(labels), **changes))
        say(f"changed: {changes or 'nothing'}")
        _finish(out, preview=0, seed=0)
