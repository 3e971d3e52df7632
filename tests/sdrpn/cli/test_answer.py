"""`sdrpn answer`: what comes out, what is refused, and that it can be stopped and gone on with."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from typer.testing import CliRunner

import sdrpn.batch_inference
from sdrpn.backbones.llava15 import Llava15
from sdrpn.batch_inference import AnswerFile
from sdrpn.cli import app
from sdrpn.config import ZoomConfig
from sdrpn.engine import ZoomModel
from sdrpn.io.images import load_image
from sdrpn.io.questions import read_questions
from sdrpn.rpn.checkpoint import RPN
from sdrpn_eval.model import LlavaSdrpn
from tests.conftest import QUESTIONS, THRESHOLD, make_image, make_llava

PAGE = Path(__file__).parents[3] / "docs" / "own_questions.md"
ZOOM = ZoomConfig(threshold=THRESHOLD, policy="strongest", min_cells=1)
COMMAND = importlib.import_module("sdrpn.cli.answer")
"""Its module; in `sdrpn.cli` the name stands for the command itself."""
runner = CliRunner()


def entry(i: int, **more: Any) -> dict[str, Any]:
    """Question i, on image i % 3: no two neighbours share one."""
    return {"id": f"q{i}", "image": f"{i % 3}.png", "question": QUESTIONS[i % 4]} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and 10 questions on them in `questions.jsonl`."""
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(112, 112), (150, 90), (60, 130)]):
        make_image(*size, seed=i).save(tmp_path / "images" / f"{i}.png")
    write(tmp_path, *(entry(i) for i in range(10)))
    return tmp_path


def write(folder: Path, *entries: Any) -> None:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in entries]
    (folder / "questions.jsonl").write_text("".join(line + "\n" for line in lines))


class Asked:
    """The engine that the command gets, and what it was asked."""

    def __init__(self, llava: Llava15, rpn: RPN) -> None:
        self.zoom = ZoomModel(llava, rpn, zoom=ZOOM)
        self.batches: list[list[str]] = []
        self.after: Callable[[], None] = lambda: None
        ask = self.zoom.ask_batch

        def counted(questions: Any, generation: Any = None) -> Any:
            answers = ask(questions, generation)
            self.batches.append([f"{q.text}|{q.images[0].width}" for q in questions])
            self.after()
            return answers

        self.zoom.ask_batch = counted  # type: ignore[method-assign]

    @property
    def questions(self) -> list[str]:
        return [one for batch in self.batches for one in batch]


