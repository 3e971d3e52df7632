"""The lmms-eval model `qwen2_5_vl_sdrpn`, on a tiny Qwen2.5-VL in the Hub's layout."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from sdrpn_eval.args import QwenArguments
from sdrpn_eval.model import Qwen2_5_VLSdrpn
from sdrpn_eval.record import read_records
from sdrpn_eval.tasks_info import qwen_threshold
from tests.helpers.qwen_tiny import CELL_PIXELS, make_qwen, make_rpn, write_checkpoint

SHORT = "Answer the question using a single word or phrase."
LIMITS = {"min_pixels": 12 * CELL_PIXELS, "max_pixels": 40 * CELL_PIXELS}
QUESTIONS = ("what pattern is on the red disc ?", "the blue disc ?", "what is on the pink disc ?")
SIZES = ((640, 480), (200, 620), (333, 333))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights rounded to bfloat16, which lmms-eval's own model always loads."""
    qwen = make_qwen()
    with torch.no_grad():
        for weight in qwen.model.parameters():
            weight.copy_(weight.bfloat16().float())
    return write_checkpoint(qwen, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def rpn(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rpn")
    make_rpn(make_qwen(), perturbed=True).save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    noise = torch.Generator().manual_seed(3)
    small = [torch.randint(0, 256, (7, 9, 3), generator=noise, dtype=torch.uint8) for _ in SIZES]
    return [
        Image.fromarray(one.numpy()).resize(size, Image.Resampling.NEAREST)
        for one, size in zip(small, SIZES, strict=True)
    ]


KWARGS = {"max_new_tokens": 6, "temperature": 0}


def documents() -> dict[str, Any]:
    return {"t": {"test": [{"image": pictures()[i % 3]} for i in range(6)]}}


def requests() -> list[Any]:
    """As lmms-eval hands them to a simple model."""
    return [
        Instance(
            "generate_until",
            (QUESTIONS[i % 2], KWARGS | {}, lambda doc: [doc["image"]], i, "t", "test"),  # type: ignore[arg-type]
            0,
            {"task": "t", "doc_id": i, "repeats": 1},  # type: ignore[arg-type]
        )
        for i in range(6)
    ]


def chat_requests() -> list[Any]:
    """The same as lmms-eval hands them to a chat model."""

    def messages(i: int) -> Any:
        return lambda doc: [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": doc["image"]},
                    {"type": "text", "text": QUESTIONS[i % 2]},
                ],
            }
        ]

    return [
        Instance(
            "generate_until",
            (QUESTIONS[i % 2], messages(i), KWARGS | {}, i, "t", "test"),  # type: ignore[arg-type]
            0,
            {"task": "t", "doc_id": i, "repeats": 1},  # type: ignore[arg-type]
        )
        for i in range(6)
    ]


def their_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decord = types.ModuleType("decord")  # for videos; lmms-eval does not install it
    monkeypatch.setattr(decord, "VideoReader", None, raising=False)
    monkeypatch.setitem(sys.modules, "decord", decord)
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

    theirs = Qwen2_5_VL(pretrained=str(folder), device="cpu", device_map="cpu", **LIMITS)
    theirs._model = theirs._model.float()
    theirs.task_dict = documents()
    return [result.text for result in theirs.generate_until(chat_requests())]


def ours(folder: Path, **arguments: Any) -> Qwen2_5_VLSdrpn:
    given = {"dtype": "float32", "batch_size": 4, "record": "none", **LIMITS, **arguments}
    model = Qwen2_5_VLSdrpn(pretrained=str(folder), **given)
    model.task_dict = documents()
    return model


