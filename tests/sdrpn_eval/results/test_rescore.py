"""Recorded answers scored anew: the same scores from the same grader, others from a mended one."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmms_eval.tasks import TaskManager
from typer.testing import CliRunner

from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.cli import app
from sdrpn_eval.results.comparability import NotComparable
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.read import BadRun, Run, read_run
from sdrpn_eval.results.rescore import Change, Moved, changes, score_again
from sdrpn_eval.results.responses import read_source
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    manager,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tests.helpers.run_folders import (
    evaluate,
    record_line,
    sample,
    shade,
    write_facts,
    write_record,
    write_run,
)

TAGS = '[["<think>", "</think>"]]'
"""What lmms-eval's command line cuts out unless told not to."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    write(tiny_vstar_rows(8), folder / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.chdir(tmp_path)  # tasks write their submission files to the working directory
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def some_right(question: Any) -> str:
    say = {"What word?": "stop", "Which year?": "1999", "what pattern": "red level"}
    right = next((a for q, a in say.items() if question.text.startswith(q)), "A")
    return right if shade(question) != 1 else "B"


def rescored(
    run: Path, out: Path, index: Any = None, tasks: tuple[str, ...] = ()
) -> tuple[Run, list[Change]]:
    source = read_source(run, tasks)
    scored = score_again(source, out, index or manager())
    return scored, changes(source, scored)


