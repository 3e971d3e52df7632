"""`--model_args`: read and written as lmms-eval does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.command_line import parse_arguments
from sdrpn_eval.results.ladder import Ladder
from sdrpn_eval.results.replay import arguments_again
from sdrpn_eval.results.responses import read_source
from tests.helpers.run_folders import (
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)


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
            'system_prompt="don\'t, please",resume=true',
            {"system_prompt": "don't, please", "resume": True},
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
def test_quotes_around_a_text_are_not_part_of_it(value: Any, written: str) -> None:
    assert parse_arguments(f"{written},y=1") == {"x": value, "y": 1}


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


def test_a_record_alone_gives_its_arguments(tmp_path: Path) -> None:
    """As they were given, where a command line gave them; else by name, as from Python."""
    write_record(tmp_path, [record_line(0, "red")])
    resolved = {"pretrained": "tiny", "system_prompt": "Look closely, then answer."}
    text = "pretrained=tiny,system_prompt='Look closely, then answer.'"
    for given, expected in ((None, resolved), ({"text": text, "parsed": resolved}, text)):
        write_facts(tmp_path, "aa", arguments=resolved, model_args=given)
        assert read_source(tmp_path / "sdrpn_record").config["model_args"] == expected


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
