"""Training at full scale: resuming, held-out measures, two processes, what is loaded and saved."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from typer.testing import CliRunner

import sdrpn.distill
from sdrpn.backbones.llava15 import Llava15
from sdrpn.cli import app
from sdrpn.cli.train import training_arguments
from sdrpn.config import LayerHeads, RPNConfig, ZoomConfig
from sdrpn.distill import trainer as module
from sdrpn.distill.label_dataset import (
    SETTINGS_FILE,
    LabelledImages,
    label_row,
    load_labels,
    shard_path,
    write_shard,
)
from sdrpn.distill.metrics import MapMetrics, map_scores
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.distill.split import split_by_image
from sdrpn.distill.trainer import RPNForTraining, RPNSamples, collate, last_checkpoint, train
from sdrpn.io.atomic import write_json
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.demo import tiny_path
from tests.conftest import QUESTIONS, make_image

runner = CliRunner()


def arguments(out: Path, **more: Any) -> Any:
    values = {
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return module.training_arguments(out, **{**values, **more})


def samples(count: int = 12) -> list[dict[str, Any]]:
    """As many labelled cells in each, at places of their own."""
    rows = []
    for i in range(count):
        labels = np.full(64, IGNORED, np.int8)
        labels[:20], labels[i : i + 4] = 0, 1
        rows.append(
            {"image": make_image(90, 60, i), "question": QUESTIONS[i % 4], "labels": labels}
        )
    return rows


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Stands for a machine that goes down in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


# Resuming


@pytest.mark.slow
def test_interrupted_and_uninterrupted_runs_end_equal(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
        rpn = RPN.from_backbone(llava, 2, 3)
        train(llava, rpn, samples(), arguments(out))
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        return rpn.state_dict(), [e["loss"] for e in state["log_history"] if "loss" in e]

    whole, curve = run(tmp_path / "whole")
    trainer = module.RPNTrainer

    def killed(**options: Any) -> Any:
        return trainer(**options, callbacks=[KillAt(5)])

    monkeypatch.setattr(module, "RPNTrainer", killed)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(module, "RPNTrainer", trainer)
    # Killed while it wrote: a folder without its last file is passed by.
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", tmp_path / "cut" / "checkpoint-5")
    (tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").unlink()
    kept, cut = (tmp_path / "cut" / f"checkpoint-{step}" for step in (4, 5))
    assert last_checkpoint(tmp_path / "cut") == (kept, [cut])
    again, curve_again = run(tmp_path / "cut")
    assert curve == curve_again
    assert len(curve) == 6
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0, msg=name)


# The best checkpoint


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "per_device_eval_batch_size": 5,
    "max_steps": 5,
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the held-out losses of steps 1, 2, ... what a test says, whatever the weights are."""

    def plan(*losses: float) -> None:
        class Planned(module.RPNTrainer):
            def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
                measure = Trainer.evaluation_loop

                def loop(trainer: Any, *words: Any, **more: Any) -> Any:
                    output = measure(trainer, *words, **more)
                    output.metrics["eval_loss"] = losses[trainer.state.global_step - 1]
                    return output

                monkeypatch.setattr(Trainer, "evaluation_loop", loop)
                try:
                    return super().evaluate(*arguments, **options)
                finally:
                    monkeypatch.setattr(Trainer, "evaluation_loop", measure)

        monkeypatch.setattr(module, "RPNTrainer", Planned)

    return plan


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    saved = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
    return {name.removeprefix("rpn."): weight for name, weight in saved.items()}


def holds(rpn: RPN, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, weights[name]) for name, weight in rpn.state_dict().items())


def test_the_smallest_loss_is_the_best(
    llava: Llava15, tmp_path: Path, planned: Callable[..., None]
) -> None:
    """Of 0.5, 0.3, 0.2, 0.4, 0.9 the third; by the settings of the command."""
    planned(0.5, 0.3, 0.2, 0.4, 0.9)
    more = ["--save_steps", "1", "--eval_steps", "1", "--max_steps", "5", "--use_cpu", "true"]
    more += ["--learning_rate", "1e-3", "--report_to", "none", "--disable_tqdm", "true"]
    given = training_arguments(more, tmp_path, 16, measured=True)
    given.save_total_limit = None
    rpn = RPN.from_backbone(llava, 2, 3)
    facts = train(llava, rpn, samples(), given, held_out=samples(5))
    assert holds(rpn, weights_at(tmp_path, 3))
    assert not holds(rpn, weights_at(tmp_path, 5))
    assert facts["steps"] == 5


