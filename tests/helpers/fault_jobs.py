"""The jobs that test_faults.py kills, imported once by the process that its children come from."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import accelerate.data_loader
import accelerate.utils.memory  # noqa: F401
import transformers.trainer
import transformers.trainer_callback  # noqa: F401
from typer.testing import CliRunner

import sdrpn.distill.trainer  # noqa: F401
from sdrpn.cli import app
from sdrpn.cli.label import _finish
from sdrpn.config import LabelConfig
from sdrpn.distill import label_job as labelling
from sdrpn.distill.questions import read_items
from sdrpn.engine import ZoomModel
from tests.conftest import make_llava
from tests.sdrpn.distill.test_label_job import LABELS

# A suite that was started in the background has SIGINT ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

LLAVA = make_llava()


def label(data: Path, out: Path) -> None:
    """What `sdrpn label` does once its model is there."""
    zoom = ZoomModel(LLAVA, proposer="none", labels=LABELS, prefix_cache=0)
    items = read_items(str(data))
    labelling.LabelJob(zoom, items, out, images=None, batch_size=2, shard_size=2).run()
    _finish(out, preview=1, seed=0)


def relabel(source: Path, out: Path, config: LabelConfig) -> None:
    labelling.relabel(source, out, config)


def command(*words: str) -> tuple[int, str]:
    """(exit code, what it said) of `sdrpn` with these words."""
    result: Any = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def train(labels: Path, out: Path, *more: str) -> tuple[int, str]:
    """`sdrpn train`, three steps with a checkpoint each."""
    words = ["train", "--model", "tiny", "--labels", str(labels), "--out", str(out)]
    words += ["--branch-layer", "3", "--held-out", "0.2", "--global-batch", "2", "--max_steps", "3"]
    words += ["--per_device_train_batch_size", "2", "--eval_steps", "1", "--save_steps", "1"]
    return command(*words, "--use_cpu", "true", *(more or ("--learning_rate", "1e-3")))
