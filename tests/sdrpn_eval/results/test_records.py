"""Which record and facts belong to a run, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdrpn.boxes import PixelBox, covered
from sdrpn_eval.results.compare import compare, gather
from sdrpn_eval.results.read import read_run
from sdrpn_eval.results.records import read_looks, unfinished_later_run
from tests.helpers.comparisons import compared, pair
from tests.helpers.run_folders import (
    DATE,
    FACTS,
    record_line,
    sample,
    write_facts,
    write_record,
    write_run,
)


def test_facts_are_not_another_model_s_beside_whose_results_they_stand(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    stock, ours = pair(tmp_path, rows, rows, model="llava_hf")
    write_facts(stock, "aa")
    write_facts(ours, "bb")
    evidence = compared(stock, ours).evidence
    assert [bool(one.facts) for one in evidence] == [True, False]


def test_a_run_is_found_by_the_date_of_its_results(tmp_path: Path) -> None:
    """The later run began during the first one's evaluation, in the same folder, and crashed."""
    folder = write_run(tmp_path / "run", {"toy": [sample(0)]})
    lines = {"20260301T120001.000000Z": 0.5, "20260301T120003.000000Z": 7.0}
    write_record(folder, [record_line(0, "red", run=name, seconds=s) for name, s in lines.items()])
    for name, dates in zip(lines, ([DATE], ["20260301_120002"]), strict=True):
        path = folder / "sdrpn_record" / f"run_facts_{name}_rank0.json"
        path.write_text(json.dumps(FACTS | {"run": name, "evaluations": dates}))
    evidence = gather(read_run(folder))
    assert evidence.facts
    assert evidence.facts.run == "20260301T120001.000000Z"
    assert evidence.record.looks["toy", 0].seconds == 0.5
    # Other results have none of these records.
    other = write_run(tmp_path / "run", {"toy": [sample(0)]}, date="20260301_120004")
    record = read_looks(read_run(other))
    assert record.looks == {}
    assert "is of other runs, the latest of which began at 20260301T120003" in record.notes[0]


def test_a_later_run_without_results_is_noticed(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(2)]
    folder = write_run(tmp_path / "run", {"toy": rows})
    write_record(folder, [record_line(i, "red") for i in range(2)])
    assert unfinished_later_run(read_run(folder)) is None
    later = "20260301T130000.000000Z"
    write_record(folder, [record_line(0, "red", run=later)])
    assert unfinished_later_run(read_run(folder)) == later
    write_run(folder, {"toy": rows}, date="20260301_125955")
    assert unfinished_later_run(read_run(folder)) is None


@pytest.mark.parametrize(
    ("regions", "share"),
    [
        ([], 0),
        ([(0, 0, 10, 10)], 1),
        ([(0, 0, 5, 10)], 0.5),
        ([(0, 0, 5, 10), (0, 0, 10, 5)], 0.75),
        ([(0, 0, 5, 10), (4, 0, 20, 10)], 1),
        ([(-5, -5, 2, 2), (50, 50, 60, 60)], 0.04),
    ],
)
def test_share_covered_by_several_regions(regions: list, share: float) -> None:
    boxes = [PixelBox(*region) for region in regions]
    assert covered(boxes, PixelBox(0, 0, 10, 10)) == pytest.approx(share)


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
    folders, given = [], {}
    for proposer in names:
        args = f"pretrained=tiny,proposer={proposer},record={shared}"
        rows = [sample(i) for i in range(2)]
        folders.append(write_run(tmp_path / proposer, {"toy": rows}, model_args=args))
        given[proposer] = {"text": args, "parsed": {"proposer": proposer, "record": str(shared)}}
    shared.mkdir()
    for rank in range(2):
        lines = [
            record_line(rank, "red", run=name, seconds=float(len(proposer)))
            for proposer, name in names.items()
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (shared / f"record_toy_rank{rank}.jsonl").write_text(text)
    for proposer, name in names.items():
        facts = FACTS | {"run": name, "evaluations": [DATE], "model_args": given[proposer]}
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


def test_repeats_of_a_question_cost_what_one_costs(tmp_path: Path) -> None:
    # Sampled answers differ; the samples hold the first.
    answers = {"red": 0.5, "blue": 1.0, "green": 1.5}
    lines = [record_line(0, answer, seconds=s) for answer, s in answers.items()]
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
