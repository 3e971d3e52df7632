"""docs/reproduce.md: its commands name what exists, its numbers are the published ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from lmms_eval.utils import simple_parse_args_string
from typer.core import TyperGroup

from sdrpn_eval.args import ARGUMENTS
from sdrpn_eval.cli import app
from sdrpn_eval.results.published import PUBLISHED
from sdrpn_eval.subsets import names, read_subset
from sdrpn_eval.tasks_info import PROTOCOLS, THRESHOLDS
from tests.helpers.local_benchmarks import PAPER, manager

PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())


def commands() -> Iterator[list[str]]:
    """The words of every command on the page, without settings of the environment."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            while "=" in words[0]:
                words.pop(0)
            yield words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_kind_of_command_is_known() -> None:
    kinds = {words[0] for words in commands()}
    assert kinds == {"pip", "hf", "lmms-eval", "sdrpn-eval"}


def test_evaluations_name_tasks_and_arguments_that_exist() -> None:
    index = manager(*PAPER).task_index
    seen = set()
    for words in commands():
        if words[0] != "lmms-eval":
            continue
        kind = ARGUMENTS[option(words, "--model")]
        assert "--log_samples" in words
        for task in option(words, "--tasks").split(","):
            assert task in index, task
        arguments = simple_parse_args_string(option(words, "--model_args"))
        kind.of(arguments)
        seen.add((option(words, "--tasks"), *sorted(arguments.items())))
    for size in ("7b", "13b"):
        model = ("pretrained", f"llava-hf/llava-1.5-{size}-hf")
        assert ("sdrpn_paper", model) in seen
        assert ("sdrpn_paper", model, ("proposer", "none")) in seen
        assert ("sdrpn_paper", model, ("proposer", "vicrop")) in seen
        assert ("sdrpn_paper", model, ("threshold", 0.15)) in seen


def test_what_is_compared_was_run() -> None:
    run = {option(w, "--output_path") for w in commands() if w[0] == "lmms-eval"}
    read = {word for w in commands() if w[0] != "lmms-eval" for word in w if word[:4] == "out/"}
    assert read <= run


def test_our_own_commands_parse() -> None:
    for words in commands():
        if words[0] == "sdrpn-eval":
            command, rest = typer.main.get_command(app), words[1:]
        else:
            continue
        with command.make_context("x", list(rest)) as context:
            if isinstance(command, TyperGroup):
                name, sub, left = command.resolve_command(context, list(rest))
                assert sub is not None
                sub.make_context(name, left)


ROWS = {"stock": "stock", "+ ViCrop": "vicrop", "+ SD-RPN": "rpn"}


def test_the_table_holds_the_published_numbers() -> None:
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.count(" | ") == 10]
    size, read = "", {}
    for name, *cells in lines:
        for family, prefix in (("LLaVA-1.5", ""), ("Qwen2.5-VL", "qwen-")):
            if name.startswith(f"{family}-"):
                size, name = prefix + name.removeprefix(f"{family}-").lower(), "stock"
        if name in ROWS:
            numbers = [float(n) for cell in cells[:-1] for n in cell.split(" / ")]
            read[size, ROWS[name]] = numbers
    assert set(read) == {row for row in PUBLISHED if row[1] != "S2"}
    for row, numbers in read.items():
        columns = PUBLISHED[row]
        assert numbers == [columns[c] for c in columns if c != "throughput"]


A6000_FLOPS, A6000_BANDWIDTH, HALF = 155e12, 768e9, 0.5
COST = {"7b": (9.1e12, 13.5e9), "13b": (17.5e12, 26.0e9)}
"""Operations of a prompt, and bytes of the language model."""


def test_hours_are_what_the_page_says_they_are_made_of() -> None:
    every = {name: read_subset(name) for name in names()}
    questions = sum(one.rows for one in every.values())
    assert f"{questions:,} questions" in WORDS
    assert f"{sum(len(one.ids) for one in every.values()):,} questions" in WORDS
    plain = questions - every["ocrbench_ci"].rows
    for size, (operations, weights) in COST.items():
        prompt = operations / (HALF * A6000_FLOPS)
        token = weights / (HALF * A6000_BANDWIDTH)
        stock = (plain * (prompt + 5 * token) + 1000 * (prompt + 20 * token)) / 3600
        for method in ("stock", "vicrop", "rpn"):
            row = PUBLISHED[size, method]
            hours = stock / row["throughput"]
            line = next(
                x for x in PAGE.splitlines() if x.startswith("|") and f"| {row['docvqa']} |" in x
            )
            assert line.endswith(f"| {hours:.1f} |"), (size, method, hours)


@pytest.mark.parametrize("name", ["ocrbench", "docvqa", "textvqa"])
def test_thresholds_on_the_page_are_the_published_ones(name: str) -> None:
    assert "(0.05 OCRBench; 0.1 DocVQA, V*, HR-Bench; 0.15 the others)" in WORDS
    assert THRESHOLDS[name] == {"ocrbench": 0.05, "docvqa": 0.1, "textvqa": 0.15}[name]


def test_every_protocol_s_task_is_explained() -> None:
    ours = {"textvqa_val_ocr", "vstar_harness", "vstar_shuffled", "vstar_likelihood"}
    ours |= {"hrbench4k_offline", "hrbench8k_offline"}
    assert ours <= set(PROTOCOLS)
    assert all(f"`{task}`" in PAGE for task in ours)
