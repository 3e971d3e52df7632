"""From arguments to a model, and what is said where weights are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdrpn.config import ZoomConfig
from sdrpn_eval import loading
from sdrpn_eval.args import LlavaArguments
from sdrpn_eval.model import LlavaSdrpn
from tests.helpers.asking_by_hand import ask, model, rows
from tests.helpers.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def test_the_default_says_what_is_missing_and_names_tiny() -> None:
    rpn = "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled"
    missing = f"pretrained=llava-hf/llava-1.5-7b-hf with rpn={rpn} cannot be loaded: {rpn} is no"
    with pytest.raises(ValueError, match=missing) as error:
        LlavaSdrpn(device="cpu")
    assert "pretrained=tiny" in str(error.value)


def test_missing_weights_are_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pretrained=tiny") as error:
        LlavaSdrpn(pretrained=str(tmp_path / "nothing"), proposer="none", device="cpu")
    assert f"there is no folder {tmp_path}/nothing" in str(error.value)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="pretrained=tiny") as error:
        LlavaSdrpn(pretrained=str(tmp_path / "nothing"), proposer="none", device="cpu")
    assert f"pretrained={tmp_path}/nothing cannot be loaded" in str(error.value)


def test_a_model_without_an_rpn_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no RPN is known for pretrained={tmp_path}"):
        LlavaSdrpn(pretrained=str(tmp_path), device="cpu")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="got a dict"):
        LlavaSdrpn(pretrained={"a": 1})


def test_an_engine_in_memory_takes_no_loading_arguments(engine: FakeEngine) -> None:
    with pytest.raises(ValueError, match=r"dtype, rpn|rpn, dtype"):
        LlavaSdrpn(pretrained=engine, dtype="float32", rpn="somewhere")
    with pytest.raises(ValueError, match="proposer: set when"):
        LlavaSdrpn(pretrained=engine, proposer="none")


def test_settings_of_an_engine_in_memory_stay_its_own(engine: FakeEngine) -> None:
    lm = model(engine, rows(2), policy="bbox", threshold=0.4)
    lm.generate_until([ask("mytask", 0, "?")])
    assert engine.batches[0][0].zoom == ZoomConfig(threshold=0.4, policy="bbox")
    assert engine.zoom == ZoomConfig(policy="strongest")


def test_engine_settings_with_a_preset(engine: FakeEngine) -> None:
    given = {"preset": "paper"}
    assert loading.zoom_settings(engine, LlavaArguments.of(given)).policy == "mask"


def test_the_fast_preset_keeps_the_rpn_s_own_policy(engine: FakeEngine) -> None:
    given = {"preset": "fast"}
    settings = loading.zoom_settings(engine, LlavaArguments.of(given))  # type: ignore[arg-type]
    assert settings == ZoomConfig(
        policy="strongest", token_budget=2.5, skip_above=0.7, crop_tokens=64
    )
    paper = {"preset": "paper"}
    settings = loading.zoom_settings(engine, LlavaArguments.of(paper))  # type: ignore[arg-type]
    assert settings == ZoomConfig(policy="mask")
