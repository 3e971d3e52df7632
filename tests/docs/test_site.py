"""The documentation as a site: strict, whole, without repetition."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, text_of

GENERATED = ("docs/throughput", "docs/speed.md")
"""Pages whose tables come with the captions of their script."""


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'sdrpn[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {Path(page).stem for page in PAGES if page.startswith("docs/")} <= pages
    api = (tmp_path / "site" / "api.html").read_text()
    for name in ("sdrpn.engine.ZoomModel.ask_batch", "sdrpn_eval.results.stats.clustered"):
        assert f'id="{name}"' in api
    # Nothing is fetched from elsewhere when a page is read.
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)', api)


def sentences(page: str) -> set[str]:
    """Sentences of a page, without code and tables."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("|")]
    found = (s for part in paragraphs for s in re.split(r"(?<=[.:])\s+", " ".join(part.split())))
    return {sentence for sentence in found if len(sentence) > 60}


def test_no_page_repeats_another() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for page in PAGES:
        if not page.startswith(GENERATED):
            for sentence in sentences(page):
                where[sentence].append(page)
    assert sum(map(len, where.values())) > 300
    assert {sentence: pages for sentence, pages in where.items() if len(pages) > 1} == {}