def test_without_a_proposer_the_answers_are_those_of_lmms_eval_s_qwen2_5_vl(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of four against one by one. What differs: lmms-eval's own loads bfloat16 (cast to
    float32 here) and stops at <|im_end|> alone, ours as generation_config.json says."""
    theirs = their_answers(checkpoint, monkeypatch)
    answers = [one.text for one in ours(checkpoint, proposer="none").generate_until(requests())]
    assert answers == [text.strip() for text in theirs]
    assert len(set(answers)) > 3


def test_a_second_look_is_recorded_and_does_not_depend_on_the_batch(
    checkpoint: Path, rpn: Path, tmp_path: Path
) -> None:
    answers = {}
    for size in (1, 4):
        arguments = {"rpn": str(rpn), "threshold": 0.3, "record": str(tmp_path / str(size))}
        model = ours(checkpoint, batch_size=size, **arguments)
        answers[size] = [one.text for one in model.generate_until(requests())]
    assert answers[1] == answers[4]
    lines = sorted(read_records(tmp_path / "4"), key=lambda line: line.doc_id)
    assert [tuple(line.image_files[0].size) for line in lines] == [SIZES[i % 3] for i in range(6)]
    assert any(line.regions for line in lines)
    stock = [one.text for one in ours(checkpoint, proposer="none").generate_until(requests())]
    assert stock != answers[4]


def test_a_second_run_takes_answers_from_the_record_unless_the_pixel_limits_moved(
    checkpoint: Path, rpn: Path, tmp_path: Path
) -> None:
    arguments = {"rpn": str(rpn), "record": str(tmp_path)}

    def resumed(**more: Any) -> list[bool]:
        ours(checkpoint, **arguments, **more).generate_until(requests())
        lines = read_records(tmp_path)
        latest = max(line.run for line in lines)
        return [line.resumed for line in lines if line.run == latest]

    assert resumed() == [False] * 6
    assert resumed() == [True] * 6
    assert resumed(max_pixels=41 * CELL_PIXELS) == [False] * 6
    assert resumed(short_answer=True) == [False] * 6


@pytest.mark.parametrize(
    ("prompt", "arguments", "asked"),
    [
        ("Which ?", {}, "Which ?"),
        ("Which ?", {"short_answer": True}, f"Which ?\n{SHORT}"),
        ("Which ?", {"preset": "paper"}, f"Which ?\n{SHORT}"),
        (f"Which ?\n{SHORT} Or two.", {"short_answer": True}, f"Which ?\n{SHORT} Or two."),
        ("Which ?", {"preset": "paper", "short_answer": False}, "Which ?"),
    ],
)
def test_the_published_sentence_ends_questions_that_lack_it(
    checkpoint: Path, tmp_path: Path, prompt: str, arguments: dict[str, Any], asked: str
) -> None:
    request = requests()[0]
    request.arguments = (prompt, *request.arguments[1:])
    given = {"proposer": "none", "record": str(tmp_path), **arguments}
    ours(checkpoint, **given).generate_until([request])
    assert [line.prompt for line in read_records(tmp_path)] == [asked]


def test_defaults_are_the_published_limits() -> None:
    values = QwenArguments.of({})
    assert (values.min_pixels, values.max_pixels) == (451_584, 451_584)
    assert values.pretrained == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert values.proposer == "rpn"
    assert not values.short_answer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_pixels": 1}, "min_pixels must be a whole number of 784"),
        ({"min_pixels": 5e5}, "min_pixels must be a whole number"),
        ({"min_pixels": 500_000}, "max_pixels must be at least min_pixels, 500000, got 451584"),
        ({"max_pixels": 200_000}, "max_pixels must be at least min_pixels, 451584, got 200000"),
        ({"padding": "pad"}, r"unknown padding \(images keep their shape\)"),
        ({"fps": 2}, r"unknown fps \(there is no video\)"),
        ({"max_pixel": 784}, "unknown max_pixel, did you mean max_pixels"),
        ({"short_answer": "yes"}, "short_answer must be True or False"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenArguments.of(given)


B3, B7 = (2048, 36), (3584, 28)


@pytest.mark.parametrize(
    ("task", "size", "tokens", "threshold"),
    [
        ("textvqa_val", B3, (576, 576), 0.15),
        ("textvqa_val_public", B7, (576, 576), 0.075),
        ("infovqa_val", B7, (576, 576), 0.1),
        ("ocrbench", B3, (576, 576), 0.03),
        ("ocrbench", B7, (576, 576), 0.05),
        ("docvqa_val", B3, (576, 576), 0.1),
        ("vstar", B3, (576, 576), 0.175),
        ("vstar", B3, (1024, 4096), 0.075),
        ("vstar_direct_attributes", B7, (576, 3072), 0.05),
        ("vstar", B7, (576, 576), 0.075),
        ("hrbench4k_offline", B3, (1024, 3072), 0.125),
        ("hrbench4k", B3, (1024, 4096), 0.05),
        ("hrbench8k", B3, (1024, 4096), 0.05),
        ("hrbench8k", B7, (576, 4096), 0.03),
        ("pope", B7, (576, 576), 0.1),
        ("mme", B7, (576, 576), 0.1),
        ("textvqa_val", (64, 6), (576, 576), 0.1),
    ],
)
def test_thresholds_are_the_published_ones(
    task: str, size: tuple[int, int], tokens: tuple[int, int], threshold: float
) -> None:
    limits = tuple(count * CELL_PIXELS for count in tokens)
    assert qwen_threshold(task, *size, *limits)[0] == threshold


@pytest.mark.parametrize(
    ("task", "size", "tokens", "origin"),
    [
        ("textvqa_val", B7, (576, 576), "as published for textvqa"),
        ("textvqa_val", B7, (256, 576), "as published for textvqa, at 576 tokens"),
        ("vstar", B7, (576, 3072), "as published for vstar at 576 to 3072 tokens"),
        ("hrbench4k", B7, (576, 576), "as none is published for it"),
        ("mme", B7, (576, 576), "as none is published for it"),
        ("vstar", (64, 6), (576, 576), "as none is published for it"),
    ],
)
def test_where_a_threshold_is_from_is_told(
    task: str, size: tuple[int, int], tokens: tuple[int, int], origin: str
) -> None:
    limits = tuple(count * CELL_PIXELS for count in tokens)
    assert qwen_threshold(task, *size, *limits)[1] == origin
