"""The authors' pickled pseudo-labels: read without running anything, and the same labels again."""

from __future__ import annotations

import builtins
import codecs
import collections
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from typer.testing import CliRunner

from sdrpn.cli import app
from sdrpn.config import LABELS_7B, LABELS_13B, LabelConfig
from sdrpn.convert import safe_pickle
from sdrpn.convert.labels import convert_labels
from sdrpn.distill.label_dataset import FEATURES, image_root, load_labels, read_settings
from sdrpn.distill.pseudo_labels import IGNORED, pseudo_labels

runner = CliRunner()
RECORD = np.load(Path(__file__).parents[2] / "data" / "parity" / "pseudo_labels.npz")
"""Maps of the shipped record, as an example of what is pickled."""
CASES = sorted({name.split("/")[0] for name in RECORD.files})


def records(kind: Callable[[np.ndarray], Any] = np.asarray) -> list[dict[str, Any]]:
    """The recorded maps, as the authors' labelling script pickles them."""
    return [
        {
            "question_id": case,
            "prompt": f"<image>\nWhat is at {case}?",
            "text": f" the answer {case}",
            "image": f"gqa/{case}.jpg",
            "sink_attn": kind(RECORD[f"{case}/sink"]),
            "grounding_attn_o2i": kind(RECORD[f"{case}/attention"]),
            "grounding_attn_q2i": kind(RECORD[f"{case}/attention"]),
        }
        for case in CASES
    ]


def pickled(tmp_path: Path, value: Any, protocol: int = 4) -> Path:
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


# --- the same labels again -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_labels_are_the_recorded_ones(tmp_path: Path, protocol: int) -> None:
    file = pickled(tmp_path, records(), protocol)
    summary = convert_labels(file, tmp_path / "out")
    rows: Any = load_labels(tmp_path / "out")
    assert rows.features == FEATURES
    assert len(rows) == len(CASES) == 20
    for row, case in zip(rows, CASES, strict=True):
        labels = RECORD[f"{case}/labels"]
        assert (np.array(row["labels"]) == labels).all()
        assert row["foreground"] == (labels == 1).sum()
        assert row["background"] == (labels == 0).sum()
        assert (row["reason"] is None) == bool((labels != -100).any())
        half = RECORD[f"{case}/attention"].astype(np.float16)
        assert (np.array(row["grounding"], np.float16) == half).all()
        assert (np.array(row["sink"], np.float16) == RECORD[f"{case}/sink"].astype("f2")).all()
        assert (row["id"], row["image"]) == (case, f"gqa/{case}.jpg")
        assert (row["question"], row["response"]) == (f"What is at {case}?", f"the answer {case}")
    kept = [row for row in rows if row["reason"] is None]
    assert 0 < len(kept) < len(rows), "the record holds samples of both kinds"
    assert summary["kept"] == len(kept)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_the_folder_can_be_trained_on(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    file = pickled(tmp_path, records())
    convert_labels(file, tmp_path / "out", images=images, config=LABELS_13B)
    settings = read_settings(tmp_path / "out")
    assert (settings["image_tokens"], settings["side"], settings["padding"]) == (576, 336, "pad")
    assert (settings["questions"], settings["shards"]) == (20, 1)
    assert LabelConfig.from_dict(settings["labels"]) == LABELS_13B
    assert image_root(tmp_path / "out") == images


def test_the_folder_says_how_it_was_made(tmp_path: Path) -> None:
    """Below folders that are missing, and without an image folder."""
    out = tmp_path / "above" / "out"
    convert_labels(pickled(tmp_path, records()), out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    settings = read_settings(out)
    assert LabelConfig.from_dict(settings.pop("labels")) == LABELS_7B
    assert settings == {
        "images": None,
        "questions": 20,
        "shards": 1,
        "shard_size": 4096,
        "image_tokens": 576,
        "side": 336,
        "padding": "pad",
        "data": "labels.pkl",
    }


def test_many_records_make_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrpn.convert.labels.SHARD_SIZE", 8)
    convert_labels(pickled(tmp_path, records()), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("labels-*-of-00003.parquet"))) == 3
    assert load_labels(tmp_path / "out")["id"][:] == CASES


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "<f2"])
def test_number_types(tmp_path: Path, kind: str) -> None:
    file = pickled(tmp_path, records(lambda a: a.astype(kind)))
    convert_labels(file, tmp_path / "out")
    for row, record in zip(load_labels(tmp_path / "out"), records(), strict=True):
        keys = "grounding_attn_o2i", "sink_attn"
        maps = [record[n].astype(kind).reshape(24, 24) for n in keys]
        expected = pseudo_labels(*maps, LABELS_7B)
        assert (np.array(row["labels"]) == expected.ravel()).all()


