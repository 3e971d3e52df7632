"""HR-Bench: the harness's prompt and data; the letter decides, and no judge is asked."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Image as ImageColumn
from lmms_eval.tasks.hrbench.utils import hrbench_doc_to_options, hrbench_doc_to_text
from PIL import Image

from sdrpn_eval import scoring
from sdrpn_eval.scoring import answer_letter
from sdrpn_eval.subsets import subset

doc_to_text = hrbench_doc_to_text
mean_score = scoring.mean_score

CATEGORIES = ("single", "cross")
AT_ONCE = 16
"""Rows held while images are decoded: one is up to 6 MB, and 1000 would be the default."""


def with_images(dataset: Any) -> Any:
    """The data set with its base64 text as image files, kept in the data sets' cache.

    As text an image would be decoded to find the questions that share it, and lmms-eval would keep
    it with every answer: 2 GB for the 4K half.
    """
    file = ImageColumn(decode=False)
    if isinstance(dataset.features["image"], ImageColumn):
        return dataset.cast_column("image", file)
    features = dataset.features.copy()
    features["image"] = file
    return dataset.map(_with_file, features=features, writer_batch_size=AT_ONCE)


def _with_file(doc: dict[str, Any]) -> dict[str, Any]:
    return {"image": {"bytes": base64.b64decode(doc["image"]), "path": None}}


def ci_4k(dataset: Any) -> Any:
    """The documents of `hrbench4k_ci`."""
    return with_images(subset("hrbench4k_ci", dataset))


def ci_8k(dataset: Any) -> Any:
    """The documents of `hrbench8k_ci`."""
    return with_images(subset("hrbench8k_ci", dataset))


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """A document's part in `average`, in its category's score and in `unparsed`.

    A document of the other category has its entry without a score: every metric sees it.
    """
    letter = answer_letter(results[0], set(hrbench_doc_to_options(doc)))
    right = letter == doc["answer"].strip().upper()
    item = {"score": float(right), "cycle_category": doc["cycle_category"]}
    own = {name: item if doc["category"] == name else {} for name in CATEGORIES}
    return {"average": item, **own, "unparsed": {"score": float(letter is None)}}


def mean_over_cycles(items: Iterable[Mapping[str, Any]]) -> float:
    """The harness's score: the mean of each cycle of options, and of these the mean.

    Every question is asked four times, its options moved on by one place each time (a cycle). NaN
    where no document has a score.
    """
    cycles: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in items:
        if "score" in item:
            cycles[item["cycle_category"]].append(item)
    return mean_score([{"score": mean_score(cycle)} for cycle in cycles.values()])
