"""`sdrpn-eval card`: its files, as huggingface_hub reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.cli import app
from tests.helpers.run_folders import (
    FACTS,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)

HUB = {"dataset_path": "lmms-lab-encoder/DocVQA"}


def card(*words: object) -> str:
    done = CliRunner().invoke(app, ["card", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of 12 of 40 documents, 9 are right; two questions an image."""
    rows = [sample(i, "red" if i < 9 else "blue") for i in range(12)]
    folder = write_run(tmp_path / "rpn", {"docvqa_val_public": rows}, config=HUB, original=40)
    lines = [record_line(i, row["filtered_resps"]) for i, row in enumerate(rows)]
    write_record(folder, [line | {"task": "docvqa_val_public"} for line in lines])
    versions = {"sdrpn": "0.1.0", "lmms_eval": "0.7.3", "torch": "2.14.1", "numpy": "2.4"}
    tasks = {"docvqa_val_public": FACTS["tasks"]["toy"]}
    source = {"commit": "0123456789abcdef", "changed": False}
    write_facts(folder, "3", versions=versions, source=source, tasks=tasks)
    return folder


NOTES = (
    "accuracy 75 [23.14, 98.97], 95 % interval clustered by image; 12 questions, 12 of 40 "
    "documents asked; threshold: 0.1 (as published for docvqa); llava_sdrpn: pretrained=tiny, "
    "proposer=rpn; commit 0123456789; sdrpn 0.1.0, lmms_eval 0.7.3, torch 2.14.1"
)


def test_the_hub_reads_the_entry(run: Path, tmp_path: Path) -> None:
    card(run, "--to", tmp_path / "model", "--source", "https://example.org/report.html")
    text = (tmp_path / "model" / ".eval_results" / "docvqa_val_public.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("lmms-lab-encoder/DocVQA", "docvqa_val_public")
    assert entry.value == 75.0
    assert entry.date == "2026-03-01T12:00:00+00:00"
    assert entry.source_url == "https://example.org/report.html"
    assert entry.notes == NOTES


def test_the_card_of_a_trained_rpn_keeps_its_text(
    run: Path, tmp_path: Path, perturbed_rpn: RPN
) -> None:
    folder = tmp_path / "my-rpn"
    perturbed_rpn.save_pretrained(folder)
    before = ModelCard.load(folder / "README.md")
    for _ in range(2):  # the second time replaces, and adds nothing
        card(run, "--to", folder, "--name", "you/my-rpn")
    after = ModelCard.load(folder / "README.md")
    assert after.text.startswith(before.text.rstrip())
    assert after.text.count("## Evaluation\n") == 1
    assert (
        "| docvqa\\_val\\_public | accuracy | 75 [23.14, 98.97] | 12 questions, 12 of" in after.text
    )
    assert (after.data["library_name"], after.data["tags"]) == ("sdrpn", before.data["tags"])
    (result,) = after.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 75.0)
    assert (result.dataset_type, result.dataset_name) == (HUB["dataset_path"], "docvqa_val_public")
    assert result.metric_args == {"notes": NOTES}
    perturbed_rpn.save_pretrained(folder)  # other weights, so no scores
    assert "## Evaluation" not in (folder / "README.md").read_text()


def test_several_runs_and_tasks(run: Path, tmp_path: Path) -> None:
    rows = {name: [sample(i) for i in range(4)] for name in ("docvqa_val_public", "toy")}
    stock = write_run(tmp_path / "stock", rows, config={"dataset_path": "parquet"})
    output = card(
        run, stock, "--to", tmp_path / "m", "--dataset", "docvqa_val_public=lmms-lab/DocVQA"
    )
    assert "note: toy has no entry, since its dataset has no id on the Hub" in output
    names = {path.name for path in (tmp_path / "m" / ".eval_results").iterdir()}
    assert names == {"docvqa_val_public_rpn.yaml", "docvqa_val_public_stock.yaml"}
    board = (tmp_path / "m" / "leaderboard.md").read_text().splitlines()
    assert board[0] == "| model | docvqa\\_val\\_public | toy |"
    assert board[2] == "| m, rpn | 75 [23.14, 98.97] |  |"
    assert board[3].startswith("| m, stock | 100 [")
    assert len(ModelCard.load(tmp_path / "m" / "README.md").data.eval_results) == 3


def test_a_metric_without_a_score_a_document_has_no_interval(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(4)]
    totals = {"pope_public": {"pope_f1_score,none": 87.1}}
    run = write_run(tmp_path / "run", {"pope_public": rows}, totals, config=HUB)
    card(run, "--to", tmp_path / "m")
    text = (tmp_path / "m" / ".eval_results" / "pope_public.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert entry.value == 87.1
    assert entry.notes.startswith("pope_f1_score 87.1, no interval; threshold: none; llava_sdrpn: ")


def test_wrong_use_ends_with_one_sentence(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(run), "--to", str(tmp_path), "--dataset", "toy=x"])
    assert done.exit_code == 2
    assert "--dataset must be TASK=OWNER/NAME, got toy=x" in " ".join(done.output.split())
