"""The page: one whole file, safe with hostile text; a browser opens it, filters and turns pages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrpn.io.images import image_key
from sdrpn_eval.report.gallery import TRIES, Album, in_order
from sdrpn_eval.report.html import as_json, write_page
from sdrpn_eval.results.compare import compare
from sdrpn_eval.results.comparison import Comparison
from sdrpn_eval.results.read import read_run
from tests.helpers.run_folders import record_line, sample, write_record, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\u2028"


class Data:
    """A task's documents: noise pictures of a size, every second document with the next one."""

    def __init__(self, size: tuple[int, int] = (100, 100)) -> None:
        self.size = size

    def image(self, doc_id: int) -> Image.Image:
        width, height = self.size
        rng = np.random.default_rng(doc_id // 2)
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    def key(self, doc_id: int) -> str:
        return image_key(self.image(doc_id))

    def prompt(self, doc_id: int) -> str:
        return f"question {doc_id}"

    def box(self, doc_id: int) -> None:
        return None


def runs(folder: Path, n: int, data: Data | None = None, **changes: Any) -> Comparison:
    """Two runs of n documents, in turn fixed, broken, both wrong, both right.

    changes: of every sample. data: documents, for a record with their images.
    """
    said = [("blue", "red"), ("red", "blue"), ("blue", "blue"), ("red", "red")]
    read = []
    for r, name in enumerate(("stock", "rpn")):
        rows = [sample(i, said[i % 4][r]) | changes for i in range(n)]
        path = write_run(folder / name, {"toy": rows})
        if data:
            lines = [record_line(i, rows[i]["filtered_resps"]) for i in range(n)]
            for i, line in enumerate(lines):
                line["images"] = [{"hash": image_key(data.image(i)), "size": list(data.size)}]
            write_record(path, lines)
        read.append(read_run(path))
    return compare(read)


def payload(page: Path) -> dict[str, Any]:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert match
    return json.loads(match[1])


# What the file holds


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    comparison = runs(tmp_path, 4, input=HOSTILE, target=HOSTILE)
    page = tmp_path / "page.html"
    write_page(comparison, {}, page)
    html = page.read_text()
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html
    assert payload(page)["questions"][0]["prompt"] == HOSTILE


def test_json_cannot_leave_its_element() -> None:
    plain = as_json({"a": HOSTILE})
    assert not set("<>&\u2028\u2029") & set(plain)
    assert json.loads(plain) == {"a": HOSTILE}


def test_names_and_notes_are_escaped_and_no_template_of_their_own(tmp_path: Path) -> None:
    rows = [sample(i) for i in range(4)]
    named = "<b>{{ payload }}{% raw %}"
    folders = [write_run(tmp_path / n, {"toy": rows}) for n in ("a", "b")]
    comparison = compare([read_run(folders[0], named), read_run(folders[1], HOSTILE)])
    page = tmp_path / "page.html"
    write_page(comparison, {}, page, notes=[HOSTILE, named])
    summary = page.read_text().split('<section id="gallery">')[0].split("<body>")[1]
    assert "<b>{{" not in summary
    assert "<script" not in summary
    assert "<img" not in summary
    assert "&lt;b&gt;{{ payload }}{% raw %}" in summary


def test_bars_and_marks_lie_where_the_numbers_are(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(runs(tmp_path, 40), {}, page)
    html = page.read_text()
    assert html.count('<b style="width: 50.0%"></b>') == 2  # both runs have half right
    assert html.count('class="point" style="left: 50.0%"') == 1  # no difference, in the middle
    left, width = map(float, re.findall(r'whisker" style="left: (.+?)%; width: (.+?)%"', html)[0])
    assert 30 < left < 50 < left + width < 70
    assert left + width / 2 == pytest.approx(50, abs=0.5)


def test_page_fetches_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(runs(tmp_path, 4, Data()), {"toy": Data()}, page)  # type: ignore[dict-item]
    html = page.read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)=["']?[^"'#]|@import|url\(|https?:""", html)


def test_pictures_maps_and_shared_images(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    left_out = write_page(runs(tmp_path, 8, Data()), {"toy": Data()}, page)  # type: ignore[dict-item]
    assert left_out == []
    data = payload(page)
    assert len(data["pictures"]) == 4  # two questions an image
    assert all(p.startswith("data:image/webp;base64,UklGR") for p in data["pictures"])
    question = data["questions"][5]
    assert question["picture"] == data["questions"][4]["picture"]
    assert question["looks"][1]["map"] == "AAAAgP8="
    assert question["looks"][1]["grid"] == [1, 5]
    assert question["looks"][1]["crops"] == [None]  # cut out of the picture itself


def test_crops_of_large_originals_are_pictures_of_their_own(tmp_path: Path) -> None:
    big, page = Data((1300, 900)), tmp_path / "page.html"
    write_page(runs(tmp_path, 2, big), {"toy": big}, page)  # type: ignore[dict-item]
    data = payload(page)
    assert len(data["pictures"]) == 2
    assert data["questions"][0]["looks"][1]["crops"] == [1 - data["questions"][0]["picture"]]


def test_budget_keeps_fixed_and_broken_first_and_all_text(tmp_path: Path) -> None:
    page, data = tmp_path / "page.html", Data((200, 200))
    comparison = runs(tmp_path, 40, data)
    write_page(comparison, {"toy": data}, page)  # type: ignore[dict-item]
    whole = page.stat().st_size
    (note,) = write_page(comparison, {"toy": data}, page, budget_mb=0.7 * whole / 1e6)  # type: ignore[dict-item]
    assert page.stat().st_size <= 0.7 * whole
    questions = payload(page)["questions"]
    assert len(questions) == 40
    pictured = [q["id"] for q in questions if q["picture"] is not None]
    changed = [q["id"] for q in questions if q["scores"][0] != q["scores"][1]]
    bare = [len(set(group) - set(pictured)) for group in (changed, set(range(40)) - set(changed))]
    assert 0 < len(pictured) < 40
    assert bare[0] < bare[1]
    assert f"{bare[0]} of 20 questions with different scores and {bare[1]} of 20 others" in note
    assert note in page.read_text()


def test_order_is_seeded_and_changed_come_first() -> None:
    changed, others = [("t", i) for i in range(5)], [("t", i) for i in range(5, 10)]
    one = in_order(changed, others, seed=1)
    assert one == in_order(changed, others, seed=1) != in_order(changed, others, seed=2)
    assert set(one[:5]) == set(changed)


def test_a_full_album_stops_trying() -> None:
    album = Album(budget=10)
    tried = []

    def make() -> Image.Image:
        tried.append(1)
        return Image.new("RGB", (9, 9))

    assert [album.add([(i, make)]) for i in range(TRIES + 20)] == [None] * (TRIES + 20)
    assert len(tried) == TRIES
    assert album.pictures == []


def test_data_of_another_kind_gives_no_pictures(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    other = Data((100, 101))
    (note,) = write_page(runs(tmp_path, 4, Data()), {"toy": other}, page)  # type: ignore[dict-item]
    assert note.startswith("4 questions are shown without pictures, as the data on this machine")
    assert payload(page)["pictures"] == []


# In a browser


def browse(page: Path, script: str, *, real_time: bool = False) -> dict[str, Any]:
    """Open a copy of the page with a script at its end; returns what it puts into `report`.

    real_time: clocks tell the truth, and only what the script does without waiting is seen.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    ending = (
        "<script>const report = {errors: []};"
        "window.onerror = (m) => { report.errors.push(String(m)); };"
        "const press = (key) => document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key, bubbles: true}));"
        "const wait = (ms) => new Promise((done) => setTimeout(done, ms));"
        "const cards = () => document.querySelectorAll('.card').length;"
        "const range = () => document.getElementById('range').textContent;"
        f"(async () => {{ try {{ {script} }} catch (e) {{ report.errors.push(String(e)); }}"
        "const out = document.createElement('pre'); out.id = 'report';"
        "out.textContent = JSON.stringify(report); document.body.append(out); })();</script>"
    )
    copy = page.with_name("driven.html")
    copy.write_text(page.read_text().replace("</body>", f"{ending}</body>"))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={page.parent / 'profile'}",
            "--window-size=1200,900",
            *([] if real_time else ["--virtual-time-budget=8000"]),
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    match = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    from html import unescape

    return json.loads(unescape(match[1]))


@pytest.mark.slow
def test_browser_opens_filters_pages_and_takes_keys(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(runs(tmp_path, 100, Data()), {"toy": Data()}, page)  # type: ignore[dict-item]
    report = browse(
        page,
        """
        await wait(200);
        report.open = [cards(), range()];
        press('ArrowRight'); report.next = range();
        press('ArrowLeft'); press('ArrowLeft'); report.back = range();
        press('f'); report.fixed = range();
        press('b'); report.broken = [range(), document.querySelector('.badge.worse') !== null];
        press('w'); report.wrong = range();
        press('a');
        press('ArrowDown'); press('ArrowDown');
        report.chosen = document.querySelector('.card.chosen').dataset.id;
        const box = document.getElementById('search');
        box.focus(); box.value = 'question 77';
        box.dispatchEvent(new Event('input')); await wait(300);
        report.search = [cards(), document.querySelector('.card').dataset.id];
        box.value = 'nowhere'; box.dispatchEvent(new Event('input')); await wait(300);
        report.none = [cards(), document.querySelector('.empty').textContent];
        box.value = ''; box.dispatchEvent(new Event('input')); await wait(300);
        const canvas = document.querySelector('.card canvas');
        const at = canvas.getContext('2d').getImageData(9, 9, 1, 1).data;
        report.painted = at[3];
        report.crops = document.querySelectorAll('.card:first-child .answer canvas').length;
        """,
    )
    assert report["errors"] == []
    assert report["open"] == [20, "1 to 20 of 100"]
    assert report["next"] == "21 to 40 of 100"
    assert report["back"] == "1 to 20 of 100"
    assert report["fixed"] == "1 to 20 of 25"
    assert report["broken"] == ["1 to 20 of 25", True]
    assert report["wrong"] == "1 to 20 of 25"
    assert report["chosen"] == "1"
    assert report["search"] == [1, "77"]
    assert report["none"] == [0, "No question matches these filters."]
    assert report["painted"] == 255
    assert report["crops"] == 2


@pytest.mark.slow
def test_browser_runs_no_script_of_a_question(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(runs(tmp_path, 4, input=HOSTILE, target=HOSTILE), {}, page)
    report = browse(
        page,
        """
        report.title = document.title;
        report.prompt = document.querySelector('.prompt').textContent;
        report.images = document.querySelectorAll('.card img').length;
        """,
    )
    assert report == {"errors": [], "title": "stock / rpn", "prompt": HOSTILE, "images": 0}


@pytest.mark.slow
def test_browser_does_not_freeze_on_thousands(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(runs(tmp_path, 12000), {}, page)
    report = browse(
        page,
        """
        const started = performance.now();
        for (let i = 0; i < 5; i++) { press('ArrowRight'); press('f'); press('a'); }
        report.each = (performance.now() - started) / 15;
        report.range = range();
        """,
        real_time=True,
    )
    assert report["range"] == "1 to 20 of 12000"
    assert 0 < report["each"] < 300  # milliseconds; far less on an idle machine