@pytest.fixture
def engine(llava: Llava15, perturbed_rpn: RPN, monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked(llava, perturbed_rpn)
    monkeypatch.setattr(COMMAND, "load_zoom", lambda *_, **__: asked.zoom)
    return asked


def answer(folder: Path, *options: str, out: str = "out/answers.jsonl") -> tuple[int, str]:
    words = ["answer", str(folder / "questions.jsonl"), "--images", str(folder / "images")]
    words += ["--out", str(folder / out), "--max-new-tokens", "3", "--batch-size", "2", *options]
    result = runner.invoke(app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def answers(folder: Path, out: str = "out/answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / out).read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# What comes out


def test_one_line_a_question_in_their_order(folder: Path, engine: Asked) -> None:
    code, said = answer(folder)
    assert code == 0, said
    lines = answers(folder)
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(10)]
    assert "10 of 10 questions answered" in said
    images = [load_image(folder / "images" / f"{i}.png") for i in range(3)]
    for i, line in enumerate(lines):
        alone = engine.zoom.ask(images[i % 3], QUESTIONS[i % 4], max_new_tokens=3)
        assert line["answer"] == alone.text
        assert line["regions"] == [list(box) for box in alone.regions]
        assert line["no_zoom"] == alone.reason
        assert line["tokens"]["crop"] == alone.crop_tokens
        assert line["given"] == {}
        assert line["seconds"] > 0
    assert {bool(line["regions"]) for line in lines} == {True, False}


def test_an_image_is_read_once(
    folder: Path, engine: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions on one image are asked side by side, and its file is decoded once for all."""
    opened = []

    def counted(path: Path) -> Image.Image:
        opened.append(path.name)
        return load_image(path)

    monkeypatch.setattr(sdrpn.batch_inference, "load_image", counted)
    assert answer(folder)[0] == 0
    assert opened == ["0.png", "1.png", "2.png"]
    assert [len(batch) for batch in engine.batches] == [2, 2, 2, 2, 2]
    widths = [one.split("|")[1] for one in engine.questions]
    assert widths == ["112"] * 4 + ["150"] * 3 + ["60"] * 3


def test_other_fields_come_back_and_other_names_are_known(folder: Path, engine: Asked) -> None:
    """LLaVA's names, a number as id, a list of objects, fields that are called as ours are."""
    ours = entry(0, answer="red", regions="mine", category={"a": [1, "é"]})
    theirs = {"question_id": 7, "image": "1.png", "text": QUESTIONS[1], "category": "conv"}
    both = {"id": "x", "question_id": 3, "image": "2.png", "question": "yellow", "text": "no"}
    write(folder, ours, theirs, "", both)
    assert answer(folder)[0] == 0
    lines = answers(folder)
    assert [line["id"] for line in lines] == ["q0", 7, "x"]
    assert [line["question"] for line in lines] == [QUESTIONS[0], QUESTIONS[1], "yellow"]
    assert [line["given"] for line in lines] == [
        {"answer": "red", "regions": "mine", "category": {"a": [1, "é"]}},
        {"category": "conv"},
        {"question_id": 3, "text": "no"},
    ]
    (folder / "questions.jsonl").write_text("\ufeff" + json.dumps([ours, theirs, both], indent=1))
    assert answer(folder, out="list.jsonl")[0] == 0
    assert timeless(answers(folder, "list.jsonl")) == timeless(lines)


def test_conversations_and_lists_of_one_image_are_asked(folder: Path, engine: Asked) -> None:
    """The first turn that asks something; the same rules as for labels."""
    turns = [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "A picture."},
        {"from": "human", "value": QUESTIONS[1]},
    ]
    listed = entry(0, image=["0.png"])
    write(folder, listed, {"id": "talk", "image": "1.png", "conversations": turns})
    code, said = answer(folder)
    assert code == 0, said
    first, talk = answers(folder)
    assert (first["image"], first["question"]) == ("0.png", QUESTIONS[0])
    assert (talk["image"], talk["question"], talk["given"]) == ("1.png", QUESTIONS[1], {})


# Stopped, and gone on with


def test_what_was_stopped_goes_on_and_asks_nothing_twice(folder: Path, engine: Asked) -> None:
    """Ctrl-C in the third batch, and a line that was half written."""
    whole = answer(folder, out="whole.jsonl")
    assert whole[0] == 0
    expected = sorted(engine.questions)
    engine.batches.clear()

    def stop() -> None:
        if len(engine.batches) == 3:
            raise KeyboardInterrupt

    engine.after = stop
    assert answer(folder)[0] != 0
    assert len(answers(folder)) == 4
    lost = engine.batches.pop()
    with (folder / "out" / "answers.jsonl").open("a") as file:
        file.write('{"id": "q4", "image": "1.pn')
    engine.after = lambda: None
    code, said = answer(folder)
    assert code == 0, said
    assert sorted(engine.questions) == expected
    assert set(lost) <= set(engine.questions)
    assert timeless(answers(folder)) == timeless(answers(folder, "whole.jsonl"))
    engine.batches.clear()
    assert answer(folder)[0] == 0
    assert engine.batches == []


def test_more_questions_go_on_too(folder: Path, engine: Asked) -> None:
    assert answer(folder)[0] == 0
    engine.batches.clear()
    write(folder, entry(10), *(entry(i) for i in range(10)), entry(11))
    assert answer(folder, "--batch-size", "5")[0] == 0
    assert len(engine.questions) == 2
    ids = [line["id"] for line in answers(folder)]
    assert ids == ["q10", *(f"q{i}" for i in range(10)), "q11"]


def test_other_settings_are_refused_with_the_reason(
    folder: Path, engine: Asked, perturbed_rpn: RPN
) -> None:
    assert answer(folder)[0] == 0
    before = (folder / "out" / "answers.jsonl").read_bytes()
    (folder / "images2").symlink_to(folder / "images")
    (folder / "other").mkdir()

    def refused(reason: str, *options: str) -> None:
        code, said = answer(folder, *options)
        assert code == 2
        assert "answers.jsonl was begun with other settings" in said
        assert reason in said
        assert (folder / "out" / "answers.jsonl").read_bytes() == before

    own = engine.zoom.backbone
    cropping = Llava15(own.model, own.processor, padding="crop", name=own.name)
    refused("max_new_tokens: 3 there, 4 now", "--max-new-tokens", "4")
    refused("other now", "--images", str(folder / "other"))
    assert answer(folder, "--images", str(folder / "images2"))[0] == 0  # the same folder
    for changed, reason in (
        (ZoomModel(engine.zoom.backbone, perturbed_rpn), "zoom: {"),
        (
            ZoomModel(engine.zoom.backbone, proposer="none", zoom=ZOOM),
            "proposer: rpn there, none now",
        ),
        (ZoomModel(make_llava(seed=3), perturbed_rpn, zoom=ZOOM), "model_hash: "),
        (ZoomModel(cropping, perturbed_rpn, zoom=ZOOM), "padding: pad there, crop now"),
        (ZoomModel(engine.zoom.backbone, _retrained(perturbed_rpn), zoom=ZOOM), "rpn_hash: "),
    ):
        engine.zoom = changed
        refused(reason)


def _retrained(rpn: RPN) -> RPN:
    """The same network in the same place, trained on."""
    other = RPN(rpn.config)
    other.load_state_dict({name: w + 0.01 for name, w in rpn.state_dict().items()})
    return other.eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: q[1:], "answers a question 'q0', which is not among these"),
        (lambda q: [q[0] | {"question": "else ?"}, *q[1:]], "line 1, question 'q0' is another one"),
        (lambda q: [q[0] | {"image": "1.png"}, *q[1:]], "line 1, question 'q0' is another one"),
    ],
)
def test_other_questions_are_refused(
    folder: Path, engine: Asked, change: Callable[..., Any], reason: str
) -> None:
    assert answer(folder)[0] == 0
    write(folder, *change([entry(i) for i in range(10)]))
    code, said = answer(folder)
    assert code == 2
    assert reason in said


