"""The arguments, the record and the scorer of a run: whose they are, and what tells them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.command_line import parse_arguments, written_arguments
from sdrpn_eval.results.compare import compare, gather
from sdrpn_eval.results.ladder import Ladder
from sdrpn_eval.results.read import read_run
from sdrpn_eval.results.records import read_looks
from sdrpn_eval.results.replay import arguments_again
from sdrpn_eval.results.responses import read_source
from tests.helpers.run_folders import (
    FACTS,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)
from tests.sdrpn_eval.report.test_compare import compared, refusal

# --model_args


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("pretrained=a=b,proposer=rpn", {"pretrained": "a=b", "proposer": "rpn"}),
        (
            'system_prompt="Be brief, please.",padding=crop',
            {"system_prompt": "Be brief, please.", "padding": "crop"},
        ),
        ("system_prompt='a=b, c',threshold=0.1", {"system_prompt": "a=b, c", "threshold": 0.1}),
        (
            'system_prompt="don\'t, please",relative=true',
            {"system_prompt": "don't, please", "relative": True},
        ),
        ('x={"a": 1, "b": [2, 3]},y=5', {"x": '{"a": 1, "b": [2, 3]}', "y": 5}),
        ('record="~/x, y"', {"record": "~/x, y"}),
        ('x="a" and "b"', {"x": '"a" and "b"'}),
        ("", {}),
        (None, {}),
        ({"padding": "crop", "threshold": 0.2}, {"padding": "crop", "threshold": 0.2}),
    ],
)
def test_arguments_are_parsed_as_lmms_eval_does(text: Any, read: dict[str, Any]) -> None:
    assert parse_arguments(text) == read


def test_arguments_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match="must be NAME=VALUE,NAME=VALUE, got 'threshold'"):
        parse_arguments("threshold")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a, b", 'x="a, b"'),
        ('say "hi", you', "x='say \"hi\", you'"),
        ("don't", 'x="don\'t"'),
        ("plain text", "x=plain text"),
        ("12", 'x="12"'),
        (12, "x=12"),
        (False, "x=False"),
        ("[a", 'x="[a"'),
        ('it\'s, "x"', 'x="it\'s, \\"x\\""'),
    ],
)
def test_arguments_are_written_as_they_are_read(value: Any, written: str) -> None:
    assert written_arguments({"x": value}) == written
    assert parse_arguments(f"{written},y=1") == {"x": value, "y": 1}


def test_arguments_that_no_text_holds_are_written_as_they_are() -> None:
    odd = {"x": "ends in \\, and 'holds' \"both\" \\"}
    assert written_arguments(odd) == odd


@pytest.mark.parametrize("name", ["pretrained", "rpn", "peft", "record", "system_prompt"])
@pytest.mark.parametrize("form", ["~/a, b", "'~/a, b'", '"~/a, b"'])
def test_paths_are_expanded_and_lose_their_quotes(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(LlavaArguments.of({name: form}), name) == "/home/me/a, b"
    assert getattr(LlavaArguments.of({name: Path("x")}), name) == "x"


def test_a_model_in_memory_stays_as_it_is() -> None:
    model = object()
    assert LlavaArguments.of({"pretrained": model}).pretrained is model
    assert LlavaArguments.of({"pretrained": 7}).pretrained == "7"


@pytest.mark.parametrize("text", ["don't look", "[look", "{look", 'say "hi'])
def test_arguments_that_a_text_swallowed_are_refused(text: str) -> None:
    """lmms-eval's parser reads on to the end behind an open quotation mark or bracket."""
    given = parse_arguments(f"system_prompt={text},proposer=none")
    assert given == {"system_prompt": f"{text},proposer=none"}
    with pytest.raises(ValueError, match="system_prompt must be in quotes: lmms-eval reads"):
        LlavaArguments.of(given)
    quote = '"' if "'" in text else "'"
    whole = parse_arguments(f"system_prompt={quote}{text}{quote},proposer=none")
    if '"' not in text:
        assert LlavaArguments.of(whole).system_prompt == text
        assert LlavaArguments.of(whole).proposer == "none"
    assert (
        LlavaArguments.of({"system_prompt": "first, threshold=5"}).system_prompt
        == "first, threshold=5"
    )


