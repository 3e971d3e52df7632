"""The labelling job: what goes in, what is kept, and that it can be killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUESTIONS, make_image
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL
from PIL import ImageFile
from typer.testing import CliRunner

from sdrpn.cli import app
from sdrpn.config import LabelConfig, LayerHeads
from sdrpn.distill.dataset import (
    FEATURES,
    image_root,
    label_row,
    load_labels,
    read_settings,
    shard_path,
    summarise,
)
from sdrpn.distill.labelling import LabelJob, preview, relabel, report
from sdrpn.distill.pseudo_labels import IGNORED, pseudo_labels
from sdrpn.distill.questions import read_items
from sdrpn.images import BadImage, inside, load_image
from sdrpn.llava import Llava
from sdrpn.zoom import ZoomLlava

LABELS = LabelConfig(
    grounding=(LayerHeads(3, (0, 2)),),
    sink=(LayerHeads(1),),
    vicrop_layer=3,
    sink_threshold=1.0,
    foreground=0.75,
    background=0.5,
    max_new_tokens=3,
)
"""A random model looks everywhere at once; only its highest peaks make a foreground."""
runner = CliRunner()


def conversation(image: str, question: str, name: str) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": "unused"},
        {"from": "human", "value": "a second question"},
    ]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """LLaVA's JSON with 14 questions in two folders, and the image folder."""
    images, entries = tmp_path / "images", []
    for i in range(14):
        folder = "gqa" if i % 3 else "ocr_vqa"
        (images / folder).mkdir(parents=True, exist_ok=True)
        make_image(60 + 10 * i, 90, i).save(images / folder / f"{i}.png")
        entries.append(conversation(f"{folder}/{i}.png", QUESTIONS[i % 4], f"q{i}"))
    entries.insert(3, {"id": "text", "conversations": [{"from": "human", "value": "hello"}]})
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    return tmp_path / "mix.json", images


def job(llava: Llava, data: tuple[Path, Path], out: Path, **options: Any) -> LabelJob:
    zoom = ZoomLlava(llava, proposer="none", labels=LABELS)
    return LabelJob(zoom, read_items(str(data[0])), out, images=data[1], **options)


# What goes in


def test_first_questions_of_llava_s_conversations(data: tuple[Path, Path]) -> None:
    items = read_items(str(data[0]))
    assert [item.id for item in items] == [f"q{i}" for i in range(14)]
    assert items[1].question == QUESTIONS[1]
    assert items[1].image == "gqa/1.png"


def test_subset_and_samples(data: tuple[Path, Path]) -> None:
    pages = read_items(str(data[0]), subset=["ocr_vqa"])
    assert [item.id for item in pages] == ["q0", "q3", "q6", "q9", "q12"]
    some = read_items(str(data[0]), samples=6, seed=1)
    assert some == read_items(str(data[0]), samples=6, seed=1)
    assert some != read_items(str(data[0]), samples=6, seed=2)
    assert len({item.id for item in some}) == 6
    with pytest.raises(ValueError, match="no image below gqb; it has gqa, ocr_vqa"):
        read_items(str(data[0]), subset=["gqb"])


