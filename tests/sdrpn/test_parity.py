"""The numbers recorded from the authors' own code, on their tiny random model, in float32.

`data/parity/README.md` says what is recorded; `SDRPN_PARITY=DIR` tests against another record. One
thing differs on purpose: the authors' code grows components of two or three cells lopsidedly, ours
around the component. Where a case's crop is such a grown box, its recorded crop tokens show another
crop than ours; there the recorded tokens are put in front of the question, so that everything
behind the crop is compared.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from sdrpn.backbones.base import CropTokens
from sdrpn.backbones.llava15 import Llava15
from sdrpn.boxes import GridBox
from sdrpn.config import LABELS_7B, ZoomConfig
from sdrpn.convert.labels import convert_labels
from sdrpn.distill.label_dataset import load_labels
from sdrpn.distill.pseudo_labels import pseudo_labels
from sdrpn.distill.trainer import RPNForTraining
from sdrpn.engine import ZoomModel
from sdrpn.inference.generation import generate
from sdrpn.roi.crops import crop_tokens
from sdrpn.roi.postprocess import components
from sdrpn.roi.proposers import Look, roi_logits
from tests.helpers import parity
from tests.helpers.parity import POLICIES, Case

TOLERANCE = 1e-4
RECORD = parity.Record(parity.DATA)
KEYS = RECORD.keys
AT_THRESHOLDS = [(key, k) for key in KEYS for k in range(len(RECORD.thresholds(key)))]


@pytest.fixture(scope="module")
def llava() -> Llava15:
    return RECORD.load_llava()


@pytest.fixture(scope="module")
def engine(llava: Llava15) -> ZoomModel:
    return ZoomModel(llava, RECORD.load_rpn())


@pytest.fixture(scope="module")
def record() -> Any:
    return RECORD.outputs


@pytest.fixture(scope="module")
def looked(engine: ZoomModel) -> dict[str, Case]:
    """Every case read and looked at once."""
    return RECORD.look(engine)


def first_logits(llava: Llava15, case: Case, crop: torch.Tensor | None) -> np.ndarray:
    """Logits of the first answer token, as generate() meets them."""
    seen: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    settings = {"max_new_tokens": 1, "logits_processor": LogitsProcessorList([keep])}
    crops = [] if crop is None else [CropTokens(crop, 1, len(crop))]
    suffix = llava.suffix_segment(case.prefix.next_position, case.words, crops)
    generate(llava, [case.prefix], [suffix], settings)
    return seen[0][0].numpy()


def own_crop(llava: Llava15, case: Case, policy: str) -> torch.Tensor | None:
    region = case.proposals[policy].region
    (crops,) = crop_tokens(llava, [case.image], [region], [case.zoom(policy)], [10_000])
    return torch.cat([crop.tokens for crop in crops]) if crops else None


def recorded_crop(llava: Llava15, record: Any, key: str, policy: str) -> torch.Tensor | None:
    """The crop tokens that the authors' code inserted, behind the projector."""
    tokens = record[f"{key}/{policy}/crop_tokens"]
    with torch.no_grad():
        projected = llava.model.model.multi_modal_projector(torch.tensor(tokens))
    return projected if len(tokens) else None


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    """Recorded logits hold -inf where the authors' settings forbade a token: left out."""
    finite = np.isfinite(expected)
    assert found.shape == expected.shape
    assert finite.any()
    assert np.abs(found - expected)[finite].max() < TOLERANCE


# --- maps and boxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_roi_logits(
    engine: ZoomModel, llava: Llava15, looked: dict[str, Case], record: Any, key: str
) -> None:
    case = looked[key]
    look = Look(case.prefix, llava.image_grid(case.image), case.words, engine.zoom)
    (found,) = roi_logits(engine.models, [look])
    assert np.abs(found - record[f"{key}/pred_roi"]).max() < TOLERANCE


@pytest.mark.parametrize("key", KEYS)
def test_blurred_maps(looked: dict[str, Case], record: Any, key: str) -> None:
    found = looked[key].proposals["mask"].roi_map
    assert found is not None
    assert np.abs(found - record[f"{key}/blurred"]).max() < TOLERANCE


@pytest.mark.parametrize(("key", "threshold"), AT_THRESHOLDS)
def test_boxes_in_cells(looked: dict[str, Case], record: Any, key: str, threshold: int) -> None:
    """From our own maps: exactly, but for the grown ones, which hold their component."""
    zoom = ZoomConfig(threshold=RECORD.thresholds(key)[threshold])
    blurred = looked[key].proposals["mask"].roi_map
    assert blurred is not None
    found = components(blurred > zoom.threshold, zoom)
    expected = record[f"{key}/boxes_grid/{threshold}"].reshape(-1, 4).tolist()
    assert len(found) == len(expected)
    for (box, cells), theirs in zip(found, expected, strict=True):
        if cells.sum() >= parity.SMALLEST_WHOLE:
            assert list(box) == theirs
        else:
            rows, columns = np.nonzero(cells)
            height, width = cells.shape
            assert 0 <= box.x0 <= columns.min() <= columns.max() < box.x1 <= width
            assert 0 <= box.y0 <= rows.min() <= rows.max() < box.y1 <= height
            assert (box.x1 - box.x0, box.y1 - box.y0) == (3, 3)


