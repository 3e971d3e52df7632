"""One bad document among many, and a memory that does not suffice."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from typer.testing import CliRunner

from sdrpn import engine as zoom
from sdrpn import second_look
from sdrpn.io.resumable import DoesNotFit
from sdrpn.roi import proposers
from sdrpn_eval.cli import app
from sdrpn_eval.on_error import BadDocument, BrokenRun
from sdrpn_eval.record import read_records
from tests.conftest import make_llava
from tests.helpers.asking_by_hand import ask, image, logged, model, rows, texts
from tests.helpers.comparisons import run_gate
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.run_folders import record_line, sample, write_facts, write_record, write_run

N = 10
CPU_FULL = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."  # noqa: E501
"""As torch says it."""


def requests(n: int = N) -> list[Any]:
    return [ask("mytask", i, f"q{i}") for i in range(n)]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    image(shade).save(file, "PNG")
    return file.getvalue()


def stored(broken: dict[int, dict[str, Any]]) -> Dataset:
    """Documents with an image file each, some of them replaced."""
    features = Features({"image": ImageColumn(), "question": Value("string")})
    files = [broken.get(i, {"bytes": png(i), "path": f"{i}.png"}) for i in range(N)]
    lines = [{"image": file, "question": f"q{i}"} for i, file in enumerate(files)]
    return Dataset.from_list(lines, features=features)


BROKEN = {
    3: {"bytes": b"this is no image", "path": "three.png"},
    5: {"bytes": None, "path": "/gone/five.png"},
    8: {"bytes": b"", "path": "eight.png"},
}


class Failing(FakeEngine):
    """Fails on a batch that holds a question with one of these texts."""

    def __init__(self, *bad: str, error: Exception | None = None) -> None:
        super().__init__()
        self.bad, self.error = set(bad), error or ValueError("too long by 9 tokens\nand more")

    def _check(self, questions: Any) -> None:
        if any(q.text in self.bad for q in questions):
            raise self.error

    def ask_batch(self, questions: Any, generation: Any = None) -> Any:
        self._check(questions)
        return super().ask_batch(questions, generation)

    def loss_batch(self, questions: Any, continuations: Any) -> Any:
        self._check(questions)
        return super().loss_batch(questions, continuations)


# A document that cannot be made into a question


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_broken_image_costs_its_own_answer_only(batch_size: int, tmp_path: Path) -> None:
    lm = model(
        FakeEngine(), stored(BROKEN), on_error="empty", record=tmp_path, batch_size=batch_size
    )
    with logged() as log:
        answers = texts(lm.generate_until(requests()))
    assert answers == ["" if i in BROKEN else f"q{i}|1" for i in range(N)]
    lines = {line.doc_id: line for line in read_records(tmp_path)}
    assert sorted(lines) == list(range(N))
    assert [i for i, line in lines.items() if line.error] == [3, 5, 8]
    assert "cannot identify image file" in str(lines[3].error)
    assert str(lines[5].error).startswith("FileNotFoundError: ")
    assert (lines[3].answer, lines[3].images, lines[3].reason) == ("", (), "not answered")
    (facts,) = tmp_path.glob("run_facts_*.json")
    assert json.loads(facts.read_text())["skipped"] == {"mytask": 3}
    (said,) = [line for line in log if "could not be answered" in line]
    assert said.startswith("3 document(s) could not be answered as asked (on_error=empty): ")
    assert "5 of mytask: FileNotFoundError" in said


def test_by_default_the_run_ends_with_the_document_named(tmp_path: Path) -> None:
    named = r"document 3 of mytask \(image three.png\): cannot identify image file.*on_error=stock"
    lm = model(FakeEngine(), stored(BROKEN), record=tmp_path, batch_size=4)
    with pytest.raises(BadDocument, match=named):
        lm.generate_until(requests())
    # What stood beside it in the batch was answered first, and is not lost.
    assert len(read_records(tmp_path)) >= 3


def test_images_in_memory_that_cannot_be_shown(tmp_path: Path) -> None:
    docs = rows(N)
    docs[4] = {"question": "q4"}  # no image at all where one is looked for
    lm = model(FakeEngine(), docs, on_error="stock", batch_size=4)
    answers = texts(lm.generate_until(requests()))
    assert answers == ["" if i == 4 else f"q{i}|1" for i in range(N)]
    with pytest.raises(BadDocument, match=r"document 4 of mytask \(image unreadable\): 'image'"):
        model(FakeEngine(), docs).generate_until(requests())


# A question that fails in the engine


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_question_that_fails_does_not_take_its_batch_along(batch_size: int) -> None:
    engine = Failing("q2", "q7")
    lm = model(engine, rows(N), on_error="empty", batch_size=batch_size)
    answers = texts(lm.generate_until(requests()))
    assert answers == ["" if i in (2, 7) else f"q{i}|1" for i in range(N)]
    assert all(len(batch) <= batch_size for batch in engine.batches)


def test_the_failing_question_is_found_and_named(tmp_path: Path) -> None:
    lm = model(Failing("q2"), rows(N), batch_size=16, record=tmp_path)
    with pytest.raises(BadDocument, match=r"document 2 of mytask \(image [0-9a-f]{32}\): too long"):
        lm.generate_until(requests())


def test_a_batch_that_fails_though_its_documents_do_not() -> None:
    class Together(FakeEngine):
        def ask_batch(self, questions: Any, generation: Any = None) -> Any:
            if len(questions) > 1:
                raise ValueError("not together")
            return super().ask_batch(questions, generation)

    with pytest.raises(ValueError, match="not together"):
        model(Together(), rows(N), batch_size=4).generate_until(requests())
    with logged() as log:
        lm = model(Together(), rows(N), batch_size=4, on_error="empty")
        assert texts(lm.generate_until(requests())) == [f"q{i}|1" for i in range(N)]
    assert "not together), and each of them alone did not" in log[-1]


def test_losses_of_a_bad_document_are_the_worst(tmp_path: Path) -> None:
    lm = model(Failing("q1"), rows(3), on_error="empty", batch_size=3, record=tmp_path)
    options = [ask("mytask", i, f"q{i}", " A", "loglikelihood") for i in range(3)]
    assert [r.text for r in lm.loglikelihood(options)] == [
        (2.0, True),
        (math.inf, False),
        (2.0, True),
    ]
    assert read_records(tmp_path)[1].loss is None


def test_a_bad_document_is_asked_again_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    found = {"pretrained": str(tmp_path)}
    monkeypatch.setattr("sdrpn_eval.run_record.sources", lambda arguments: found)
    record = tmp_path / "r"
    model(Failing("q2"), rows(N), on_error="empty", record=record).generate_until(requests())
    engine = FakeEngine()
    lm = model(engine, rows(N), record=record)
    assert texts(lm.generate_until(requests())) == [f"q{i}|1" for i in range(N)]
    assert [q.text for batch in engine.batches for q in batch] == ["q2"]
    assert not any(line.error for line in read_records(record))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_what_no_policy_swallows(error: BaseException) -> None:
    engine = Failing("q2", error=error)  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        model(engine, rows(N), on_error="empty", batch_size=4).generate_until(requests())


# A run that is broken, not a document


@pytest.mark.parametrize("on_error", ["stock", "empty"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_run_whose_first_documents_all_fail_alike_ends(
    batch_size: int, on_error: str, tmp_path: Path
) -> None:
    engine = Failing(*(f"q{i}" for i in range(N)))
    lm = model(engine, rows(N), on_error=on_error, record=tmp_path, batch_size=batch_size)
    told = r"the first 3 documents all fail alike \(ValueError: too long by 9 tokens\), so it is"
    with pytest.raises(BrokenRun, match=told):
        lm.generate_until(requests())


def test_numbers_make_no_other_failure(tmp_path: Path) -> None:
    docs = [{"question": f"q{i}"} for i in range(N)]  # proposer=box needs a box
    lm = model(FakeEngine(), docs, proposer="box", on_error="empty", record=tmp_path)
    with pytest.raises(BrokenRun, match=r"first 3 documents all fail alike \(KeyError: 'image'\)"):
        lm.generate_until(requests())


@pytest.mark.parametrize(
    ("bad", "n"),
    [(["q0", "q1"], N), (["q1", "q2", "q3", "q4"], N), (["q0"], 1), (["q0", "q1"], 2)],
)
def test_a_few_that_fail_are_bad_documents(bad: list[str], n: int, tmp_path: Path) -> None:
    lm = model(Failing(*bad), rows(N), on_error="empty", record=tmp_path, batch_size=1)
    answers = texts(lm.generate_until(requests(n)))
    assert answers == ["" if f"q{i}" in bad else f"q{i}|1" for i in range(n)]


def test_options_of_one_document_are_one_document(tmp_path: Path) -> None:
    lm = model(Failing("q0"), rows(2), on_error="empty", record=tmp_path, batch_size=1)
    options = [ask("mytask", 0, "q0", f" {o}", "loglikelihood") for o in "ABCD"]
    assert len(lm.loglikelihood(options)) == 4


def test_first_documents_that_fail_each_in_its_way_are_bad_documents(tmp_path: Path) -> None:
    class Varied(FakeEngine):
        def ask_batch(self, questions: Any, generation: Any = None) -> Any:
            word = {"q0": "red", "q1": "green", "q2": "blue"}.get(questions[0].text)
            if word:
                raise ValueError(f"no {word}")
            return super().ask_batch(questions, generation)

    lm = model(Varied(), rows(N), on_error="empty", record=tmp_path, batch_size=1)
    assert texts(lm.generate_until(requests())) == ["", "", "", *(f"q{i}|1" for i in range(3, N))]


def test_a_run_that_goes_on_with_nothing_but_bad_documents_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr("sdrpn_eval.run_record.sources", lambda _: {"pretrained": str(tmp_path)})
    bad = ["q4", "q5", "q6", "q7"]
    for _ in range(2):
        lm = model(Failing(*bad), rows(N), on_error="empty", record=tmp_path / "r", batch_size=1)
        answers = texts(lm.generate_until(requests()))
        assert answers == ["" if f"q{i}" in bad else f"q{i}|1" for i in range(N)]


def test_skipping_needs_a_record_that_tells(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error=empty needs a record"):
        model(FakeEngine(), rows(1), on_error="empty", record="none")


def test_the_gate_refuses_skipped_documents_unless_they_are_allowed(tmp_path: Path) -> None:
    """Two of four, and their images could not be read: neither may pass for another image."""
    folders = {}
    for name in ("good", "skipping"):
        answers = ["red"] * 4 if name == "good" else ["red", "red", "", "red"]
        samples = [sample(i, answer, accuracy=1.0) for i, answer in enumerate(answers)]
        folders[name] = write_run(tmp_path / name, {"toy": samples})
        lines = [record_line(i, answer) for i, answer in enumerate(answers)]
        if name == "skipping":
            lines[2] |= {"images": [], "error": "OSError: broken"}
        write_record(folders[name], lines)
        write_facts(folders[name], "scorer")
    (path,) = (folders["skipping"] / "sdrpn_record").glob("run_facts_*")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"skipped": {"toy": 2}}))
    baseline = tmp_path / "baseline.json"
    assert run_gate(folders["good"], baseline, "--update")[0] == 0
    code, line = run_gate(folders["skipping"], baseline)
    assert code == 2
    assert "2 document(s) of toy were skipped or answered without a second look" in line
    assert run_gate(folders["skipping"], baseline, "--allow-skipped", "1")[0] == 2
    code, line = run_gate(folders["skipping"], baseline, "--allow-skipped", "2")
    assert (code, line) == (0, "gate: passed, 1 task(s) stand")
    # Nor does it become the baseline.
    before = baseline.read_text()
    done = CliRunner().invoke(
        app, ["gate", str(folders["skipping"]), "--baseline", str(baseline), "--update"]
    )
    assert done.exit_code != 0
    assert baseline.read_text() == before


def test_stock_answers_where_the_second_look_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embedded model: the answer is that of proposer=none, the others keep their zoom."""
    monkeypatch.chdir(tmp_path)
    docs = [{"image": image(40 * i).resize((90, 60))} for i in range(4)]
    asked = [ask("mytask", i, f"what pattern is on the {c} disc ?") for i, c in enumerate("abcd")]
    stock = texts(model("tiny", docs, proposer="none", device="cpu").generate_until(asked))
    zoomed = texts(model("tiny", docs, device="cpu").generate_until(asked))
    by_rpn = proposers.by_rpn

    def fails_on_the_third(models: Any, looks: Any, lowered: Any) -> Any:
        third = models.backbone.prompt_ids("what pattern is on the c disc ?").after
        if any(look.question == third for look in looks):
            raise ValueError("no region")
        return by_rpn(models, looks, lowered)

    monkeypatch.setattr(second_look, "by_rpn", fails_on_the_third)
    record = tmp_path / "r"
    lm = model("tiny", docs, device="cpu", on_error="stock", batch_size=4, record=record)
    answers = texts(lm.generate_until(asked))
    assert answers == [*zoomed[:2], stock[2], zoomed[3]]
    line = read_records(record)[2]
    assert line.error == "ValueError: no region"
    assert line.reason == "the second look failed"
    assert line.regions == ()
    assert line.answer == stock[2]


