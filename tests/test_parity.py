"""The numbers recorded from the authors' own code, on their tiny random model, in float32.

`data/parity/README.md` says what was recorded. One thing is ours on purpose: the authors' code
grows components of two or three cells lopsidedly, we around the component (METHOD section 3). Where
a case's crop is such a grown box, its recorded crop tokens show another crop than ours; there the
recorded tokens are put in front of the question, so that everything behind the crop is compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import parity
import pytest
import torch
from transformers import LogitsProcessorList

from sdrpn.answer import Suffix, generate
from sdrpn.config import ZoomConfig
from sdrpn.crops import crop_tokens
from sdrpn.distill.train import RPNForTraining
from sdrpn.llava import Llava
from sdrpn.prefix import Prefix
from sdrpn.proposers import Look, Proposal, roi_logits
from sdrpn.region import components
from sdrpn.zoom import Question, ZoomLlava

TOLERANCE = 1e-4
CASES = parity.cases()
NUMBERS = range(len(CASES))
POLICIES = ("mask", "bbox")


@pytest.fixture(scope="module")
def llava() -> Llava:
    return parity.load_llava()


@pytest.fixture(scope="module")
def engine(llava: Llava) -> ZoomLlava:
    return ZoomLlava(llava, parity.load_rpn())


@pytest.fixture(scope="module")
def record() -> Any:
    return parity.recorded()


@dataclass
class Case:
    """A recorded case at its own threshold, on our side."""

    number: int
    image: Any
    prefix: Prefix
    words: tuple[int, ...]
    proposals: dict[str, Proposal]

    def zoom(self, policy: str) -> ZoomConfig:
        return ZoomConfig(threshold=CASES[self.number]["threshold"], policy=policy)

    def has_grown_box(self, policy: str) -> bool:
        """Whether the crop is the box of a component of two or three cells."""
        proposal, zoom = self.proposals[policy], self.zoom(policy)
        assert proposal.roi_map is not None
        small = {
            tuple(box)
            for box, cells in components(proposal.roi_map > zoom.threshold, zoom)
            if cells.sum() < 4
        }
        region = proposal.region
        return region.keep is None and any(tuple(box) in small for box in region.grid_boxes)


@pytest.fixture(scope="module")
def looked(engine: ZoomLlava, llava: Llava) -> list[Case]:
    """Every case read and looked at once."""
    found = []
    for number, case in enumerate(CASES):
        image = parity.image(case["image"])
        (prefix,) = engine.read([image])
        text = parity.question(case["question_ids"])
        one = Case(number, image, prefix, tuple(llava.question_ids(text)), {})
        for policy in POLICIES:
            asked = Question(text, (image,), zoom=one.zoom(policy))
            (one.proposals[policy],) = engine.look([asked], [prefix], [one.words])
        found.append(one)
    return found


def first_logits(llava: Llava, case: Case, crop: torch.Tensor | None) -> np.ndarray:
    """Logits of the first answer token, as generate() meets them."""
    seen: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    settings = {"max_new_tokens": 1, "logits_processor": LogitsProcessorList([keep])}
    generate(llava, [case.prefix], [Suffix(case.words, crop)], settings)
    return seen[0][0].numpy()


def own_crop(llava: Llava, case: Case, policy: str) -> torch.Tensor | None:
    region = case.proposals[policy].region
    (crop,) = crop_tokens(llava, [case.image], [region], [case.zoom(policy)], [10_000])
    return crop


def recorded_crop(llava: Llava, record: Any, number: int, policy: str) -> torch.Tensor | None:
    """The crop tokens that the authors' code inserted, behind the projector."""
    tokens = record[f"{number:02d}/{policy}/crop_tokens"]
    with torch.no_grad():
        projected = llava.model.model.multi_modal_projector(torch.tensor(tokens))
    return projected if len(tokens) else None


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    """Recorded logits hold -inf where the authors' settings forbade a token: left out."""
    finite = np.isfinite(expected)
    assert finite.sum() > 190
    assert np.abs(found - expected)[finite].max() < TOLERANCE


# --- maps and boxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_roi_logits(
    engine: ZoomLlava, llava: Llava, looked: list[Case], record: Any, number: int
) -> None:
    case = looked[number]
    look = Look(case.prefix, llava.view(case.image), case.words, engine.zoom)
    (found,) = roi_logits(engine.models, [look])
    assert np.abs(found - record[f"{number:02d}/pred_roi"]).max() < TOLERANCE


@pytest.mark.parametrize("number", NUMBERS)
def test_blurred_maps(looked: list[Case], record: Any, number: int) -> None:
    found = looked[number].proposals["mask"].roi_map
    assert found is not None
    assert np.abs(found - record[f"{number:02d}/blurred"]).max() < TOLERANCE