def lines(run: Run, task: str) -> list[dict[str, Any]]:
    file = run.file.with_name(run.file.name.replace("_results.json", f"_samples_{task}.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


# The same grader


def test_the_same_grader_gives_the_same_files(data: Path, tmp_path: Path) -> None:
    tasks = ["textvqa_val", "docvqa_val", "vstar", "tiny_vstar"]
    write(textvqa_rows(4), data / "textvqa_val")
    write(docvqa_rows(3), data / "docvqa_val", "validation-00000-of-00001.parquet")
    write(vstar_rows(3, 2), data / "vstar")
    evaluate(tmp_path / "run", FakeEngine(some_right), tasks)
    old = read_run(tmp_path / "run")
    new, found = rescored(tmp_path / "run", tmp_path / "anew")
    assert set(new.tasks) == set(old.tasks)
    for task in old.tasks:
        assert lines(new, task) == lines(old, task)
    for name in ("results", "groups", "group_subtasks", "n-samples", "higher_is_better"):
        assert new.results.get(name) == old.results.get(name)
    vstar = next(one for one in found if (one.task, one.metric) == ("vstar", "accuracy,none"))
    assert vstar.before == vstar.after == pytest.approx(4 / 5)
    assert {one.changed for one in found} == {0}
    part, _ = rescored(tmp_path / "run", tmp_path / "part", tasks=("vstar",))
    assert set(part.tasks) == {"vstar_direct_attributes", "vstar_relative_position"}
    assert part.results["results"]["vstar"] == old.results["results"]["vstar"]
    assert new.results["rescored"]["from"] == str(old.file)
    assert new.scored_from == str(old.file)


def test_a_run_scored_anew_compares_with_its_record(data: Path, tmp_path: Path) -> None:
    evaluate(tmp_path / "run", FakeEngine(some_right), ["tiny_vstar"])
    new, _ = rescored(tmp_path / "run", tmp_path / "anew")
    comparison = compare([read_run(tmp_path / "run", "run"), new])
    assert comparison.rows[0].differences[0].ties == 8
    assert comparison.rows[0].images == 4
    assert comparison.tasks[0].looks["anew"]["zoomed"] == 1
    assert comparison.runs[1].labels[0].startswith("scored anew, from ")


# One's own tasks, mended

UTILS = """
def doc_to_visual(doc):
    return [doc["image"]]

def process_results(doc, results):
    return {{"accuracy": {{"score": {grade}, "image_id": doc["image_id"]}}}}

def mean(items):
    return sum(item["score"] for item in items) / len(items)
"""
STRICT = 'float(results[0] == doc["answer"])'
MENDED = 'float(results[0].lower().strip(" .") == doc["answer"])'


@pytest.fixture
def own(data: Path, tmp_path: Path) -> Callable[..., TaskManager]:
    """Writes the task `mine`, and indexes it. grade: the grader's expression."""

    def make(grade: str = STRICT, **more: Any) -> TaskManager:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "utils.py").write_text(UTILS.format(grade=grade))
        plain = {
            "task": "mine",
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(data / "tiny_vstar" / "data.parquet")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": 8, "until": []},
        }
        functions = (
            "doc_to_visual: !function utils.doc_to_visual\n"
            "process_results: !function utils.process_results\n"
            "metric_list:\n  - metric: accuracy\n    aggregation: !function utils.mean\n"
            "    higher_is_better: true\n"
        )
        by_hand = "" if "metric_list" in more else functions
        (folder / "mine.yaml").write_text(yaml.safe_dump(plain | more) + by_hand)
        return TaskManager(include_path=str(folder), include_defaults=False)

    return make


def test_a_mended_grader_changes_scores_and_is_another_scorer(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    """Image 1 was answered "B", the others "Level."."""
    say = FakeEngine(lambda q: "B" if shade(q) == 1 else "Level.")
    evaluate(tmp_path / "run", say, ["mine"], own())
    new, (change,) = rescored(tmp_path / "run", tmp_path / "anew", own(MENDED))
    assert change == Change("mine", "accuracy,none", 0.0, 0.75, 6)
    assert new.tasks["mine"].samples[0].answer == "Level."
    with pytest.raises(NotComparable, match="mine: other scorer"):
        compare([read_run(tmp_path / "run"), new])
    again, (change,) = rescored(tmp_path / "anew", tmp_path / "back", own(STRICT))
    assert (change.before, change.after, change.changed) == (0.75, 0.0, 6)
    assert compare([read_run(tmp_path / "run", "first"), again]).rows


def test_limit_offset_and_repeats_stay(own: Callable[..., TaskManager], tmp_path: Path) -> None:
    asked = []

    def say(question: Any) -> str:
        asked.append(question)
        return "level" if len(asked) % 3 else "go"

    evaluate(tmp_path / "run", FakeEngine(say), ["mine"], own(), limit=3, offset=2, repeats=2)
    old = read_run(tmp_path / "run")
    config = dict(old.results["config"]) | {"resolved_cli_args": {"repeats": 2}}
    old.file.write_text(json.dumps(dict(old.results) | {"config": config}))
    new, (change,) = rescored(tmp_path / "run", tmp_path / "anew", own())
    assert list(new.tasks["mine"].samples) == [2, 3, 4]
    assert len(lines(new, "mine")[0]["resps"]) == 2
    assert lines(new, "mine") == lines(old, "mine")
    assert change.changed == 0


FIRST_WORD = [
    {
        "name": "word",
        "filter": [
            {"function": "regex", "regex_pattern": "([a-z]+)"},
            {"function": "take_first"},
        ],
    }
]


def test_answers_that_a_filter_shortened_are_taken_from_the_record(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    say = FakeEngine(lambda q: "level, I think")
    cut = Namespace(reasoning_tags=TAGS, process_with_media=False, output_path=None)
    index = own(filter_list=FIRST_WORD)
    evaluate(tmp_path / "run", say, ["mine"], index, cli_args=cut)
    whole = 'float(results[0] == "level, I think")'
    _, (change, other) = rescored(tmp_path / "run", tmp_path / "anew", own(whole))
    assert (change.metric, change.before, change.after) == ("accuracy,word", 1.0, None)
    assert (other.metric, other.before, other.after) == ("accuracy,none", None, 1.0)
    for file in (tmp_path / "run" / "sdrpn_record").iterdir():
        file.unlink()
    with pytest.raises(BadRun, match="what its filters left of the answers"):
        rescored(tmp_path / "run", tmp_path / "not", own(whole))


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_visual": "image",
    "doc_to_choice": ["dotted", "A", "checked"],
    "doc_to_target": 1,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("tags", [None, TAGS])
def test_a_multiple_choice_is_scored_by_its_recorded_losses(
    own: Callable[..., TaskManager], tmp_path: Path, tags: str | None
) -> None:
    settings = Namespace(reasoning_tags=tags, process_with_media=True, output_path=None)
    evaluate(tmp_path / "run", FakeEngine(), ["mine"], own(**CHOICE), cli_args=settings)
    mended = CHOICE | {"doc_to_target": 0}
    _, (change,) = rescored(tmp_path / "run", tmp_path / "anew", own(**mended))
    assert (change.metric, change.before, change.after) == ("acc,none", 1.0, 0.0)
    assert change.changed == 8


# The record alone, and answers that were never scored


def crashed(run: Path) -> Path:
    """A run that answered everything and left no results."""
    for file in run.glob("tiny/*"):
        file.unlink()
    return run


def test_a_record_alone_tells_the_model_by_its_arguments(tmp_path: Path) -> None:
    for kind in ARGUMENTS.values():
        folder = tmp_path / kind.model_name
        write_record(folder, [record_line(0, "red")])
        write_facts(folder, "aa", arguments=kind.of({"pretrained": "x"}).model_dump(mode="json"))
        assert read_source(folder).config["model"] == kind.model_name


@pytest.mark.parametrize("more", [{}, CHOICE])
def test_a_run_that_crashed_while_it_scored_is_scored_from_its_record(
    own: Callable[..., TaskManager], tmp_path: Path, more: dict[str, Any]
) -> None:
    evaluate(tmp_path / "run", FakeEngine(lambda q: "level"), ["mine"], own(**more))
    new, (change,) = rescored(crashed(tmp_path / "run"), tmp_path / "anew", own(**more))
    assert (change.before, change.after, change.changed) == (None, 1.0, None)
    assert new.results["config"]["model"] == "llava_sdrpn"
    assert new.scored_from == str(tmp_path / "run" / "sdrpn_record")


def test_a_partial_record_is_no_run(own: Callable[..., TaskManager], tmp_path: Path) -> None:
    run = crashed(evaluate(tmp_path / "run", FakeEngine(), ["mine"], own()))
    (record,) = run.rglob("record_*.jsonl")
    record.write_text("".join(record.read_text().splitlines(True)[:5]))
    with pytest.raises(BadRun, match="holds 5 of the 8 documents of mine: start the same"):
        read_source(run)


def test_answers_without_a_score_are_scored(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    evaluate(tmp_path / "run", FakeEngine(lambda q: "level"), ["mine"], own(), predict_only=True)
    _, found = rescored(tmp_path / "run", tmp_path / "anew", own())
    assert [one.after for one in found if one.metric == "accuracy,none"] == [1.0]


# Other models


def as_llava_hf(run: Path) -> Path:
    """As a run of lmms-eval's own model: its results, and nothing of ours."""
    read = read_run(run)
    config = dict(read.results["config"]) | {"model": "llava_hf", "model_args": "pretrained=x"}
    read.file.write_text(json.dumps(dict(read.results) | {"config": config}))
    for file in (run / "sdrpn_record").iterdir():
        file.unlink()
    return run


def test_a_run_of_llava_hf_is_scored_too(own: Callable[..., TaskManager], tmp_path: Path) -> None:
    evaluate(tmp_path / "run", FakeEngine(lambda q: "Level."), ["mine"], own())
    new, (change,) = rescored(as_llava_hf(tmp_path / "run"), tmp_path / "anew", own(MENDED))
    assert (change.before, change.after, change.changed) == (0.0, 1.0, 8)
    assert (new.model, new.results["config"]["model_args"]) == ("llava_hf", "pretrained=x")


def test_losses_of_other_models_cannot_be_scored(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    run = as_llava_hf(evaluate(tmp_path / "run", FakeEngine(), ["mine"], own(**CHOICE)))
    with pytest.raises(BadRun, match=r"the samples of mine hold .* \(multiple_choice, \[\]\)"):
        rescored(run, tmp_path / "anew", own(**CHOICE))


def test_facts_beside_another_model_s_results_are_not_its(data: Path, tmp_path: Path) -> None:
    run = evaluate(tmp_path / "run", FakeEngine(), ["tiny_vstar"])
    assert read_source(run).facts
    read = read_run(run)
    config = dict(read.results["config"]) | {"model": "llava_hf"}
    read.file.write_text(json.dumps(dict(read.results) | {"config": config}))
    assert read_source(run).facts is None


def test_another_target_is_refused_where_no_facts_tell_data_from_grader(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    run = as_llava_hf(evaluate(tmp_path / "run", FakeEngine(), ["mine"], own()))
    with pytest.raises(Moved, match="mine: another target in 8 documents, such as 0"):
        rescored(run, tmp_path / "anew", own(doc_to_target="colour"))
    assert not (tmp_path / "anew").exists()


# Refusals


def rows(**changes: Any) -> Any:
    """tiny_vstar's rows with document 3 changed."""

    def change(row: dict[str, Any], i: int) -> dict[str, Any]:
        return row | changes if i == 3 else row

    return tiny_vstar_rows(8).map(change, with_indices=True)


def test_other_documents_are_refused(own: Callable[..., TaskManager], tmp_path: Path) -> None:
    evaluate(tmp_path / "run", FakeEngine(), ["mine"], own())
    for changed, says in (
        (rows(question="another"), "mine: another prompt in 1 document, such as 3: it was 'what"),
        (rows(width=41), "mine: other data than the run was asked (fingerprint "),
        (tiny_vstar_rows(7), "mine: 1 document is no longer asked, such as 7"),
        (tiny_vstar_rows(9), "mine: 1 document was not answered, such as 8"),
    ):
        write(changed, tmp_path / "data" / "tiny_vstar")
        with pytest.raises(Moved) as error:
            rescored(tmp_path / "run", tmp_path / "anew", own())
        assert says in str(error.value)
    assert not (tmp_path / "anew").exists()


def test_more_options_than_were_answered_are_refused(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    run = evaluate(tmp_path / "run", FakeEngine(), ["mine"], own(**CHOICE))
    for file in run.rglob("run_facts_*"):
        file.unlink()  # which tell of other prompts
    more = CHOICE | {"doc_to_choice": ["dotted", "A", "checked", "B"]}
    with pytest.raises(Moved, match="document 0 is asked more, or with other options"):
        rescored(run, tmp_path / "anew", own(**more))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("other", "holds results already"),
        ("run/anew", "lies inside the run's own folder"),
        ("run/tiny/anew", "lies inside the run's own folder"),
    ],
)
def test_nothing_is_written_over(tmp_path: Path, out: str, says: str) -> None:
    for name in ("run", "other"):
        write_run(tmp_path / name, {"toy": [sample(0)]})
    with pytest.raises(ValueError, match=says):
        score_again(read_source(tmp_path / "run"), tmp_path / out, None)


# The command


def test_command_says_what_changed(
    own: Callable[..., TaskManager], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(tmp_path / "run", FakeEngine(lambda q: "Level."), ["mine"], own())
    mended = own(MENDED)
    monkeypatch.setattr("sdrpn_eval.results.documents.task_manager", lambda path: mended)
    done = CliRunner().invoke(app, ["score", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "mine, accuracy 0.0000 1.0000 8" in said
    assert "8 documents have another accuracy in mine." in said
    assert read_run(tmp_path / "run-rescored").results["results"]["mine"]["accuracy,none"] == 1
    done = CliRunner().invoke(app, ["score", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "run-rescored holds results already" in " ".join(done.output.split())


def test_a_task_that_is_unknown_by_now_is_named(
    own: Callable[..., TaskManager], tmp_path: Path
) -> None:
    evaluate(tmp_path / "run", FakeEngine(), ["mine"], own())
    with pytest.raises(BadRun, match=r"knows no task mine; give --include_path FOLDER"):
        rescored(tmp_path / "run", tmp_path / "anew", manager())
