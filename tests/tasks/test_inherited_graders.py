"""Traps of lmms-eval's graders, as docs/reproduce.md tells them: a changed grader shows here."""

from __future__ import annotations

import pytest
from lmms_eval.tasks.chartqa.utils import chartqa_process_results
from lmms_eval.tasks.docvqa import utils as docvqa
from lmms_eval.tasks.textvqa.utils import textvqa_process_results


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("2%", "2", False),
        ("2", "2%", False),
        ("2%", "2%", True),
        ("0.02", "2%", True),
        ("2.09", "2", True),  # within 5 %
        ("2.1", "2", False),  # by a float's last digit
        ("1920", "2010", True),  # years are numbers as well
        ("1909", "2010", False),
        ("2,000", "2000", False),
        ("0.0", "0", False),
        ("Yes.", "Yes", False),
    ],
)
def test_chartqa_s_relaxed_accuracy(answer: str, target: str, right: bool) -> None:
    doc = {"type": "human_test", "answer": target}
    assert chartqa_process_results(doc, [answer])["relaxed_overall"] == right


@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        ("", ["a"] * 10, 1),
        ("the", ["a"] * 10, 1),
        ("", ["the"] * 3 + ["stop"] * 7, 0.9),
        ("", ["stop"] * 10, 0),
        ("2", ["two"] * 10, 1),
    ],
)
def test_textvqa_drops_articles(answer: str, answers: list[str], score: float) -> None:
    doc = {"question_id": 1, "answers": list(answers)}
    assert textvqa_process_results(doc, [answer])["exact_match"] == pytest.approx(score)


def test_docvqa_grades_by_a_registered_metric() -> None:
    assert not hasattr(docvqa, "docvqa_process_results"), "read docs/reproduce.md's traps again"
