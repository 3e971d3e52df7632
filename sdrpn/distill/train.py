"""Train an RPN on pseudo-labels, over a frozen backbone, with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.layers import run_layers
from sdrpn.llava import Llava
from sdrpn.rpn import RPN

PUBLISHED: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
}
"""Hyper-parameters of METHOD section 5 that hold on any machine."""


def training_arguments(out: Path | str, **overrides: Any) -> TrainingArguments:
    """The published hyper-parameters; every field of TrainingArguments can be overridden."""
    return TrainingArguments(
        output_dir=str(out), remove_unused_columns=False, **{**PUBLISHED, **overrides}
    )


class RPNForTraining(nn.Module):
    """An RPN over its frozen backbone; only the RPN is a submodule, so only it is trained."""

    def __init__(self, llava: Llava, rpn: RPN) -> None:
        super().__init__()
        self.llava = llava
        self.rpn = rpn.attach(llava).requires_grad_(True)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Loss and RoI logits of a batch (METHOD section 5).

        pixel_values: [B, 3, side, side]. input_ids, attention_mask: [B, N] question tokens,
        left-padded. labels: [B, T] of 1, 0, -100. Returns loss (mean over all labelled tokens of
        the batch; 0 where there is none) and logits [B, T].
        """
        start = len(self.llava.head_ids)
        states = self._states(pixel_values, input_ids, attention_mask)
        image = states[:, start : start + self.llava.image_tokens]
        logits = self.rpn.roi_logits(states[:, -1], self.rpn.image_keys(image))
        labels = labels.to(logits.device)
        labelled = labels != IGNORED
        targets = labels.clamp(min=0).to(logits.dtype)
        each = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (each * labelled).sum() / labelled.sum().clamp(min=1)
        return {"loss": loss, "logits": logits}

    def _states(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the map head reads, over [text before the image][image][padding][question]."""
        llava = self.llava
        with torch.no_grad():
            features = llava.encode(pixel_values)
            head = llava.embed(llava.head_ids).expand(len(features), -1, -1)
            embeds = torch.cat([head, features, llava.embed(input_ids)], dim=1)
            before = attention_mask.new_ones(len(features), embeds.shape[1] - input_ids.shape[1])
            span = llava.span(embeds, torch.cat([before, attention_mask], dim=1))
            branch = run_layers(llava.layers[: self.rpn.config.branch_layer], embeds, span)
        return self.rpn(branch, span)


class RPNSamples(Dataset):
    """Rows with `image` (a PIL image), `question` and `labels` [T], made ready for training."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Any, llava: Llava) -> None:
        self.rows, self.llava = rows, llava

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        image: Image.Image = row["image"]
        return {
            "pixel_values": self.llava.pixels([image])[0],
            "input_ids": torch.tensor(self.llava.question_ids(row["question"])),
            "labels": torch.tensor(row["labels"], dtype=torch.long),
        }


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples; questions are left-padded, so that each row ends with its last token."""
    ids = [sample["input_ids"] for sample in samples]
    ones = [torch.ones_like(one) for one in ids]
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "input_ids": pad_sequence(ids, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence(ones, batch_first=True, padding_side="left"),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


def train(
    llava: Llava,
    rpn: RPN,
    rows: Sequence[Mapping[str, Any]] | Any,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Train `rpn` in place on labelled rows (see RPNSamples); returns and notes the facts."""
    trainer = Trainer(
        model=RPNForTraining(llava, rpn),
        args=arguments,
        train_dataset=RPNSamples(rows, llava),
        data_collator=collate,
    )
    result = trainer.train()
    rpn.facts |= {
        "samples": len(rows),
        "steps": result.global_step,
        "final loss": round(_last_loss(trainer), 4),
        "learning rate": arguments.learning_rate,
        "batch size": arguments.train_batch_size * arguments.gradient_accumulation_steps,
        "seed": arguments.seed,
        "seconds": round(result.metrics["train_runtime"], 1),
    }
    return rpn.facts


def _last_loss(trainer: Trainer) -> float:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] if losses else float("nan")
