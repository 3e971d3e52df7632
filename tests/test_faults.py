"""Faults: killed at any write, a full disk, damaged files. The same command again must go on.

CRASHES=all tries every write of labelling and training in turn (minutes); by default some.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15
from sdrpn.distill.label_dataset import (
    SETTINGS_FILE,
    label_row,
    load_labels,
    shard_path,
    write_settings,
    write_shard,
)
from sdrpn.distill.label_job import relabel
from sdrpn_eval.demo import embedded_model, tiny_path
from tests.conftest import QUESTIONS, make_image
from tests.helpers import fault_jobs as jobs
from tests.helpers.crashes import Writes, run
from tests.sdrpn.distill.test_label_job import LABELS

pytestmark = pytest.mark.slow  # every job runs in processes that are killed at a write
EVERY = os.environ.get("CRASHES") == "all"
runner = CliRunner()


def some(count: int, wanted: int) -> list[int]:
    """Numbers from 1 to count: all, or a few that lie evenly, first and last among them."""
    if EVERY or count <= wanted:
        return list(range(1, count + 1))
    return sorted({round(x) for x in np.linspace(1, count, wanted)})


def left(folder: Path) -> list[str]:
    """Parts of files that were not finished."""
    return [str(path) for path in folder.rglob("*.part*")]


# Labelling


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions on three images that lie inside the data set, so labelling keeps them."""
    folder = tmp_path_factory.mktemp("embedded")
    for i in range(3):
        make_image(50 + i, 40, i).save(folder / f"{i}.png")
    rows = [{"image": str(folder / f"{i % 3}.png"), "question": QUESTIONS[i % 4]} for i in range(5)]
    features = Features({"image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / "d.parquet")
    return folder / "d.parquet"


@pytest.fixture(scope="module")
def labelled(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of labels that was never interrupted, and its writes."""
    out = tmp_path_factory.mktemp("whole") / "labels"
    writes = Writes(out)
    assert run(jobs.label, parquet, out, writes=writes) == (0, None)
    assert sum("write_table" in one for one in writes.said) == 3
    assert any("images/" in one for one in writes.said)
    return out, writes.said


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_labelling_killed_at_any_write_goes_on(
    parquet: Path,
    labelled: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    whole, said = labelled
    for at in some(len(said), 6):
        out = tmp_path / str(at)
        status, _ = run(jobs.label, parquet, out, writes=Writes(out, at))
        assert status == -9, said[at - 1]
        assert run(jobs.label, parquet, out) == (0, None), said[at - 1]
        assert load_labels(out)[:] == load_labels(whole)[:], said[at - 1]
        assert files(out).keys() == files(whole).keys(), said[at - 1]


def test_labelling_on_a_full_disk_is_one_sentence_and_goes_on(
    parquet: Path,
    labelled: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    whole, writes = labelled
    said = [one for one in writes if not one.startswith("os.")]  # moving needs no room
    for at in some(len(said), 4):
        out = tmp_path / str(at)
        status, result = run(jobs.label, parquet, out, writes=Writes(out, at, full=True))
        assert status == 1, said[at - 1]
        assert result.startswith("OSError: "), result
        assert "No space left on device" in result
        assert str(out) in result
        assert not left(out)
        assert run(jobs.label, parquet, out) == (0, None), said[at - 1]
        assert load_labels(out)[:] == load_labels(whole)[:], said[at - 1]


def test_labelling_interrupted_goes_on(
    parquet: Path, labelled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, said = labelled
    for at in some(len(said), 3)[1:]:
        out = tmp_path / str(at)
        stopped = Writes(out, at, sent=signal.SIGINT)
        assert run(jobs.label, parquet, out, writes=stopped) == (1, "KeyboardInterrupt: ")
        assert not left(out), said[at - 1]
        assert run(jobs.label, parquet, out) == (0, None), said[at - 1]
        assert load_labels(out)[:] == load_labels(whole)[:], said[at - 1]


def test_relabelling_killed_at_any_write_leaves_no_mixture(
    labelled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Thresholds of two kinds in one finished folder would go unnoticed."""
    config, other = (replace(LABELS, foreground=f) for f in (0.9, 0.8))
    count = Writes(tmp_path)
    assert run(jobs.relabel, labelled[0], tmp_path / "whole", config, writes=count) == (0, None)
    for at in some(len(count.said), 4):
        out = tmp_path / str(at)
        status, _ = run(jobs.relabel, labelled[0], out, config, writes=Writes(tmp_path, at))
        assert status == -9
        if (out / SETTINGS_FILE).exists():
            with pytest.raises(ValueError, match="foreground"):
                relabel(labelled[0], out, other)
        relabel(labelled[0], out, config)
        assert load_labels(out)[:] == load_labels(tmp_path / "whole")[:]
        assert not left(out)


@pytest.mark.parametrize("harm", ["cut", "empty", "other rows", "gone", "junk"])
def test_labelling_makes_damaged_shards_anew(
    parquet: Path,
    labelled: tuple[Path, list[str]],
    tmp_path: Path,
    harm: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "labels"
    shutil.copytree(labelled[0], out)
    path = shard_path(out, 1, 3)
    content = path.read_bytes()
    match harm:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "junk":
            path.write_bytes(b"PAR1" * 100)
        case "gone":
            path.unlink()
        case "other rows":
            shutil.copy(shard_path(out, 2, 3), path)
    if harm != "other rows":  # which only labelling knows, by the count of its questions
        with pytest.raises(ValueError, match=path.name):
            load_labels(out)
    before = shard_path(out, 0, 3).stat().st_mtime_ns
    jobs.label(parquet, out)
    assert load_labels(out)[:] == load_labels(labelled[0])[:]
    assert shard_path(out, 0, 3).stat().st_mtime_ns == before
    assert (f"{path} is damaged and is made anew" in caplog.text) == (harm != "gone")


def test_a_flipped_bit_in_a_shard_is_noticed(
    labelled: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    shutil.copytree(labelled[0], out)
    path = shard_path(out, 0, 3)
    content, noticed = path.read_bytes(), 0
    for at in range(4, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            rows = load_labels(out)[:]
        except ValueError as error:
            noticed += str(path) in str(error)
        else:  # in a statistic or the like, which is not read
            assert rows == load_labels(labelled[0])[:], at
    assert noticed > 10


# Training


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of ten labels on five images, for the embedded model's grid."""
    folder = tmp_path_factory.mktemp("training") / "labels"
    images = folder.parent / "images"
    folder.mkdir()
    images.mkdir()
    rows = []
    for i in range(10):
        make_image(112, 112, i // 2).save(images / f"{i // 2}.png")
        cells = np.zeros(64, np.int8)
        cells[i : i + 4] = 1
        maps = {"grounding": np.zeros(64), "sink": np.zeros(64)}
        rows.append(label_row(str(i), f"{i // 2}.png", QUESTIONS[i % 4], labels=cells, **maps))
    write_shard(rows, shard_path(folder, 0, 1))
    settings = {"images": str(images), "shards": 1, "image_tokens": 64, "side": 112}
    write_settings(folder, settings | {"padding": "pad", "labels": asdict(LABELS)})
    return folder


@pytest.fixture(scope="module")
def trained(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An RPN whose training was never interrupted, and its writes."""
    out = tmp_path_factory.mktemp("whole") / "rpn"
    writes = Writes(out)
    status, (code, said) = run(jobs.train, labels, out, writes=writes)
    assert (status, code) == (0, 0), said
    assert any("os.remove" in one and "checkpoint-1" in one for one in writes.said), "rotated"
    return out, writes.said


def test_training_killed_at_any_write_goes_on(
    labels: Path, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, writes = trained
    for at in some(len(writes), 5):
        out = tmp_path / str(at)
        status, _ = run(jobs.train, labels, out, writes=Writes(out, at))
        assert status == -9, writes[at - 1]
        status, (code, said) = run(jobs.train, labels, out)
        assert (status, code) == (0, 0), (writes[at - 1], said)
        weights = (out / "rpn.safetensors").read_bytes()
        assert weights == (whole / "rpn.safetensors").read_bytes(), writes[at - 1]
        assert not left(out)
        shutil.rmtree(out)


def test_training_on_a_full_disk_is_one_sentence_and_goes_on(
    labels: Path, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, said = trained
    writes = [one for one in said if not one.startswith("os.")]
    for at in some(len(writes), 4):
        out = tmp_path / str(at)
        status, (code, said) = run(jobs.train, labels, out, writes=Writes(out, at, full=True))
        assert (status, code) == (0, 2), (writes[at - 1], said)
        assert "error: " in said
        assert "cannot be written" in said, said
        assert str(out) in said
        assert "Traceback" not in said
        assert not left(out)
        status, (code, said) = run(jobs.train, labels, out)
        assert (status, code) == (0, 0), (writes[at - 1], said)
        weights = (out / "rpn.safetensors").read_bytes()
        assert weights == (whole / "rpn.safetensors").read_bytes(), writes[at - 1]
        shutil.rmtree(out)


def last_of(out: Path) -> Path:
    """The last checkpoint of a training of three steps."""
    return out / "checkpoints" / "checkpoint-3"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
def test_training_passes_by_a_checkpoint_that_was_cut(
    labels: Path, trained: tuple[Path, list[str]], tmp_path: Path, file: str
) -> None:
    """Of the two that are kept, the older one is gone on from; the end is the same."""
    out = tmp_path / "rpn"
    shutil.copytree(trained[0], out)
    path = last_of(out) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, said = jobs.train(labels, out)
    assert code == 0, said
    assert f"removing incomplete checkpoint {last_of(out)}" in said
    assert "resuming from" in said
    assert (out / "rpn.safetensors").read_bytes() == (trained[0] / "rpn.safetensors").read_bytes()


def test_training_starts_over_where_no_checkpoint_is_whole(
    labels: Path, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "rpn"
    shutil.copytree(trained[0], out)
    for path in (out / "checkpoints").glob("checkpoint-*/model.safetensors"):
        path.write_bytes(b"")
    code, said = jobs.train(labels, out)
    assert code == 0, said
    assert said.count("removing incomplete checkpoint") == 2
    assert (out / "rpn.safetensors").read_bytes() == (trained[0] / "rpn.safetensors").read_bytes()


def test_training_of_another_base_is_refused(
    labels: Path, trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A begun --out belongs to its base model, though the name be the same."""
    out = tmp_path / "rpn"
    shutil.copytree(trained[0], out)
    settings = out / "checkpoints" / "settings.json"
    noted = json.loads(settings.read_text())
    settings.write_text(json.dumps(noted | {"base_hash": "0" * 16}))
    code, said = jobs.train(labels, out)
    assert code == 2
    assert (
        f"was begun with other settings (base_hash: {'0' * 16} there, {noted['base_hash']}" in said
    )


@pytest.mark.parametrize("harm", ["missing shard", "cut shard", "missing image", "no settings"])
def test_training_says_what_is_wrong_with_its_labels(
    labels: Path, tmp_path: Path, harm: str
) -> None:
    folder = tmp_path / "labels"
    shutil.copytree(labels, folder)
    shutil.copytree(labels.parent / "images", tmp_path / "images")
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    settings["images"] = str(tmp_path / "images")
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    shard = shard_path(folder, 0, 1)
    match harm:
        case "missing shard":
            shard.unlink()
            said = "1 of 1 shard is missing (labels-00000-of-00001.parquet, ...)"
        case "cut shard":
            shard.write_bytes(shard.read_bytes()[:900])
            said = f"{shard} cannot be read"
        case "missing image":
            (tmp_path / "images" / "3.png").unlink()
            said = "1 of 5 images is not in"
        case _:
            (folder / SETTINGS_FILE).unlink()
            said = f"{folder} holds no settings.json"
    code, output = jobs.train(folder, tmp_path / "rpn")
    assert code == 2
    assert said in output
    assert "Traceback" not in output


# Loading


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_base_model_is_named(tmp_path: Path, kind: str, harm: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_path(), folder)
    weights = load_file(folder / "model.safetensors")
    path = folder / "model.safetensors"
    if kind == "sharded":
        path.unlink()
        Llava15.load(str(tiny_path())).model.save_pretrained(folder, max_shard_size="2MB")
        path = sorted(folder.glob("model-0000*.safetensors"))[1]
    elif kind == "bin":
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(weights, path)
        assert Llava15.load(str(folder)).num_layers == 6
    content = path.read_bytes()
    path.unlink() if harm == "gone" else path.write_bytes(
        b"" if harm == "empty" else content[: len(content) // 2]
    )
    told = r"cannot|no file named|is not a file of tensors|lacks"
    with pytest.raises((OSError, ValueError), match=told) as error:
        Llava15.load(str(folder))
    assert str(folder) in str(error.value)
    if harm != "gone":
        assert path.name in str(error.value)
    elif kind == "sharded":
        assert path.name in str(error.value) or "lacks" in str(error.value)


def test_a_damaged_rpn_ends_the_command_with_a_sentence(tmp_path: Path) -> None:
    shutil.copytree(embedded_model()[1], tmp_path / "rpn")
    path = tmp_path / "rpn" / "rpn.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    make_image(40, 40, 0).save(tmp_path / "a.png")
    words = ["look", str(tmp_path / "a.png"), "what ?", "--model", "tiny", "--out"]
    code, said = jobs.command(*words, str(tmp_path / "b.png"), "--rpn", str(tmp_path / "rpn"))
    assert code == 2
    assert f"{path} cannot be read as safetensors" in said
    assert "Traceback" not in said
