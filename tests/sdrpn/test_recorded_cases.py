"""The shipped record of the authors' code is worth testing against: it holds cases of every kind.

Its numbers are compared in `test_parity.py`, which takes any record; what is counted here is true
of this one.
"""

from __future__ import annotations

import numpy as np
import pytest

from sdrpn.config import ZoomConfig
from sdrpn.distill.pseudo_labels import IGNORED
from sdrpn.engine import ZoomModel
from sdrpn.roi.postprocess import components
from tests.helpers.parity import POLICIES, SHIPPED, Case, Record

RECORD = Record(SHIPPED)


@pytest.fixture(scope="module")
def looked() -> dict[str, Case]:
    return RECORD.look(ZoomModel(RECORD.load_llava(), RECORD.load_rpn()))


def test_boxes_of_both_kinds(looked: dict[str, Case]) -> None:
    sizes = []
    for case in looked.values():
        blurred = case.proposals["mask"].roi_map
        assert blurred is not None
        for threshold in RECORD.thresholds(case.key):
            zoom = ZoomConfig(threshold=threshold)
            sizes += [cells.sum() for _, cells in components(blurred > threshold, zoom)]
    assert sum(size >= 4 for size in sizes) > 50
    assert sum(size < 4 for size in sizes) > 20


def test_cases_of_the_whole_way(looked: dict[str, Case]) -> None:
    """Enough cases go the whole way on our own crops: masked ones, and two boxes of one image."""
    whole = [
        case.proposals[policy].region
        for case in looked.values()
        for policy in POLICIES
        if not case.has_grown_box(policy)
    ]
    assert sum(region.keep is not None for region in whole) == 4
    assert sum(len(region.boxes) == 2 for region in whole) == 1
    assert sum(region.reason is not None for region in whole) == 2


def test_labels_of_all_kinds() -> None:
    labels = RECORD.pseudo_labels
    kinds = [tuple(np.unique(labels[f"{case}/labels"])) for case in RECORD.label_cases]
    assert len(kinds) == 20
    assert (IGNORED, 0, 1) in kinds
    assert (IGNORED,) in kinds