@pytest.mark.parametrize("moved", [False, True], ids=["same place", "moved"])
def test_a_finished_training_gives_the_best_weights_again(
    llava: Llava15, tmp_path: Path, planned: Callable[..., None], moved: bool
) -> None:
    planned(0.5, 0.2, 0.3, 0.4, 0.9)
    first = RPN.from_backbone(llava, 2, 3)
    train(llava, first, samples(), arguments(tmp_path / "a", **BEST), held_out=samples(5))
    assert holds(first, weights_at(tmp_path / "a", 2))
    folder = tmp_path / ("b" if moved else "a")
    if moved:
        (tmp_path / "a").rename(folder)
    again, told = RPN.from_backbone(llava, 2, 3), []
    given = arguments(folder, **BEST)
    train(llava, again, samples(), given, held_out=samples(5), log=told.append)
    assert told == [f"training is already complete: {folder / 'checkpoint-5'}"]
    assert holds(again, weights_at(folder, 2))
    assert not holds(again, weights_at(folder, 5))
    # Without a held-out set there is no best, and the last weights are what was trained.
    last = RPN.from_backbone(llava, 2, 3)
    train(llava, last, samples(), arguments(folder, max_steps=5), log=told.append)
    assert holds(last, weights_at(folder, 5))
    shutil.rmtree(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2/model\.safetensors is missing"):
        train(llava, again, samples(), given, held_out=samples(5), log=told.append)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", [False, True], ids=["moved", "deleted"])
def test_a_resumed_training_ends_with_the_best_weights_of_the_first_part(
    llava: Llava15, tmp_path: Path, planned: Callable[..., None], deleted: bool
) -> None:
    """The best was before the interruption, and the folder was moved; or it is gone."""
    planned(0.5, 0.2, 0.3, 0.4, 0.9)
    train(
        llava,
        RPN.from_backbone(llava, 2, 3),
        samples(),
        arguments(tmp_path / "a", **BEST),
        held_out=samples(5),
    )
    for step in (4, 5):
        shutil.rmtree(tmp_path / "a" / f"checkpoint-{step}")
    (tmp_path / "a").rename(tmp_path / "b")
    if deleted:
        shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    rpn = RPN.from_backbone(llava, 2, 3)
    train(llava, rpn, samples(), arguments(tmp_path / "b", **BEST), held_out=samples(5))
    assert holds(rpn, weights_at(tmp_path / "b", 4 if deleted else 2))


def test_the_best_checkpoint_is_that_of_the_folder_in_use(tmp_path: Path) -> None:
    """Under its new path if the folder was moved; none if it is gone."""
    here = tmp_path / "checkpoint-2"
    here.mkdir()
    state = TrainerState(best_model_checkpoint="/elsewhere/checkpoint-2", best_metric=0.2)
    given: Any = SimpleNamespace(output_dir=str(tmp_path))
    move = module._RelocateBestCheckpoint()
    move.on_train_begin(given, state, TrainerControl())
    assert (state.best_model_checkpoint, state.best_metric) == (str(here), 0.2)
    here.rmdir()
    move.on_train_begin(given, state, TrainerControl())
    assert (state.best_model_checkpoint, state.best_metric) == (None, None)


# The published hyper-parameters, as a run uses them


class Watch(TrainerCallback):
    """Notes what the Trainer trains with."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.optimizer = ""
        self.rates: list[float] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.optimizer = type(getattr(optimizer, "optimizer", optimizer)).__name__
        self.groups = [
            {k: v for k, v in group.items() if k in ("betas", "weight_decay")}
            for group in optimizer.param_groups
        ]
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, trainer = Watch(), module.RPNTrainer

    def watched(**options: Any) -> Any:
        watch.trainer = trainer(**options, callbacks=[watch])
        return watch.trainer

    monkeypatch.setattr(module, "RPNTrainer", watched)
    return watch


QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.mark.slow
def test_a_run_uses_the_published_optimizer_and_schedule(
    llava: Llava15, tmp_path: Path, watch: Watch
) -> None:
    """100 steps: 3 of warm-up from 0 to 5e-5, then half a cosine down to 0."""
    more = ["--max_steps", "100", "--per_device_train_batch_size", "1", "--save_strategy", "no"]
    given = training_arguments([*QUIET, *more], tmp_path, 1, measured=False)
    train(llava, RPN.from_backbone(llava, 2, 2), samples(2), given)
    assert watch.optimizer == "AdamW"
    assert watch.groups
    assert all(g == {"betas": (0.9, 0.98), "weight_decay": 0.0} for g in watch.groups)
    assert len(watch.rates) == 100
    assert watch.rates[:4] == pytest.approx([0, 5e-5 / 3, 1e-4 / 3, 5e-5])
    # Behind the warm-up, 97 steps: at s of them 2.5e-5 x (1 + cos(pi s / 97)).
    expected = {3: 5e-5, 4: 4.998689e-05, 27: 4.282022e-05, 51: 2.540483e-05, 99: 1.311077e-08}
    for step, rate in expected.items():
        assert watch.rates[step] == pytest.approx(rate, rel=1e-5), step


@pytest.mark.slow
def test_a_run_is_one_epoch_of_512_questions_a_step(
    llava: Llava15, tmp_path: Path, watch: Watch
) -> None:
    """513 questions: a step of 512 and a step of one."""
    given = training_arguments(QUIET, tmp_path, 512, measured=False)
    (row,) = samples(1)
    facts = train(llava, RPN.from_backbone(llava, 1, 2), [row] * 513, given)
    assert (facts["batch size"], facts["steps"], facts["epochs"]) == (512, 2, 1)
    assert facts["learning rate"] == 5e-5
    assert watch.rates == [0, 5e-5]  # 3 % of two steps, rounded up


def test_on_a_gpu_it_is_bfloat16_with_checkpointing(
    llava: Llava15, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = module.defaults(measured=False)
    name = "activation_checkpointing"
    name = name if name in values else "gradient_checkpointing"
    assert values["bf16"] is True
    assert values[name] is True
    assert values["use_cpu"] is False
    monkeypatch.undo()
    assert module.defaults(measured=False)["bf16"] is torch.cuda.is_available()
    # Both reach the run: on the CPU here, by the same settings.
    trainer, models = module.RPNTrainer, []

    def kept(**options: Any) -> Any:
        models.append(options["model"])
        return trainer(**options)

    monkeypatch.setattr(module, "RPNTrainer", kept)
    given = arguments(tmp_path, max_steps=1, bf16=True, save_strategy="no", **{name: True})
    dtypes = []
    rpn = RPN.from_backbone(llava, 2, 3)
    rpn.q_proj.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    train(llava, rpn, samples(4), given)
    assert set(dtypes) == {torch.bfloat16}
    assert all(layer.gradient_checkpointing for layer in models[0].rpn.layers)


def test_the_command_s_defaults_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = module.defaults(measured=False)
    name = next(key for key in found if key.endswith("checkpointing"))  # transformers renamed it
    plain = {
        "num_train_epochs": 1,
        "learning_rate": 5e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "bf16": False,
        name: False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
    }
    assert found == plain
    assert module.defaults(measured=True) == plain | {
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "batch_eval_metrics": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = {"bf16": True, name: True, "use_cpu": False, "dataloader_num_workers": 4}
    assert module.defaults(measured=False) == plain | on_gpu


def test_training_arguments_are_the_published_ones_unless_given(tmp_path: Path) -> None:
    given = {"use_cpu": True, "report_to": "none", "adam_beta1": 0.8}
    found = module.training_arguments(tmp_path / "out", **given)
    assert found.output_dir == str(tmp_path / "out")
    assert (found.num_train_epochs, found.learning_rate, found.weight_decay) == (1, 5e-5, 0.0)
    assert (found.adam_beta1, found.adam_beta2) == (0.8, 0.98)
    assert (found.lr_scheduler_type, found.warmup_steps) == ("cosine", 0.03)
    assert (found.remove_unused_columns, found.batch_eval_metrics) == (False, True)


# What is trained on


def test_a_sample_as_it_is_trained_on(llava: Llava15) -> None:
    labels = np.full((8, 8), IGNORED, np.int8)
    labels[0, 1], labels[1, 0] = 1, 0
    found = RPNSamples([samples(1)[0] | {"labels": labels}], llava)[0]
    assert set(found) == {"images", "input_ids", "labels"}
    assert (found["labels"].dtype, found["input_ids"].dtype) == (torch.int64, torch.int64)
    assert found["labels"].tolist() == [IGNORED, 1, *[IGNORED] * 6, 0, *[IGNORED] * 55]
    assert found["input_ids"].tolist() == [*llava.prompt_ids(QUESTIONS[0]).after]
    assert found["images"].grid.cells == 64


def test_questions_are_padded_on_their_left_and_labels_on_their_right() -> None:
    pairs = (([5, 6, 7], [1, 0]), ([8], [0, 1, IGNORED]))
    batch = collate(
        [
            {"images": i, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            for i, (ids, labels) in enumerate(pairs)
        ]
    )
    assert batch["images"] == [0, 1]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[1, 0, -100], [0, 1, -100]]


def test_the_loss_is_the_mean_over_all_labelled_tokens(
    llava: Llava15, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch, not of each row: ln 2, ln(1 + e^2) and ln(1 + e^-1), over three tokens."""
    model = RPNForTraining(llava, RPN.from_backbone(llava, 2, 3))
    logits = torch.tensor([[0.0, 2.0, 9.0], [1.0, -9.0, 0.0]])
    monkeypatch.setattr(model, "_logits", lambda *_: logits)
    labels = torch.tensor([[1, 0, IGNORED], [1, IGNORED, IGNORED]])
    found = model([], torch.zeros(2, 1), torch.ones(2, 1), labels)
    assert float(found["loss"]) == pytest.approx((0.693147 + 2.126928 + 0.313262) / 3, abs=1e-5)
    assert found["logits"] is logits
    alone = torch.tensor([[1, IGNORED, IGNORED], [IGNORED] * 3])
    one = model([], torch.zeros(2, 1), torch.ones(2, 1), alone)
    assert float(one["loss"]) == pytest.approx(0.693147, abs=1e-5)
    nothing = model([], torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 3), IGNORED))
    assert float(nothing["loss"]) == 0


