"""Fuzzes what reads questions, labels and checkpoints: sound values, or a sentence with the file.

python -m fuzz.labels --minutes 10
"""

from __future__ import annotations

import json
import pickle
import resource
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from fuzz.harness import JSON, ODD_TEXTS, cut, harmed, holds, main, refused
from sdrpn.config import LABELS_7B, RPNConfig
from sdrpn.convert import safe_pickle
from sdrpn.convert.labels import convert_labels
from sdrpn.distill.head_search import load_label_config
from sdrpn.distill.label_dataset import (
    SETTINGS_FILE,
    LabelledImages,
    image_root,
    label_row,
    load_labels,
    read_label_config,
    shard_path,
    summarise,
    write_shard,
)
from sdrpn.distill.questions import fingerprint, read_items
from sdrpn.distill.trainer import last_checkpoint
from sdrpn.io.images import BadImage, safe_join
from sdrpn.rpn.checkpoint import RPN

TOKENS = 16
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-labels-"))
MEMORY = 12 << 30
"""Bytes that no input may make this process exceed."""

TURNS = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "that"}]
CONVERSATIONS = [{"id": i, "image": f"a/{i}.png", "conversations": TURNS} for i in range(3)]
LINES = [{"id": str(i), "image": f"{i}.png", "question": "what ?"} for i in range(3)]


def check_items(path: Path) -> None:
    try:
        items = read_items(str(path))
    except ValueError as error:
        refused(error, str(path))
        return
    assert items
    for item in items:
        for text in (item.id, item.image, item.question):
            assert isinstance(text, str)
            assert text
        with suppress(BadImage):
            assert safe_join(FOLDER, item.image).is_relative_to(FOLDER)
    assert len(fingerprint(items)) == 32


@holds(content=harmed(CONVERSATIONS))
def conversations(content: bytes) -> None:
    path = FOLDER / "q.json"
    path.write_bytes(content)
    check_items(path)


@holds(lines=st.lists(st.sampled_from(LINES).flatmap(harmed), max_size=3), mixed=st.booleans())
def json_lines(lines: list[bytes], mixed: bool) -> None:
    path = FOLDER / "q.jsonl"
    path.write_bytes((b"\r\n" if mixed else b"\n").join(lines))
    check_items(path)


def _shard(folder: Path) -> bytes:
    rng = np.random.default_rng(0)
    rows = [label_row("gone", "gone.png", "?", reason="image missing")]
    for i in range(4):
        maps = {name: rng.random(TOKENS) for name in ("grounding", "sink")}
        cells = rng.choice([1, 0, -100], TOKENS)
        rows.append(label_row(str(i), f"{i}.png", "what ?", "that", labels=cells, **maps))
    write_shard(rows, shard_path(folder, 0, 1))
    return shard_path(folder, 0, 1).read_bytes()


LABELS = FOLDER / "labels"
LABELS.mkdir()
SHARD = _shard(LABELS)
SETTINGS = {"images": None, "questions": 5, "shards": 1, "shard_size": 512, "side": 336}
SETTINGS |= {"image_tokens": TOKENS, "padding": "pad", "labels": asdict(LABELS_7B)}


def check_labels() -> None:
    """Rows that training can use, or a sentence that names the folder."""
    try:
        rows = load_labels(LABELS)
        config = read_label_config(LABELS)
        root = image_root(LABELS)
    except ValueError as error:
        refused(error, str(LABELS))
        return
    assert config.grounding is not None
    tokens = json.loads((LABELS / SETTINGS_FILE).read_text())["image_tokens"]
    found = summarise(rows)
    assert found["questions"] == len(rows)
    for row in rows:
        if row["reason"] is None:  # type: ignore[index]
            assert len(row["labels"]) == tokens  # type: ignore[index]
            assert {1, 0, -100}.issuperset(row["labels"])  # type: ignore[index]
    try:
        LabelledImages(rows, root)
    except ValueError as error:
        refused(error)


@holds(content=harmed(SETTINGS))
def label_settings(content: bytes) -> None:
    (LABELS / SETTINGS_FILE).write_bytes(content)
    shard_path(LABELS, 0, 1).write_bytes(SHARD)
    check_labels()


@holds(content=cut(SHARD, most=4))
def label_shards(content: bytes) -> None:
    (LABELS / SETTINGS_FILE).write_text(json.dumps(SETTINGS))
    shard_path(LABELS, 0, 1).write_bytes(content)
    check_labels()