def test_json_lines_and_data_sets(tmp_path: Path) -> None:
    lines = [{"image": "a.png", "question": "one"}, {"image": "b.png", "text": "two", "id": 7}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(i.id, i.question) for i in read_items(str(tmp_path / "d.jsonl"))] == [
        ("1", "one"),
        ("7", "two"),
    ]
    make_image(40, 30, 0).save(tmp_path / "a.png")
    rows = [{"image": str(tmp_path / "a.png"), "question": "q"}]
    features = Features({"image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    (item,) = read_items(str(tmp_path / "d.parquet"))
    assert item.content is not None
    assert load_image(item.content()).size == (40, 30)
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert read_items(str(tmp_path / "saved"))[0].question == "q"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", "{", "is not valid JSON"),
        ("d.json", "{}", "must hold a list"),
        ("d.json", '[{"id": 1, "image": "a.png"}]', "entry 0: expected LLaVA's"),
        ("d.json", "[]", "no question on an image"),
        ("d.jsonl", '{"image": "a.png", "question": "x"}\n{"image"', "line 2: expected"),
        ("d.jsonl", '{"image": "a.png"}', "line 1: expected"),
    ],
)
def test_data_that_is_wrong_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_items(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


# What comes out


def test_rows_are_the_labels_of_their_maps(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "out", batch_size=3, shard_size=5).run()
    rows = load_labels(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(14)]
    assert str(rows.features["grounding"].feature.dtype) == "float16"
    assert str(rows.features["labels"].feature.dtype) == "int8"
    kept = [row for row in rows if row["reason"] is None]
    assert kept
    for row in kept:
        maps = (np.array(row[name], np.float32) for name in ("grounding", "sink"))
        labels = pseudo_labels(*maps, LABELS)
        np.testing.assert_array_equal(row["labels"], labels)
        assert row["foreground"] == (labels == 1).sum() > 0
        assert row["background"] == (labels == 0).sum()
    for row in rows:
        assert (row["reason"] is None) == (np.array(row["labels"]) != IGNORED).any()
    found = summarise(rows)
    assert found["kept"] + sum(found["ignored"].values()) == found["questions"] == 14
    assert found["mean_foreground_share"] == pytest.approx(
        np.mean([row["foreground"] / 64 for row in kept]), abs=1e-4
    )
    assert preview(tmp_path / "out", 2).stat().st_size > 10_000


def test_a_summary_does_not_hang_on_where_the_kept_rows_are() -> None:
    bad = [label_row(str(i), "gone.png", "?", reason="image missing") for i in range(1001)]
    labels = np.array([1, 0, IGNORED, IGNORED])
    maps = {"grounding": np.zeros(4), "sink": np.zeros(4)}
    rows = [*bad, label_row("good", "a.png", "?", labels=labels, **maps)]
    found = summarise(Dataset.from_list(rows, features=FEATURES))
    assert found == {
        "questions": 1002,
        "kept": 1,
        "ignored": {"image missing": 1001},
        "mean_foreground_share": 0.25,
    }
    assert summarise(Dataset.from_list(bad, features=FEATURES))["mean_foreground_share"] == 0


def test_any_batch_and_shard_size_gives_the_same_labels(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "a", batch_size=1, shard_size=14).run()
    job(llava, data, tmp_path / "b", batch_size=4, shard_size=3).run()
    for one, other in zip(load_labels(tmp_path / "a"), load_labels(tmp_path / "b"), strict=True):
        assert one["response"] == other["response"]
        np.testing.assert_allclose(one["grounding"], other["grounding"], atol=1e-3)
        assert one["labels"] == other["labels"]


def test_a_second_run_does_only_what_is_missing(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path, shard_size=5).run()
    paths = [shard_path(tmp_path, k, 3) for k in range(3)]
    before = load_labels(tmp_path)[:]
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards is missing \(labels-00001-of-00003"):
        load_labels(tmp_path)
    times = [paths[k].stat().st_mtime_ns for k in (0, 2)]
    (tmp_path / "labels-00001-of-00003.part77").write_text("of a run that was killed")
    job(llava, data, tmp_path, shard_size=5).run()
    assert load_labels(tmp_path)[:] == before
    assert [paths[k].stat().st_mtime_ns for k in (0, 2)] == times
    assert not list(tmp_path.glob("*.part*"))


def test_other_settings_need_another_folder(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path, shard_size=5, about={"dtype": "float32"}).run()
    with pytest.raises(ValueError, match="dtype: float32 there, float16 now"):
        job(llava, data, tmp_path, shard_size=5, about={"dtype": "float16"}).run()


def test_a_broken_shard_is_named(llava: Llava, data: tuple[Path, Path], tmp_path: Path) -> None:
    job(llava, data, tmp_path, shard_size=5).run()
    path = shard_path(tmp_path, 2, 3)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"labels-00002-of-00003\.parquet cannot be read"):
        load_labels(tmp_path)


def test_images_inside_a_data_set_are_kept_for_training(llava: Llava, tmp_path: Path) -> None:
    for i in range(2):
        make_image(50, 40 + i, i).save(tmp_path / f"{i}.png")
    rows = [{"image": str(tmp_path / f"{i % 2}.png"), "question": QUESTIONS[i]} for i in range(3)]
    features = Features({"image": Image(), "question": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    zoom = ZoomLlava(llava, proposer="none", labels=LABELS)
    LabelJob(zoom, read_items(str(tmp_path / "d.parquet")), tmp_path / "out", images=None).run()
    root = image_root(tmp_path / "out")
    labelled = load_labels(tmp_path / "out")
    sizes = [load_image(inside(root, row["image"])).size for row in labelled]  # type: ignore[index]
    assert sizes == [(50, 40), (50, 41), (50, 40)]
    assert len(list(root.iterdir())) == 2


def test_relabelling_is_labelling_with_other_thresholds(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path
) -> None:
    job(llava, data, tmp_path / "a", shard_size=5).run()
    given = ["--foreground", "0.9", "--background", "0.3", "--max-components", "1"]
    out = str(tmp_path / "b")
    result = runner.invoke(app, ["relabel", str(tmp_path / "a"), "--out", out, *given])
    assert result.exit_code == 0, result.output
    assert "'foreground': 0.9" in result.output
    before, after = load_labels(tmp_path / "a"), load_labels(tmp_path / "b")
    strict = LabelConfig.from_dict(read_settings(tmp_path / "b")["labels"])
    assert (strict.foreground, strict.background, strict.max_components) == (0.9, 0.3, 1)
    assert strict.grounding == LABELS.grounding
    assert before["labels"] != after["labels"]
    for one, other in zip(before, after, strict=True):
        maps = (np.array(one[name], np.float32) for name in ("grounding", "sink"))
        np.testing.assert_array_equal(other["labels"], pseudo_labels(*maps, strict))
        assert one["response"] == other["response"]
    with pytest.raises(ValueError, match="another folder"):
        relabel(tmp_path / "a", tmp_path / "a", strict)


# Images that cannot be used


def test_bad_images_are_counted_by_reason_and_skipped(
    llava: Llava, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data[1]
    (images / "gqa/1.png").unlink()
    whole = (images / "gqa/2.png").read_bytes()
    (images / "gqa/2.png").write_bytes(whole[: len(whole) // 2])
    (images / "gqa/4.png").write_text("no picture")
    (images / "gqa/5.png").write_bytes(b"")
    PIL.new("RGB", (1, 500)).save(images / "gqa/7.png")
    PIL.new("1", (300, 300)).save(images / "gqa/8.png")
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 80_000)
    entries = json.loads(data[0].read_text())
    entries.append(conversation("../mix.json", "out of the folder", "escape"))
    data[0].write_text(json.dumps(entries))
    job(llava, data, tmp_path / "out").run()
    rows = load_labels(tmp_path / "out")
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons["q1"] == "image missing"
    assert reasons["q2"] == "image truncated or unreadable"
    assert reasons["q4"] == reasons["q5"] == "image not an image"
    assert reasons["q7"] == "image too narrow"
    assert reasons["q8"] == "image too large"
    assert reasons["escape"] == "image outside the image folder"
    assert sum(r is not None and r.startswith("image ") for r in reasons.values()) == 7
    assert report(tmp_path / "out")["bad_image_share"] == pytest.approx(7 / 15, abs=1e-4)


def test_half_an_image_is_refused_beside_lmms_eval_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms_eval.api.task does
    make_image(60, 60, 0).save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").size == (60, 60)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match="truncated or unreadable"):
        load_image(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_picture_is_turned_as_a_viewer_shows_it(tmp_path: Path) -> None:
    exif = PIL.Exif()
    exif[0x0112] = 6  # the camera was held upright
    PIL.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)
    with pytest.raises(BadImage, match=r"b\.jpg: missing"):
        load_image(tmp_path / "b.jpg")


# The command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 questions for the embedded model, on 12 images."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = []
    for i in range(12):
        make_image(112, 112, i).save(folder / f"{i}.png")
        for colour in ("red", "green", "blue", "pink"):
            question = f"what pattern is on the {colour} disc ?"
            lines.append({"id": f"{i}-{colour}", "image": f"{i}.png", "question": question})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(scenes: Path, out: Path, *more: str) -> list[str]:
    files = ["--data", str(scenes / "questions.jsonl"), "--images", str(scenes)]
    sizes = ["--shard-size", "4", "--batch-size", "2"]
    return ["-m", "sdrpn.cli", "label", "--model", "tiny", *files, "--out", str(out), *sizes, *more]


def run(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_and_started_again_it_goes_on(scenes: Path, tmp_path: Path) -> None:
    """SIGKILL after the second shard; by two processes then: nothing lost, nothing doubled."""
    process = run(command(scenes, tmp_path))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert 2 <= len(done) < 12
    assert not (tmp_path / "summary.json").exists()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    again = run([*launch, *command(scenes, tmp_path)], ACCELERATE_USE_CPU="1")
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written
    rows = load_labels(tmp_path)
    wanted = [json.loads(li)["id"] for li in (scenes / "questions.jsonl").read_text().split("\n")]
    assert rows["id"] == wanted
    assert json.loads((tmp_path / "summary.json").read_text())["questions"] == 48


def test_too_many_bad_images_are_an_error_at_the_end(scenes: Path, tmp_path: Path) -> None:
    lines = (scenes / "questions.jsonl").read_text().split("\n")[:20]
    lines += ['{"id": "x", "image": "x.png", "question": "?"}'] * 2
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    words = ["label", "--model", "tiny", "--data", str(tmp_path / "q.jsonl")]
    words += ["--images", str(scenes), "--out", str(tmp_path / "out"), "--preview", "2"]
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert "9.1% of the images could not be used" in " ".join(result.output.split())
    assert "ignored, image missing: 2" in result.output
    assert len(load_labels(tmp_path / "out")) == 22
    assert (tmp_path / "out" / "preview.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "nowhere.json"], "there is no file nowhere.json"),
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--model", "nowhere/model"], "cannot load 'nowhere/model'"),
        (["--heads", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_values_are_one_sentence(
    scenes: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    words = command(scenes, tmp_path / "out")[2:]
    result = runner.invoke(app, [*words, *change])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
