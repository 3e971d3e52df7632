"""The fuzzers of fuzz/, a few examples each: `python fuzz/results.py --minutes 10` tries more."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from hypothesis import settings

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

from harness import LOOSE, Property  # noqa: E402

FEW = settings(LOOSE, max_examples=25, derandomize=True)


def properties() -> list[Property]:
    scripts = ("regions", "labels", "results")
    return [one for name in scripts for one in importlib.import_module(name).PROPERTIES]


@pytest.mark.parametrize("one", properties(), ids=lambda one: one.name)
def test_what_is_read_works_or_is_refused_in_a_sentence(one: Property) -> None:
    one.trial(FEW)()