RECORDS = [
    {
        "question_id": str(i),
        "prompt": "<image>\nwhat ?",
        "text": "that",
        "image": f"a/{i}.jpg",
        "sink_attn": np.linspace(0, 0.01, 16, dtype=np.float32),
        "grounding_attn_o2i": np.linspace(0, 0.01, 16, dtype=np.float32),
    }
    for i in range(2)
]
PICKLES = [pickle.dumps(RECORDS, protocol) for protocol in range(6)]


@holds(content=st.sampled_from(PICKLES).flatmap(lambda p: cut(p, most=3)))
def pickles(content: bytes) -> None:
    """Plain values or a refusal, and nothing run."""
    path = FOLDER / "labels.pkl"
    path.write_bytes(content)
    try:
        value = safe_pickle.load(path)
    except ValueError as error:
        refused(error, str(path))
        return
    assert isinstance(
        value, dict | list | tuple | str | bytes | bytearray | int | float | bool | np.ndarray
        | np.generic | set | frozenset | type(None)
    )  # fmt: skip


@holds(values=st.lists(st.dictionaries(st.sampled_from([*RECORDS[0], "more"]), JSON), max_size=2))
def records(values: list[dict[str, Any]]) -> None:
    """Records of any kind beside good ones."""
    path = FOLDER / "records.pkl"
    path.write_bytes(pickle.dumps([*RECORDS[:1], *({**RECORDS[1], **v} for v in values)]))
    out = Path(tempfile.mkdtemp(dir=FOLDER)) / "out"
    try:
        convert_labels(path, out)
    except ValueError as error:
        refused(error, str(path))
        assert not out.exists()


@holds(content=harmed(asdict(LABELS_7B)))
def head_lists(content: bytes) -> None:
    path = FOLDER / "heads.json"
    path.write_bytes(content)
    try:
        config = load_label_config(path)
    except ValueError as error:
        refused(error, str(path))
        return
    for one in (*config.grounding, *config.sink):
        assert type(one.layer) is int
        assert one.heads is None or all(type(head) is int for head in one.heads)
    assert LABELS_7B.from_dict(json.loads(json.dumps(asdict(config)))) == config


CONFIG = RPNConfig(16, 24, 2, 1, 1e-5, TOKENS, branch_layer=1, depth=2, labels=LABELS_7B)
WEIGHTS = save({name: torch.ones_like(t) for name, t in RPN(CONFIG).state_dict().items()})
RPN_FOLDER = FOLDER / "rpn"
RPN_FOLDER.mkdir()


def check_rpn() -> None:
    try:
        rpn = RPN.from_pretrained(RPN_FOLDER)
    except (ValueError, FileNotFoundError) as error:
        refused(error, str(RPN_FOLDER))
        return
    assert all(torch.isfinite(weight).all() for weight in rpn.parameters())
    assert not any(weight.requires_grad or weight.is_meta for weight in rpn.parameters())


@holds(content=harmed(CONFIG.to_dict() | {"facts": {}}))
def rpn_configs(content: bytes) -> None:
    (RPN_FOLDER / "config.json").write_bytes(content)
    (RPN_FOLDER / "rpn.safetensors").write_bytes(WEIGHTS)
    check_rpn()


@holds(content=cut(WEIGHTS, most=3), length=st.none() | st.integers(0, 2**64 - 1))
def rpn_weights(content: bytes, length: int | None) -> None:
    """length: what the file claims of its header."""
    (RPN_FOLDER / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    if length is not None:
        content = length.to_bytes(8, "little") + content[8:]
    (RPN_FOLDER / "rpn.safetensors").write_bytes(content)
    check_rpn()


STATE = {"global_step": 3, "max_steps": 3, "log_history": [], "epoch": 1.0}


@holds(
    names=st.lists(
        st.sampled_from(["checkpoint-3", "checkpoint-x", "checkpoint-", "checkpoint-1"])
    ),
    state=harmed(STATE) | ODD_TEXTS,
    weights=cut(WEIGHTS),
)  # fmt: skip
def checkpoints(names: list[str], state: bytes, weights: bytes) -> None:
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    for name in set(names):
        (folder / name).mkdir()
        (folder / name / "trainer_state.json").write_bytes(state)
        (folder / name / "model.safetensors").write_bytes(weights)
    last, broken = last_checkpoint(folder)
    assert {last, *broken} - {None} <= set(folder.iterdir())


PROPERTIES = (
    conversations,
    json_lines,
    label_settings,
    label_shards,
    pickles,
    records,
    head_lists,
    rpn_configs,
    rpn_weights,
    checkpoints,
)

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    main(PROPERTIES, __doc__ or "")
