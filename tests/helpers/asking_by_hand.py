"""Documents, requests and a model, without lmms-eval's evaluator around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from loguru import logger
from PIL import Image

from sdrpn_eval.model import LlavaSdrpn
from tests.helpers.fake_engine import FakeEngine

LIMIT = {"max_new_tokens": 4}


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (shade, 0, 0))


def rows(n: int, per_image: int = 2) -> list[dict[str, Any]]:
    return [
        {"image": image(i // per_image), "box": [1, 1, 4, 4], "question": f"q{i}"} for i in range(n)
    ]


def visual(row: Any) -> list[Image.Image]:
    return [row["image"]] if row["image"] is not None else []


def ask(
    task: str,
    doc_id: int,
    prompt: str,
    extra: Any = None,
    kind: str = "generate_until",
    doc_to_visual: Any = visual,
    **meta: Any,
) -> Instance:
    extra = dict(LIMIT) if extra is None else extra
    metadata = {"task": task, "doc_id": doc_id, "repeats": 1, **meta}
    arguments = (prompt, extra, doc_to_visual, doc_id, task, "test")
    return Instance(kind, arguments, 0, metadata)  # type: ignore[arg-type]


def model(engine: FakeEngine | str, docs: Any, **more: Any) -> LlavaSdrpn:
    """engine: or what else `pretrained` takes."""
    lm = LlavaSdrpn(pretrained=engine, **more)
    lm.task_dict = {"textvqa_val": {"test": docs}, "mytask": {"test": docs}}
    return lm


def texts(results: list[GenerationResult]) -> list[str]:
    return [r.text for r in results]


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines: list[str] = []
    sink = logger.add(lambda m: lines.append(m.record["message"]), level="INFO", format="{message}")
    yield lines
    logger.remove(sink)