def test_a_short_name_and_a_tilde_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `--model=~/x` as it is."""
    from sdrpn.model_registry import resolve

    (tmp_path / "llava").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/llava", "~/rpn") == (f"{tmp_path}/llava", f"{tmp_path}/rpn")
    assert resolve("a/b", None) == ("a/b", None)


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
    assert [run["labels"] for run in comparison.runs] == [[], ["other preprocessing"], []]


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
    assert compared(*folders).runs[1]["labels"] == []
    write_facts(folders[1], "aa", arguments=arguments | {"system_prompt": "Be long."})
    assert compared(*folders).runs[1]["labels"] == ["other preprocessing"]


def test_a_record_alone_gives_its_arguments_in_quotes(tmp_path: Path) -> None:
    write_record(tmp_path, [record_line(0, "red")])
    prompt = "Look closely, then answer."
    write_facts(tmp_path, "aa", arguments={"pretrained": "tiny", "system_prompt": prompt})
    source = read_source(tmp_path / "sdrpn_record")
    written = 'pretrained=tiny,system_prompt="Look closely, then answer."'
    assert source.config["model_args"] == written


def test_a_question_is_asked_again_with_its_own_arguments(tmp_path: Path) -> None:
    args = "pretrained=tiny,system_prompt='a, b=c'"
    source = read_source(write_run(tmp_path / "run", {"toy": [sample(0)]}, model_args=args))
    assert arguments_again(source, parse_arguments('system_prompt="d, e"')) == {
        "pretrained": "tiny",
        "system_prompt": "d, e",
    }
    assert arguments_again(source, {}) == {"pretrained": "tiny", "system_prompt": "a, b=c"}


def test_a_ladder_reads_arguments_as_lmms_eval_does(tmp_path: Path) -> None:
    def plan(model_args: str) -> Ladder:
        return Ladder(tmp_path, "toy", model_args, None, "1")

    args = plan('pretrained=tiny,system_prompt="which proposer=rpn, say?"').arguments("attention")
    assert parse_arguments(args)["proposer"] == "attention"
    with pytest.raises(ValueError, match="must not name a proposer"):
        plan('system_prompt="a, b",proposer=rpn')
    with pytest.raises(ValueError, match="leaves a quotation mark or bracket open; put the value"):
        plan("system_prompt=don't look")


# Which record is a run's


def two_runs(tmp_path: Path, *, second_args: str = "pretrained=tiny,proposer=rpn") -> Path:
    """An output folder in which two runs gave the same answers, at 12:00 and at 13:00."""
    out = tmp_path / "out"
    for date, args in (
        ("20260301_120000", "pretrained=tiny,proposer=rpn"),
        ("20260301_130000", second_args),
    ):
        write_run(out, {"toy": [sample(i) for i in range(2)]}, date=date, model_args=args)
    cost = {"image": 10, "crop": 0, "question": 5, "new": 1}
    lines = [record_line(i, "red") for i in range(2)]
    later = "20260301T130002.000000Z"
    lines += [record_line(i, "red", run=later, tokens=cost, seconds=7.0) for i in range(2)]
    write_record(out, lines)
    return out


def test_runs_with_equal_answers_have_their_own_records(tmp_path: Path) -> None:
    files = sorted(two_runs(tmp_path).rglob("*_results.json"))
    looks = [read_looks(read_run(file)) for file in files]
    assert [one.looks["toy", 0].seconds for one in looks] == [0.5, 7.0]
    assert [sum(one.looks["toy", 1].tokens.values()) for one in looks] == [140, 16]
    comparison = compare([read_run(file, name) for file, name in zip(files, "ab", strict=True)])
    assert [comparison.tasks[0].looks[name]["seconds"] for name in "ab"] == [0.5, 7.0]
    # The folder alone is its latest run.
    assert read_looks(read_run(tmp_path / "out")).looks["toy", 0].seconds == 7.0


def test_a_run_without_a_record_takes_no_other_s(tmp_path: Path) -> None:
    out = two_runs(tmp_path)
    write_run(out, {"toy": [sample(i) for i in range(2)]}, date="20260301_150000")
    write_run(out, {"toy": [sample(i) for i in range(2)]}, date="20260301_110000")
    for hour in (15, 11):
        record = read_looks(read_run(out / "tiny" / f"20260301_{hour}0000_results.json"))
        assert record.looks == {}
        assert "is of other runs, the latest of which began at 20260301T130002" in record.notes[0]


def test_runs_at_the_same_time_are_told_apart_by_their_arguments(tmp_path: Path) -> None:
    """Both began in one second, and share a folder for the record."""
    shared = tmp_path / "shared"
    names = {"rpn": "20260301T120001.100000Z", "attention": "20260301T120001.900000Z"}
    folders = []
    for proposer in names:
        args = f"pretrained=tiny,proposer={proposer},record={shared}"
        rows = [sample(i) for i in range(2)]
        folders.append(write_run(tmp_path / proposer, {"toy": rows}, model_args=args))
    shared.mkdir()
    for rank in range(2):
        lines = [
            record_line(rank, "red", run=name, seconds=float(len(proposer)))
            for proposer, name in names.items()
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (shared / f"record_toy_rank{rank}.jsonl").write_text(text)
    for proposer, name in names.items():
        facts = FACTS | {"run": name, "arguments": {"proposer": proposer, "pretrained": "tiny"}}
        (shared / f"run_facts_{name}_rank0.json").write_text(json.dumps(facts))
    evidence = [gather(read_run(folder)) for folder in folders]
    assert [one.facts and one.facts.run for one in evidence] == list(names.values())
    assert [one.record.looks["toy", 0].seconds for one in evidence] == [3.0, 9.0]
    assert [one.record.looks["toy", 1].seconds for one in evidence] == [3.0, 9.0]


def test_a_run_that_went_on_from_another_has_its_own_lines(tmp_path: Path) -> None:
    out = two_runs(tmp_path)
    path = out / "sdrpn_record" / "record_toy_rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = lines[:1]  # the first run was killed after one, which the second took over
    taken = first[0] | {"run": lines[2]["run"], "from": first[0]["run"], "resumed": True}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*first, taken, lines[3]]))
    (out / "tiny" / "20260301_120000_results.json").unlink()
    looks = read_looks(read_run(out)).looks
    assert [looks["toy", i].seconds for i in range(2)] == [0.5, 7.0]


def test_a_folder_of_records_named_with_a_tilde_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    args = "pretrained=tiny,record='~/my, records'"
    folder = write_run(tmp_path / "run", {"toy": [sample(0)]}, model_args=args)
    write_record(tmp_path, [record_line(0, "red")])
    (tmp_path / "sdrpn_record").rename(tmp_path / "my, records")
    assert read_looks(read_run(folder)).looks["toy", 0].seconds == 0.5


# What an answer cost


def test_repeats_of_a_question_cost_what_one_costs(tmp_path: Path) -> None:
    lines = [record_line(0, "red", seconds=s) for s in (0.5, 1.0, 1.5)]
    folder = write_run(tmp_path / "run", {"toy": [sample(0)]}, config={"repeats": 3})
    write_record(folder, lines)
    look = read_looks(read_run(folder)).looks["toy", 0]
    assert look.seconds == 1.0
    assert look.tokens == {"image": 64, "crop": 64, "question": 10, "new": 2}


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_options_of_a_multiple_choice_are_summed(tmp_path: Path, repeats: int) -> None:
    lines = [
        record_line(0, "", continuation=option, loss=1.0, greedy=False)
        for option in ("yes", "no", "no")
        for _ in range(repeats)
    ]
    config = {"repeats": repeats, "output_type": "multiple_choice"}
    folder = write_run(tmp_path / "run", {"toy": [sample(0)]}, config=config)
    write_record(folder, lines)
    look = read_looks(read_run(folder)).looks["toy", 0]
    assert look.seconds == 1.5
    assert look.tokens == {"image": 192, "crop": 192, "question": 30, "new": 6}


# What a refusal of scorers names


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