@pytest.mark.parametrize(
    "kind",
    [
        lambda a: a.tolist(),
        lambda a: tuple(a.tolist()),
        list,  # of numpy scalars
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2)[::2],
    ],
)
def test_lists_and_odd_arrays(tmp_path: Path, kind: Callable[[np.ndarray], Any]) -> None:
    convert_labels(pickled(tmp_path, records(kind)), tmp_path / "out")
    for row, case in zip(load_labels(tmp_path / "out"), CASES, strict=True):
        assert (np.array(row["labels"]) == RECORD[f"{case}/labels"]).all()


@pytest.mark.parametrize("core", ["core", "_core"])
def test_pickles_of_numpy_1_and_2(tmp_path: Path, core: str) -> None:
    """Protocol 2 writes module names as lines, so that they can be exchanged."""
    content = pickle.dumps([*records()[:2], {"scalar": np.float32(0.5)}], protocol=2)
    current = b"numpy._core" if b"numpy._core" in content else b"numpy.core"
    content = content.replace(current, f"numpy.{core}".encode())
    assert content.count(f"numpy.{core}.multiarray\n".encode()) >= 2
    path = tmp_path / "labels.pkl"
    path.write_bytes(content)
    *rest, last = safe_pickle.load(path)
    assert (rest[1]["sink_attn"] == RECORD["01/sink"]).all()
    assert last == {"scalar": np.float32(0.5)}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_and_shapes_come_back(tmp_path: Path, protocol: int) -> None:
    """Protocol 5 has a way of its own for arrays, by rows or by columns."""
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    values = {"a": [1, 2.5, None, True, "text", b"bytes"], "b": (array, array.T, array[:0])}
    found = safe_pickle.load(pickled(tmp_path, values, protocol))
    assert found["a"] == values["a"]
    for one, other in zip(found["b"], values["b"], strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()
        assert one.shape == other.shape


# --- grids and their padding ---------------------------------------------------------------------

PADDED = replace(LABELS_7B, padding_background=True)


def on_a_grid(folder: Path, size: tuple[int, int], turned: bool = False) -> dict[str, Any]:
    """A record on a picture as a viewer shows it, with a grid of 4 x 4.

    Foreground at (1, 1), a value between the thresholds at (1, 2) and (3, 3), more than either at
    (0, 0), and a sink at (2, 1).
    """
    folder.mkdir(exist_ok=True)
    name = f"{size[0]}-{turned}.png"
    exif = Image.Exif()
    if size[0] != size[1]:
        exif[ExifTags.Base.Orientation] = 5 if turned else 4
    Image.new("RGB", size[::-1] if turned else size).save(folder / name, exif=exif)
    grounding, sink = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    grounding[0, 0], grounding[1, 1], grounding[1, 2], grounding[3, 3] = 5, 1, 0.15, 0.15
    grounding[2, 1], sink[2, 1] = 9, 0.5
    return {
        "question_id": 7,
        "prompt": " <image> What? ",
        "text": " red ",
        "image": name,
        "sink_attn": sink,
        "grounding_attn_o2i": grounding,
    }


@pytest.mark.parametrize("turned", [False, True])
def test_padding_around_pictures_is_background(tmp_path: Path, turned: bool) -> None:
    """40 x 21 in a square of 40: rows 0 and 3 of 4 hold none of it. 21 x 40: columns 0 and 3."""
    images = tmp_path / "images"
    given = [on_a_grid(images, size, turned) for size in ((40, 21), (21, 40), (30, 30))]
    file = pickled(tmp_path, given)
    about = {"square": True, "max_pixels": 5}
    out = tmp_path / "out"
    convert_labels(file, out, images=images, config=PADDED, preprocessing=about)
    wide, high, square = load_labels(out)  # type: ignore[misc]
    row = [0, 1, IGNORED, 0]
    assert wide["labels"] == [0] * 4 + row + [0] * 4 + [0] * 4
    assert high["labels"] == [0] * 4 + row + [0] * 4 + [0] * 4
    # (0, 0) is in the picture, and the foreground itself; (1, 1) has exactly a fifth of it.
    assert square["labels"] == [1, 0, 0, 0, 0, IGNORED, *[0] * 10]
    assert [one["size"] for one in (wide, high, square)] == [[40, 21], [21, 40], [30, 30]]
    assert [one["extent"] for one in (wide, high, square)] == [
        [0, -9, 40, 31],
        [-9, 0, 31, 40],
        [0, 0, 30, 30],
    ]
    assert (wide["id"], wide["question"], wide["response"]) == ("7", "What?", "red")
    assert (wide["rows"], wide["columns"]) == (4, 4)
    settings = read_settings(out)
    assert (settings["image_tokens"], settings["square"], settings["max_pixels"]) == (None, True, 5)
    kept = {"images", "questions", "shards", "shard_size", "labels", "data", *about, "image_tokens"}
    assert set(json.loads((out / "settings.json").read_text())) == kept
    assert settings["images"] == str(images)


def test_without_labels_for_padding_sizes_are_not_read(tmp_path: Path) -> None:
    record = on_a_grid(tmp_path / "images", (40, 21))
    (tmp_path / "images" / record["image"]).unlink()
    for key in ("sink_attn", "grounding_attn_o2i"):
        record[key] = record[key].reshape(2, 8)
    for images in (None, tmp_path / "images"):
        out = tmp_path / f"out-{images is None}"
        convert_labels(pickled(tmp_path, [record]), out, images=images, preprocessing={})
        (row,) = load_labels(out)  # type: ignore[misc]
        assert (row["size"], row["extent"]) == ([], [])
        assert (row["rows"], row["columns"]) == (2, 8)


def test_sizes_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    images = tmp_path / "images"
    file = pickled(tmp_path, [on_a_grid(images, (40, 21)), on_a_grid(images, (21, 40))])
    message = (
        f"{file} labels the padding around pictures, which follows from their sizes: give the "
        "folder they are in with --images"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert_labels(file, tmp_path / "out", config=PADDED, preprocessing={})
    path = images / "21-False.png"
    for damage in (lambda: path.write_text("no picture"), path.unlink):
        damage()
        told = re.escape(f"{file}, record 1: the size of {path} cannot be read: ")
        with pytest.raises(ValueError, match=f"^{told}."):
            convert_labels(file, tmp_path / "out", images=images, config=PADDED, preprocessing={})


def test_grids_of_two_shapes_are_refused(tmp_path: Path) -> None:
    record = on_a_grid(tmp_path / "images", (40, 21))
    record["sink_attn"] = record["sink_attn"].reshape(2, 8)
    told = "record 0: maps must be two grids (rows, columns) of one shape, got (4, 4) and (2, 8)"
    with pytest.raises(ValueError, match=re.escape(told)):
        convert_labels(pickled(tmp_path, [record]), tmp_path / "out", preprocessing={})


# --- nothing is run ------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, ("{made}",), f"{os.mkdir.__module__}.mkdir"),
        (subprocess.getoutput, ("mkdir {made}",), r"(subprocess|commands).getoutput"),
        (builtins.eval, ("__import__('os').mkdir({made!r})",), r"(builtins|__builtin__).eval"),
        (np.load, ("{made}",), "numpy.load"),
        (np.array, ([1],), "numpy.array"),
        (collections.OrderedDict, (), "collections.OrderedDict"),
    ],
)
def test_other_globals_are_refused_by_name(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], name: str, protocol: int
) -> None:
    made = str(tmp_path / "made")
    filled = [a.format(made=made) if isinstance(a, str) else a for a in arguments]
    file = pickled(tmp_path, [*records()[:1], Calls(function, *filled)], protocol)
    with pytest.raises(ValueError, match=rf"labels.pkl is refused: it contains {name},"):
        convert_labels(file, tmp_path / "out")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_such_a_pickle_would_have_run(tmp_path: Path) -> None:
    file = pickled(tmp_path, Calls(os.mkdir, str(tmp_path / "made")))
    pickle.loads(file.read_bytes())
    assert (tmp_path / "made").exists()


