"""`sdrpn train`: from labels to an RPN checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdrpn import model_registry as names
from sdrpn.cli.shared import MODEL_HELP, report_errors, say
from sdrpn.config import ZoomConfig

CHECKPOINTS = "checkpoints"
FACTS = "training.json"


def train(
    context: typer.Context,
    labels: Annotated[Path, typer.Option(help="A finished folder of `sdrpn label`.")],
    out: Annotated[Path, typer.Option(help="Folder for the RPN; a begun one is gone on with.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = names.LLAVA_7B,
    images: Annotated[
        Path | None, typer.Option(help="Image folder, where it is no longer where it was labelled.")
    ] = None,
    branch_layer: Annotated[int, typer.Option(help="B: backbone layers below the RPN.")] = 15,
    depth: Annotated[int, typer.Option(help="R: R-1 decoder layers and the map head.")] = 3,
    held_out: Annotated[
        float, typer.Option(help="Share of the images kept back to measure on; 0 for none.")
    ] = 0.02,
    samples: Annotated[
        int | None, typer.Option(help="Train on so many labels only, drawn at random.")
    ] = None,
    global_batch: Annotated[
        int, typer.Option(help="Questions a step over all processes, by accumulation.")
    ] = 512,
    zoom: Annotated[
        str,
        typer.Option(help="Zoom settings to note in the RPN: threshold=0.1,policy=strongest,..."),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Of the frozen model: auto, float32, bfloat16 or float16.")
    ] = "auto",
    save_dtype: Annotated[
        str, typer.Option(help="Of the saved RPN; auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
    padding: Annotated[
        str | None, typer.Option(help="pad or crop; default: as the labels were made.")
    ] = None,
) -> None:
    """Train an RPN on labels, with the published hyper-parameters unless told otherwise.

    Every field of transformers' TrainingArguments can be set too, such as --learning_rate 1e-4,
    --per_device_train_batch_size 8, --max_steps 100, --report_to wandb, --bf16 false.

    Example: sdrpn train --labels labels/ --out rpn-7b/

    Several GPUs: accelerate launch -m sdrpn.cli train ...  Stopped at any moment, the same command
    goes on from its last checkpoint; --resume_from_checkpoint is not needed.
    """
    with report_errors():
        # Imported here, so that --help and a wrong path answer at once.
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
        noted = ZoomConfig.from_text(zoom)
        arguments = training_arguments(
            context.args, out / CHECKPOINTS, global_batch, measured=held_out > 0
        )
        from sdrpn.backbones.llava15 import Llava15, check_padding
        from sdrpn.distill.split import split_by_image
        from sdrpn.distill.trainer import train as run
        from sdrpn.rpn.checkpoint import RPN

        # Before the weights are loaded, for what is wrong with the numbers.
        trained, kept_back = split_by_image(rows, held_out, samples, arguments.seed)
        check_padding(padding)
        labelled = check_same_padding(padding, settings, labels)
        folder, _ = names.resolve(model, None)
        layers = branch_layer + depth
        llava = Llava15.load(
            folder, dtype=dtype, device=arguments.device, num_layers=layers, padding=labelled
        )
        llava.name = model
        check_same_grid(llava, settings, labels)
        skipped = rows.drop(
            lambda question, cells: llava.room(cells, llava.prompt_ids(question).after) < 1
        )
        if skipped:
            trained, kept_back = split_by_image(rows, held_out, samples, arguments.seed)
            if arguments.process_index == 0:
                say(
                    f"skipped, does not fit the context of {llava.context_length} tokens: "
                    f"{len(skipped)} labels, such as {skipped[0]!r}"
                )
        made = read_label_config(labels)
        rpn = RPN.from_backbone(llava, branch_layer, depth, zoom=noted, labels=made)
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
            if llava.padding != "pad":  # which earlier versions always used and did not note
                chosen["padding"] = llava.padding
            remove_partial_files(out / CHECKPOINTS)
            guard_settings(out / CHECKPOINTS / "settings.json", chosen)
        facts = run(llava, rpn, trained, arguments, held_out=kept_back, tell=say)
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


def training_arguments(more: list[str], out: Path, global_batch: int, measured: bool) -> Any:
    """The published hyper-parameters, then what the command line says, as TrainingArguments."""
    from transformers import HfArgumentParser, TrainingArguments

    from sdrpn.distill.trainer import defaults

    kind: Any = TrainingArguments
    parser = HfArgumentParser(kind, prog="sdrpn train", add_help=False)
    given = {word.lstrip("-").split("=")[0] for word in more if word.startswith("--")}
    wanted = {"output_dir": str(out), **defaults(measured)}
    words = [w for k, v in wanted.items() if k not in given for w in (f"--{k}", str(v))]
    try:
        (arguments,) = parser.parse_args_into_dataclasses([*words, *more], look_for_args_file=False)
    except SystemExit:
        raise ValueError(
            f"not all of {' '.join(more)} is known: give options of `sdrpn train --help` or fields "
            "of transformers' TrainingArguments"
        ) from None
    if "gradient_accumulation_steps" not in given:
        at_once = arguments.per_device_train_batch_size * arguments.world_size
        if global_batch % at_once:
            raise ValueError(
                f"global_batch {global_batch} is no multiple of the {at_once} questions that "
                f"{arguments.world_size} process(es) take at once; set "
                "--per_device_train_batch_size or --global-batch"
            )
        arguments.gradient_accumulation_steps = global_batch // at_once
    return arguments


def check_same_grid(backbone: Any, settings: dict[str, Any], labels: Path) -> None:
    """Refuse labels of another grid of image tokens than the model's."""
    cells, own = settings.get("image_tokens"), backbone.rpn_shape()["image_tokens"]
    if cells != own:
        raise ValueError(
            f"{labels} labels {cells} image tokens, {backbone.name} has {own}: label with this "
            "model"
        )


def check_same_padding(padding: str | None, settings: dict[str, Any], labels: Path) -> str | None:
    """The padding that the labels were made with; refuse another one, whose cells lie elsewhere.

    None where neither the command nor the labels name one.
    """
    made = settings.get("padding")
    if padding is not None and made is not None and padding != made:
        raise ValueError(
            f"--padding {padding}, but {labels} was labelled with padding {made}: leave --padding "
            "out, or label again with it"
        )
    return padding or made


def pick_save_dtype(name: str, device: str) -> Any:
    """torch's dtype; `auto` is bfloat16 where training ran on a GPU."""
    from sdrpn.backbones.loading import DTYPES

    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"save_dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
