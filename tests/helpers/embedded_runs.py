"""Runs on the embedded benchmark whose records name its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import load_dataset

from sdrpn.io.images import image_key
from sdrpn_eval.demo import BENCHMARK
from tests.helpers.run_folders import record_line, sample, write_facts, write_record, write_run

N = 8
"""Documents of a run: two images of the embedded benchmark."""
ARGUMENTS_OF_A_RUN = {"pretrained": "tiny", "proposer": "rpn", "padding": "pad"}
ARGUMENTS_OF_A_RUN |= {"system_prompt": None}


def shown(folder: Path, hashes: list[str], record: bool = True, **config: Any) -> Path:
    """A run on the embedded benchmark whose record names images by these hashes."""
    settings = {"dataset_path": "parquet", "test_split": "test", **config}
    settings.setdefault("dataset_kwargs", {"data_files": {"test": str(BENCHMARK)}})
    rows = [sample(i) for i in range(len(hashes))]
    run = write_run(folder, {"tiny_vstar": rows}, config=settings)
    if record:
        images = [[{"hash": one, "size": [448, 448]}] for one in hashes]
        write_record(
            run,
            [
                record_line(i, "red", task="tiny_vstar", images=image)
                for i, image in enumerate(images)
            ],
        )
    write_facts(run, "aa", arguments=ARGUMENTS_OF_A_RUN)
    return run


def embedded_hashes(rows: Any = None) -> list[str]:
    """Content hashes of the images of the first documents."""
    rows = rows or load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    return [image_key(rows[i]["image"]) for i in range(N)]