def test_torch_tensors_are_refused_with_the_mend(tmp_path: Path) -> None:
    file = pickled(tmp_path, records(torch.tensor))
    with pytest.raises(ValueError, match=r"contains torch\S+, .*; save its torch tensors as numpy"):
        convert_labels(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}], dtype=object), "an array of 'O8'"),
        (np.array(["text"]), "an array of 'U4'"),
        (np.zeros(2, dtype="f4,i4"), "an array of 'V8'"),
        (np.zeros(2, dtype="M8[s]"), "an array of 'M8'"),
        (np.zeros(2, dtype="c8"), "an array of 'c8'"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        safe_pickle.load(pickled(tmp_path, array))


FLOAT = Calls(np.dtype, "f4")


class Built:
    """Pickles as a call, then a state set on what it gave."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any) -> None:
        self.made = function, arguments, state

    def __reduce__(self) -> Any:
        return self.made


def array_with(state: Any) -> Built:
    made = np.zeros(0).__reduce__()
    return Built(made[0], (np.ndarray, (0,), b"b"), state)


@pytest.mark.parametrize(
    "value",
    [
        array_with((1, (2,), FLOAT, False, b"1234")),  # too few bytes
        array_with((1, (-1,), FLOAT, False, b"1234")),
        array_with((1, (1 << 62,), FLOAT, False, b"1234")),
        array_with((1, [1], FLOAT, False, b"1234")),
        array_with((1, (1,), "f4", False, b"1234")),
        array_with((1, (1,), FLOAT, False, [1.0])),
        array_with((1, (1,), FLOAT)),
        array_with("state"),
        Calls(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b"b"),  # no state
        Calls(np.ndarray, (3,)),
        Built(np.dtype, ("f4", False, True), (3, "?", None)),
        Built(np.dtype, ("f4", False, True), "state"),
        Calls(np.dtype, 4),
        Calls(np.dtype, "no such type"),
        array_with((1, (1,), Calls(np.dtype, None), False, b"12345678")),  # numpy's float64
        array_with((1, (True,), FLOAT, False, b"1234")),
        array_with((1, (-1, -1), FLOAT, False, b"1234")),
        Built(np.dtype, ("f4", False, True), [3, "<", None]),
        Built(np.dtype, ("f4", False, True), (3,)),
        Calls(np.float32(0).__reduce__()[0], FLOAT),  # a number without its bytes
    ],
)
def test_arrays_of_unknown_make_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"labels.pkl is refused: it contains an? "):
        safe_pickle.load(pickled(tmp_path, [value]))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"c_codecs\nencode\n.", "function"),
        (b"cnumpy\ndtype\n.", "type"),
        (b"(cnumpy\ndtype\nl.", "type"),
        (b"\x80\x04\x8f(cnumpy\ndtype\n\x90.", "type"),
    ],
)
def test_what_is_no_value_does_not_come_out(tmp_path: Path, content: bytes, kind: str) -> None:
    """A pickle may name a function without having it called."""
    (tmp_path / "labels.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"is refused: it contains a {kind}, which is not"):
        safe_pickle.load(tmp_path / "labels.pkl")


@pytest.mark.parametrize(
    ("code", "order", "data", "expected"),
    [
        ("i2", "<", b"\1\2", 513),
        ("i2", ">", b"\1\2", 258),
        ("i2", "=", b"\1\2", 513 if sys.byteorder == "little" else 258),
        ("i1", "|", b"\3", 3),
    ],
)
def test_bytes_have_the_order_that_is_named(
    tmp_path: Path, code: str, order: str, data: bytes, expected: int
) -> None:
    kind = Built(np.dtype, (code, False, True), (3, order, None, None, None, -1, -1, 0))
    (found,) = safe_pickle.load(pickled(tmp_path, [array_with((1, (1,), kind, False, data))]))
    assert found.tolist() == [expected]


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    for value in (Calls(codecs.encode, "text", "utf-16"), Calls(codecs.encode, b"text", "latin1")):
        with pytest.raises(ValueError, match=r"contains text in an unusual encoding$"):
            safe_pickle.load(pickled(tmp_path, [value]))
    assert safe_pickle.load(pickled(tmp_path, Calls(codecs.encode, "\xe9", "latin1"))) == b"\xe9"


def test_an_array_s_flags_are_not_believed(tmp_path: Path) -> None:
    """numpy would take the last number as flags, and floats for pointers with the right ones."""
    flags = Built(np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63))
    (found,) = safe_pickle.load(pickled(tmp_path, [array_with((1, (1,), flags, False, b"\1" * 8))]))
    assert found.dtype == np.dtype("<f8")
    assert found.dtype.flags == np.dtype("<f8").flags


# --- broken files --------------------------------------------------------------------------------


def changed(**changes: Any) -> list[dict[str, Any]]:
    """Three records, the last of them changed; a value of None takes the key out."""
    good, last = records()[:2], records()[2] | changes
    return [*good, {key: value for key, value in last.items() if value is not None}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "must hold a list of records, got a dict"),
        ([], "must hold a list of records, got a list"),
        (
            ["text"],
            "record 0 must be a dict with question_id, prompt, text, image, sink_attn, "
            "grounding_attn_o2i, got a str$",
        ),
        (changed(sink_attn=None), "record 2 has no sink_attn; it has question_id"),
        (changed(image=None), "record 2 has no image"),
        (changed(sink_attn="text"), "record 2: sink_attn must be an array of numbers, got a str"),
        (changed(sink_attn=["a"]), "record 2: sink_attn must be a list of numbers"),
        (changed(sink_attn=np.zeros((24, 24))), r"one vector .*, got the shape \(24, 24\)$"),
        (
            changed(sink_attn=np.full(576, np.nan)),
            r"one vector of finite numbers, got the shape \(576,\) with NaN or infinity$",
        ),
        (
            changed(sink_attn=np.zeros(576, bool)),
            "must be an array of numbers, got an array of bool",
        ),
        (changed(sink_attn=np.zeros(100)), "record 2 has maps of 100 and 576 image tokens"),
        (changed(prompt=5), "record 2: prompt must be text, got a int"),
        (changed(text=5), "record 2: text must be text, got a int"),
        (changed(image=5), "record 2: image must be text, got a int"),
        (changed(question_id="\ud800"), "record 2: question_id has a lone surrogate"),
        (changed(text="a \udfff"), "record 2: text has a lone surrogate"),
        (
            changed(image="/data/gqa/1.jpg"),
            "record 2: image '/data/gqa/1.jpg' is not below an image",
        ),
        (changed(image="../1.jpg"), "record 2: image '../1.jpg' is not below"),
        ([records()[0] | {"sink_attn": np.zeros(7), "grounding_attn_o2i": np.zeros(7)}], "7 image"),
        (
            [records()[0] | {"sink_attn": np.zeros(0), "grounding_attn_o2i": np.zeros(0)}],
            "record 0: .*maps",
        ),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path: Path, value: Any, message: str) -> None:
    file = pickled(tmp_path, value)
    with pytest.raises(ValueError, match=message) as error:
        convert_labels(file, tmp_path / "out")
    assert str(file) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.pkl"]


def test_a_path_outside_the_image_folder_names_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = pickled(tmp_path, changed(image=str(tmp_path / "gqa" / "1.jpg")))
    with pytest.raises(
        ValueError, match=r"record 2: image '\.\./gqa/1\.jpg' is not below"
    ) as error:
        convert_labels(file, tmp_path / "out", images=tmp_path / "images")
    assert str(error.value).endswith(f" is not below {tmp_path / 'images'}")


def test_absolute_paths_below_the_image_folder(tmp_path: Path) -> None:
    file = pickled(tmp_path, changed(image=str(tmp_path / "gqa" / "1.jpg")))
    convert_labels(file, tmp_path / "out", images=tmp_path)
    assert load_labels(tmp_path / "out")["image"][2] == "gqa/1.jpg"


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_files_that_are_cut_off(tmp_path: Path, cut: int) -> None:
    file = pickled(tmp_path, records())
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"labels.pkl cannot be read as a pickle: \w") as error:
        safe_pickle.load(file)
    assert cut or str(error.value).endswith(": Ran out of input")


def test_a_list_in_itself(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="cannot be read as a pickle"):
        safe_pickle.load(pickled(tmp_path, endless))


# --- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    file, out = pickled(tmp_path, records()), tmp_path / "out"
    words = ["convert", "labels", str(file), "--out", str(out), "--size", "13b"]
    done = runner.invoke(app, [*words, "--images", str(tmp_path)])
    assert done.exit_code == 0, done.output
    kept = sum(bool((RECORD[f"{case}/labels"] != -100).any()) for case in CASES)
    assert f"{kept} of 20 questions gave labels" in done.output
    assert read_settings(out)["images"] == str(tmp_path.resolve())
    assert LabelConfig.from_dict(read_settings(out)["labels"]) == LABELS_13B


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.pkl", "--out", "{tmp}/out"], "there is no file nothing.pkl"),
        (["{file}", "--out", "{tmp}"], "is not empty: give a new folder"),
        (
            ["{file}", "--out", "{tmp}/out", "--size", "70b"],
            "--size must be 7b, 13b, qwen-3b, qwen-7b, got '70b'",
        ),
        (["{file}", "--out", "{tmp}/out", "--images", "/none"], "there is no folder /none"),
        (["{file}", "--out", "{tmp}/out"], "it contains subprocess.getoutput"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, words: list[str], message: str) -> None:
    file = pickled(tmp_path, Calls(subprocess.getoutput, "true"))
    filled = [word.format(tmp=tmp_path, file=file) for word in words]
    done = runner.invoke(app, ["convert", "labels", *filled])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
