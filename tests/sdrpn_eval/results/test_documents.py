"""True boxes from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdrpn_eval.results.documents import read_boxes


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"toy": {"0": [1, 2, 3]}}', '{"toy": {"0": [5, 5, 5, 9]}}']
)
def test_a_bad_file_of_boxes_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"boxes\.json must hold"):
        read_boxes(file)