def test_what_is_not_ours_is_not_written_to(folder: Path, engine: Asked) -> None:
    """Somebody's own file, the questions themselves, a folder, a file that was edited."""
    (folder / "mine.jsonl").write_text("mine\n")
    for out in ("mine.jsonl", "questions.jsonl", "images"):
        before = (folder / out).read_bytes() if (folder / out).is_file() else b""
        code, said = answer(folder, out=out)
        assert code == 2
        assert "use another --out" in said or "Is a directory" in said
        assert not before or (folder / out).read_bytes() == before
    assert answer(folder)[0] == 0
    with (folder / "out" / "answers.jsonl").open("a") as file:
        file.write('{"id": "q4"}\n')
    code, said = answer(folder)
    assert code == 2
    assert "answers.jsonl, line 11, is no answer" in said


def test_an_emptied_file_is_begun_anew(folder: Path, engine: Asked) -> None:
    assert answer(folder)[0] == 0
    (folder / "out" / "answers.jsonl").unlink()
    assert answer(folder, "--max-new-tokens", "2")[0] == 0
    assert answer(folder, "--max-new-tokens", "3")[0] == 2


# Questions that cannot be answered


def test_a_broken_image_ends_it_and_is_named(folder: Path, engine: Asked) -> None:
    """What was answered stays; mended, the same command asks the rest."""
    good = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").write_bytes(good[:300])
    code, said = answer(folder)
    assert code == 2
    assert "questions.jsonl, line 2, question 'q1': " in said
    assert "1.png: truncated or unreadable" in said
    assert {line["id"] for line in answers(folder)} == {"q0", "q3", "q6", "q9"}
    (folder / "images" / "1.png").write_bytes(good)
    engine.batches.clear()
    assert answer(folder)[0] == 0
    assert len(engine.questions) == 6
    assert [line["id"] for line in answers(folder)] == [f"q{i}" for i in range(10)]


def test_on_error_empty_notes_it_and_goes_on(folder: Path, engine: Asked) -> None:
    good = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").unlink()
    code, said = answer(folder, "--on-error", "empty")
    assert code == 1
    assert "7 of 10 questions answered" in said
    assert "3 could not be answered, such as 'q1'" in said
    assert "1.png: missing" in said
    lines = answers(folder)
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(10)]
    bad = [line for line in lines if "error" in line]
    assert [line["id"] for line in bad] == ["q1", "q4", "q7"]
    assert all(line["answer"] == "" and "missing" in line["error"] for line in bad)
    engine.batches.clear()
    assert answer(folder, "--on-error", "empty")[0] == 1
    assert engine.questions == []
    assert timeless(answers(folder)) == timeless(lines)
    (folder / "images" / "1.png").write_bytes(good)
    assert answer(folder)[0] == 0
    assert len(engine.questions) == 3
    assert [line["id"] for line in answers(folder)] == [f"q{i}" for i in range(10)]
    assert not any("error" in line for line in answers(folder))


