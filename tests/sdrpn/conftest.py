"""The model families, each with questions on its pictures."""

from __future__ import annotations

import pytest

from sdrpn.engine import Question
from tests.conftest import QUESTIONS
from tests.helpers.families import FAMILIES, Family


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def questions(family: Family) -> list[Question]:
    return [Question(text, (image,)) for image in family.images for text in QUESTIONS]