@pytest.mark.parametrize("threshold", range(5))
@pytest.mark.parametrize("number", NUMBERS)
def test_boxes(llava: Llava, looked: list[Case], record: Any, number: int, threshold: int) -> None:
    """In cells and in pixels, from our own maps: exactly, but for the grown ones."""
    key = f"{number:02d}/"
    case = looked[number]
    view = llava.view(case.image)
    zoom = ZoomConfig(threshold=float(record[f"{key}thresholds"][threshold]))
    blurred = case.proposals["mask"].roi_map
    assert blurred is not None
    found = components(blurred > zoom.threshold, zoom)
    in_cells = record[f"{key}boxes_grid/{threshold}"].tolist()
    in_pixels = record[f"{key}boxes_src/{threshold}"].tolist()
    assert len(found) == len(in_cells) > 0
    for (box, cells), theirs, pixels in zip(found, in_cells, in_pixels, strict=True):
        if cells.sum() >= 4:
            assert list(box) == theirs
            assert list(view.to_pixels(box)) == pixels
        else:
            rows, columns = np.nonzero(cells)
            assert 0 <= box.x0 <= columns.min() <= columns.max() < box.x1 <= 24
            assert 0 <= box.y0 <= rows.min() <= rows.max() < box.y1 <= 24
            assert (box.x1 - box.x0, box.y1 - box.y0) == (3, 3)


def test_the_record_holds_boxes_of_both_kinds(looked: list[Case], record: Any) -> None:
    sizes = []
    for case in looked:
        for threshold in record[f"{case.number:02d}/thresholds"]:
            zoom = ZoomConfig(threshold=float(threshold))
            blurred = case.proposals["mask"].roi_map
            sizes += [cells.sum() for _, cells in components(blurred > threshold, zoom)]
    assert sum(size >= 4 for size in sizes) > 50
    assert sum(size < 4 for size in sizes) > 20


# --- crops and answers -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", NUMBERS)
def test_crop_tokens(
    llava: Llava, looked: list[Case], record: Any, number: int, policy: str
) -> None:
    """What is inserted, token by token; of grown boxes only how many there are."""
    case = looked[number]
    found, expected = own_crop(llava, case, policy), recorded_crop(llava, record, number, policy)
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        assert case.proposals[policy].region.reason
        return
    assert found.shape == expected.shape
    if not case.has_grown_box(policy):
        assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("number", NUMBERS)
def test_first_logits(
    llava: Llava, looked: list[Case], record: Any, number: int, policy: str
) -> None:
    case = looked[number]
    if case.has_grown_box(policy):
        crop = recorded_crop(llava, record, number, policy)
    else:
        crop = own_crop(llava, case, policy)
    agree(first_logits(llava, case, crop), record[f"{number:02d}/{policy}/first_logits"])


@pytest.mark.parametrize("number", NUMBERS)
def test_first_logits_without_a_zoom(
    llava: Llava, looked: list[Case], record: Any, number: int
) -> None:
    expected = record[f"{number:02d}/none/first_logits"]
    agree(first_logits(llava, looked[number], None), expected)


def test_the_record_tests_whole_ways(looked: list[Case]) -> None:
    """Enough cases go the whole way on our own crops: masked ones, and two boxes of one image."""
    whole = [
        case.proposals[policy].region
        for case in looked
        for policy in POLICIES
        if not case.has_grown_box(policy)
    ]
    assert sum(region.keep is not None for region in whole) == 4
    assert sum(len(region.boxes) == 2 for region in whole) == 1
    assert sum(region.reason is not None for region in whole) == 2


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


def test_training_step(llava: Llava) -> None:
    """The loss of a batch of two and the gradient norm of every weight of the RPN."""
    step = json.loads((parity.DATA / "training.json").read_text())
    targets = np.load(parity.DATA / "pseudo_labels.npz")
    labels = np.stack([targets[f"{case}/labels"] for case in step["targets"]])
    rpn = parity.load_rpn()
    training = RPNForTraining(llava, rpn)
    training.train()
    ids, mask = padded(step["question_ids"])
    pixels = llava.pixels([parity.image(name) for name in step["images"]])
    loss = training(pixels, ids, mask, torch.tensor(labels, dtype=torch.long))["loss"]
    assert loss.item() == pytest.approx(step["loss"], abs=TOLERANCE)
    loss.backward()
    norms = {name: weight.grad.norm().item() for name, weight in rpn.named_parameters()}
    expected = {ours(name): norm for name, norm in step["grad_norms"].items()}
    assert set(expected) <= set(norms)
    assert set(norms) - set(expected) <= {"norm.weight"}
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=TOLERANCE), name
    assert all(weight.grad is None for weight in llava.model.parameters())
