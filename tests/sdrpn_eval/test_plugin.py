"""The entry point: the model, and our tasks in the index."""

from __future__ import annotations

from typing import Any

import pytest

from sdrpn_eval.model import LlavaSdrpn
from sdrpn_eval.plugin import add_tasks, register
from tests.helpers.asking_by_hand import logged


@pytest.fixture
def log() -> Any:
    with logged() as lines:
        yield lines


def test_entry_point_gives_the_model_and_its_class() -> None:
    from lmms_eval.models import get_model

    assert get_model("llava_sdrpn") is LlavaSdrpn


def test_a_changed_lmms_eval_is_survived(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    from lmms_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "initialize_tasks", lambda self: {})
    assert register().model_id == "llava_sdrpn"
    assert "give --include_path" in log[-1]
    monkeypatch.delattr(TaskManager, "initialize_tasks")
    add_tasks()
    assert "could not add its tasks" in log[-1]


def test_the_hook_is_put_on_once() -> None:
    from lmms_eval.tasks import TaskManager

    add_tasks()
    hooked = TaskManager.initialize_tasks
    add_tasks()
    assert TaskManager.initialize_tasks is hooked