# Checkpoints


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    TrainerState(global_step=step, max_steps=12).save_to_json(str(path / "trainer_state.json"))
    save_file({"a": torch.zeros(3)}, path / "model.safetensors")
    torch.save({"a": 1}, path / "optimizer.pt")
    return path


def test_the_newest_whole_checkpoint_is_gone_on_with(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) == (None, [])
    nine, ten, eleven = (write_checkpoint(tmp_path, step) for step in (9, 10, 11))
    for other in ("checkpoint-x", "old-checkpoint-99", "checkpoint-99.part"):
        (tmp_path / other).mkdir()
    assert last_checkpoint(tmp_path) == (eleven, [])  # by number: "9" comes behind "11" in letters
    weights = eleven / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert last_checkpoint(tmp_path) == (ten, [eleven])
    (ten / "optimizer.pt").write_bytes(b"cut off")
    assert last_checkpoint(tmp_path) == (nine, [eleven, ten])
    (nine / "trainer_state.json").write_text("[")
    assert last_checkpoint(tmp_path) == (None, [eleven, ten, nine])


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_file_of_a_checkpoint_that_was_cut_is_seen(tmp_path: Path, suffix: str) -> None:
    path = write_checkpoint(tmp_path, 1)
    (path / "notes.txt").write_text("no archive, and none is asked for")
    assert last_checkpoint(tmp_path) == (path, [])
    (path / f"more{suffix}").write_bytes(b"PK cut")
    assert last_checkpoint(tmp_path) == (None, [path])


