"""`sdrpn train`: train an RPN on a labels folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from sdrpn import model_registry
from sdrpn.cli.shared import MODEL_HELP, report_errors, say
from sdrpn.config import ZoomConfig

CHECKPOINTS = "checkpoints"
FACTS = "training.json"


def train(
    context: typer.Context,
    labels: Annotated[Path, typer.Option(help="Complete labels folder of `sdrpn label`.")],
    out: Annotated[Path, typer.Option(help="Folder for the RPN; resumes if training was begun.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = model_registry.LLAVA_7B,
    images: Annotated[
        Path | None, typer.Option(help="Image folder, if moved since labelling.")
    ] = None,
    branch_layer: Annotated[
        int | None, typer.Option(help="B: backbone layers below the RPN; default: as published.")
    ] = None,
    depth: Annotated[int, typer.Option(help="R: R-1 decoder layers and the map head.")] = 3,
    held_out: Annotated[
        float, typer.Option(help="Share of the images held out for evaluation; 0 for none.")
    ] = 0.02,
    samples: Annotated[
        int | None, typer.Option(help="Number of training labels, drawn at random; default: all.")
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            help="Questions per step over all processes; sets accumulation. Default: as published."
        ),
    ] = None,
    zoom: Annotated[
        str,
        typer.Option(help="Zoom settings to save in the RPN: threshold=0.1,policy=strongest,..."),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the frozen model: auto, float32, bfloat16 or float16.")
    ] = "auto",
    save_dtype: Annotated[
        str, typer.Option(help="Dtype of the saved RPN; auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
    padding: Annotated[
        str | None, typer.Option(help="pad or crop; default: the padding of the labels.")
    ] = None,
) -> None:
    """Train an RPN on a labels folder, with the published hyper-parameters by default.

    Also accepts every field of transformers' TrainingArguments, such as --learning_rate 1e-4,
    --per_device_train_batch_size 8, --max_steps 100, --report_to wandb, --bf16 false.

    Example: sdrpn train --labels labels/ --out rpn-7b/

    Several GPUs: accelerate launch -m sdrpn.cli train ...  After an interruption the same command
    resumes from the last checkpoint, without --resume_from_checkpoint.
    """
    with report_errors():
        # Imported here to keep --help and path errors fast.
        from sdrpn.backbones.registry import family_of, load_backbone
        from sdrpn.distill.label_dataset import (
            LabelledImages,
            image_root,
            load_labels,
            read_label_config,
            read_settings,
        )
        from sdrpn.io.atomic import read_object, remove_partial_files, write_json
        from sdrpn.io.resumable import ANEW, guard_settings

        settings = read_settings(labels)
        rows = LabelledImages(load_labels(labels), image_root(labels, images))
        folder, _ = model_registry.resolve(model, None)
        family, published_branch = family_of(folder)
        branch_layer = published_branch if branch_layer is None else branch_layer
        global_batch = family.global_batch if global_batch is None else global_batch
        zoom_config = ZoomConfig.from_text(zoom) if zoom else family.default_zoom
        arguments = training_arguments(
            context.args,
            out / CHECKPOINTS,
            global_batch,
            measured=held_out > 0,
            overrides=family.training_overrides,
        )
        from sdrpn.backbones.llava15 import check_padding
        from sdrpn.distill.split import split_by_image
        from sdrpn.distill.trainer import train as run
        from sdrpn.rpn.checkpoint import RPN

        # Before the weights are loaded, to report invalid settings early.
        if dtype in ("bfloat16", "float16") and not (arguments.bf16 or arguments.fp16):
            raise ValueError(
                f"--dtype {dtype}: the RPN itself is float32, so it needs mixed precision above "
                "such a model: add --bf16 true, or use --dtype float32"
            )
        trained, evaluated = split_by_image(rows, held_out, samples, arguments.seed)
        check_padding(padding)
        labelled = check_same_padding(padding, settings, labels)
        layers = branch_layer + depth
        backbone = load_backbone(
            folder, dtype=dtype, device=arguments.device, num_layers=layers, padding=labelled
        ).as_trained()
        backbone.name = model
        check_same_grid(backbone, settings, labels)
        skipped = rows.drop(
            lambda question, cells: (
                backbone.remaining_tokens(cells, backbone.prompt_ids(question).after) < 1
            )
        )
        if skipped:
            trained, evaluated = split_by_image(rows, held_out, samples, arguments.seed)
            if arguments.process_index == 0:
                say(
                    f"skipped, does not fit the context of {backbone.context_length} tokens: "
                    f"{len(skipped)} labels, such as {skipped[0]!r}"
                )
        label_config = read_label_config(labels)
        rpn = RPN.from_backbone(
            backbone, branch_layer, depth, zoom=zoom_config, labels=label_config
        )
        if arguments.process_index == 0:
            chosen = {
                "model": model,
                "base_hash": rpn.config.base_hash,
                "labels": settings.get("data_hash"),
                "made_by": settings["labels"],
                "branch_layer": branch_layer,
                "depth": depth,
                "held_out": held_out,
                "samples": samples,
                "global_batch": global_batch,
                "arguments": context.args,
            }
            # Earlier versions always used pad and did not save it.
            if (own := backbone.preprocessing.get("padding", "pad")) != "pad":
                chosen["padding"] = own
            remove_partial_files(out / CHECKPOINTS)
            guard_settings(out / CHECKPOINTS / "settings.json", chosen)
        facts = run(backbone, rpn, trained, arguments, held_out=evaluated, log=say)
        earlier = read_object(out / FACTS, ANEW) if (out / FACTS).exists() else {}
        rpn.facts = {"labels": settings.get("data", str(labels)), **facts}
        if skipped:
            rpn.facts["skipped, does not fit the context"] = len(skipped)
        rpn.facts.setdefault("seconds", earlier.get("seconds"))
        if arguments.process_index == 0:
            rpn.to(pick_save_dtype(save_dtype, arguments.device.type)).save_pretrained(out)
            write_json(out / FACTS, rpn.facts)
            for name, value in rpn.facts.items():
                say(f"{name}: {value}")
            say(f"RPN: {out}")


def training_arguments(
    more: list[str],
    out: Path,
    global_batch: int,
    measured: bool,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Build TrainingArguments from the published hyper-parameters and the command line.

    Args:
        more: Command-line words beyond the options of `sdrpn train`.
        out: Folder for checkpoints.
        global_batch: Questions per step over all processes.
        measured: Whether there is a held-out set.
        overrides: Hyper-parameters of the model family that differ.

    Raises:
        ValueError: If an option is unknown, or `global_batch` is not a multiple of the questions
            that all processes handle at once.
    """
    from transformers import HfArgumentParser, TrainingArguments

    from sdrpn.distill.trainer import defaults

    kind: Any = TrainingArguments
    parser = HfArgumentParser(kind, prog="sdrpn train", add_help=False)
    given = {word.lstrip("-").split("=")[0] for word in more if word.startswith("--")}
    wanted = {"output_dir": str(out), **defaults(measured), **overrides}
    words = [w for k, v in wanted.items() if k not in given for w in (f"--{k}", str(v))]
    try:
        (arguments,) = parser.parse_args_into_dataclasses([*words, *more], look_for_args_file=False)
    except SystemExit:
        raise ValueError(
            f"unknown option among {' '.join(more)}: give options of `sdrpn train --help` or "
            "fields of transformers' TrainingArguments"
        ) from None
    if "gradient_accumulation_steps" not in given:
        at_once = arguments.per_device_train_batch_size * arguments.world_size
        if global_batch % at_once:
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of the {at_once} questions that "
                f"{arguments.world_size} process(es) handle at once; set "
                "--per_device_train_batch_size or --global-batch"
            )
        arguments.gradient_accumulation_steps = global_batch // at_once
    return arguments


