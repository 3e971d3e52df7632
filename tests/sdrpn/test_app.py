"""The page of `sdrpn app` in this process: settings, refusals, one question at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sdrpn[app]'")
from gradio_client import Client, handle_file  # noqa: E402

from sdrpn.app import CONTROLS, SideBySide, build_page, chosen_zoom, read_upload  # noqa: E402
from sdrpn.boxes import PixelBox  # noqa: E402
from sdrpn.config import ZoomConfig  # noqa: E402
from sdrpn.engine import Answer, ZoomModel  # noqa: E402
from sdrpn.io.images import BadImage  # noqa: E402

OWN = ZoomConfig(threshold=0.2, policy="strongest", min_cells=1, gate=0.9)


def test_settings_of_the_page_change_the_model_s_own() -> None:
    assert list(CONTROLS) == ["threshold", "policy", "crop_tokens"]
    assert chosen_zoom(OWN, ["0.2", "strongest", 0], "") == OWN
    assert chosen_zoom(OWN, ["peak", "strongest", 0], "").threshold == "peak"
    changed = chosen_zoom(OWN, ["0.4", "bbox", 32], "")
    assert (changed.threshold, changed.policy, changed.crop_tokens) == (0.4, "bbox", 32)
    assert (changed.min_cells, changed.gate) == (1, 0.9)
    typed = chosen_zoom(OWN, ["0.4", "bbox", 32], " threshold=0.1, min_cells=3,")
    assert (typed.threshold, typed.min_cells, typed.policy) == (0.1, 3, "bbox")
    with pytest.raises(ValueError, match=r"unknown key.* thresold"):
        chosen_zoom(OWN, ["0.4", "bbox", 32], "thresold=0.1")
    with pytest.raises(ValueError, match="crop_tokens must be 1 or more, got -1"):
        chosen_zoom(OWN, ["0.4", "bbox", -1], "")
    with pytest.raises(ValueError, match=r"crop_tokens must be int or null, got '3\.5'"):
        chosen_zoom(OWN, ["0.4", "bbox", 3.5], "")


@pytest.mark.parametrize("content", [b"no picture at all", b""])
def test_a_bad_upload_is_named_as_its_user_knows_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x0123.png"
    path.write_bytes(content)
    with pytest.raises(BadImage) as error:
        read_upload({"path": str(path), "orig_name": "holiday.png"}, tmp_path)
    assert str(error.value) == "holiday.png: not an image"


def test_only_uploads_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    (tmp_path / "uploads").mkdir()
    for path in (str(tmp_path / "private.png"), "../private.png", None):
        with pytest.raises(BadImage, match=r"outside the image folder|missing"):
            read_upload({"path": path}, tmp_path / "uploads")
    with pytest.raises(BadImage, match=r"Image: missing .drop one, or click an example"):
        read_upload(None, tmp_path)


def test_stock_and_second_look_are_the_engine_s(llava: Any, perturbed_rpn: Any) -> None:
    zoom = ZoomModel(llava, perturbed_rpn, zoom=ZoomConfig(threshold=0.5))
    model = SideBySide(zoom)
    assert model.proposers == ["rpn", "attention", "vicrop", "none"]
    image = Image.effect_noise((160, 90), 80).convert("RGB")
    strict = ZoomConfig(threshold=0.3)
    stock, second = model.ask(image, "the blue disc ?", "rpn", strict)
    assert stock.text == ZoomModel(llava, proposer="none").ask(image, "the blue disc ?").text
    direct = ZoomModel(llava, perturbed_rpn, zoom=strict).ask(image, "the blue disc ?")
    assert (second.text, second.regions) == (direct.text, direct.regions)
    assert model.draw(image, "", second).size == (800, 450)
    assert "rpn" not in SideBySide(ZoomModel(llava, proposer="none")).proposers
    with pytest.raises(ValueError, match="there is no question"):
        model.ask(image, " ", "rpn", strict)
    with pytest.raises(ValueError, match="proposer must be one of rpn, attention, vicrop, none"):
        model.ask(image, "what ?", "luck", strict)


class OneAtATime:
    """Stands for a model; counts how many ask it at once."""

    def __init__(self) -> None:
        self.zoom = type("Engine", (), {"zoom": OWN, "proposer": "rpn"})()
        self.proposers = ["rpn"]
        self.inside = self.most = 0
        self.lock = threading.Lock()

    def ask(self, *_: Any) -> tuple[Answer, Answer]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.1)
        with self.lock:
            self.inside -= 1
        seen = np.full((2, 2), 0.5, np.float32)
        stock = Answer("red", (), None, "stock", 4, 0, 3, 1)
        return stock, Answer("blue", (PixelBox(0, 0, 8, 8),), seen, None, 4, 4, 3, 1)

    def draw(self, image: Image.Image, *_: Any) -> Image.Image:
        return image


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[OneAtATime, str]]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    model: Any = OneAtATime()
    page = build_page(model, [], tmp_path, "double")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield model, address
    page.close()


@pytest.mark.slow
def test_others_wait_while_one_is_answered(served: tuple[OneAtATime, str], tmp_path: Path) -> None:
    model, address = served
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    client = Client(address, verbose=False, download_files=False)
    words = (handle_file(tmp_path / "a.png"), "what ?", "rpn", "", 0.2, "mask", 0)
    jobs = [client.submit(*words, api_name="/ask") for _ in range(4)]
    assert [job.result(timeout=30)[:2] for job in jobs] == [("red", "blue")] * 4
    assert model.most == 1