def test_a_checkpoint_ends_a_training_at_its_last_step(llava: Llava15, tmp_path: Path) -> None:
    """12 of 12 steps: nothing is left to do; the weights are those of the folder."""
    rpn = RPN.from_backbone(llava, 2, 3)
    path = write_checkpoint(tmp_path, 12)
    moved = {f"rpn.{name}": weight + 1 for name, weight in rpn.state_dict().items()}
    save_file(moved, path / "model.safetensors")
    told: list[str] = []
    facts = train(llava, rpn, samples(4), arguments(tmp_path), log=told.append)
    assert told == [f"training is already complete: {path}"]
    assert holds(rpn, {name.removeprefix("rpn."): weight for name, weight in moved.items()})
    assert (facts["steps"], facts["samples"]) == (12, 4)
    assert "seconds" not in facts


@pytest.mark.parametrize(("best", "expected"), [(9, 9), (None, 12)])
def test_the_best_step_is_enough_to_find_the_best_weights(
    llava: Llava15, tmp_path: Path, best: int | None, expected: int
) -> None:
    """A state that names no folder, as of some versions of transformers; or no best at all."""
    rpn = RPN.from_backbone(llava, 2, 3)
    for step, more in ((9, 1), (12, 2)):
        path = write_checkpoint(tmp_path, step)
        moved = {f"rpn.{name}": weight + more for name, weight in rpn.state_dict().items()}
        save_file(moved, path / "model.safetensors")
    state = TrainerState(global_step=12, max_steps=12, best_global_step=best)
    state.save_to_json(str(path / "trainer_state.json"))
    train(llava, rpn, samples(4), arguments(tmp_path, **BEST), held_out=samples(2))
    assert holds(rpn, weights_at(tmp_path, expected))


def test_what_training_leaves_is_said_by_its_facts(
    llava: Llava15, tmp_path: Path, planned: Callable[..., None]
) -> None:
    """A step of 2 x 4 of 12 samples, behind a checkpoint that was cut off."""
    planned(0.123456)
    cut = tmp_path / "checkpoint-5"
    cut.mkdir()
    rpn, told = RPN.from_backbone(llava, 2, 3), []
    more = BEST | {"max_steps": 1, "gradient_accumulation_steps": 2, "seed": 7}
    facts = train(
        llava,
        rpn,
        samples(12),
        arguments(tmp_path, **more),
        held_out=samples(5),
        log=told.append,
    )
    assert told == [f"removing incomplete checkpoint {cut}"]
    assert not cut.exists()
    assert facts is rpn.facts
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    (loss,) = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert 0 < facts.pop("seconds") < 600
    assert 0 < facts.pop("held-out average precision") <= 1
    assert 0 <= facts.pop("held-out IoU") <= 1
    assert facts == {
        "samples": 12,
        "steps": 1,
        "epochs": 0.667,
        "final loss": round(loss, 4),
        "learning rate": 1e-3,
        "batch size": 8,
        "seed": 7,
        "held-out samples": 5,
        "held-out loss": 0.1235,
    }


def test_facts_count_all_processes_and_leave_out_what_is_not_known() -> None:
    """4 samples a device, 3 steps accumulated, 2 processes; nothing was logged or finished."""
    arguments = SimpleNamespace(
        train_batch_size=4,
        gradient_accumulation_steps=3,
        world_size=2,
        learning_rate=0.1,
        seed=9,
    )
    trainer: Any = SimpleNamespace(args=arguments, state=TrainerState(global_step=5))
    known = {"samples": 11, "steps": 5, "learning rate": 0.1, "batch size": 24, "seed": 9}
    assert module._facts(trainer, 11, None) == known | {"epochs": 0}
    trainer.state.epoch = 1.23456
    trainer.state.log_history = [{"loss": 0.5}, {"loss": 0.123456}, {"eval_loss": 9.0}]
    more = {"epochs": 1.235, "final loss": 0.1235, "seconds": 7.5}
    assert module._facts(trainer, 11, 7.5) == known | more