@pytest.mark.parametrize("on_error", ["raise", "empty"])
def test_a_question_too_long_is_the_only_one_to_fail(
    folder: Path, engine: Asked, on_error: str
) -> None:
    """Three in one batch: the ones beside it are answered."""
    write(folder, entry(0), entry(3, question="red " * 2000), entry(6))
    code, said = answer(folder, "--batch-size", "3", "--on-error", on_error)
    assert code == (1 if on_error == "empty" else 2)
    assert "too many for a context of 1024" in said
    if on_error == "raise":
        assert "line 2, question 'q3'" in said
    assert [line["id"] for line in answers(folder) if line["answer"]] == ["q0", "q6"]


def test_batches_are_halved_where_the_memory_does_not_suffice(folder: Path, engine: Asked) -> None:
    """With the answers that a larger memory gives; what was answered before stays."""
    assert answer(folder, out="whole.jsonl")[0] == 0
    engine.batches.clear()

    def full() -> None:
        if len(engine.batches[-1]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.after = full
    code, said = answer(folder, "--batch-size", "5")
    assert code == 0, said
    assert [len(batch) for batch in engine.batches] == [5, 3, 2, 2, 1, 2, 2, 1]
    assert timeless(answers(folder)) == timeless(answers(folder, "whole.jsonl"))


def test_a_question_that_does_not_fit_alone_ends_it_and_is_named(
    folder: Path, engine: Asked
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.after = full
    code, said = answer(folder, "--on-error", "empty")
    assert code == 2
    assert "line 1, question 'q0' does not fit the memory even alone; ask on a device with" in said
    assert answers(folder) == []


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"answers\.jsonl cannot be written: .*No space left"):
        AnswerFile(tmp_path / "answers.jsonl").append([{"id": 1}])


# Refused before the model is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(COMMAND, "load_zoom", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": 1, "image": ', "line 3 is not valid JSON: Expecting value, column 20"),
        ("[" * 100_000, "line 3 is not valid JSON"),
        ('{"id": 1e999999999999, "image": ' + "9" * 5000 + "}", "line 3 is not valid JSON"),
        ("7", "line 3: it must be an object, got a int; expected"),
        (
            {"id": 1, "image": "0.png"},
            "line 3: it has no question, no text and no conversations; expected",
        ),
        ({"id": 1, "question": "?"}, "line 3: it has no image; expected"),
        ({"image": "0.png", "question": "?"}, "line 3: it has no id and no question_id; expected"),
        (entry(1), "line 3: the id 'q1' stands in"),
        (entry(8, id=None), "line 3: the id must be text or a whole number, got None"),
        (entry(8, id=True), "line 3: the id must be text or a whole number, got True"),
        (entry(8, id=1.5), "line 3: the id must be text or a whole number, got 1.5"),
        (entry(8, id=""), "line 3: the id must be text or a whole number, got ''"),
        (entry(8, question=" \n"), "line 3: the question must be text, got ' \\n'"),
        (entry(8, question=["a"]), "line 3: the question must be text, got ['a']"),
        (
            entry(8, image=["a", "b"]),
            "line 3: the image must be text, got ['a', 'b'], 2 of them; give one",
        ),
        (entry(8, image=[]), "line 3: it has no image; expected"),
        (
            {"id": 8, "image": "0.png", "conversations": [{"from": "human", "value": "<image>"}]},
            'line 3: no turn "from" "human" asks anything',
        ),
        (
            {"id": 8, "image": "0.png", "conversations": "what ?"},
            'line 3: conversations must be a list of {"from": ..., "value": ...}',
        ),
        (entry(8, image="../secret.png"), "line 3: image ../secret.png: outside the image folder"),
        (entry(8, image="/etc/passwd"), "line 3: image /etc/passwd: outside the image folder"),
        (entry(8, image="0\0.png"), "line 3: image '0\\x00.png': not a path"),
        (
            entry(8, question="half \ud800"),
            "line 3: the question holds half of a character, '\\ud800'",
        ),
        (entry(8, note={"deep": ["\udfff"]}), "line 3 holds half of a character, '\\udfff'"),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: Any, reason: str) -> None:
    write(folder, entry(0), entry(1), line)
    code, said = answer(folder)
    assert code == 2
    assert f"questions.jsonl, {reason}" in said
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "questions.jsonl holds no question"),
        (b"\n \n[]", "questions.jsonl holds no question"),
        (b'[{"id": 1}, \n 2', "questions.jsonl is not valid JSON: Expecting ',' delimiter, line 2"),
        (b'[{"id": 1, "image": "0.png"}]', "questions.jsonl, entry 1: it has no question"),
        (b'{"id": "\xff\xfe"}', "questions.jsonl is not in UTF-8, from byte 8 on; save it as"),
        (b'\n\n{"id": "\xff"}', "questions.jsonl is not in UTF-8, from byte 10 on"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, content: bytes, reason: str) -> None:
    (folder / "questions.jsonl").write_bytes(content)
    code, said = answer(folder)
    assert code == 2
    assert reason in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--images", "nowhere"], "there is no folder nowhere"),
        (["--on-error", "ignore"], "on_error must be one of raise, empty, got 'ignore'"),
        (["--batch-size", "0"], "batch_size and max_new_tokens must be 1 or more, got 0, 3"),
        (["--max-new-tokens", "0"], "must be 1 or more, got 2, 0"),
    ],
)
def test_wrong_options_are_named(folder: Path, options: list[str], reason: str) -> None:
    code, said = answer(folder, *options)
    assert code == 2
    assert reason in said