def check_same_grid(backbone: Any, settings: dict[str, Any], labels: Path) -> None:
    """Raise ValueError unless the labels have the model's number of image tokens."""
    cells, own = settings.get("image_tokens"), backbone.rpn_shape()["image_tokens"]
    if cells != own:
        raise ValueError(
            f"{labels} has labels for {cells} image tokens, {backbone.name} has {own}: label with "
            "this model"
        )


def check_same_padding(padding: str | None, settings: dict[str, Any], labels: Path) -> str | None:
    """Return the padding of the labels, since another one places their cells elsewhere.

    Args:
        padding: The --padding option.
        settings: Settings of the labels folder.
        labels: The labels folder.

    Returns:
        The padding, or None if neither the option nor the settings name one.

    Raises:
        ValueError: If the option differs from the settings.
    """
    made = settings.get("padding")
    if padding is not None and made is not None and padding != made:
        raise ValueError(
            f"--padding {padding}, but {labels} was labelled with padding {made}: omit --padding, "
            "or label again with it"
        )
    return padding or made


def pick_save_dtype(name: str, device: str) -> Any:
    """Return the torch dtype of a name; `auto` is bfloat16 for a GPU and float32 for a CPU."""
    from sdrpn.backbones.loading import DTYPES

    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"save_dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
