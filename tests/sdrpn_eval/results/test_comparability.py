"""Which runs may be compared, and what the refusal names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdrpn_eval.provenance.model import Provenance
from sdrpn_eval.report import text
from sdrpn_eval.results.comparability import (
    Evidence,
    NotComparable,
    changes,
    common_tasks,
    established,
    labels,
    moved_in_task,
    other_data,
    preprocessing,
    refuse_moved,
)
from sdrpn_eval.results.read import Run, Sample, TaskRun, read_run
from sdrpn_eval.results.records import Record
from tests.helpers.comparisons import compared, pair, refusal
from tests.helpers.local_benchmarks import (
    docvqa_rows,
    textvqa_rows,
    tiny_vstar_rows,
    vstar_rows,
    write,
)
from tests.helpers.run_folders import (
    FACTS,
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


# By hand, without files


def one(doc_id: int, prompt: str = "q", target: str = "t") -> Sample:
    return Sample(doc_id, prompt, target, "red", (None, None), {})


def ran(
    samples: Sequence[Sample] = (one(0), one(1)),
    name: str = "a",
    *,
    tasks: Sequence[str] = ("toy",),
    config: Mapping[str, Any] | None = None,
    totals: Sequence[str] = ("accuracy,none",),
    images: Mapping[int, tuple[str, ...]] | None = None,
    facts: Provenance | None = None,
    model: str = "llava_sdrpn",
    given: str = "",
    limit: float | None = None,
    **more: Any,
) -> Evidence:
    """A run and what is known of it; the same samples, settings and totals in each task."""
    by_id = {sample.doc_id: sample for sample in samples}
    held = {
        task: TaskRun(task, by_id, dict.fromkeys(totals, 0.5), {}, config or {}, len(by_id))
        for task in tasks
    }
    results: Any = {"config": {"model": model, "model_args": given, "limit": limit}, **more}
    looks: Any = {("toy", i): SimpleNamespace(images=seen) for i, seen in (images or {}).items()}
    folder = Path("/no/such/folder") / name
    run = Run(name, folder, folder / "x_results.json", results, held)
    return Evidence(run, Record(looks), facts)


def facts(
    scorer: str | None = "aa", source: str | None = None, data: str = "1", **arguments: Any
) -> Provenance:
    marks = {"data": data, "prompts": "2", "scorer": scorer, "scorer_source": source}
    return Provenance.model_validate(FACTS | {"tasks": {"toy": marks}, "arguments": arguments})


def moved(first: Evidence, second: Evidence) -> list[str]:
    return moved_in_task(first, second, "toy")


def test_the_tasks_of_all_runs_in_the_order_of_the_first() -> None:
    runs = [
        ran(name="a", tasks=["y", "x", "p"]).run,
        ran(name="b", tasks=["x", "y", "z"]).run,
        ran(name="c", tasks=["z", "x", "y"]).run,
    ]
    assert common_tasks(runs) == (
        ["y", "x"],
        [
            "p is not compared: b, c has no such task",
            "z is not compared: a has no such task",
        ],
    )
    with pytest.raises(NotComparable, match=r"have no task in common \(a: y, x; b: z\)$"):
        common_tasks([ran(name="a", tasks=["y", "x"]).run, ran(name="b", tasks=["z"]).run])


def test_what_moved_is_said_task_by_task() -> None:
    refuse_moved(ran(), ran(name="b"), ["toy"])
    first = ran([one(0)], tasks=["x", "y"])
    second = ran([one(0, "Q")], "b", tasks=["x", "y"])
    told = "{}: other prompts in 1 document, such as 0: 'q' and 'Q'"
    with pytest.raises(
        NotComparable,
        match=f"^a and b cannot be compared: {told.format('x')}; {told.format('y')}$",
    ):
        refuse_moved(first, second, ["x", "y"])


def test_other_documents() -> None:
    more = ran([one(i) for i in (0, 1, 7, 5)])
    assert moved(more, ran()) == ["toy: other documents, 4 and 2, such as 5 in one only"]
    assert moved(ran(), more) == ["toy: other documents, 2 and 4, such as 5 in one only"]
    both = ran([one(0, "Q"), one(3)], limit=0.5)
    assert moved(both, ran()) == [
        "toy: other documents, 2 and 2, such as 3 in one only (limits: 0.5 and none)"
    ]


def test_other_prompts_and_targets_are_quoted_to_80_characters() -> None:
    first = ran([one(0), one(2, "a" * 80, "x"), one(1, "c", "y")])
    second = ran([one(0), one(2, "b" * 81, "X"), one(1, "d", "y")])
    assert moved(first, second) == [
        f"toy: other prompts in 2 documents, such as 2: '{'a' * 80}' and '{'b' * 77}...'",
        "toy: other targets in 1 document, such as 2: 'x' and 'X'",
    ]


def test_other_images_or_else_other_data() -> None:
    seen = {0: ("h",), 1: ("i",), 2: ("j", "k")}
    first = ran(images=seen, facts=facts(data="1"))
    data = "toy: other data, in columns that prompts do not show (1 and 7)"
    second = ran(images=seen | {2: ("j", "K"), 1: ("I",)}, facts=facts(data="7"))
    assert moved(first, second) == ["toy: other images in 2 documents, such as 1"]
    # An image that one run could not show, or has no record of, is not known to be another.
    for others in ({0: ("h",), 1: ()}, {}):
        assert moved(first, ran(images=others, facts=facts(data="7"))) == [data]
        assert moved(ran(images=others, facts=facts(data="7")), ran(images=seen)) == []
    assert moved(first, ran(images=seen, facts=facts(data="1"))) == []


def test_data_is_compared_where_it_is_known() -> None:
    assert other_data(None, "a") is other_data("a", None) is other_data("a", "a") is None
    told = "other data, in columns that prompts do not show (a and b)"
    assert other_data("a", "b") == told


def test_a_scorer_of_the_same_source_and_settings_is_the_same() -> None:
    """Its fingerprint covers settings and metrics; what a configuration shows may be left out."""
    first = ran(config={"repeats": 1}, facts=facts("aa"))
    other = ran(config={"repeats": 2}, totals=["f1,none"], facts=facts("aa"))
    assert moved(first, other) == []
    told = "toy: other scorer, repeats is 1 and 2"
    metrics = "toy: other metrics, accuracy,none, f1,none in one only"
    for one_only in (None, facts(None)):
        unknown = ran(config={"repeats": 2}, totals=["f1,none"], facts=one_only)
        assert moved(first, unknown) == [told, metrics]
        assert moved(unknown, first) == ["toy: other scorer, repeats is 2 and 1", metrics]


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        (("c1", "c2"), "toy: other scorer (source c1 and c2)"),
        (("c1", "c1"), "toy: other scorer (source aa and bb)"),
        (("c1", None), "toy: other scorer (source aa and bb)"),
        ((None, "c2"), "toy: other scorer (source aa and bb)"),
    ],
)
def test_another_scorer_without_another_setting(sources: tuple[Any, Any], told: str) -> None:
    first, second = facts("aa", sources[0]), facts("bb", sources[1])
    assert moved(ran(facts=first), ran(facts=second)) == [told]


def filters(*functions: dict[str, Any]) -> dict[str, Any]:
    return {"filter_list": [{"name": "n", "filter": list(functions)}]}


LOWER, STRIP = {"function": "lowercase"}, {"function": "strip"}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (
            filters(LOWER, STRIP),
            filters(STRIP, LOWER),
            ["the order of filter_list[n].filter is lowercase, strip and strip, lowercase"],
        ),
        (
            filters(LOWER | {"x": 1}, STRIP),
            filters(LOWER),
            [
                "filter_list[n].filter[lowercase].x is there and missing",
                "filter_list[n].filter[strip] is there and missing",
            ],
        ),
        (
            filters(STRIP, STRIP | {"x": 1}),
            filters(STRIP, STRIP | {"x": 2}),
            ["filter_list[n].filter[1].x is 1 and 2"],
        ),
        (
            {"metric_list": [{"metric": "f1", "name": "other", "x": [1]}]},
            {"metric_list": [{"metric": "f1", "name": "other", "x": [2]}]},
            ["metric_list[f1].x is [1] and [2]"],
        ),
        ({"metric_list": [{"x": 1}]}, {"metric_list": [{"x": 2}]}, ["metric_list[0].x is 1 and 2"]),
        ({"doc_to_target": {"a": 1}}, {"doc_to_target": {"a": 2}}, ["doc_to_target.a is 1 and 2"]),
        ({"doc_to_target": ["A"]}, {"doc_to_target": "A"}, ["doc_to_target is ['A'] and A"]),
        (
            {"doc_to_choice": [{}, "A"]},
            {"doc_to_choice": []},
            ["doc_to_choice is [{}, 'A'] and []"],
        ),
        (
            {"process_results": "<function f at 0x7f>"},
            {"process_results": "<function g at 0x7f>"},
            ["process_results is <function f> and <function g>"],
        ),
        ({"repeats": "1" * 81}, {}, [f"repeats is {'1' * 77}... and None"]),
        ({"repeats": 1}, {"repeats": "1"}, []),
        ({"output_type": "a", "doc_to_text": "b"}, {"output_type": "a", "doc_to_text": "c"}, []),
    ],
)
def test_where_settings_of_a_scorer_differ(
    first: dict[str, Any], second: dict[str, Any], told: list[str]
) -> None:
    expected = [f"toy: other scorer, {clause}" for clause in told]
    assert moved(ran(config=first), ran(config=second)) == expected


def test_what_is_established_is_of_all_runs_and_tasks() -> None:
    seen = {0: ("h",), 1: ("i",)}
    known = ran(name="known", images=seen, facts=facts())
    bare = ran(name="bare")
    by_settings = "Same scorer: by its settings in the results file only."
    assert established([known, bare], ["toy"]) == [
        "Same documents, prompts and targets: 2 questions, checked one by one.",
        "Same images: not known, bare left no record of them.",
        by_settings,
    ]
    two = ran([one(0)], tasks=["toy", "other"], images=seen, facts=facts())
    assert established([two, two], ["toy", "other"]) == [
        "Same documents, prompts and targets: 2 questions, checked one by one.",
        "Same images: by the content hash of each.",
        by_settings,
    ]
    assert established([two], ["toy"]) == [
        "Same documents, prompts and targets: 1 question, checked one by one.",
        "Same images: by the content hash of each.",
        "Same scorer: by its source and settings.",
    ]


def test_arguments_are_the_resolved_ones_where_they_are_known() -> None:
    assert ran(given="padding=crop").arguments == {"padding": "crop"}
    assert ran(given="padding=crop", facts=facts()).arguments == {"padding": "crop"}
    assert ran(given="padding=crop", facts=facts(padding="pad")).arguments == {"padding": "pad"}


def test_how_an_image_and_a_question_reach_the_model() -> None:
    assert preprocessing(ran(model="llava_hf", given="padding=crop").run) == {"model": "llava_hf"}
    plain = {"model": "llava_sdrpn", "padding": "pad", "system_prompt": None}
    assert preprocessing(ran().run) == plain
    assert preprocessing(ran(given="padding=,system_prompt=").run) == plain | {"padding": None}
    crop = ran(given="padding=crop,proposer=none").run
    assert preprocessing(crop) == plain | {"padding": "crop"}
    brief = facts(padding="pad", system_prompt="Be brief.")
    assert preprocessing(crop, brief) == plain | {"system_prompt": "Be brief."}


def label_of(*runs: Evidence) -> list[list[str]]:
    return [labels(run, runs) for run in runs]


def test_labels_are_against_the_first_run_of_ours() -> None:
    hf, ours, crop = ran(model="llava_hf"), ran(), ran(given="padding=crop")
    other = ["other preprocessing"]
    assert label_of(hf, ours, crop, ours) == [other, [], other, []]
    assert label_of(hf, hf) == [[], []]
    assert label_of(hf, ran(model="qwen2_vl")) == [[], other]
    # By a file in one run and as text in the other: known where both left what they resolved.
    text_ = facts(padding="pad", system_prompt="Be brief.")
    by_file, by_text = (
        ran(given=f"system_prompt={given}", facts=text_) for given in ("/x/y.txt", "brief")
    )
    assert label_of(by_file, by_text) == [[], []]
    assert label_of(by_file, ran(given="system_prompt=brief")) == [[], other]
    assert label_of(by_file, ran(given="system_prompt=/x/y.txt")) == [[], []]
    partly = ran(given="system_prompt=brief", facts=facts(padding="pad"))
    assert label_of(by_file, partly) == [[], other]


def test_labels_name_answers_scored_anew_and_each_other_argument_once() -> None:
    def asked(tasks: Sequence[str], **generation: Any) -> Evidence:
        return ran(tasks=tasks, config={"generation_kwargs": generation})

    first = asked(["x", "y"], max_new_tokens=16)
    second = asked(["x", "y", "z"], max_new_tokens=32, until=["."])
    assert labels(second, [first, second]) == [
        "other generation arguments: max_new_tokens=32",
        "other generation arguments: until=['.']",
    ]
    assert labels(first, [first, second]) == []
    assert labels(asked(["z"], max_new_tokens=32), [first]) == []
    anew = ran(rescored={"from": "/runs/a"})
    assert labels(anew, [ran(), anew]) == ["scored anew, from /runs/a"]


def test_changes_of_values_by_name() -> None:
    found = changes({"a": 1, "b": 2, "c": 3}, {"d": 4, "a": 1, "b": 5})
    assert list(found.items()) == [("b", (2, 5)), ("c", (3, None)), ("d", (None, 4))]
