"""Sweeps of zoom settings: grids, costs and frontiers by hand; one sweep of the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.cli import app
from sdrpn_eval.report import sweep as report
from sdrpn_eval.results import sweep
from sdrpn_eval.results.stats import Estimate
from sdrpn_eval.results.sweep import BASE, Sweep, Swept, grid


def test_a_grid_names_what_it_changes() -> None:
    settings = grid({"threshold": [None, "peak"], "gate": [None, 0.9], "tiles": [None]})
    assert settings == {
        "base": {},
        "gate=0.9": {"gate": 0.9},
        "threshold=peak": {"threshold": "peak"},
        "threshold=peak gate=0.9": {"threshold": "peak", "gate": 0.9},
    }
    assert sweep.folder_name("threshold=peak gate=0.9") == "threshold-peak_gate-0.9"
    with pytest.raises(ValueError, match="tiles must be one of 1, 2, 4, got 3"):
        grid({"tiles": [3]})


def line(image: str, cost: dict[str, int]) -> Any:
    return SimpleNamespace(images=(image,), model_extra={"swept": {"x": {"cost": cost}}})


def test_costs_share_what_images_share() -> None:
    lower = {"prefix": 40, "map": 5, "whole_prefix": 90, "stock": 100, "without_zoom": 10}
    lines = [
        line("a", lower | {"question": 20}),
        line("a", lower | {"question": 30, "prefix": 90}),  # this one needs the whole prefix
        line("b", lower | {"question": 25, "map": 0}),
    ]
    # Questions 75, prefixes 90 and 40, maps 5 and 0: 210 of 300. Without zooms 30, and 180.
    assert sweep._cost(lines, "x") == (0.7, 0.0)


def swept(name: str, score: float, cost: float) -> Swept:
    estimate = Estimate(score, score - 0.1, None)
    return Swept(name, {"gate": 0.5}, estimate, Estimate(0.0, -0.1, 0.1), cost, 0.5, 0.25, 12.0)


def test_a_frontier_has_no_better_neighbour() -> None:
    every = [swept("a", 0.9, 1.0), swept("b", 0.9, 0.8), swept("c", 0.5, 0.9), swept("d", 0.4, 0.1)]
    assert [sweep._undominated(one, every) for one in every] == [False, True, False, True]
    twins = [swept("a", 0.9, 1.0), swept("b", 0.9, 1.0)]
    assert [sweep._undominated(one, twins) for one in twins] == [True, True]


def test_files_of_a_sweep(tmp_path: Path) -> None:
    from dataclasses import replace

    every = [swept(BASE, 0.9, 1.5), replace(swept("gate=0.5", 0.88, 0.9), on_frontier=True)]
    report.write(Sweep(every, "gate=0.5", 0.02, 60, 12, {"t": "exact_match"}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frontier",
        "sweep.json",
        "sweep.md",
        "sweep.png",
        "zoom.json",
    ]
    assert LlavaArguments.of({"zoom": str(tmp_path / "zoom.json")}).gate == 0.5
    assert (tmp_path / "frontier" / "gate-0.5.json").exists()
    text = (tmp_path / "sweep.md").read_text()
    assert "| gate=0.5 * | 88.0 [n/a] | +0.0 [-10.0, +10.0] | 0.90 | 50 % | 25 % | 12 |" in text
    assert "| base | 90.0 [n/a] |  | 1.50 |" in text
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert (saved["chosen"], saved["questions"], saved["images"]) == ("gate=0.5", 60, 12)
    assert saved["settings"][1]["score"] == [0.88, 0.78, None]


SWEEP = ["sweep", "--threshold", "base", "--gate", "none,0.9", "--crop-tokens", "none,9"]


def test_a_sweep_of_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it asks, then finished; every setting's run is one that compare reads."""
    from sdrpn_eval.results import sweep as module

    out, asked = tmp_path / "sweep", []
    true = module.ask_settings

    def counted(engine: Any, questions: Any, settings: Any, generation: Any) -> Any:
        asked.extend(questions)
        if fail and len(asked) > fail:
            raise KeyboardInterrupt
        return true(engine, questions, settings, generation)

    monkeypatch.setattr(module, "ask_settings", counted)
    command = [*SWEEP, "--out", str(out), "--limit", "12", "--batch-size", "4"]
    fail = 8
    CliRunner().invoke(app, command)
    assert not (out / "zoom.json").exists()
    fail, first = 0, len(asked)
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(asked) == first + 4  # the third batch was lost, and asked again
    found = json.loads((out / "sweep.json").read_text())
    names = [one["name"] for one in found["settings"]]
    assert names == ["base", "crop_tokens=9", "gate=0.9", "gate=0.9 crop_tokens=9"]
    by_name = {one["name"]: one for one in found["settings"]}
    assert by_name["crop_tokens=9"]["crop_tokens"] <= 9 < by_name["base"]["crop_tokens"]
    assert by_name["gate=0.9"]["cost"] < by_name["base"]["cost"]
    assert by_name["base"]["extra"] == 1
    runs = [str(out / sweep.folder_name(name)) for name in names[:2]]
    compared = CliRunner().invoke(
        app, ["compare", *runs, "--out", str(tmp_path / "compared")], catch_exceptions=False
    )
    assert compared.exit_code == 0, compared.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gate", "much"], "--gate must list values, got 'much'"),
        (["--gate", "2"], "gate must be in"),
        (["--model", "llava"], "--model must be"),
        (["--tolerance", "-1"], "--tolerance must be in"),
        (["--tasks", ","], "--tasks names no task"),
        (["--model_args", "pretrained=tiny,proposer=none"], "proposer must be rpn, got none"),
        (["--limit", "0"], "--limit must be 1 or more"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["sweep", "--out", str(tmp_path), *options])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
