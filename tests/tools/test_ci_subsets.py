"""The ids of the CI subsets: chosen evenly, and those that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpn_eval.subsets import ids_folder, read_subset
from tests.sdrpn_eval.test_subsets import ROWS
from tools.ci_subsets import even_ids, main, make_subset

SHIPPED = ids_folder()


def test_the_shipped_files_are_what_the_script_makes(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)])
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in SHIPPED.iterdir()}
    assert set(made) == {f"{task}.json" for task in ROWS}


@pytest.mark.parametrize("task", ROWS)
def test_a_document_of_every_stretch(task: str) -> None:
    chosen = read_subset(task)
    n, of = len(chosen.ids), chosen.rows
    source, count = ROWS[task]
    assert (chosen.source, n, of) == (source, min(200, count), count)
    assert all(of * i // n <= row < of * (i + 1) // n for i, row in enumerate(chosen.ids))


def test_stretches_are_met_at_no_fixed_place() -> None:
    offsets = [row - 25 * i for i, row in enumerate(read_subset("textvqa_ci").ids)]
    assert set(offsets) == set(range(25))
    others = [read_subset(t).ids for t in ("hrbench4k_ci", "hrbench8k_ci")]
    assert others[0] != others[1]


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_ids_are_distinct_and_in_order(of: int, count: int, seed: int) -> None:
    ids = even_ids(of, count, seed, "x")
    assert len(ids) == min(of, count)
    assert ids == sorted(set(ids))
    assert ids[0] >= 0
    assert ids[-1] < of


def test_another_seed_chooses_others() -> None:
    assert make_subset("pope_ci", seed=1).ids != make_subset("pope_ci").ids
