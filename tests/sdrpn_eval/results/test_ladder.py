"""The ladder: a run for each way to look, made once, compared and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdrpn_eval.cli import app
from sdrpn_eval.cli.ladder import caption
from sdrpn_eval.report.figures import draw_ladder, shown
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.ladder import Ladder, RunFailed, finished_run, make_run
from sdrpn_eval.results.read import read_run
from tests.helpers.run_folders import sample, write_run

RIGHT = {"none": 2, "vicrop": 3, "attention": 5, "rpn": 6, "box": 8}
"""How many of eight questions each answers."""


class Documents:
    """A task's documents without pictures."""

    def __init__(self, has_boxes: bool) -> None:
        self.has_boxes = has_boxes

    def image(self, doc_id: int) -> None:
        return None

    def key(self, doc_id: int) -> None:
        return None

    def box(self, doc_id: int) -> None:
        return None


class Runner:
    """Stands in for lmms-eval: a process that leaves what a run of `toy` leaves, or fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.script = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
        monkeypatch.setattr(Ladder, "command", lambda plan, p: self.command(plan, p))

    def command(self, plan: Ladder, proposer: str) -> list[str]:
        self.asked.append(proposer)
        made = self.folder / f"{len(self.asked)}_{proposer}"
        rows = [sample(i, "red" if i < RIGHT[proposer] else "blue") for i in range(8)]
        arguments = plan.arguments(proposer)
        write_run(
            made,
            {"toy": rows},
            model_args=arguments,
            limit=plan.limit,
            cli={"tasks": plan.tasks},
            date=f"20260301_1200{len(self.asked):02}",
        )
        return [sys.executable, "-c", self.script, str(made), str(plan.folder(proposer))]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path / "made", monkeypatch)


def plan(out: Path, **more: Any) -> Ladder:
    return Ladder(out, "toy", "pretrained=tiny", **{"limit": None, "batch_size": "4"} | more)


def run_ladder(
    monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, boxes: bool = True
) -> tuple[int, str]:
    data = {"toy": Documents(boxes)}
    monkeypatch.setattr(
        "sdrpn_eval.results.documents.load_data", lambda tasks, include_path: (data, [])
    )
    done = CliRunner().invoke(app, ["ladder", "--tasks", "toy", "--out", str(out), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, " ".join(done.output.split())


def test_one_command_makes_runs_comparison_and_figure(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ladder"
    code, said = run_ladder(monkeypatch, out)
    assert code == 0, said
    assert runner.asked == ["none", "vicrop", "attention", "rpn", "box"]
    content = json.loads((out / "comparison.json").read_text())
    means = {s["run"]: s["mean"] for s in content["rows"][0]["scores"]}
    assert means == {
        "stock": 2 / 8,
        "vicrop": 3 / 8,
        "attention": 5 / 8,
        "rpn": 6 / 8,
        "true box": 1.0,
    }
    assert "rpn is better than stock" not in said  # not of eight questions
    assert "toy: too few to tell rpn from stock" in said
    for name in ("comparison.md", "comparison.html", "ladder.svg"):
        assert (out / name).stat().st_size > 1000
    with Image.open(out / "ladder.png") as figure:
        assert figure.width == 1600  # twice the width of a README's column


def test_what_is_there_is_not_made_again(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ladder"
    run_ladder(monkeypatch, out, "--proposers", "none,rpn")
    (torn,) = out.glob("rpn/tiny/*.jsonl")  # as if it had been killed there
    torn.write_text(torn.read_text()[:-30])
    code, said = run_ladder(monkeypatch, out, "--proposers", "none,vicrop,rpn")
    assert code == 0, said
    assert runner.asked == ["none", "rpn", "vicrop", "rpn"]
    assert "none: done before" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"limit": 3}, "--limit None then, 3 now"),
        ({"model_args": "pretrained=tiny,threshold=0.1"}, "threshold None then, 0.1 now"),
        ({"tasks": "toy,else"}, "--tasks toy then, toy,else now"),
        ({"model": "qwen2_5_vl_sdrpn"}, "--model llava_sdrpn then, qwen2_5_vl_sdrpn now"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    runner: Runner, tmp_path: Path, more: dict[str, Any], says: str
) -> None:
    first = plan(tmp_path)
    make_run(first, "none")
    assert finished_run(first, "none")
    other = {"out": tmp_path, "tasks": "toy", "model_args": "pretrained=tiny"} | more
    with pytest.raises(ValueError, match="none holds another run") as error:
        finished_run(Ladder(**{"limit": None, "batch_size": "1"} | other), "none")
    assert says in str(error.value)


def test_a_run_with_other_weights_is_refused(runner: Runner, tmp_path: Path) -> None:
    first = plan(tmp_path)
    make_run(first, "none")
    facts = {
        "run": "20260301T120001.000000Z",
        "rank": 0,
        "versions": {},
        "weights": {"pretrained/model.safetensors": "0123"},
        "arguments": {"pretrained": "tiny", "proposer": "none", "revision": "main"},
        "device": {},
        "seeds": None,
        "source": None,
        "tasks": {},
    }
    (tmp_path / "none" / "sdrpn_record").mkdir()
    file = tmp_path / "none" / "sdrpn_record" / f"run_facts_{facts['run']}_rank0.json"
    file.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"the weights pretrained/model\.safetensors 0123 then"):
        finished_run(first, "none")


def test_a_run_that_failed_ends_with_its_log_and_exit_code(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.script = "print('first line'); print('\\n' * 20 + 'out of memory'); raise SystemExit(3)"
    code, said = run_ladder(monkeypatch, tmp_path / "ladder")
    assert code == 2
    assert "lmms-eval's exit code was 3" in said
    assert "out of memory" in said
    assert "first line" not in said
    assert runner.asked == ["none"]


def test_results_that_are_not_whole_are_a_failure_whatever_the_exit_code(
    runner: Runner, tmp_path: Path
) -> None:
    runner.script += "; import pathlib; next(pathlib.Path(sys.argv[2]).rglob('*.jsonl')).unlink()"
    with pytest.raises(RunFailed, match=r"no samples of toy beside it.*exit code was 0"):
        make_run(plan(tmp_path), "none")


def test_the_oracle_is_left_out_where_documents_have_no_boxes(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = run_ladder(
        monkeypatch, tmp_path / "ladder", "--proposers", "none,rpn,box", boxes=False
    )
    assert code == 0, said
    assert runner.asked == ["none", "rpn"]
    assert "note: box is left out: the documents of toy have none" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--proposers", "rpn"], "--proposers needs two different ones or more, got 'rpn'"),
        (["--proposers", "rpn,rpn"], "needs two different ones or more"),
        (["--model_args", "proposer=rpn"], "--model_args must not name a proposer"),
        (["--processes", "0"], "--processes must be 1 or more, or auto, got '0'"),
        (["--model", "llava_hf"], "--model must be llava_sdrpn or qwen2_5_vl_sdrpn, got"),
    ],
)
def test_wrong_use_ends_with_one_sentence(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    code, said = run_ladder(monkeypatch, tmp_path, *words)
    assert (code, runner.asked) == (2, [])
    assert says in said


def test_the_command_line_of_a_run(tmp_path: Path) -> None:
    made = plan(tmp_path, limit=5, include_path="mine").command("attention")
    assert made[1:5] == ["-m", "lmms_eval", "--model", "llava_sdrpn"]
    words = " ".join(made)
    assert "--model_args pretrained=tiny,proposer=attention --batch_size 4" in words
    assert f"--output_path {tmp_path / 'attention'} --log_samples --limit 5" in words
    assert words.endswith("--include_path mine")
    other = plan(tmp_path, model="qwen2_5_vl_sdrpn").command("rpn")
    assert other[1:5] == ["-m", "lmms_eval", "--model", "qwen2_5_vl_sdrpn"]
    several = " ".join(plan(tmp_path, processes=8).command("rpn")[1:])
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 8 -m lmms_eval --model "
    assert several.startswith(launcher)
    bare = Ladder(tmp_path, "toy", "", None, "1")
    assert bare.arguments("rpn") == "proposer=rpn"


# The figure


def several_metrics(tmp_path: Path) -> list[Any]:
    """Two runs of one task with a metric for all and one for half of its questions."""
    folders = []
    for name, right in (("stock", 2), ("rpn", 6)):
        rows = []
        for i in range(8):
            score = {"score": float(i < right)}
            part = score if i % 2 else {}
            rows.append(sample(i, accuracy=score, accuracy_fine=part, unread=score))
        totals = {"accuracy,none": right / 8, "accuracy_fine,none": right / 2 / 4}
        totals["unread,none"] = right / 8
        better = {"accuracy": True, "accuracy_fine": True, "unread": False}
        folders.append(write_run(tmp_path / name, {"toy": rows}, {"toy": totals}, better=better))
    return [read_run(folder) for folder in folders]


def test_bars_are_a_task_s_metrics_or_several_tasks_main_ones(tmp_path: Path) -> None:
    one = compare(several_metrics(tmp_path))
    assert [row.metric for row in shown(one)] == ["accuracy", "accuracy_fine"]
    rows = [sample(i, accuracy=1.0, accuracy_fine=1.0) for i in range(3)]
    totals = {"accuracy,none": 1.0, "accuracy_fine,none": 1.0}
    runs = [
        read_run(write_run(tmp_path / n, {"x": rows, "y": rows}, {"x": totals, "y": totals}))
        for n in ("a", "b")
    ]
    assert [(r.task, r.metric) for r in shown(compare(runs))] == [
        ("x", "accuracy"),
        ("y", "accuracy"),
    ]


def test_the_figure_names_what_it_shows(tmp_path: Path) -> None:
    comparison = compare(several_metrics(tmp_path))
    how = caption(comparison, plan(tmp_path))
    assert "--model_args pretrained=tiny --tasks toy, one run for each proposer" in how
    draw_ladder(comparison, how, [tmp_path / "ladder.svg"])
    text = (tmp_path / "ladder.svg").read_text()
    for words in ("stock", "rpn", "all questions", "fine", "25.0", "75.0", "accuracy, %"):
        assert f"<!-- {words} -->" in text, words
    assert "<!-- Measured by lmms-eval" in text


def test_without_a_score_to_draw_there_is_no_figure(tmp_path: Path) -> None:
    rows = [sample(i, points=100.0 * i) for i in range(3)]
    totals = {"toy": {"points,none": 100.0}}
    runs = [
        read_run(write_run(tmp_path / n, {"toy": rows}, totals, better={"points": True}))
        for n in ("a", "b")
    ]
    with pytest.raises(ValueError, match="no task has a score a document between 0 and 1"):
        draw_ladder(compare(runs), "", [tmp_path / "ladder.png"])


# With lmms-eval itself


@pytest.mark.slow
def test_a_run_of_a_ladder_is_known_again(tmp_path: Path) -> None:
    real = Ladder(tmp_path / "out", "tiny_vstar", "pretrained=tiny", 3, "4")
    run, seconds = make_run(real, "box")
    assert list(run.tasks["tiny_vstar"].samples) == [0, 1, 2]
    assert (run.name, run.arguments["proposer"]) == ("true box", "box")
    assert seconds > 0
    known = finished_run(real, "box")
    assert known is not None
    assert known.file == run.file


def test_help_needs_no_torch() -> None:
    """Each command's --help comes up without the libraries that take seconds to load."""
    code = (
        "import sys; sys.argv = ['sdrpn-eval', '{}', '--help']\n"
        "from sdrpn_eval.cli import app\n"
        "try:\n    app()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {{'torch', 'lmms_eval', 'transformers', 'datasets', 'matplotlib'}}\n"
        "print('loaded', heavy & set(sys.modules))"
    )
    for command in ("score", "replay", "ladder"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(command)], capture_output=True, text=True
        )
        assert done.stdout.endswith("loaded set()\n"), done.stdout + done.stderr
        assert f"sdrpn-eval {command} " in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--proposers", "none,zoom"], "--proposers must be of rpn, attention, vicrop, none, box"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, or auto, got '0'"),
        (["--batch-size", "-4"], "--batch-size must be 1 or more, or auto, got '-4'"),
        (["--batch-size", "some"], "--batch-size must be 1 or more, or auto, got 'some'"),
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--limit", "-5"], "--limit must be 1 or more, got -5"),
        (["--tasks", ","], "--tasks names no task, got ','"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_options_that_cannot_mean_anything_are_refused_before_anything_runs(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    code, said = run_ladder(monkeypatch, tmp_path / "ladder", *words)
    assert code == 2
    assert says in said
    assert runner.asked == []
