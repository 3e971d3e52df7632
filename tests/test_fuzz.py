"""The fuzzers of fuzz/, a few examples each: `python -m fuzz.results --minutes 10` tries more."""

from __future__ import annotations

import pytest
from hypothesis import settings

from fuzz import labels, regions, results
from fuzz.harness import LOOSE, Property

FEW = settings(LOOSE, max_examples=25, derandomize=True)


def properties() -> list[Property]:
    return [one for module in (regions, labels, results) for one in module.PROPERTIES]


@pytest.mark.parametrize("one", properties(), ids=lambda one: one.name)
def test_what_is_read_works_or_is_refused_in_a_sentence(one: Property) -> None:
    one.trial(FEW)()
