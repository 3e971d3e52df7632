"""Small data sets with the true schemas of benchmarks, and an index of the tasks that read them."""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import lmms_eval.tasks
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from lmms_eval.tasks import TaskManager
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from PIL import Image

from sdrpn_eval.plugin import add_tasks, tasks_folder

TEXTVQA = Features(
    {
        "image_id": Value("string"),
        "question_id": Value("int32"),
        "question": Value("string"),
        "question_tokens": List(Value("string")),
        "image": ImageColumn(),
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": Value("string"),
        "flickr_300k_url": Value("string"),
        "answers": List(Value("string")),
        "image_classes": List(Value("string")),
        "set_name": Value("string"),
        "ocr_tokens": List(Value("string")),
    }
)
DOCVQA = Features(
    {
        "questionId": Value("string"),
        "question": Value("string"),
        "question_types": List(Value("string")),
        "image": ImageColumn(),
        "docId": Value("int64"),
        "ucsf_document_id": Value("string"),
        "ucsf_document_page_no": Value("string"),
        "answers": List(Value("string")),
        "data_split": Value("string"),
    }
)
VSTAR = Features(
    {
        "image": ImageColumn(),
        "text": Value("string"),
        "category": Value("string"),
        "label": Value("string"),
        "question_id": Value("string"),
    }
)
INFOVQA = Features(
    {
        "questionId": Value("string"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "answer_type": List(Value("string")),
        "image": ImageColumn(),
        "image_url": Value("string"),
        "operation/reasoning": List(Value("string")),
        "ocr": Value("string"),
        "data_split": Value("string"),
    }
)
CHARTQA = Features(
    {
        "type": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "image": ImageColumn(),
    }
)
OCRBENCH = Features(
    {
        "dataset": Value("string"),
        "question": Value("string"),
        "question_type": Value("string"),
        "answer": List(Value("string")),
        "image": ImageColumn(),
    }
)
POPE = Features(
    {
        "id": Value("string"),
        "question_id": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "image_source": Value("string"),
        "image": ImageColumn(),
        "category": Value("string"),
    }
)
HRBENCH = Features(
    {"index": Value("int64")}
    | {
        name: Value("string")
        for name in ("question", "answer", "category", *"ABCD", "cycle_category", "image")
    }
)
TINY_VSTAR = Features(
    {
        "question_id": Value("int64"),
        "image_id": Value("int64"),
        "image": ImageColumn(),
        "question": Value("string"),
        "answer": Value("string"),
        "colour": Value("string"),
        "category": Value("string"),
        "box": List(Value("int64")),
        "width": Value("int64"),
        "height": Value("int64"),
    }
)


def png(shade: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@functools.cache
def photo(_: int = 0) -> dict[str, Any]:
    """A photograph of a person beside a flag, 512 x 600, as matplotlib ships it."""
    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    return {"bytes": Path(path).read_bytes(), "path": None}


@functools.cache
def chart(_: int = 0) -> dict[str, Any]:
    """A bar chart with numbers on its axes."""
    figure = Figure(figsize=(6, 4))
    plot = figure.subplots()
    plot.bar(["2020", "2021", "2022"], [7, 12, 9])
    plot.set_title("Ships a year")
    return _drawn(figure)


@functools.cache
def page(_: int = 0) -> dict[str, Any]:
    """A page of type, taller than wide."""
    figure = Figure(figsize=(8.5, 11))
    lines = [f"{i}. The meeting of the board in 1999 began at ten." for i in range(1, 31)]
    figure.text(0.1, 0.95, "\n".join(lines), va="top", fontsize=11, linespacing=1.6)
    return _drawn(figure)


def _drawn(figure: Figure) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return {"bytes": file.getvalue(), "path": None}


def dataset(features: Features, rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Rows of a schema; columns that a row does not name are empty."""
    return Dataset.from_list([dict.fromkeys(features) | dict(r) for r in rows], features=features)


def textvqa_rows(n: int, image: Callable[[int], dict[str, Any]] = png) -> Dataset:
    return dataset(
        TEXTVQA,
        (
            {
                "question_id": i,
                "question": "what word?",
                "image": image(i),
                "answers": ["stop"] * 10,
            }
            | {"ocr_tokens": ["STOP", "sign"]}
            for i in range(n)
        ),
    )


def docvqa_rows(n: int, image: Callable[[int], dict[str, Any]] = png) -> Dataset:
    return dataset(
        DOCVQA,
        (
            {
                "questionId": str(i),
                "question": "Which year?",
                "image": image(i),
                "answers": ["1999"],
            }
            for i in range(n)
        ),
    )


def infovqa_rows(n: int) -> Dataset:
    return dataset(
        INFOVQA,
        (
            {"questionId": str(i), "question": "Which year?", "image": page(), "answers": ["1999"]}
            for i in range(n)
        ),
    )


def chartqa_rows(n: int) -> Dataset:
    """Half of them by people, half by machines; right within 5 % of 12."""
    return dataset(
        CHARTQA,
        (
            {"type": ("human_test", "augmented_test")[i % 2], "question": "How many in 2021?"}
            | {"answer": "12", "image": chart()}
            for i in range(n)
        ),
    )


def ocrbench_rows(n: int) -> Dataset:
    return dataset(
        OCRBENCH,
        (
            {"dataset": "IIIT5K", "question": "what is written in the image?", "image": page()}
            | {"question_type": "Regular Text Recognition", "answer": ["meeting"]}
            for _ in range(n)
        ),
    )


def pope_rows(n: int) -> Dataset:
    """Answers take turns: yes, no."""
    return dataset(
        POPE,
        (
            {"id": str(i), "question_id": str(i), "question": "Is there a flag in the image?"}
            | {"answer": ("yes", "no")[i % 2], "image": photo(), "category": "random"}
            for i in range(n)
        ),
    )


def hrbench_rows() -> Dataset:
    """Two questions, one of each category, each with its options moved on through four cycles."""
    options = ["red", "green", "blue", "white"]
    image = base64.b64encode(photo()["bytes"]).decode()
    rows = [
        {"index": 4 * q + cycle, "question": "What color is the flag?", "category": category}
        | dict(zip("ABCD", options[cycle:] + options[:cycle], strict=True))
        | {"answer": "ADCB"[cycle], "cycle_category": str(cycle), "image": image}
        for q, category in enumerate(("single", "cross"))
        for cycle in range(4)
    ]
    return dataset(HRBENCH, rows)


VSTAR_ENDING = "\nAnswer with the option's letter from the given choices directly."


def vstar_true_rows() -> Dataset:
    """Three questions in the wording of the data set, on a photograph."""
    asked = [
        ("What is the material of the glove?", "rubber cotton kevlar leather", "A"),
        ("What is the color of the dustpan?", "purple red blue white", "C"),
        ("Is the dog on the left or right side of the bicycle?", "right left", "A"),
    ]
    rows = []
    for i, (question, options, label) in enumerate(asked):
        lines = [f"({letter}) {o}" for letter, o in zip("ABCD", options.split(), strict=False)]
        category = "relative_position" if question.startswith("Is") else "direct_attributes"
        text = "\n".join([question, *lines]) + VSTAR_ENDING
        rows.append({"image": photo(), "text": text, "category": category, "label": label})
        rows[-1]["question_id"] = str(i)
    return dataset(VSTAR, rows)


def vstar_rows(attributes: int, positions: int) -> Dataset:
    def row(i: int, category: str, options: str) -> dict[str, Any]:
        text = f"What is it?\n{options}"
        return {"image": png(i), "text": text, "category": category, "label": "A"} | {
            "question_id": str(i)
        }

    rows = [row(i, "direct_attributes", "(A) red (B) blue (C) green") for i in range(attributes)]
    rows += [row(99 + i, "relative_position", "(A) left (B) right") for i in range(positions)]
    return Dataset.from_list(rows, features=VSTAR)


def tiny_vstar_rows(n: int) -> Dataset:
    """Two questions an image, the first of each fine and the second coarse."""
    rows = [
        {
            "question_id": i,
            "image_id": i // 2,
            "image": png(i // 2),
            "question": "what pattern is on the red disc ?",
            "answer": "level",
            "colour": "red",
            "category": ("fine", "coarse")[i % 2],
            "box": [5, 5, 20, 20],
            "width": 40,
            "height": 30,
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows, features=TINY_VSTAR)


def write(rows: Dataset, folder: Path, name: str = "data.parquet") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / name))


def write_all(folder: Path) -> None:
    """A few documents of every benchmark of the paper, true to their schemas and wording."""
    write(textvqa_rows(4, photo), folder / "textvqa_val", "validation-00000-of-00001.parquet")
    write(docvqa_rows(3, page), folder / "docvqa_val")
    write(infovqa_rows(3), folder / "infovqa_val")
    write(chartqa_rows(4), folder / "chartqa")
    write(ocrbench_rows(3), folder / "ocrbench")
    write(vstar_true_rows(), folder / "vstar")
    write(pope_rows(4), folder / "pope")
    write(hrbench_rows(), folder / "hrbench4k", "hr_bench_4k.parquet")
    write(hrbench_rows(), folder / "hrbench8k", "hr_bench_8k.parquet")


def task_utils(task: str) -> ModuleType:
    """A task's utils.py, as lmms-eval loads it: from the file, outside any package.

    Named by its path, so that mutation testing finds what it mutated.
    """
    path = tasks_folder() / task / "utils.py"
    spec = importlib.util.spec_from_file_location(f"tasks.{task}.utils", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAPER = ("chartqa", "infovqa", "ocrbench", "pope", "hrbench")


def manager(*more: str) -> TaskManager:
    """An index of ours and of three of lmms-eval's own folders (all 2000 tasks take seconds)."""
    add_tasks()
    theirs = Path(lmms_eval.tasks.__file__).parent
    paths = [str(theirs / name) for name in ("textvqa", "docvqa", "vstar_bench", *more)]
    return TaskManager(include_path=paths, include_defaults=False)
