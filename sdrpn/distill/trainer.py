"""Train an RPN on pseudo-labels over a frozen backbone, with transformers' Trainer."""

from __future__ import annotations

import functools
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdrpn.backbones.base import Backbone, ImageInput
from sdrpn.backbones.cache import KV
from sdrpn.distill.metrics import MapMetrics
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.inference.decoder import run_layers
from sdrpn.inference.prefix import Batch, batch_rows
from sdrpn.io.checkpoint_files import first_line, read_all, tensor_names
from sdrpn.io.checkpoints import check_finite
from sdrpn.rpn.checkpoint import RPN

_CHECKPOINTING = next(
    f.name
    for f in fields(TrainingArguments)
    if f.name in ("activation_checkpointing", "gradient_checkpointing")
)
"""Name of the field, which transformers 5.2x changed."""

PUBLISHED: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1, a share of all steps
}
"""Published hyper-parameters that do not depend on the hardware (docs/method.md)."""

STATE_FILE = "trainer_state.json"
"""Written last, so a checkpoint without it is incomplete."""


def defaults(measured: bool) -> dict[str, Any]:
    """Return the defaults of `sdrpn train`: published hyper-parameters and checkpointing.

    Args:
        measured: Whether there is a held-out set, by which the best checkpoint is selected.
    """
    gpu = torch.cuda.is_available()
    values = {
        **PUBLISHED,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "bf16": gpu,
        _CHECKPOINTING: gpu,
        "use_cpu": not gpu,
        "dataloader_num_workers": 4 if gpu else 0,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
    }
    if measured:
        values |= {
            "eval_strategy": "steps",
            "eval_steps": 0.1,
            "batch_eval_metrics": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return values


def training_arguments(out: Path | str, **overrides: Any) -> TrainingArguments:
    """Build TrainingArguments with the published hyper-parameters.

    Args:
        out: Folder for checkpoints.
        **overrides: Any fields of TrainingArguments.
    """
    return TrainingArguments(
        output_dir=str(out),
        remove_unused_columns=False,
        batch_eval_metrics=True,
        **{**PUBLISHED, **overrides},
    )


class RPNForTraining(nn.Module):
    """An RPN over its frozen backbone; only the RPN is a submodule and is trained.

    Its weights are float32 whatever the dtype of the backbone; with `bf16`, the Trainer's autocast
    computes in bfloat16.
    """

    def __init__(self, backbone: Backbone, rpn: RPN) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn.attach(backbone, torch.float32).requires_grad_(True)

    def forward(
        self,
        images: Sequence[ImageInput],
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the loss and RoI logits of a batch of B samples.

        Args:
            images: B preprocessed images.
            input_ids: [B, N] token ids after the image, left-padded.
            attention_mask: [B, N], 1 for tokens and 0 for padding.
            labels: [B, T] of 1, 0 and -100, where T is the largest number of image tokens;
                right-padded with -100.

        Returns:
            `loss`, the mean over all labelled tokens of the batch (0 if there are none), and
            `logits`, [B, T], right-padded with 0.
        """
        logits = self._logits(images, input_ids, attention_mask)
        labels = labels.to(logits.device)
        labelled = labels != IGNORED
        targets = labels.clamp(min=0).to(logits.dtype)
        losses = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (losses * labelled).sum() / labelled.sum().clamp(min=1)
        return {"loss": loss, "logits": logits}

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute each RPN layer in the backward pass; called by the Trainer."""
        chosen = next(
            (v for k, v in options.items() if k.endswith("checkpointing_kwargs") and v), {}
        )
        run = functools.partial(checkpoint, **{"use_reentrant": False, **chosen})
        layers: Any = self.rpn.layers
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = run

    gradient_checkpointing_enable = activation_checkpointing_enable
    """The method's name in older versions of transformers."""

    def _logits(
        self, images: Sequence[ImageInput], input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """RoI logits over [padding][text before][image][padding][text after], [B, T]."""
        backbone = self.backbone
        with torch.no_grad():
            features = backbone.encode(images)
            before = [
                backbone.prefix_segment(one, tokens)
                for one, tokens in zip(images, features, strict=True)
            ]
            after = [
                backbone.suffix_segment(first.next_position, ids[mask.bool()].tolist())
                for first, ids, mask in zip(before, input_ids, attention_mask, strict=True)
            ]
            lengths = [one.length for one in before]
            first, then = batch_rows(before, [0] * len(before)), batch_rows(after, lengths)
            batch = Batch(
                torch.cat([first.embeds, then.embeds], dim=1),
                then.mask,
                torch.cat([first.positions, then.positions], dim=-1),
                prefix_length=0,
            )
            inputs = batch.attention(backbone)
            branch = run_layers(backbone.layers[: self.rpn.branch_layer], batch.embeds, inputs)
        states = self.rpn(branch, inputs)
        cos, sin = inputs.rotary
        keys = self.rpn.image_keys(states[:, : max(lengths)], _columns(inputs.rotary, max(lengths)))
        own = [keys[row, max(lengths) - one.length :][one.image] for row, one in enumerate(before)]
        last = cos[:, -1:], sin[:, -1:]
        return self.rpn.roi_logits(states[:, -1], last, pad_sequence(own, batch_first=True))


def _columns(rotary: KV, count: int) -> KV:
    cos, sin = rotary
    return cos[:, :count], sin[:, :count]


class RPNSamples(Dataset):
    """Preprocessed training samples.

    Indexing raises ValueError for a question that exceeds the context.

    Args:
        rows: Rows with `image` (a PIL image), `question` and `labels` [rows, columns].
        backbone: The frozen model.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Any, backbone: Backbone) -> None:
        self.rows, self.backbone = rows, backbone

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        (image,) = self.backbone.preprocess([row["image"]])
        token_ids = self.backbone.prompt_ids(row["question"]).after
        if (budget := self.backbone.remaining_tokens(image.grid.cells, token_ids)) < 1:
            limit = self.backbone.context_length
            raise ValueError(
                f"sample {index} has a prompt of {limit - budget} tokens, {1 - budget} too many "
                f"for a context of {limit} with one token to answer ({row['question']!r:.60}): "
                "remove it"
            )
        labels = torch.tensor(row["labels"], dtype=torch.long)
        return {
            "images": image,
            "input_ids": torch.tensor(token_ids),
            "labels": labels.flatten(),
        }


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Batch samples, with questions left-padded and labels right-padded with -100."""
    ids = [sample["input_ids"] for sample in samples]
    ones = [torch.ones_like(one) for one in ids]
    labels = [sample["labels"] for sample in samples]
    return {
        "images": [sample["images"] for sample in samples],
        "input_ids": pad_sequence(ids, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence(ones, batch_first=True, padding_side="left"),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


class RPNTrainer(Trainer):
    """transformers' Trainer that saves only finite weights and explains why saving failed."""

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate as the Trainer does; raises ValueError if weights are not finite."""
        self._check_finite()
        return super().evaluate(*arguments, **options)

    def _check_finite(self) -> None:
        hint = "the training diverged: use a lower --learning_rate and another --out"
        assert self.model is not None
        check_finite(self.model.named_parameters(), f"step {self.state.global_step}", hint)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        self._check_finite()
        try:
            super()._save_checkpoint(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # Python, torch, safetensors
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} cannot be written ({first_line(error)}): free disk space, then run the "
                "same command to resume from the previous checkpoint"
            ) from error


def train(
    backbone: Backbone,
    rpn: RPN,
    rows: Sequence[Mapping[str, Any]] | Any,
    arguments: TrainingArguments,
    *,
    held_out: Sequence[Mapping[str, Any]] | Any | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train an RPN in place, resuming from the last complete checkpoint in the output folder.

    An interrupted training that is resumed gives the same weights as an uninterrupted one.

    Args:
        backbone: The frozen model.
        rpn: The RPN, on any device; moved to the CPU at the end.
        rows: Labelled rows, see `RPNSamples`.
        arguments: Settings; checkpoints are in `output_dir`.
        held_out: Rows for evaluation: loss, average precision and IoU against the pseudo-labels.
        log: Receives progress messages.

    Returns:
        Facts for the model card, also saved as `rpn.facts`.

    Raises:
        ValueError: If the weights diverge or a checkpoint is damaged.
        OSError: If a checkpoint cannot be written.
    """
    trainer = RPNTrainer(
        model=RPNForTraining(backbone, rpn),
        args=arguments,
        train_dataset=RPNSamples(rows, backbone),
        eval_dataset=RPNSamples(held_out, backbone) if held_out is not None else None,
        compute_metrics=MapMetrics() if held_out is not None else None,
        data_collator=collate,
    )
    trainer.add_callback(_RelocateBestCheckpoint())
    seconds = _run(trainer, log)
    measured = trainer.evaluate() if held_out is not None else {}
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero() and state:
        weights = {name.removeprefix("rpn."): tensor for name, tensor in state.items()}
        rpn.to("cpu").load_state_dict(weights)
    rpn.facts |= _facts(trainer, len(rows), seconds) | _held_out_facts(measured, held_out)
    return rpn.facts


def _run(trainer: Trainer, log: Callable[[str], None]) -> float | None:
    """Train from the last complete checkpoint: seconds, or None if it is already finished."""
    arguments = trainer.args
    last, incomplete = last_checkpoint(Path(str(arguments.output_dir)))
    for folder in incomplete:
        log(f"removing incomplete checkpoint {folder}")
        if arguments.process_index == 0:  # otherwise its files would mix with the new ones
            shutil.rmtree(folder, ignore_errors=True)
    if last is not None and _is_finished(last):
        # The Trainer would add a step if resumed from the last one.
        log(f"training is already complete: {last}")
        _load_final(trainer, last)
        return None
    if last is not None:
        log(f"resuming from {last}")
    try:
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    except UnpicklingError as error:  # a damaged state, or one that contains code
        raise ValueError(f"{last} cannot be read ({first_line(error)}); delete it") from error
    return round(result.metrics["train_runtime"], 1)


def _is_finished(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    return state.global_step >= state.max_steps


def _load_final(trainer: Trainer, checkpoint: Path) -> None:
    """Load the state of a finished training and its best weights."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    best = _best_checkpoint(trainer.state, checkpoint.parent)
    source = best if best and trainer.args.load_best_model_at_end else checkpoint
    weights = source / "model.safetensors"
    if not weights.exists():
        raise ValueError(
            f"{weights} is missing, the best weights of a finished training: restore it, or delete "
            f"{checkpoint.parent} and train again"
        )
    model: Any = trainer.model
    model.load_state_dict(read_all(weights))


def _best_checkpoint(state: TrainerState, folder: Path) -> Path | None:
    """The checkpoint with the smallest held-out loss, in the current checkpoint folder.

    The state contains the original path; the folder may have been moved since.
    """
    if state.best_model_checkpoint is not None:
        return folder / Path(state.best_model_checkpoint).name
    return folder / f"checkpoint-{state.best_global_step}" if state.best_global_step else None


class _RelocateBestCheckpoint(TrainerCallback):
    """Update the path of the best checkpoint when training resumes in a moved folder.

    The Trainer ignores a best checkpoint at another path but keeps its loss, so it would end with
    the last weights instead of the best ones.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = _best_checkpoint(state, Path(str(args.output_dir)))
        if best is not None and best.is_dir():
            state.best_model_checkpoint = str(best)
        else:  # it was deleted, so the best of the following ones is used
            state.best_model_checkpoint = state.best_metric = None


def _facts(trainer: Trainer, samples: int, seconds: float | None) -> dict[str, Any]:
    """Facts for the model card. seconds: duration of this run, None if it was already complete."""
    arguments = trainer.args
    accumulated = arguments.gradient_accumulation_steps * arguments.world_size
    loss = _last_loss(trainer)
    return {
        "samples": samples,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        **({} if loss is None else {"final loss": round(loss, 4)}),
        "learning rate": arguments.learning_rate,
        "batch size": arguments.train_batch_size * accumulated,
        "seed": arguments.seed,
        **({} if seconds is None else {"seconds": seconds}),
    }


def _held_out_facts(measured: Mapping[str, float], held_out: Any) -> dict[str, Any]:
    if not measured:
        return {}
    names = {"loss": "loss", "average_precision": "average precision", "iou": "IoU"}
    return {"held-out samples": len(held_out)} | {
        f"held-out {label}": round(measured[f"eval_{name}"], 4) for name, label in names.items()
    }


def last_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find the newest complete checkpoint.

    Args:
        folder: Folder of checkpoints.

    Returns:
        (the newest complete checkpoint or None, later ones that are truncated or damaged).
    """
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    incomplete = []
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        if _is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


def _is_complete(folder: Path) -> bool:
    """Whether the state, which is written last, exists and no other file is truncated."""
    try:
        TrainerState.load_from_json(str(folder / STATE_FILE))
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                tensor_names(path)
            elif path.suffix in (".bin", ".pt", ".pth") and not zipfile.is_zipfile(path):
                return False
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return True


def _last_loss(trainer: Trainer) -> float | None:
    """The last logged loss; None if training was shorter than --logging_steps."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] if losses else None
