"""Small data sets with the true schemas of benchmarks, and an index of the tasks that read them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lmms_eval.tasks
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from lmms_eval.tasks import TaskManager
from PIL import Image

from sdrpn_eval.plugin import add_tasks

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


def textvqa_rows(n: int) -> Dataset:
    rows = [
        dict.fromkeys(TEXTVQA)
        | {"question_id": i, "question": "what word?", "image": png(i), "answers": ["stop"] * 10}
        for i in range(n)
    ]
    return Dataset.from_list(rows, features=TEXTVQA)


def docvqa_rows(n: int) -> Dataset:
    rows = [
        dict.fromkeys(DOCVQA)
        | {"questionId": str(i), "question": "Which year?", "image": png(i), "answers": ["1999"]}
        for i in range(n)
    ]
    return Dataset.from_list(rows, features=DOCVQA)


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


def manager() -> TaskManager:
    """An index of ours and of three of lmms-eval's own folders (all 2000 tasks take seconds)."""
    add_tasks()
    theirs = Path(lmms_eval.tasks.__file__).parent
    paths = [str(theirs / name) for name in ("textvqa", "docvqa", "vstar_bench")]
    return TaskManager(include_path=paths, include_defaults=False)
