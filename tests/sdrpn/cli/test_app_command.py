"""`sdrpn app` as a process of its own, used in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import RepoCard

ROOT = Path(__file__).parents[3]
QUESTION = "what pattern is on the yellow disc ?"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")

pytestmark = pytest.mark.slow


@dataclass
class Served:
    """A running app: its address, its folder for uploads, its working directory, its process."""

    address: str
    uploads: Path
    cwd: Path
    process: subprocess.Popen[str]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sdrpn[app]'")
    uploads, cwd = tmp_path_factory.mktemp("uploads"), tmp_path_factory.mktemp("cwd")
    # As a Space runs it.
    command = [sys.executable, str(ROOT / "spaces" / "app.py")]
    settings = {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_SERVER_PORT": str(free_port())}
    settings["GRADIO_SHARE"] = "True"  # of no effect: only --share shares
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO")} | settings
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    line = next((line for line in process.stdout if "http" in line), "")
    assert "tiny is at http://127.0.0.1:" in line
    yield Served(line.split()[3], uploads, cwd, process)
    process.terminate()
    process.wait(30)
    assert list(uploads.iterdir()) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as running:
        one = running.chromium.launch(executable_path=path, args=list(FLAGS))
        yield one
        one.close()


@pytest.fixture
def page(served: Served, browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    page.strangers = []
    page.on("request", lambda r: page.strangers.append(r.url))
    page.goto(served.address)
    yield page
    local = (served.address, "data:", "blob:")
    assert [url for url in page.strangers if not url.startswith(local)] == []
    page.close()


def ask(page: Any, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def test_the_space_says_what_it_needs() -> None:
    card = RepoCard.load(ROOT / "spaces" / "README.md").data
    assert (card["sdk"], card["license"], card["python_version"]) == (
        "gradio",
        "apache-2.0",
        "3.11",
    )
    assert (ROOT / "spaces" / card["app_file"]).is_file()
    assert card["sdk_version"].startswith("6.")
    assert (ROOT / "spaces" / "requirements.txt").read_text() == "sdrpn[app]\n"


def test_an_image_of_one_s_own(page: Any, served: Served) -> None:
    from playwright.sync_api import expect

    page.set_input_files("input[type=file]", str(ROOT / "docs" / "scene.png"))
    ask(page, QUESTION)
    expect(page.get_by_label("Stock model")).to_have_value("yellow rising")
    expect(page.get_by_label("Second look")).to_have_value("yellow checked")
    expect(page.locator("body")).to_contain_text(re.compile(r"crop tokens\s*0\s*40"))
    expect(page.get_by_text("336, 112, 448, 280")).to_be_attached()
    assert list(served.uploads.rglob("scene.png"))
    assert list(served.cwd.iterdir()) == []
    # A setting that leaves no region, and the reason for it.
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("More settings").fill("threshold=0.99")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("No zoom: ")).to_be_visible()
    expect(page.get_by_label("Second look")).to_have_value("yellow rising")


def test_examples_and_refusals(page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_text("Image: missing (drop one, or click an example)")).to_be_visible()
    page.get_by_text("what pattern is on the red disc ?").click()
    expect(page.get_by_label("Question", exact=True)).to_have_value(
        "what pattern is on the red disc ?"
    )
    ask(page, "word " * 2000)
    expect(page.get_by_text("for a context of 1024")).to_be_visible()
    (tmp_path / "holiday.png").write_bytes(b"no picture at all")
    page.get_by_label("Clear").first.click()
    page.set_input_files("input[type=file]", str(tmp_path / "holiday.png"))
    ask(page, QUESTION)
    expect(page.get_by_text("holiday.png: not an image")).to_be_visible()


def test_nobody_reads_files_of_the_machine(served: Served) -> None:
    """Neither as a download nor as the image of a question."""
    secret = str(ROOT / "pyproject.toml")
    with pytest.raises(HTTPError) as error:
        urlopen(f"{served.address}gradio_api/file={secret}")
    assert error.value.code == 403
    image = {"path": secret, "meta": {"_type": "gradio.FileData"}}
    words = {"data": [image, QUESTION, "rpn", "", 0.2, "mask", 0]}
    call = f"{served.address}gradio_api/call/ask"
    begun = urlopen(Request(call, json.dumps(words).encode(), {"content-type": "application/json"}))
    answer = urlopen(f"{call}/{json.load(begun)['event_id']}").read().decode()
    assert "event: error" in answer
    assert "not an image" not in answer  # which would tell that it was read
