"""Files that somebody made on purpose: no code runs, no path leaves its folder, nothing explodes.

Refusals by name of single settings stand beside what they belong to: test_llava.py, test_convert*,
test_labelling.py; hostile text in the page of a comparison in test_html.py.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdrpn.backbones.llava15 import Llava15
from sdrpn.cli import app
from sdrpn.config import LABELS_13B, LabelConfig, ZoomConfig
from sdrpn.convert import safe_pickle
from sdrpn.distill.head_search import load_label_config
from sdrpn.distill.label_dataset import (
    SETTINGS_FILE,
    LabelledImages,
    label_row,
    load_labels,
    shard_path,
    write_settings,
    write_shard,
)
from sdrpn.distill.pseudo_labels import IGNORED, NOT_FINITE, label_cells
from sdrpn.distill.questions import fingerprint, read_items
from sdrpn.distill.trainer import train
from sdrpn.engine import ZoomModel
from sdrpn.io.atomic import MAX_SETTINGS, parse_json, read_object
from sdrpn.io.images import BadImage, safe_join
from sdrpn.io.resumable import guard_settings
from sdrpn.roi.proposers import require_labels
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.demo import embedded_model, tiny_path
from sdrpn_eval.report.html import write_page
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import read_run
from tests.conftest import make_image
from tests.helpers.run_folders import record_line, sample, write_record, write_run
from tests.sdrpn.distill.test_trainer import arguments, samples
from tests.sdrpn.rpn.test_published import Hostile

ROOT = Path(__file__).parents[3]
runner = CliRunner()


# No code from a file


def calls() -> Iterator[tuple[Path, ast.Call, str]]:
    """Every call in what is shipped: (file, call, what is called, such as torch.load)."""
    for folder in ("sdrpn", "sdrpn_eval", "tasks", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT), node, ast.unparse(node.func)


def keywords(call: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def test_nothing_in_the_tree_unpickles_freely() -> None:
    loads = 0
    for path, call, name in calls():
        where = f"{path}:{call.lineno}: {ast.unparse(call)[:100]}"
        given = keywords(call)
        module, _, function = name.rpartition(".")
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
            loads += 1
        if module in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            assert function in ("dump", "dumps"), where
        if module in ("yaml", "ruamel.yaml"):
            assert function in ("safe_load", "safe_dump", "dump"), where
        assert name not in ("eval", "exec", "os.system", "np.load", "numpy.load"), where
        assert given.get("allow_pickle", "False") == "False", where
        assert given.get("trust_remote_code", "False") == "False", where
        assert given.get("shell", "False") == "False", where
    assert loads == 1, "the one in checkpoint.py, found by this very walk"


def test_the_one_unpickler_knows_only_arrays() -> None:
    """Who else imports pickle must be looked at; safe_pickle's own tests are in another file."""
    importers = set()
    for folder in ("sdrpn", "sdrpn_eval", "tasks", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if {"pickle", "dill", "cloudpickle", "joblib", "marshal"} & set(names):
                    importers.add(str(path.relative_to(ROOT)))
    assert importers <= {"sdrpn/convert/safe_pickle.py", "sdrpn/distill/trainer.py"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base model."""
    shutil.copytree(tiny_path(), tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "rpn")
    return tmp_path / "base"


def test_code_in_a_base_model_s_bin_is_not_run(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**weights, "more": Hostile(tmp_path / "run")}, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a file of tensors"):
        Llava15.load(str(base))
    assert not (tmp_path / "run").exists()


def test_code_beside_a_base_model_is_not_run(base: Path, tmp_path: Path) -> None:
    """auto_map names Python files that transformers would offer to run."""
    made = tmp_path / "run"
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(made)!r})\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((base / name).read_text())
        values["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        values |= {"processor_class": "Evil", "tokenizer_class": "Evil"} if "t" in name[:1] else {}
        (base / name).write_text(json.dumps(values))
    with suppress(OSError, ValueError):  # it may do without them, or refuse
        Llava15.load(str(base))
    assert not made.exists()


def test_code_in_a_training_checkpoint_is_not_run(base: Path, tmp_path: Path) -> None:
    """A begun --out from somebody else: the optimiser's state is a pickle."""
    llava = Llava15.load(str(base), dtype="float32")
    out = tmp_path / "out"
    train(llava, RPN.from_backbone(llava, 2, 3), samples(4), arguments(out, max_steps=2))
    step = out / "checkpoint-2"
    state = json.loads((step / "trainer_state.json").read_text())
    (step / "trainer_state.json").write_text(json.dumps(state | {"max_steps": 3}))
    torch.save({"state": Hostile(tmp_path / "run"), "param_groups": []}, step / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be read"):
        train(llava, RPN.from_backbone(llava, 2, 3), samples(4), arguments(out, max_steps=3))
    assert not (tmp_path / "run").exists()


# Paths


ESCAPES = ("../secret.png", "{secret}", "link/secret.png", "a/../../secret.png", "self", "a\0b")
"""Up, from the root, through a link, up again, a link to itself, and no path at all."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder with a link that leads out of it, to where a picture lies."""
    folder = tmp_path / "images"
    folder.mkdir()
    make_image(60, 40, 0).save(tmp_path / "secret.png")
    make_image(60, 40, 1).save(folder / "good.png")
    (folder / "link").symlink_to(tmp_path)
    (folder / "self").symlink_to(folder / "self")
    return folder


def escapes(root: Path) -> list[str]:
    return [name.format(secret=root.parent / "secret.png") for name in ESCAPES]


def test_no_name_leads_out_of_a_folder(root: Path) -> None:
    for name in escapes(root):
        with pytest.raises(BadImage):
            safe_join(root, name)
    assert safe_join(root, "good.png") == root / "good.png"
    (root / "fine").symlink_to(root / "good.png")
    assert safe_join(root, "fine") == root / "good.png"


def test_labelling_shows_no_image_from_elsewhere(root: Path, tmp_path: Path) -> None:
    lines = [{"image": name, "question": "what ?"} for name in [*escapes(root), "good.png"]]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["label", "--model", "tiny", "--data", str(tmp_path / "q.jsonl")]
    result = runner.invoke(app, [*words, "--images", str(root), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert "of the images could not be used" in " ".join(result.output.split())
    reasons = [row["reason"] or "" for row in load_labels(tmp_path / "out")]  # type: ignore[index]
    assert all(reason.startswith("image ") for reason in reasons[:-1])
    assert not reasons[-1].startswith("image ")


@pytest.mark.parametrize("bytes_", [None, b""])
def test_a_data_set_s_images_are_not_read_from_elsewhere(
    root: Path, tmp_path: Path, bytes_: bytes | None
) -> None:
    """A column of images may hold a path instead of bytes, and the path may be any."""
    features = Features({"image": Image(), "question": Value("string")})
    names = [*escapes(root)[:-1], "http://host/a.png", "good.png", ""]
    rows = [{"image": {"bytes": bytes_, "path": name}, "question": "what ?"} for name in names]
    table = Dataset.from_list(rows, features=features).with_format("arrow")[:]
    pyarrow.parquet.write_table(table, root / "d.parquet")
    items = read_items(str(root / "d.parquet"))
    for item, name in zip(items, names, strict=True):
        assert item.content is not None
        if name == "good.png":
            assert item.content() == (root / "good.png").read_bytes()
            continue
        with pytest.raises(BadImage, match="missing"):
            item.content()


def with_config(folder: Path, **change: Any) -> RPN:
    """The RPN of a folder with a config.json as the paper's authors write it."""
    config = {"model_type": "llava", "twig_K": 1, "twig_T": 1, "hidden_size": 16}
    config |= {"intermediate_size": 4, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
    config |= {"roi_multi_head": True}
    (folder / "config.json").write_text(json.dumps(config | change))
    return RPN.from_pretrained(folder)


def labels_of(folder: Path, names: list[str], **settings: Any) -> Path:
    """A finished folder of labels on these images."""
    folder.mkdir()
    cells = {name: np.zeros(16) for name in ("labels", "grounding", "sink")}
    rows = [label_row(str(i), name, "what ?", "that", **cells) for i, name in enumerate(names)]
    write_shard(rows, shard_path(folder, 0, 1))
    made = {"shards": 1, "image_tokens": 16, "labels": {"grounding": [], "sink": []}}
    made["labels"] |= {"vicrop_layer": 0}
    write_settings(folder, made | {"images": None} | settings)
    return folder


def test_training_reads_no_image_from_elsewhere(root: Path, tmp_path: Path) -> None:
    for i, name in enumerate(escapes(root)):
        folder = labels_of(tmp_path / f"labels-{i}", [name])
        with pytest.raises(ValueError, match=r"outside the image folder|not a path"):
            LabelledImages(load_labels(folder), root)
    assert len(LabelledImages(load_labels(labels_of(tmp_path / "good", ["good.png"])), root)) == 1
    gone = labels_of(tmp_path / "gone", ["gone.png", "good.png", "lost.png"])
    with pytest.raises(
        ValueError, match=r"2 of 3 images are not in .*\(gone.png, \.\.\.\): set --images"
    ):
        LabelledImages(load_labels(gone), root)


@pytest.mark.parametrize("file", ["../b.safetensors", "/etc/passwd", "..", "", 5, "a/b"])
def test_an_index_leads_to_no_other_folder(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "rpn"
    folder.mkdir()
    where = {f"model.twig_{n}.weight": file for n in ("norm", "layers.0.input_layernorm")}
    where |= {f"model.twig_layers.0.self_attn.{n}_proj.weight": file for n in "qk"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises((ValueError, FileNotFoundError), match=str(folder)):
        with_config(folder)


# JSON


DEEP, WIDE = "[" * 100_000, "1" * 5000
TEXTS = {
    "empty": b"",
    "cut": b'{"a": 1',
    "deep": DEEP.encode(),
    "deep object": b'{"a":' * 100_000,
    "huge number": b'{"a": ' + WIDE.encode() + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null",
    "text": b'"a"',
    "number": b"NaN",
    "list": b"[1, 2]",
    "infinite": b"-Infinity",
    "NULs": b"\0" * 100,
}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "settings": (SETTINGS_FILE, lambda p: load_labels(p.parent)),
    "claim": ("claim.json", lambda p: guard_settings(p, {"a": 1})),
    "conversations": ("q.json", lambda p: read_items(str(p))),
    "lines": ("q.jsonl", lambda p: read_items(str(p))),
    "heads": ("heads.json", load_label_config),
    "rpn": ("config.json", lambda p: RPN.from_pretrained(p.parent)),
    "index": ("model.safetensors.index.json", lambda p: with_config(p.parent)),
    "object": ("a.json", read_object),
    "base": ("config.json", lambda p: Llava15.load(str(p.parent))),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_settings_file_is_one_sentence(tmp_path: Path, reader: str, text: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(TEXTS[text])
    with pytest.raises((ValueError, OSError), match=str(tmp_path)) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_json_of_any_depth_is_parsed_or_refused() -> None:
    assert parse_json("[" * 500 + "]" * 500)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)


def test_a_gigantic_settings_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_SETTINGS + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"config\.json has 67,108,865 bytes, more than any"):
        RPN.from_pretrained(tmp_path)


def test_a_gigantic_line_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"image": "a", "question": "b"}\n' + " " * 200 + "\n")
    monkeypatch.setattr("sdrpn.distill.questions.MAX_LINE", 100)
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: it has more than 100 bytes"):
        read_items(str(path))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        5,
        "a",
        [],
        {"image": 5},
        {"image": ["a.png"]},
        {"image": "a.png", "conversations": None},
        {"image": "a.png", "conversations": "human"},
        {"image": "a.png", "conversations": {"from": "human", "value": "x"}},
        {"image": "a.png", "conversations": [5]},
        {"image": "a.png", "conversations": [{"from": "human"}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": 5}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "\ud800"}]},
        {"image": "\udfff", "conversations": [{"from": "human", "value": "x"}]},
        {"id": "\ud800", "image": "a", "conversations": [{"from": "human", "value": "x"}]},
    ],
)
def test_conversations_of_wrong_types_are_named(tmp_path: Path, entry: Any) -> None:
    """And skipped, where another entry is good."""
    path = tmp_path / "q.json"
    good = {"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}
    path.write_text(json.dumps([good, entry]))
    told: list[str] = []
    items = read_items(str(path), tell=told.append)
    assert [(item.image, item.question) for item in items] == [("a.png", "x")]
    assert len(fingerprint(items)) == 32
    (said,) = told
    assert said.startswith(
        f"1 of 2 entries of {path} is skipped: {path}, entry 1: expected LLaVA's"
    )
    assert "\n" not in said
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"q\.json, entry 0: expected LLaVA's"):
        read_items(str(path))


@pytest.mark.parametrize(
    "row", [{"question": None}, {"question": ""}, {"image": None}, {"image": ""}]
)
def test_rows_of_a_data_set_without_text_are_named(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"image": "a.png", "question": "x"}
    features = Features({"image": Value("string"), "question": Value("string")})
    Dataset.from_list([good, good | row], features=features).to_parquet(tmp_path / "d.parquet")
    told: list[str] = []
    assert len(read_items(str(tmp_path / "d.parquet"), tell=told.append)) == 1
    assert "1 of 2 entries of" in told[0]
    (name,) = row
    assert f"d.parquet, row 1: the {name} must be text, got {row[name]!r}" in told[0]
    Dataset.from_list([good | row], features=features).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet, row 0: the \w+ must be text, got"):
        read_items(str(tmp_path / "d.parquet"))


# Settings and weights that explode, or mean nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "tensors are too few for 1000000000 layers"),
        ({"depth": "3"}, "depth must be int, got '3'"),
        ({"depth": True}, "depth must be int, got 'True'"),
        ({"hidden_size": 10**20}, "weights and config disagree"),
        ({"hidden_size": -128}, "sizes must be 1 or more"),
        ({"num_attention_heads": 0}, "sizes must be 1 or more"),
        ({"num_attention_heads": 3}, "hidden_size 128 must be a multiple of 3 heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be float, got 'nan'"),
        ({"num_attention_heads": 128, "num_key_value_heads": 1}, "heads of 1 channels cannot be"),
        ({"image_tokens": 0}, "sizes must be 1 or more"),
        ({"zoom": []}, "ZoomConfig must be an object, got a list"),
        ({"zoom": {"threshold": "high"}}, "threshold must be float, got 'high'"),
        ({"zoom": {"crop_tokens": 2.5}}, "crop_tokens must be int or null"),
        ({"labels": {"grounding": 3}}, "'sink' is missing"),
        ({"labels": 3}, "LabelConfig must be an object"),
        ({"facts": [1]}, "facts must be an object"),
        ({"base_model": {"a": 1}}, "base_model must be str"),
    ],
)
def test_settings_of_an_rpn_that_make_no_sense(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, rpn = embedded_model()
    shutil.copytree(rpn, tmp_path / "rpn")
    path = tmp_path / "rpn" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        RPN.from_pretrained(tmp_path / "rpn")
    assert str(tmp_path / "rpn") in str(error.value)


@pytest.mark.parametrize("key", ["twig_K", "twig_T"])
def test_no_table_of_a_billion_layers_is_built(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} in config.json must be 1 to 1000, got 1000000"):
        with_config(tmp_path, **{key: 10**9})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"num_hidden_layers": 10**9}, "must be a number up to 1000"),
        ("vision_config", {"num_hidden_layers": 10**9}, "must be a number up to 1000"),
        ("text_config", {"num_hidden_layers": "6"}, "must be a number up to 1000, got '6'"),
        ("text_config", {"vocab_size": 10**9}, "more than its weights files of .* bytes can hold"),
        ("text_config", {"hidden_size": "x"}, "cannot load"),
        ("text_config", {"num_hidden_layers": 7}, r"lacks model.language_model.layers.6\S+ and 8"),
        ("text_config", {"intermediate_size": 344}, r"has the shape \[\d+, \d+\], but its config"),
    ],
)
def test_a_base_model_s_settings_that_its_weights_belie(
    base: Path, part: str, change: dict[str, Any], message: str
) -> None:
    """transformers would make up what is missing, random numbers, and answer with them."""
    values = json.loads((base / "config.json").read_text())
    values[part] |= change
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        Llava15.load(str(base))
    assert str(base) in str(error.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "cannot be read as safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "[Hh]eader ?[Tt]oo ?[Ll]arge"),
        (struct.pack("<Q", 1 << 40) + b"{}", "[Hh]eader ?[Tt]oo ?[Ll]arge"),
        (struct.pack("<Q", 90 << 20) + b"{}", "cannot be read as safetensors"),
        (struct.pack("<Q", 2) + b"[]", "cannot be read as safetensors"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "cannot be read as safetensors"),
        (struct.pack("<Q", 0), "cannot be read as safetensors"),
    ],
)
def test_a_header_that_lies_about_its_length(
    base: Path, tmp_path: Path, head: bytes, message: str
) -> None:
    _, rpn = embedded_model()
    shutil.copytree(rpn, tmp_path / "rpn")
    (tmp_path / "rpn" / "rpn.safetensors").write_bytes(head)
    (base / "model.safetensors").write_bytes(head)
    with pytest.raises(ValueError, match=rf"rpn\.safetensors .*{message}|{message}"):
        RPN.from_pretrained(tmp_path / "rpn")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        Llava15.load(str(base))


