"""The long run asks what it says, keeps the cache within its bound and reads slopes right."""

from __future__ import annotations

import pytest

from benchmarks import long_run


def test_a_short_one_through_the_plugin() -> None:
    """Four images, of which two fit the cache."""
    rows = long_run.long_run(4, 6, every=6, batch_size=3, cache=2 * long_run.MIB)
    assert [row["questions"] for row in rows] == [6, 12, 18, 24]
    assert [row["prefixes"] for row in rows] == [1, 2, 2, 2]
    assert all(0 < row["prefix_cache_bytes"] <= 2 * long_run.MIB for row in rows)
    assert all(row["anonymous_bytes"] > 0 for row in rows)
    found = long_run.findings(rows, 2 * long_run.MIB)
    assert len(long_run.figure({"rows": rows, "findings": found}).axes) == 3


def test_slopes_leave_out_the_first_tenth() -> None:
    rows = [{"questions": float(n), "anonymous_bytes": 1000 + 3.0 * n} for n in range(50, 501, 50)]
    rows[0]["anonymous_bytes"] = 0
    assert long_run.slope(rows, "anonymous_bytes") == pytest.approx(3)
    with pytest.raises(ValueError, match="too few rows"):
        long_run.slope(rows[:1], "anonymous_bytes")


def test_more_questions_than_there_are_wordings_are_refused() -> None:
    with pytest.raises(ValueError, match="--per-image must be 16 or less"):
        long_run.requests(1, 17, 0)
