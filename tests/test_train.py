"""Training at full scale: resuming, held-out measures, two processes, what is loaded and saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import QUESTIONS, make_image
from transformers import TrainerCallback
from typer.testing import CliRunner

import sdrpn.distill
from sdrpn.cli import app
from sdrpn.cli.train import training_arguments
from sdrpn.config import LayerHeads, RPNConfig, ZoomConfig
from sdrpn.distill import train as module
from sdrpn.distill.dataset import (
    SETTINGS_FILE,
    LabelledImages,
    label_row,
    load_labels,
    shard_path,
    write_shard,
)
from sdrpn.distill.metrics import map_scores
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.distill.split import split_by_image
from sdrpn.distill.train import RPNForTraining, RPNSamples, collate, last_checkpoint, train
from sdrpn.files import write_json
from sdrpn.llava import Llava
from sdrpn.rpn import RPN
from sdrpn_eval.demo import tiny_path

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


def test_interrupted_and_uninterrupted_runs_end_equal(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
        rpn = RPN.from_backbone(llava, 2, 3)
        train(llava, rpn, samples(), arguments(out))
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        return rpn.state_dict(), [e["loss"] for e in state["log_history"] if "loss" in e]

    whole, curve = run(tmp_path / "whole")
    trainer = module.SafeTrainer

    def killed(**options: Any) -> Any:
        return trainer(**options, callbacks=[KillAt(5)])

    monkeypatch.setattr(module, "SafeTrainer", killed)
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(module, "SafeTrainer", trainer)
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


# What is measured


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


def test_held_out_measures_are_those_of_the_saved_rpn(llava: Llava, tmp_path: Path) -> None:
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


def test_checkpointing_gives_the_same_gradients(llava: Llava) -> None:
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


def test_weights_stay_float32_over_a_half_backbone(llava: Llava) -> None:
    half = Llava.load(str(tiny_path()), dtype="bfloat16")
    model = RPNForTraining(half, RPN.from_backbone(half, 2, 3))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    made = RPNSamples(samples(2), half)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**collate([made[0], made[1]]))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_only_the_layers_that_are_needed_are_loaded() -> None:
    whole = Llava.load(str(tiny_path()), dtype="float32")
    part = Llava.load(str(tiny_path()), dtype="float32", num_layers=4)
    assert (whole.num_layers, part.num_layers) == (6, 4)
    a, b = whole.model.state_dict(), part.model.state_dict()
    assert set(a) - set(b) == {name for name in a if ".layers.4." in name or ".layers.5." in name
                               if "language_model" in name}  # fmt: skip
    for name, weight in b.items():
        torch.testing.assert_close(weight, a[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="has 6 decoder layers, 7 are needed"):
        Llava.load(str(tiny_path()), num_layers=7)


@pytest.mark.parametrize(
    ("hidden", "inner", "heads", "millions"), [(4096, 11008, 32, 438), (5120, 13824, 40, 687)]
)
def test_size_of_the_real_rpns(hidden: int, inner: int, heads: int, millions: int) -> None:
    """METHOD section 2: about 438 M for 7B; for 13B by the same shape (2 layers, q, k, norms)."""
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
    with pytest.raises(ValueError, match="samples must be 1 to 18"):
        split_by_image(rows, 0.25, 19, seed=0)
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
    # The same command again: nothing is left to do, and the same comes out.
    before = (out / "rpn.safetensors").read_bytes()
    result = runner.invoke(app, words(labels, out, *zoom, "--learning_rate", "1e-3"))
    assert "nothing is left to do" in result.output
    assert json.loads((out / "training.json").read_text()) == facts
    assert (out / "rpn.safetensors").read_bytes() == before
    result = runner.invoke(app, words(labels, out, *zoom, "--learning_rate", "2e-3"))
    assert result.exit_code == 2
    assert "was begun with other settings (arguments:" in " ".join(result.output.split())


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
    start = RPN.from_backbone(Llava.load(str(tiny_path()), dtype="float32"), 3, 3).state_dict()
    for name, weight in one.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0
        assert (two[name] - weight).abs().max() < 0.2 * moved, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--labels", "nowhere"], "nowhere holds no settings.json"),
        (["--no_such_field", "1"], "--no_such_field"),
        (["--global-batch", "6"], "global_batch 6 is no multiple of the 4"),
        (["--zoom", "treshold=1"], "unknown key(s) treshold"),
        (["--zoom", "threshold=2"], "threshold must be in (0, 1), got 2"),
        (["--branch-layer", "5"], "has 6 decoder layers, 8 are needed"),
        (["--samples", "500"], "samples must be 1 to 18"),
        (["--save-dtype", "int3"], "save_dtype must be auto"),
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
    assert "labels 576 image tokens, tiny has 64" in " ".join(result.output.split())