def test_facts_from_before_the_training_are_kept(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = SimpleNamespace(metrics={"train_runtime": 1.0})
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: result)
    rpn = RPN.from_backbone(llava, 2, 3)
    rpn.facts = {"data": "some labels", "samples": 99}
    facts = train(llava, rpn, samples(4), arguments(tmp_path))
    assert (facts["data"], facts["samples"]) == ("some labels", 4)


def test_an_evaluation_takes_the_options_of_the_trainer(llava: Llava15, tmp_path: Path) -> None:
    trainer = module.RPNTrainer(
        model=RPNForTraining(llava, RPN.from_backbone(llava, 2, 3)),
        args=arguments(tmp_path),
        compute_metrics=MapMetrics(),
        data_collator=collate,
    )
    rows = RPNSamples(samples(2), llava)
    assert trainer.evaluate(rows, metric_key_prefix="early")["early_loss"] > 0


def test_seconds_are_told_to_a_tenth(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = SimpleNamespace(metrics={"train_runtime": 12.3456})
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: result)
    facts = train(llava, RPN.from_backbone(llava, 2, 3), samples(4), arguments(tmp_path))
    assert facts["seconds"] == 12.3
    assert "final loss" not in facts


def test_a_training_that_diverged_is_not_saved(llava: Llava15, tmp_path: Path) -> None:
    rpn = RPN.from_backbone(llava, 2, 3)
    with torch.no_grad():
        rpn.q_proj.weight[0, 0] = torch.nan
    advice = "the training diverged: use a lower --learning_rate and another --out"
    with pytest.raises(ValueError, match=rf"step 1\b.*{advice}"):
        train(llava, rpn, samples(4), arguments(tmp_path, max_steps=1, save_steps=1))
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "error",
    [OSError("No space left"), RuntimeError("No space left"), SafetensorError("No space left")],
)
def test_a_checkpoint_that_cannot_be_written_is_removed(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, begun: bool
) -> None:
    folder = tmp_path / "checkpoint-1"

    def full(*_: Any, **__: Any) -> None:
        if begun:
            folder.mkdir()
        raise error

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    message = re.escape(
        f"{folder} cannot be written (No space left): free disk space, then run the same command "
        "to resume from the previous checkpoint"
    )
    with pytest.raises(OSError, match=f"^{message}$"):
        train(
            llava,
            RPN.from_backbone(llava, 2, 3),
            samples(4),
            arguments(tmp_path, max_steps=1, save_steps=1),
        )
    assert not folder.exists()