# Out of memory


class Small(FakeEngine):
    """Holds so many questions at a time, and fewer characters in all."""

    def __init__(self, fits: int, error: Exception) -> None:
        super().__init__()
        self.fits, self.error, self.tried = fits, error, []

    def ask_batch(self, questions: Any, generation: Any = None) -> Any:
        self.tried.append(len(questions))
        if len(questions) > self.fits:
            raise self.error
        return super().ask_batch(questions, generation)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(CPU_FULL),
    RuntimeError("could not create a primitive"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu", "onednn", "python"])
def test_batches_are_halved_until_they_fit_said_once(error: Exception) -> None:
    engine = Small(3, error)
    lm = model(engine, rows(20), batch_size=8)
    with logged() as log:
        answers = texts(lm.generate_until(requests(20)))
    assert answers == [f"q{i}|1" for i in range(20)]
    assert engine.tried[:3] == [8, 4, 2]
    assert max(engine.tried[3:]) == 2, "no batch is tried at a size that did not fit"
    assert lm.batch_size == 2
    said = [line for line in log if "do not fit the memory" in line]
    assert said == ["8 questions at a time do not fit the memory: going on with 2"]


@pytest.mark.parametrize("on_error", ["raise", "stock", "empty"])
def test_one_that_does_not_fit_alone_ends_the_run_and_is_named(on_error: str) -> None:
    engine = Small(0, FULL[0])
    lm = model(engine, rows(N), batch_size=4, on_error=on_error)
    named = r"document \d of mytask \(image \w+\), with a prompt of 2 characters, does not fit"
    with pytest.raises(DoesNotFit, match=named):
        lm.generate_until(requests())


def test_memory_that_fails_while_an_image_is_made_ready_is_not_a_bad_document() -> None:
    engine = FakeEngine()

    def full(questions: Any) -> None:
        raise RuntimeError(CPU_FULL)

    engine.prepare = full  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        model(engine, rows(N), on_error="empty").generate_until(requests())


# Pixels that the prefetch thread prepares


class Guarded(dict):
    """A dict that is only touched with its lock held."""

    def __init__(self, lock: Any) -> None:
        super().__init__()
        self.lock, self.filled = lock, 0

    def _check(self) -> None:
        assert self.lock.locked(), "the pixels are touched without their lock"

    def __contains__(self, key: object) -> bool:
        self._check()
        return super().__contains__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._check()
        self.filled += 1
        super().__setitem__(key, value)

    def pop(self, *args: Any) -> Any:
        self._check()
        return super().pop(*args)

    def clear(self) -> None:
        self._check()
        super().clear()


@pytest.fixture
def short_engine() -> zoom.ZoomModel:
    """A model whose context holds a question of a few words and no more."""
    llava = make_llava()
    before = len(llava.head_ids) + llava.image_tokens
    llava.context_length = before + len(llava.prompt_ids("red").after) + 4
    engine = zoom.ZoomModel(llava, proposer="none", prefix_cache=0)
    engine._ready = Guarded(engine._ready_lock)
    return engine


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("on_error", ["raise", "stock", "empty"])
@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_no_pixels_of_a_question_that_is_too_long_are_left(
    tmp_path: Path, short_engine: zoom.ZoomModel, kind: str, on_error: str, batch_size: int
) -> None:
    """Two of six are too long; under `raise` the next batch is being prepared when the run ends."""
    docs = [{"image": image(40 * i).resize((30, 20))} for i in range(6)]
    words = ["red", " ".join(["red"] * 9), "red", "red", " ".join(["red"] * 10), "red"]
    extra = {"max_new_tokens": 1} if kind == "generate_until" else " red"
    asked = [ask("mytask", i, text, extra, kind) for i, text in enumerate(words)]
    lm = model(short_engine, docs, on_error=on_error, record=tmp_path / "r", batch_size=batch_size)  # type: ignore[arg-type]
    if on_error == "raise":
        with pytest.raises(BadDocument, match="too many for a context"):
            getattr(lm, kind)(asked)
    else:
        assert len(getattr(lm, kind)(asked)) == 6
        failed = [line.doc_id for line in read_records(tmp_path / "r") if line.error]
        assert sorted(failed) == [1, 4]
        assert short_engine._ready.filled == 6  # type: ignore[attr-defined]
    assert dict(short_engine._ready) == {}
    if on_error == "stock":
        assert lm._stock._ready == {}


def test_pixels_of_a_batch_that_is_refused_are_let_go(short_engine: zoom.ZoomModel) -> None:
    questions = [zoom.Question("red", (image(i).resize((30, 20)),)) for i in range(2)]
    for refused in (
        lambda: short_engine.loss_batch(questions, ["red", " "]),
        lambda: short_engine.ask_batch([*questions, zoom.Question("red " * 2000)]),
        lambda: short_engine.ask_batch(questions, {"use_cache": False}),
    ):
        short_engine.prepare(questions)
        assert len(short_engine._ready) == 2
        with pytest.raises(ValueError, match=r"empty|too many|use_cache"):
            refused()
        assert len(short_engine._ready) == 0
    short_engine.prepare(questions)
    short_engine.forget_prepared()
    assert len(short_engine._ready) == 0