def test_wrong_zoom_settings_are_told_before_the_weights_are_asked_for(folder: Path) -> None:
    for option, value, reason in (
        ("--threshold", "7", "threshold must be in (0, 1), got 7"),
        ("--policy", "best", "policy must be one of mask, bbox, strongest, got 'best'"),
    ):
        code, said = answer(folder, option, value, "--model", "nowhere")
        assert code == 2
        assert reason in said
    code, said = answer(folder, "--model", "nowhere")
    assert code == 2
    assert "For a first try without weights: --model tiny" in said


def test_the_questions_of_a_file_that_is_gone() -> None:
    with pytest.raises(ValueError, match=r"there is no file nowhere\.jsonl"):
        read_questions(Path("nowhere.jsonl"), Path())


# The page


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, its command and its task, on the embedded model, from where it says."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (make, ask, evaluate) = (text for kind, text in blocks if kind == "bash")
    (task,) = (text for kind, text in blocks if kind == "yaml")
    (code,) = (text for kind, text in blocks if kind == "python")
    (shown,) = (json.loads(text) for kind, text in blocks if kind == "json")
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(PAGE.parent)
    Path("own/task").mkdir(parents=True)
    Path("own/questions.jsonl").write_text(make.split("<<'END'\n")[1].split("END\n")[0])
    Path("own/task/own.yaml").write_text(task)
    Path("own/task/utils.py").write_text(code)

    words = shlex.split(ask)
    assert words.pop(0) == "sdrpn"
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    first, *others = answers(tmp_path, "own/answers.jsonl")
    assert timeless([first]) == timeless([shown])
    assert set(first) == set(shown)
    assert all(line["answer"] == line["given"]["answer"] for line in others)

    command = shlex.split(evaluate.replace("\\\n", " "))
    options = dict(zip(command[1::2], command[2::2], strict=False))
    assert options["--model"] == "llava_sdrpn"
    assert options["--tasks"] == yaml.load(task, _Tags)["task"]
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    model = LlavaSdrpn(**dict([options["--model_args"].split("=")]), device="cpu", batch_size=8)
    index = TaskManager(include_path=options["--include_path"], include_defaults=False)
    results = simple_evaluate(
        model=model, tasks=[options["--tasks"]], task_manager=index, bootstrap_iters=10
    )
    assert results
    assert results["results"]["own_questions"]["exact_match,none"] == 1.0


class _Tags(yaml.SafeLoader):
    """Reads `!function` as text."""


_Tags.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_help_teaches() -> None:
    shown = runner.invoke(app, ["answer", "--help"], env={"COLUMNS": "200"}).output
    assert "sdrpn answer questions.jsonl --images photos/" in " ".join(shown.split())
