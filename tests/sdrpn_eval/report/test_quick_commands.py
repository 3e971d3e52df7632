"""Commands that read JSON import nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from sdrpn.boxes import PixelBox
from sdrpn.io.images import image_key
from sdrpn_eval.demo import BENCHMARK
from sdrpn_eval.results import documents
from sdrpn_eval.results.compare import gather
from sdrpn_eval.results.read import read_run
from tests.helpers.run_folders import record_line, sample, write_facts, write_record, write_run

SLOW = ["torch", "transformers", "datasets", "lmms_eval", "accelerate", "pandas", "matplotlib"]
SLOW += ["scipy.stats", "sklearn", "sdrpn.engine", "sdrpn.inference.prefix"]

N = 8
"""Documents of a run: two images of the embedded benchmark."""
ARGUMENTS_OF_A_RUN = {"pretrained": "tiny", "proposer": "rpn", "padding": "pad"}
ARGUMENTS_OF_A_RUN |= {"system_prompt": None}

PROGRAM = """
import json, sys
sys.argv = json.loads(sys.argv[1])
from {module} import app
try:
    app()
except SystemExit as done:
    code = done.code
print(json.dumps([code, [name for name in {names} if name in sys.modules]]))
"""


def imported(words: list[str], names: list[str], module: str = "sdrpn_eval.cli") -> list[Any]:
    """[exit code, which of the names a command imported], in a process of its own."""
    program = PROGRAM.format(module=module, names=names)
    argv = json.dumps(["sdrpn-eval", *words])
    done = subprocess.run(
        [sys.executable, "-c", program, argv], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Stock, and a run with a record and facts."""
    rows = [sample(i) for i in range(N)]
    folders = [
        write_run(tmp_path / "stock", {"tiny_vstar": rows}, model_args="proposer=none"),
        write_run(tmp_path / "rpn", {"tiny_vstar": rows}),
    ]
    write_record(folders[1], [record_line(i, "red", task="tiny_vstar") for i in range(6)])
    write_facts(folders[1], "aa")
    return folders


def test_the_list_names_what_is_slow(tmp_path: Path) -> None:
    """The check below would see it: `--update` writes versions down, and needs torch for it."""
    run = write_run(tmp_path / "run", {"toy": [sample(i) for i in range(6)]})
    words = ["gate", str(run), "--baseline", str(tmp_path / "b.json"), "--update"]
    assert imported(words, ["torch"]) == [0, ["torch"]]


@pytest.mark.parametrize("words", [[], ["gate"], ["compare"], ["ladder"], ["curve"], ["score"]])
def test_help_imports_nothing_slow(words: list[str]) -> None:
    assert imported([*words, "--help"], [*SLOW, "scipy"]) == [0, []]


def test_help_of_sdrpn_imports_nothing_slow() -> None:
    assert imported(["--help"], [*SLOW, "scipy"], module="sdrpn.cli") == [0, []]


@pytest.mark.parametrize("good", [True, False])
def test_a_gate_imports_nothing_slow(tmp_path: Path, runs: list[Path], good: bool) -> None:
    base = tmp_path / "b.json"
    assert imported(["gate", str(runs[1]), "--baseline", str(base), "--update"], []) == [0, []]
    if not good:
        next(runs[1].rglob("*_samples_*.jsonl")).unlink()
    words = ["gate", str(runs[1]), "--baseline", str(base), "--junit", str(tmp_path / "x.xml")]
    assert imported(words, SLOW) == [0 if good else 2, []]


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


def embedded_hashes() -> list[str]:
    rows = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    return [image_key(rows[i]["image"]) for i in range(N)]


def test_a_comparison_imports_nothing_slow_and_shows_pictures(tmp_path: Path) -> None:
    folders = [shown(tmp_path / name, embedded_hashes()) for name in ("stock", "rpn")]
    words = ["compare", *map(str, folders), "--out", str(tmp_path / "out")]
    slow = [name for name in SLOW if name not in ("datasets", "pandas")]
    assert imported(words, slow) == [0, []]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/webp") == len(set(embedded_hashes()))
    table = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"][0]
    assert table["boxes"]["rpn"][0]["questions"] == N


def stored(folder: Path, hashes: list[str], **more: Any) -> documents.StoredData | None:
    return documents.stored_data([gather(read_run(shown(folder, hashes, **more)))], "tiny_vstar")


def test_stored_rows_are_used_only_for_the_images_that_were_shown(tmp_path: Path) -> None:
    hashes = embedded_hashes()
    found = stored(tmp_path / "good", hashes)
    assert found
    assert [found.key(i) for i in range(N)] == hashes
    assert found.image(0).size == (448, 448)
    rows = load_dataset("parquet", data_files=str(BENCHMARK), split="train")
    assert found.box(3) == PixelBox(*rows[3]["box"])
    assert stored(tmp_path / "other", hashes[-1:] + hashes[1:]) is None
    assert stored(tmp_path / "none", hashes, record=False) is None
    assert stored(tmp_path / "chosen", hashes, process_docs="<function some at 0x7f>") is None
    assert stored(tmp_path / "gone", hashes, dataset_kwargs={"data_files": "/no/file"}) is None


@pytest.mark.parametrize(
    "place",
    [
        {"dataset_path": "pandas", "dataset_kwargs": {"data_files": "{file}"}},
        {"dataset_path": "{folder}", "dataset_kwargs": {}},
        {"dataset_path": "a/b", "dataset_kwargs": {"data_files": "https://x.invalid/a.parquet"}},
        {"dataset_path": "parquet", "dataset_kwargs": {"data_files": "https://x.invalid/a"}},
    ],
)
def test_a_results_file_names_no_other_place_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any]
) -> None:
    """Some readers of data sets unpickle, or fetch; results files come from others."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was opened"))
    file = tmp_path / "rows.pkl"
    file.write_bytes(b"")
    text = json.dumps(place).replace("{file}", str(file)).replace("{folder}", str(tmp_path))
    assert stored(tmp_path / "run", ["aa"] * N, **json.loads(text)) is None


@pytest.mark.parametrize(("name", "everything"), [("tiny_vstar", [False]), ("mme", [False, True])])
def test_the_files_of_all_tasks_are_read_only_where_a_task_is_theirs(
    monkeypatch: pytest.MonkeyPatch, name: str, everything: list[bool]
) -> None:
    asked, original = [], documents.task_manager

    def recorded(include_path: Any = None, include_defaults: bool = True) -> Any:
        asked.append(include_defaults)
        return original(include_path, include_defaults)

    monkeypatch.setattr(documents, "task_manager", recorded)
    documents.load_data([name])
    assert asked == everything