@pytest.mark.parametrize(("key", "threshold"), AT_THRESHOLDS)
def test_boxes_in_pixels(
    llava: Llava15, looked: dict[str, Case], record: Any, key: str, threshold: int
) -> None:
    """From the recorded cells: every one exactly, however it was grown."""
    view = llava.image_grid(looked[key].image)
    in_cells = record[f"{key}/boxes_grid/{threshold}"].reshape(-1, 4).tolist()
    in_pixels = record[f"{key}/boxes_src/{threshold}"].reshape(-1, 4).tolist()
    assert [list(view.to_pixels(GridBox(*box))) for box in in_cells] == in_pixels


# --- crops and answers -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("key", KEYS)
def test_crop_tokens(
    llava: Llava15, looked: dict[str, Case], record: Any, key: str, policy: str
) -> None:
    """What is inserted, token by token; of grown boxes only that each gives a whole grid."""
    case = looked[key]
    found, expected = own_crop(llava, case, policy), recorded_crop(llava, record, key, policy)
    if case.has_grown_box(policy):
        sizes = [len(tokens) for tokens in (found, expected) if tokens is not None]
        assert all(size in (llava.image_tokens, 2 * llava.image_tokens) for size in sizes)
        return
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        region = case.proposals[policy].region
        assert region.reason or region.keep is not None, "only a mask can leave no token"
        return
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("key", KEYS)
def test_first_logits(
    llava: Llava15, looked: dict[str, Case], record: Any, key: str, policy: str
) -> None:
    case = looked[key]
    if case.has_grown_box(policy):
        crop = recorded_crop(llava, record, key, policy)
    else:
        crop = own_crop(llava, case, policy)
    agree(first_logits(llava, case, crop), record[f"{key}/{policy}/first_logits"])


@pytest.mark.parametrize("key", KEYS)
def test_first_logits_without_a_zoom(
    llava: Llava15, looked: dict[str, Case], record: Any, key: str
) -> None:
    expected = record[f"{key}/none/first_logits"]
    agree(first_logits(llava, looked[key], None), expected)


# --- pseudo-labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECORD.label_cases)
def test_pseudo_labels(case: str) -> None:
    """Foreground, background and ignored cells, exactly."""
    maps = RECORD.pseudo_labels
    attention, sink = (maps[f"{case}/{name}"].reshape(24, 24) for name in ("attention", "sink"))
    found = pseudo_labels(attention, sink, LABELS_7B)
    assert np.array_equal(found.ravel(), maps[f"{case}/labels"])


def test_converted_pseudo_labels(tmp_path: Path) -> None:
    """The same labels again out of maps pickled as the authors' labelling script does."""
    maps = RECORD.pseudo_labels
    lines = [
        {
            "question_id": case,
            "prompt": "<image>\nWhat?",
            "text": " That",
            "image": f"{case}.jpg",
            "sink_attn": maps[f"{case}/sink"],
            "grounding_attn_o2i": maps[f"{case}/attention"],
        }
        for case in RECORD.label_cases
    ]
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(lines))
    convert_labels(tmp_path / "labels.pkl", tmp_path / "out")
    rows: Any = load_labels(tmp_path / "out")
    assert rows["id"][:] == RECORD.label_cases
    for row, case in zip(rows, RECORD.label_cases, strict=True):
        assert (np.array(row["labels"]) == maps[f"{case}/labels"]).all()


# --- training ----------------------------------------------------------------------------------


def padded(questions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, questions))
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question) :] = torch.tensor(question)
        mask[row, longest - len(question) :] = 1
    return ids, mask


def ours(name: str) -> str:
    """The authors' name of an RPN weight -> ours; the last layer gives only the map."""
    for theirs, own in (
        ("2.input_layernorm.", "map_norm."),
        ("2.self_attn.q_proj.", "q_proj."),
        ("2.self_attn.k_proj.", "k_proj."),
    ):
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name if name.startswith("norm.") else f"layers.{name}"


def test_training_step(llava: Llava15) -> None:
    """The loss of a batch and the gradient norm of every weight of the RPN."""
    step = json.loads((RECORD.folder / "training.json").read_text())
    labels = np.stack([RECORD.pseudo_labels[f"{case}/labels"] for case in step["targets"]])
    rpn = RECORD.load_rpn()
    training = RPNForTraining(llava, rpn)
    training.train()
    ids, mask = padded(step["question_ids"])
    images = llava.preprocess([RECORD.image(name) for name in step["images"]])
    loss = training(images, ids, mask, torch.tensor(labels, dtype=torch.long))["loss"]
    assert loss.item() == pytest.approx(step["loss"], abs=TOLERANCE)
    loss.backward()
    norms = {name: weight.grad.norm().item() for name, weight in rpn.named_parameters()}
    expected = {ours(name): norm for name, norm in step["grad_norms"].items()}
    assert set(expected) <= set(norms)
    assert set(norms) - set(expected) <= {"norm.weight"}
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=TOLERANCE), name
    assert all(weight.grad is None for weight in llava.model.parameters())
