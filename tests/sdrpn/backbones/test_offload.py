"""Weights on disk or on the CPU, by accelerate's device_map: everything answers as in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdrpn.backbones.fingerprint import base_hash, weights_hash
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import PixelBox
from sdrpn.config import LabelConfig, LayerHeads, ZoomConfig
from sdrpn.engine import Question, ZoomModel
from sdrpn.rpn.checkpoint import RPN
from tests.conftest import BRANCH_LAYER, DEPTH, QUESTIONS, make_rpn

LABELS = LabelConfig((LayerHeads(3, (0, 2)),), (LayerHeads(1),), 3, sink_threshold=0.5)
PARTS = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model.embed_tokens",
    *[f"model.language_model.layers.{i}" for i in range(6)],
    "model.language_model.norm",
    "model.language_model.rotary_emb",
    "lm_head",
]
MAPS = {
    "tower": ["model.vision_tower"],
    "projector": ["model.multi_modal_projector"],
    "embeddings": ["model.language_model.embed_tokens"],
    "first layers": PARTS[3:6],
    "last layers": PARTS[6:9],
    "norm": ["model.language_model.norm"],
    "head": ["lm_head"],
    "all": PARTS,
}


def device_map(on_disk: list[str]) -> dict[str, str]:
    return {part: "disk" if part in on_disk else "cpu" for part in PARTS}


@pytest.fixture(scope="module")
def folder(llava: Llava15, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("offload")
    llava.model.save_pretrained(path)
    llava.processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=MAPS)
def offloaded(folder: str, request: pytest.FixtureRequest) -> Llava15:
    loaded = Llava15.load(folder, dtype="float32", device_map=device_map(MAPS[request.param]))
    meta = [name for name, weight in loaded.model.named_parameters() if weight.is_meta]
    assert meta, "nothing is offloaded"
    assert all(any(name.startswith(part) for part in MAPS[request.param]) for name in meta)
    return loaded


@pytest.mark.parametrize(
    "proposer",
    ["rpn", "none", *(pytest.param(n, marks=pytest.mark.slow) for n in ("attention", "vicrop"))],
)
def test_answers_are_those_of_a_model_in_memory(
    llava: Llava15,
    offloaded: Llava15,
    perturbed_rpn: RPN,
    images: list[Image.Image],
    tmp_path: Path,
    proposer: str,
) -> None:
    """Zoomed by every proposer, by a given box, and on prompts of no image and several."""
    perturbed_rpn.save_pretrained(tmp_path)
    zoom = ZoomConfig(0.1, "strongest", min_cells=1, max_cells_fraction=1)
    engines = [
        ZoomModel(one, RPN.from_pretrained(tmp_path), proposer=proposer, zoom=zoom, labels=LABELS)
        for one in (llava, offloaded)
    ]
    asked = [Question(text, (image,)) for image in images[:3] for text in QUESTIONS[:2]]
    asked += [Question("yellow", (images[0],), PixelBox(5, 5, 60, 50))]
    asked += [Question("yellow"), Question("yellow", tuple(images[:2]))]
    expected, found = (engine.ask_batch(asked, {"max_new_tokens": 4}) for engine in engines)
    assert [(a.text, a.regions, a.reason) for a in found] == [
        (a.text, a.regions, a.reason) for a in expected
    ]
    if proposer != "none":
        assert any(answer.regions for answer in found[:6])
    losses = [engine.loss_batch(asked, ["red disc"] * len(asked)) for engine in engines]
    for (loss, greedy, _), (other, as_greedy, _) in zip(*losses, strict=True):
        assert loss == pytest.approx(other, abs=1e-5)
        assert greedy == as_greedy


def test_devices_are_those_that_compute(offloaded: Llava15) -> None:
    assert offloaded.device == torch.device("cpu")
    assert offloaded.embed([1, 2]).device == torch.device("cpu")
    assert offloaded.dtype == torch.float32


def test_an_rpn_is_copied_from_weights_on_disk(llava: Llava15, offloaded: Llava15) -> None:
    found = RPN.from_backbone(offloaded, BRANCH_LAYER, DEPTH)
    expected = RPN.from_backbone(llava, BRANCH_LAYER, DEPTH)
    assert found.config.base_hash == expected.config.base_hash != ""
    weights = dict(found.named_parameters())
    assert all(torch.equal(weights[name], w) for name, w in expected.named_parameters())


def test_hashes_are_those_of_a_model_in_memory(llava: Llava15, offloaded: Llava15) -> None:
    assert base_hash(offloaded, 6) == base_hash(llava, 6) != ""
    assert weights_hash([offloaded.model]) == weights_hash([llava.model]) != ""


def test_an_rpn_of_another_base_is_noticed_from_disk(
    folder: str, perturbed_rpn: RPN, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tensors = load_file(Path(folder) / "model.safetensors")
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = {name: -t if "layers.0.mlp" in name else t for name, t in tensors.items()}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Llava15.load(str(tmp_path), dtype="float32", device_map=device_map(PARTS))
    ZoomModel(loaded, make_rpn(loaded, perturbed=False))
    assert "was trained on" not in caplog.text
    ZoomModel(loaded, perturbed_rpn)
    assert "was trained on" in caplog.text


@pytest.mark.parametrize(
    "name", ["vision_tower", "embed_tokens.weight", "layers.5.mlp", "lm_head.weight"]
)
def test_broken_weights_on_disk_are_found(folder: str, tmp_path: Path, name: str) -> None:
    tensors = load_file(Path(folder) / "model.safetensors")
    broken = next(key for key in tensors if name in key)
    tensors[broken].view(-1)[3] = float("nan")
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds values that are not finite"):
        Llava15.load(str(tmp_path), dtype="float32", device_map=device_map(PARTS))


def test_pickled_weights_are_offloaded_to_a_folder(
    llava: Llava15, folder: str, images: list[Image.Image], tmp_path: Path
) -> None:
    source = tmp_path / "pickled"
    source.mkdir()
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(Path(folder) / "model.safetensors"), source / "pytorch_model.bin")
    loaded = ZoomModel.from_pretrained(
        str(source),
        proposer="none",
        dtype="float32",
        device_map=device_map(PARTS[:4]),
        offload_folder=str(tmp_path / "offload"),
    )
    assert any((tmp_path / "offload").iterdir())
    found = loaded.ask(images[1], QUESTIONS[0], max_new_tokens=4)
    expected = ZoomModel(llava, proposer="none").ask(images[1], QUESTIONS[0], max_new_tokens=4)
    assert found.text == expected.text


def test_half_precision_is_chosen_by_the_device_that_computes(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of `cpu` and `disk` alone computes on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Llava15.load(folder, device_map=device_map(PARTS[:1])).dtype == torch.float32


def test_maps_match_exactly(
    llava: Llava15, offloaded: Llava15, perturbed_rpn: RPN, images: list[Image.Image]
) -> None:
    found, expected = (
        ZoomModel(one, perturbed_rpn).ask(images[1], QUESTIONS[0], max_new_tokens=1).roi_map
        for one in (offloaded, llava)
    )
    assert found is not None
    assert expected is not None
    assert np.abs(found - expected).max() < 1e-5
