"""Which runs may be compared, and what the refusal names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.report import text
from sdrpn_eval.results.comparability import NotComparable, established
from sdrpn_eval.results.read import read_run
from tests.helpers.comparisons import compared, pair, refusal
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tests.helpers.run_folders import (
    SCORER_SETTINGS,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    write(textvqa_rows(4), folder / "textvqa_val")
    write(docvqa_rows(4), folder / "docvqa", "validation-00000-of-00001.parquet")
    write(docvqa_rows(2), folder / "docvqa", "test-00000-of-00001.parquet")
    write(vstar_rows(5, 3), folder / "vstar")
    write(tiny_vstar_rows(8), folder / "tiny_vstar")
    monkeypatch.setenv("SDRPN_DATA", str(folder))
    monkeypatch.chdir(tmp_path)  # tasks write their submission files to the working directory
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("setting", SCORER_SETTINGS)
def test_each_setting_that_makes_a_score_is_compared(tmp_path: Path, setting: str) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows, config={setting: SCORER_SETTINGS[setting]})
    with pytest.raises(NotComparable, match=rf"toy: other scorer, {setting}.* is "):
        compared(*folders)


def test_a_metric_of_one_run_only_is_another_scorer(tmp_path: Path) -> None:
    """Of the same settings: a grader that returns one metric more."""
    rows = [sample(i) for i in range(2)]
    config = {"metric_list": [{"metric": "accuracy"}]}
    more = {"toy": {"accuracy,none": 1.0, "unparsed,none": 0.0}}
    one = write_run(tmp_path / "one", {"toy": rows}, config=config)
    two = write_run(tmp_path / "two", {"toy": rows}, more, config=config)
    assert "toy: other metrics, unparsed,none in one only" in refusal(one, two)


def test_what_was_found_to_be_the_same_is_listed(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(4)]
    folders = pair(tmp_path, rows, rows)
    assert established(compared(*folders).evidence, ["toy"]) == [
        "Same documents, prompts and targets: 4 questions, checked one by one.",
        "Same images: not known, stock, rpn left no record of them.",
        "Same scorer: by its settings in the results file only.",
    ]
    for folder in folders:
        write_record(folder, [record_line(i, "red") for i in range(4)])
        write_facts(folder, "aa")
    assert established(compared(*folders).evidence, ["toy"])[1:] == [
        "Same images: by the content hash of each.",
        "Same scorer: by its source and settings.",
    ]


def test_other_documents_and_limits_are_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(5)]
    text_ = refusal(*pair(tmp_path, rows, rows[:3], limit=3.0, original=5))
    assert "toy: other documents, 5 and 3, such as 3 in one only (limits: none and 3)" in text_


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": "another question"}, "toy: other prompts in 1 document, such as 1"),
        ({"target": "green"}, "toy: other targets in 1 document, such as 1"),
    ],
)
def test_other_prompts_and_targets_are_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    rows = [sample(i) for i in range(3)]
    assert says in refusal(*pair(tmp_path, rows, [rows[0], rows[1] | change, rows[2]]))


def test_other_images_are_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    write_record(folders[0], [record_line(i, "red") for i in range(2)])
    other = {"images": [{"hash": "else", "size": [100, 100]}]}
    write_record(folders[1], [record_line(0, "red"), record_line(1, "red", **other)])
    assert "toy: other images in 1 document, such as 1" in refusal(*folders)


def test_another_scorer_is_refused_by_settings_and_by_source(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows, config={"process_results": "<function strict at 0x7f>"})
    assert "toy: other scorer, process_results is None and <function strict>" in refusal(*folders)
    folders = pair(tmp_path, rows, rows)
    for folder, scorer in zip(folders, ("aa", "bb"), strict=True):
        write_facts(folder, scorer)
    assert "toy: other scorer (source aa and bb)" in refusal(*folders)


def test_other_data_behind_the_same_prompts_is_refused(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, rows)
    for folder, data in zip(folders, ("1", "7"), strict=True):
        write_facts(folder, "aa", data)
    told = f"({1:032x} and {7:032x})"
    assert f"toy: other data, in columns that prompts do not show {told}" in refusal(*folders)


def test_addresses_in_the_settings_are_no_difference(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = pair(tmp_path, rows, [dict(row) for row in rows])
    configs = [read_run(f).tasks["toy"].config["metric_list"] for f in folders]
    assert configs[0] != configs[1]  # as lmms-eval writes them, with an address in memory
    assert compared(*folders).rows


def test_runs_without_a_common_task_are_refused(tmp_path: Path) -> None:
    rows = [sample(0)]
    one, two = write_run(tmp_path / "1", {"x": rows}), write_run(tmp_path / "2", {"y": rows})
    assert "no task in common (1: x; 2: y)" in refusal(one, two)


def test_a_task_of_one_run_only_is_named(tmp_path: Path) -> None:
    rows = [sample(0)]
    one = write_run(tmp_path / "1", {"x": rows, "y": rows})
    notes = compared(one, write_run(tmp_path / "2", {"x": rows})).notes
    assert "y is not compared: 2 has no such task" in notes


def test_llava_hf_is_compared_and_labelled(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(3)]
    stock, ours = pair(tmp_path, rows, rows)
    hf = write_run(tmp_path / "hf", {"toy": rows}, model="llava_hf", model_args="pretrained=x")
    comparison = compared(stock, ours, hf)
    assert [run.labels for run in comparison.runs] == [[], [], ["other preprocessing"]]
    assert "hf: other preprocessing" in text.cautions(comparison)


def test_other_padding_and_generation_arguments_are_labelled(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(3)]
    config = {"generation_kwargs": {"max_new_tokens": 99}}
    more = {"model_args": "pretrained=tiny,padding=crop", "config": config}
    comparison = compared(*pair(tmp_path, rows, rows, **more))
    assert comparison.runs[1].labels == [
        "other preprocessing",
        "other generation arguments: max_new_tokens=99",
    ]


def test_a_changed_system_prompt_with_commas_is_noticed(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    prompts = ("Look closely, then answer.", "Look closely, or not.", "Look closely, then answer.")
    folders = [
        write_run(
            tmp_path / name,
            {"toy": rows},
            model_args=f'pretrained=tiny,system_prompt="{prompt}"{more}',
        )
        for name, prompt, more in zip("abc", prompts, ("", "", ",padding=pad"), strict=True)
    ]
    comparison = compared(*folders)
    assert [run.labels for run in comparison.runs] == [[], ["other preprocessing"], []]


def test_preprocessing_is_compared_as_resolved(tmp_path: Path) -> None:
    """One run names its prompt by a file, the other gives the text of it."""
    rows = [sample(i) for i in range(2)]
    folders = [
        write_run(tmp_path / name, {"toy": rows}, model_args=f"system_prompt={given}")
        for name, given in (("a", "/x/prompt.txt"), ("b", '"Be brief, please."'))
    ]
    for folder in folders:
        arguments = {"padding": "pad", "system_prompt": "Be brief, please."}
        write_facts(folder, "aa", arguments=arguments)
    assert compared(*folders).runs[1].labels == []
    write_facts(folders[1], "aa", arguments=arguments | {"system_prompt": "Be long."})
    assert compared(*folders).runs[1].labels == ["other preprocessing"]


def metrics(**more: Any) -> dict[str, Any]:
    return {"metric_list": [{"metric": "accuracy", "higher_is_better": True}, more]}


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"repeats": 1}, {"repeats": 3}, "repeats is 1 and 3"),
        (
            metrics(metric="f1", ignore_case=True),
            metrics(metric="f1", ignore_case=False),
            "metric_list[f1].ignore_case is True and False",
        ),
        (metrics(metric="f1"), metrics(metric="em"), "metric_list[f1] is there and missing"),
        (metrics(metric="f1"), metrics(metric="f1", a=1), "metric_list[f1].a is missing and there"),
        ({"score_key": "score"}, {"score_key": "anls"}, "score_key is score and anls"),
    ],
)
def test_a_changed_setting_of_the_scorer_is_named(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], told: str
) -> None:
    """By facts of this version and of older ones: the source is the same."""
    rows = [sample(i) for i in range(2)]
    folders = [
        write_run(tmp_path / name, {"toy": rows}, config=config)
        for name, config in (("a", one), ("b", other))
    ]
    for more in ({}, {"scorer_source": "cc"}):
        for folder, scorer in zip(folders, ("aa", "bb"), strict=True):
            marks = {"toy": {"data": "1", "prompts": "2", "scorer": scorer, **more}}
            write_facts(folder, scorer, tasks=marks)
        said = refusal(*folders)
        assert f"toy: other scorer, {told}" in said
        assert "source" not in said


def test_a_changed_source_is_named_beside_a_setting(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folders = [
        write_run(tmp_path / name, {"toy": rows}, config={"repeats": n})
        for name, n in (("a", 1), ("b", 3))
    ]
    for folder, scorer, source in zip(folders, ("aa", "bb"), ("c1", "c2"), strict=True):
        marks = {"toy": {"data": "1", "prompts": "2", "scorer": scorer, "scorer_source": source}}
        write_facts(folder, scorer, tasks=marks)
    said = refusal(*folders)
    assert "toy: other scorer, repeats is 1 and 3" in said
    assert "toy: other scorer (source c1 and c2)" in said