def test_memory_that_ran_out_while_saving_is_told_as_such(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    given = arguments(tmp_path, max_steps=1, save_steps=1)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        train(llava, RPN.from_backbone(llava, 2, 3), samples(4), given)


def test_a_state_that_cannot_be_unpickled_is_named(
    llava: Llava15, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = write_checkpoint(tmp_path, 9), []

    def refused(_: Any, resume_from_checkpoint: Any = None) -> None:
        asked.append(resume_from_checkpoint)
        raise UnpicklingError("Weights only load failed\nand more")

    monkeypatch.setattr(Trainer, "train", refused)
    told: list[str] = []
    why = "it holds more than tensors, or is damaged; code in a checkpoint is never run"
    message = re.escape(f"{path} cannot be read ({why}); delete it")
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(
            llava, RPN.from_backbone(llava, 2, 3), samples(4), arguments(tmp_path), log=told.append
        )
    assert asked == [str(path)]
    assert told == [f"resuming from {path}"]


# Questions that do not fit the context


def test_a_question_past_the_context_is_refused_by_name(llava: Llava15) -> None:
    rows = [samples(1)[0] | {"question": "red " * 1400}]
    with pytest.raises(ValueError, match="too many for a context of 1024 with one token to answ"):
        RPNSamples(rows, llava)[0]


def test_a_question_fits_to_the_token(llava: Llava15, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question needs a token behind it, which answers it."""
    row = samples(1)[0]
    prompt = len(llava.plain_ids(row["question"])) - 1 + 64
    monkeypatch.setattr(llava, "context_length", prompt + 1)
    assert RPNSamples([row], llava)[0]["labels"].shape == (64,)
    monkeypatch.setattr(llava, "context_length", prompt)
    with pytest.raises(ValueError, match=rf"sample 0 has a prompt of {prompt} tokens, 1 too many"):
        RPNSamples([row], llava)[0]
    monkeypatch.setattr(llava, "context_length", prompt - 4)
    with pytest.raises(ValueError, match=rf"sample 0 has a prompt of {prompt} tokens, 5 too many"):
        RPNSamples([row], llava)[0]


def test_the_command_skips_questions_past_the_context(labels: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in load_labels(labels)]  # type: ignore[call-overload]
    for i in (3, 4):
        rows[i]["question"] = "red " * 1400
    write_shard(rows, shard_path(labels, 0, 1))
    result = runner.invoke(app, words(labels, tmp_path / "rpn", "--held-out", "0"))
    said = " ".join(result.output.split())
    assert result.exit_code == 0, said
    assert "skipped, does not fit the context of 1024 tokens: 2 labels, such as '3'" in said
    facts = json.loads((tmp_path / "rpn" / "training.json").read_text())
    assert facts["samples"] == 22
    assert facts["skipped, does not fit the context"] == 2


# What is measured


def test_metrics_are_means_over_the_samples_of_all_batches() -> None:
    """Two maps with labels of both kinds, one without, in two batches; then all anew."""
    metrics = MapMetrics()
    right, wrong = [3.0, 2.0, -1.0, -2.0], [-1.0, -2.0, 3.0, 2.0]
    labels, none = [1, 1, 0, 0], [1, 1, IGNORED, IGNORED]

    def fed(maps: list[Any], truth: list[Any], **options: Any) -> Any:
        both = torch.tensor(maps, dtype=torch.bfloat16), torch.tensor(truth)
        return metrics(SimpleNamespace(predictions=both[0], label_ids=both[1]), **options)

    for _ in range(2):
        assert fed([right, right], [labels, none], compute_result=False) == {}
        # Wrong: the two of the foreground come last, at precisions 1/3 and 2/4.
        found = fed([wrong], [labels], compute_result=True)
        assert found == {
            "average_precision": pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2),
            "iou": 0.5,
        }
    arrays = SimpleNamespace(predictions=np.array([right]), label_ids=np.array([labels]))
    assert metrics(arrays) == {"average_precision": 1, "iou": 1}
    nothing = fed([right], [none])
    assert all(np.isnan(value) for value in nothing.values())
    assert set(nothing) == {"average_precision", "iou"}


def test_a_cell_counts_where_its_logit_is_over_0() -> None:
    found = map_scores(np.array([0.5, 0.0, -1.0]), np.array([1, 0, 0]))
    assert found == {"average_precision": 1.0, "iou": 1.0}
    assert map_scores(np.zeros(2), np.zeros(2)) is None


def test_map_scores_by_hand() -> None:
    labels = np.array([1, 1, 0, 0, IGNORED])
    perfect = map_scores(np.array([3.0, 2.0, -1.0, -2.0, 9.0]), labels)
    assert perfect == {"average_precision": 1.0, "iou": 1.0}
    # Ranked: right, wrong, right, wrong. Precisions at the right ones: 1 and 2/3.
    mixed = map_scores(np.array([3.0, -1.0, 2.0, -2.0, 9.0]), labels)
    assert mixed is not None
    assert mixed["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert mixed["iou"] == pytest.approx(1 / 3)  # over: 0 and 2; foreground: 0 and 1
    assert map_scores(np.zeros(2), np.array([1, IGNORED])) is None


def test_held_out_measures_are_those_of_the_saved_rpn(llava: Llava15, tmp_path: Path) -> None:
    rpn = RPN.from_backbone(llava, 2, 3)
    back = samples(5)
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "per_device_eval_batch_size": 5,
        "learning_rate": 3e-2,  # so large that the last step is hardly the best
    }
    facts = train(llava, rpn, samples(), arguments(tmp_path, **best), held_out=back)
    made = RPNSamples(back, llava)
    with torch.no_grad():
        output = RPNForTraining(llava, rpn)(**collate([made[i] for i in range(5)]))
    assert facts["held-out loss"] == pytest.approx(float(output["loss"]), abs=2e-4)
    scores = [
        map_scores(a, r["labels"]) for a, r in zip(output["logits"].numpy(), back, strict=True)
    ]
    mean = np.mean([s["average_precision"] for s in scores if s])
    assert facts["held-out average precision"] == pytest.approx(mean, abs=2e-4)
    states = [json.loads(p.read_text()) for p in tmp_path.glob("checkpoint-6/trainer_state.json")]
    losses = [e["eval_loss"] for e in states[0]["log_history"] if "eval_loss" in e]
    assert facts["held-out loss"] == pytest.approx(min(losses), abs=1e-3)


# How it is computed


def test_checkpointing_gives_the_same_gradients(llava: Llava15) -> None:
    made = RPNSamples(samples(3), llava)
    batch = collate([made[i] for i in range(3)])
    gradients = []
    for checkpointing in (False, True):
        model = RPNForTraining(llava, RPN.from_backbone(llava, 2, 3)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.rpn.layers)
        model(**batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


def test_checkpointing_takes_the_options_of_the_trainer(llava: Llava15) -> None:
    model = RPNForTraining(llava, RPN.from_backbone(llava, 2, 3))
    default = {"use_reentrant": False}
    for options, expected in (
        ({}, default),
        ({"gradient_checkpointing_kwargs": None}, default),
        ({"other_kwargs": {"x": 1}}, default),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"use_reentrant": True}),
        (
            {"activation_checkpointing_kwargs": {"preserve_rng_state": False}},
            default | {"preserve_rng_state": False},
        ),
    ):
        model.activation_checkpointing_enable(**options)
        assert [layer.gradient_checkpointing for layer in model.rpn.layers] == [True, True]
        for layer in model.rpn.layers:
            run = layer._gradient_checkpointing_func
            assert (run.func, run.keywords) == (checkpoint, expected)


def test_weights_stay_float32_over_a_half_backbone(llava: Llava15) -> None:
    half = Llava15.load(str(tiny_path()), dtype="bfloat16")
    model = RPNForTraining(half, RPN.from_backbone(half, 2, 3))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    made = RPNSamples(samples(2), half)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**collate([made[0], made[1]]))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_only_the_layers_that_are_needed_are_loaded() -> None:
    whole = Llava15.load(str(tiny_path()), dtype="float32")
    part = Llava15.load(str(tiny_path()), dtype="float32", num_layers=4)
    assert (whole.num_layers, part.num_layers) == (6, 4)
    a, b = whole.model.state_dict(), part.model.state_dict()
    assert set(a) - set(b) == {name for name in a if ".layers.4." in name or ".layers.5." in name
                               if "language_model" in name}  # fmt: skip
    for name, weight in b.items():
        torch.testing.assert_close(weight, a[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="has 6 decoder layers, 7 are needed"):
        Llava15.load(str(tiny_path()), num_layers=7)


@pytest.mark.parametrize(
    ("hidden", "inner", "heads", "millions"), [(4096, 11008, 32, 438), (5120, 13824, 40, 687)]
)
def test_size_of_the_real_rpns(hidden: int, inner: int, heads: int, millions: int) -> None:
    """docs/method.md: about 438 M for 7B; for 13B by the same shape (2 layers, q, k, norms)."""
    config = RPNConfig(hidden, inner, heads, heads, 1e-5, 576)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in RPN(config).parameters())
    layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    assert parameters == 2 * layer + 2 * hidden**2 + 2 * hidden
    assert round(parameters / 1e6) == millions


# Labels on disk


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A finished folder of 24 labels on 12 images, for the embedded model's grid."""
    folder, images = tmp_path / "labels", tmp_path / "images"
    folder.mkdir()
    images.mkdir()
    rows = []
    for i, sample in enumerate(samples(24)):
        name = f"{i // 2}.png"
        make_image(112, 112, i // 2).save(images / name)
        maps = {"grounding": np.zeros(64), "sink": np.zeros(64)}
        question = f"what pattern is on the {('red', 'blue')[i % 2]} disc ?"
        rows.append(label_row(str(i), name, question, "red level", labels=sample["labels"], **maps))
    rows.append(label_row("bad", "gone.png", "what", reason="image missing"))
    write_shard(rows, shard_path(folder, 0, 1))
    config = {"grounding": [{"layer": 0, "heads": [3]}], "sink": [{"layer": 0, "heads": None}]}
    settings = {"images": str(images), "shards": 1, "image_tokens": 64, "data": "by hand"}
    write_json(folder / SETTINGS_FILE, settings | {"labels": config | {"vicrop_layer": 0}})
    return folder


def test_no_image_is_on_both_sides(labels: Path) -> None:
    rows = LabelledImages(load_labels(labels), labels.parent / "images")
    assert len(rows) == 24
    trained, measured = split_by_image(rows, 0.25, None, seed=0)
    assert measured is not None
    names = [{rows.rows[i]["image"] for i in part.indices} for part in (trained, measured)]
    assert len(names[1]) == 3
    assert not names[0] & names[1]
    assert len(trained) + len(measured) == 24
    some, _ = split_by_image(rows, 0.25, 5, seed=0)
    more, _ = split_by_image(rows, 0.25, 9, seed=0)
    assert set(some.indices) < set(more.indices) < set(trained.indices)
    assert some.indices == sorted(some.indices)
    assert [len(split_by_image(rows, 0.25, n, seed=0)[0]) for n in (1, 18)] == [1, 18]
    whole, none = split_by_image(rows, 0, None, seed=0)
    assert (len(whole), none) == (24, None)
    for count in (19, 0, -1):
        with pytest.raises(ValueError, match="samples must be 1 to 18"):
            split_by_image(rows, 0.25, count, seed=0)
    for share in (1, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"held_out must be a share in \[0, 1\), got"):
            split_by_image(rows, share, None, seed=0)
    rows.drop(lambda question, cells: True)
    with pytest.raises(ValueError, match="no sample has a label"):
        split_by_image(rows, 0, None, seed=0)


def test_rows_are_dropped_by_their_question(labels: Path) -> None:
    rows = LabelledImages(load_labels(labels), labels.parent / "images")
    assert rows.drop(lambda question, cells: False) == []
    assert len(rows) == 24
    dropped = rows.drop(lambda question, cells: "red" in question and cells == 64)
    assert dropped == [str(i) for i in range(0, 24, 2)]
    assert rows.rows["id"] == [str(i) for i in range(1, 24, 2)]
    rows = LabelledImages(load_labels(labels), labels.parent / "images")
    with pytest.raises(ValueError, match="is none"):
        split_by_image(rows, 0.01, None, seed=0)


# The command


def words(labels: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", "tiny", "--labels", str(labels), "--out", str(out), "--branch-layer", "3"]
    fixed = ["--held-out", "0.25", "--global-batch", "8", "--max_steps", "4"]
    return ["train", *given, *fixed, "--per_device_train_batch_size", "4", *more]


def test_the_command_leaves_an_rpn_that_says_how_it_was_made(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "rpn"
    zoom = ["--zoom", "threshold=0.2,policy=strongest,min_cells=1", "--save-dtype", "float16"]
    result = runner.invoke(app, words(labels, out, *zoom, "--learning_rate", "1e-3"))
    assert result.exit_code == 0, result.output
    rpn = RPN.from_pretrained(str(out))
    assert rpn.config.zoom == ZoomConfig(threshold=0.2, policy="strongest", min_cells=1)
    assert rpn.config.labels is not None
    assert rpn.config.labels.grounding == (LayerHeads(0, (3,)),)
    assert (rpn.config.branch_layer, rpn.config.depth, rpn.config.base_model) == (3, 3, "tiny")
    assert rpn.q_proj.weight.dtype == torch.float16
    facts = json.loads((out / "training.json").read_text())
    assert facts == rpn.facts
    assert (facts["samples"], facts["steps"], facts["batch size"]) == (18, 4, 8)
    assert facts["held-out samples"] == 6
    assert f"held-out IoU: {facts['held-out IoU']}" in (out / "README.md").read_text()
    size = sum(p.numel() for p in rpn.parameters()) * 2
    assert (out / "rpn.safetensors").stat().st_size == pytest.approx(size, rel=0.02)
    # The same command again: training is complete, and the result is the same.
    before = (out / "rpn.safetensors").read_bytes()
    result = runner.invoke(app, words(labels, out, *zoom, "--learning_rate", "1e-3"))
    assert "training is already complete" in result.output
    assert json.loads((out / "training.json").read_text()) == facts
    assert (out / "rpn.safetensors").read_bytes() == before
    result = runner.invoke(app, words(labels, out, *zoom, "--learning_rate", "2e-3"))
    assert result.exit_code == 2
    assert "was begun with other settings (arguments:" in " ".join(result.output.split())


@pytest.mark.slow
def test_two_processes_train_as_one(labels: Path, tmp_path: Path) -> None:
    """DDP on the CPU: the same global batch, so the same weights, as a process alone."""
    fixed = ["--held-out", "0", "--logging_steps", "1"]
    launches = {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    for name, launch in launches.items():
        command = [sys.executable, *launch, "-m", "sdrpn.cli"]
        command += words(labels, tmp_path / name, *fixed)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / n / "training.json").read_text()) for n in launches]
    assert facts[0]["batch size"] == facts[1]["batch size"] == 8
    assert facts[0]["final loss"] == pytest.approx(facts[1]["final loss"], abs=2e-3)
    one, two = (RPN.from_pretrained(str(tmp_path / n)).state_dict() for n in launches)
    start = RPN.from_backbone(Llava15.load(str(tiny_path()), dtype="float32"), 3, 3).state_dict()
    for name, weight in one.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0
        assert (two[name] - weight).abs().max() < 0.2 * moved, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--labels", "nowhere"], "nowhere holds no settings.json"),
        (["--no_such_field", "1"], "--no_such_field"),
        (["--global-batch", "6"], "global_batch 6 is not a multiple of the 4"),
        (["--zoom", "treshold=1"], "unknown key(s) treshold"),
        (["--zoom", "threshold=2"], "threshold must be in (0, 1), got 2"),
        (["--branch-layer", "5"], "has 6 decoder layers, 8 are needed"),
        (["--samples", "500"], "samples must be 1 to 18"),
        (["--save-dtype", "int3"], "save_dtype must be auto"),
        (["--dtype", "bfloat16", "--bf16", "false"], "add --bf16 true, or use --dtype float32"),
    ],
)
def test_wrong_values_are_one_sentence(
    labels: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    result = runner.invoke(app, words(labels, tmp_path / "rpn", *change))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_every_training_argument_can_be_set(tmp_path: Path) -> None:
    published = training_arguments([], tmp_path, 512, measured=True)
    assert (published.learning_rate, published.adam_beta2, published.seed) == (5e-5, 0.98, 42)
    assert published.gradient_accumulation_steps == 32
    assert published.load_best_model_at_end
    more = ["--learning_rate", "1e-4", "--lr_scheduler_type", "linear", "--save_steps=7"]
    changed = training_arguments([*more, "--eval_steps", "7"], tmp_path, 512, measured=True)
    assert (changed.learning_rate, changed.lr_scheduler_type, changed.save_steps) == (
        1e-4,
        "linear",
        7,
    )


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_zero2"])
def test_launch_files_are_read_by_accelerate(name: str) -> None:
    path = Path(sdrpn.distill.__file__).parent / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert config.distributed_type.value.lower() == name.split("_")[0]


def test_labels_of_another_grid_are_refused(labels: Path, tmp_path: Path) -> None:
    settings = json.loads((labels / "settings.json").read_text())
    write_json(labels / SETTINGS_FILE, settings | {"image_tokens": 576})
    result = runner.invoke(app, words(labels, tmp_path / "rpn"))
    assert result.exit_code == 2
    assert "grounding has rows of 64 values, not 576" in " ".join(result.output.split())
    cells = {name: np.zeros(576) for name in ("grounding", "sink", "labels")}
    rows = [label_row(str(i), f"{i}.png", "what", **cells) for i in range(12)]
    write_shard(rows, shard_path(labels, 0, 1))
    result = runner.invoke(app, words(labels, tmp_path / "rpn"))
    assert result.exit_code == 2
    assert "has labels for 576 image tokens, tiny has 64" in " ".join(result.output.split())