def test_a_tensor_that_claims_more_than_there_is(tmp_path: Path) -> None:
    """Offsets beyond the file, overlapping, or a shape of more numbers than bytes."""
    _, rpn = embedded_model()
    shutil.copytree(rpn, tmp_path / "rpn")
    for shape, offsets in (
        ([1 << 40], [0, 1 << 42]),
        ([2**62, 2**62], [0, 8]),
        ([2], [0, 4]),
        ([2], [4, 0]),
        ([-2], [0, 8]),
    ):
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        header = json.dumps({"q_proj.weight": tensor}).encode()
        content = struct.pack("<Q", len(header)) + header + b"\0" * 8
        (tmp_path / "rpn" / "rpn.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"rpn\.safetensors cannot be read as safetensors"):
            RPN.from_pretrained(tmp_path / "rpn")


# Labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 10**9}, "shards must be 1 to 99999"),
        ({"shards": 0}, "shards must be 1 to 99999"),
        ({"shards": "1"}, "shards must be int, got '1'"),
        ({"shards": True}, "shards must be int, got True"),
        ({"image_tokens": "16"}, "image_tokens must be int or null, got '16'"),
        ({"image_tokens": -16}, "image_tokens 1 or more"),
        ({"labels": []}, "labels must be dict"),
        ({"images": 5}, "images must be a folder or null"),
        ({"image_tokens": 64}, "has rows of 16 values, not 64"),
    ],
)
def test_settings_of_labels_that_make_no_sense(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = labels_of(tmp_path / "labels", ["good.png"], **change)
    with pytest.raises(ValueError, match=message) as error:
        load_labels(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("labels", [[1] * 15], "labels has rows of 15 values, not 16"),
        ("labels", [[1] * 17], "labels has rows of 17 values, not 16"),
        ("labels", [[]], "a row has neither labels nor a reason"),
        ("labels", [[5] + [1] * 15], "other values than 1, 0 and -100"),
        ("labels", [None], "labels has rows without a value"),
        ("labels", [[None] * 16], "other values than 1, 0 and -100"),
        ("labels", [[1000] * 16], "cannot be read"),
        ("labels", ["text"], "cannot be read"),
        ("image", [None], "image has rows without a value"),
        ("question", [None], "question has rows without a value"),
        ("foreground", [None], "foreground has rows without a value"),
        ("grounding", [[0.5] * 4], "grounding has rows of 4 values"),
    ],
)
def test_rows_that_no_labelling_writes(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    folder = labels_of(tmp_path / "labels", ["good.png"])
    path = shard_path(folder, 0, 1)
    table = pyarrow.parquet.read_table(path)
    other = pyarrow.array(values)
    pyarrow.parquet.write_table(
        table.set_column(table.column_names.index(column), column, other), path
    )
    with pytest.raises(ValueError, match=message) as error:
        load_labels(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_make_no_labels(value: float) -> None:
    good = np.full((4, 4), 0.1)
    bad = good.copy()
    bad[0, 3] = value
    for pair in ((good, bad), (bad, good)):
        labels, reason = label_cells(*pair, LABELS_13B)
        assert reason == NOT_FINITE
        assert (labels == IGNORED).all()


# NaN in weights


def test_nan_in_a_base_model_is_named(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.2.mlp.up_proj.weight"))
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = {**weights, name: weights[name].clone()}
        broken[name][3, 5] = value
        save_file(broken, base / "model.safetensors", metadata={"format": "pt"})
        said = r"base: model\.language_model\.layers\.2\.mlp\.up_proj\.weight holds values that are"
        with pytest.raises(ValueError, match=said):
            Llava15.load(str(base))


def test_nan_in_an_rpn_is_named_and_none_is_saved(tmp_path: Path, llava: Llava15) -> None:
    rpn = RPN.from_backbone(llava, 2, 3)
    rpn.save_pretrained(tmp_path / "rpn")
    before = (tmp_path / "rpn" / "rpn.safetensors").read_bytes()
    with torch.no_grad():
        rpn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"k_proj\.weight holds .* lower learning rate"):
        rpn.save_pretrained(tmp_path / "rpn")
    assert (tmp_path / "rpn" / "rpn.safetensors").read_bytes() == before
    save_file(rpn.state_dict(), tmp_path / "rpn" / "rpn.safetensors")
    with pytest.raises(ValueError, match=r"rpn: k_proj\.weight holds values that are not finite"):
        RPN.from_pretrained(tmp_path / "rpn")


def test_heads_of_another_model_are_refused(llava: Llava15) -> None:
    zoom = ZoomModel(llava, proposer="none", labels=LABELS_13B)
    with pytest.raises(ValueError, match="these heads were found for another model"):
        require_labels(zoom.models)


@pytest.mark.parametrize(
    "value",
    [
        {"layer": -1, "heads": [0]},
        {"layer": 0, "heads": [-1]},
        {"layer": 0, "heads": ["0"]},
        {"layer": 0, "heads": "012"},
        {"layer": 0, "heads": 5},
        {"layer": 0.0, "heads": [0]},
        {"layer": True, "heads": [0]},
        {"layer": 0, "heads": [0], "more": 1},
        5,
    ],
)
def test_heads_that_make_no_sense(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        LabelConfig.from_dict({"grounding": [value], "sink": [], "vicrop_layer": 0})


@pytest.mark.parametrize("text", ["threshold=none", "token_budget=nan", "min_cells=none", "a", "="])
def test_zoom_settings_that_make_no_sense(text: str) -> None:
    """threshold=none, found by fuzzing, was a TypeError."""
    with pytest.raises(ValueError, match=r"zoom settings|unknown key"):
        ZoomConfig.from_text(text)


# The page of a comparison


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\u2028"


def test_hostile_answers_names_and_paths_stay_text(tmp_path: Path) -> None:
    """Beside what test_html.py tries: answers, names of runs, tasks and metrics, arguments."""
    task, runs = "<img src=x onerror=alert(1)>", []
    for i, name in enumerate(("<img src=y>", "'\"><script>alert(1)<")):
        rows = [sample(k, HOSTILE if k == i else "red", HOSTILE) for k in range(3)]
        for row in rows:
            row["<img src=z>"] = row["accuracy"]
        totals = {task: {"<img src=z>,none": 1 / 3, "accuracy,none": 1 / 3}}
        args = "pretrained=<img src=a>,record=<script>"
        folder = write_run(tmp_path / name, {task: rows}, totals, model_args=args)
        lines = [record_line(k, rows[k]["filtered_resps"], task=task) for k in range(3)]
        write_record(folder, [line | {"no_zoom": HOSTILE} for line in lines])
        runs.append(read_run(folder))
    page = tmp_path / "page.html"
    write_page(compare(runs), {}, page, notes=[HOSTILE])
    html = page.read_text()
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html
    assert "&lt;img src=y&gt;" in html or "\\u003cimg src=y" in html


def test_pickles_bound_what_they_repeat(tmp_path: Path) -> None:
    """Lists of lists of the same list: small in the file, and small once read."""
    value: Any = ["x"]
    for _ in range(60):
        value = [value] * 10
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    found = safe_pickle.load(tmp_path / "a.pkl")
    assert found[0] is found[9]
