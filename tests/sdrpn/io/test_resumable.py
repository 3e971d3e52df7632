"""The runner of long jobs: prefetching, batches that do not fit, items that fail, torn files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpn.io.resumable import (
    BatchRunner,
    DoesNotFit,
    append_lines,
    drop_incomplete_line,
    first_line,
    guard_settings,
    is_out_of_memory,
    prefetch,
)


def runner(run: Callable[[Sequence[int]], list[int]], **more: Any) -> BatchRunner[int, int, Any]:
    """Squares numbers; what fails becomes the error's text."""
    given = {
        "prepare": lambda i: i * i,
        "run": lambda items, ready: run(list(ready)),
        "recover": lambda item, ready, error: str(error),
        "describe": lambda item: f"number {item}",
        "batch_size": 4,
        "remedy": "buy more",
    }
    return BatchRunner(**(given | more))


def flat(pieces: Any) -> list[tuple[int, Any]]:
    return [pair for piece in pieces for pair in piece]


BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
SQUARES = [(i, i * i) for i in range(10)]


def test_results_come_in_the_order_of_the_batches() -> None:
    one = runner(list)
    assert flat(one(BATCHES, disable=True)) == SQUARES
    assert one.succeeded
    assert flat(runner(list)([], disable=True)) == []


def test_batches_are_halved_until_they_fit_and_stay_small() -> None:
    sizes, warned = [], []

    def small(ready: list[int]) -> list[int]:
        sizes.append(len(ready))
        if len(ready) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return ready

    one = runner(small, warn=warned.append)
    assert flat(one(BATCHES, disable=True)) == SQUARES
    assert sizes == [4, 2, *[1] * 10]
    assert one.batch_size == 1
    assert warned == ["4 questions at a time do not fit the memory: going on with 1"]


def test_an_item_that_does_not_fit_alone_is_named_with_the_remedy() -> None:
    def full(ready: list[int]) -> list[int]:
        raise MemoryError("full\nand more")

    told = r"number 0 does not fit the memory even alone; buy more \(full\)"
    with pytest.raises(DoesNotFit, match=told):
        flat(runner(full)(BATCHES, disable=True))


def test_a_bad_item_costs_only_itself_and_comes_last_in_its_batch() -> None:
    def run(ready: list[int]) -> list[int]:
        if 1 in ready:
            raise ValueError("odd")
        return ready

    def prepare(i: int) -> int:
        if i == 4:
            raise OSError("gone")
        return i * i

    done = flat(runner(run, prepare=prepare)(BATCHES, disable=True))
    first = [(0, 0), (2, 4), (3, 9), (1, "odd")]
    assert done == [*first, (5, 25), (6, 36), (7, 49), (4, "gone"), (8, 64), (9, 81)]


def test_recover_is_told_what_was_prepared_and_may_end_the_job() -> None:
    seen: list[Any] = []

    def fail(ready: list[int]) -> list[int]:
        raise ValueError("no")

    def recover(item: int, ready: int | None, error: Exception) -> None:
        seen.append((item, ready))
        raise error

    with pytest.raises(ValueError, match="no"):
        flat(runner(fail, recover=recover)([[3, 4]], disable=True))
    assert seen == [(3, 9)]


@pytest.mark.parametrize("strict", [True, False])
def test_a_batch_that_fails_only_as_a_batch(strict: bool) -> None:
    warned: list[str] = []

    def apart(ready: list[int]) -> list[int]:
        if len(ready) > 1:
            raise ValueError("not together")
        return ready

    one = runner(apart, strict=strict, warn=warned.append)
    if strict:
        with pytest.raises(ValueError, match="not together"):
            flat(one([[1, 2]], disable=True))
    else:
        assert flat(one([[1, 2]], disable=True)) == [(1, 1), (2, 4)]
        assert warned == [
            "a batch of 2 questions failed (not together), and each of them alone did not"
        ]


def test_a_lost_device_ends_the_job_at_once() -> None:
    def lost(ready: list[int]) -> list[int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        flat(runner(lost, recover=lambda *_: pytest.fail("not an item's fault"))(BATCHES))


def test_memory_that_fails_while_preparing_is_no_bad_item() -> None:
    def full(i: int) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        flat(runner(list, prepare=full)(BATCHES, disable=True))


def test_a_job_that_ends_early_leaves_no_thread() -> None:
    before = threading.active_count()
    results = runner(list, workers=3)(BATCHES, disable=True)
    next(results)
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (ValueError("no"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_first_lines_name_no_address() -> None:
    assert first_line(ValueError("<f at 0x7f00> is bad\nand more")) == "<f> is bad"
    assert first_line(KeyError()) == "KeyError"


# Prefetching


def test_one_item_is_made_ahead_and_no_further() -> None:
    made: list[int] = []

    def make(i: int) -> int:
        made.append(i)
        return i * 10

    seen = []
    for item, value in prefetch(iter(range(5)), make):
        assert value == item * 10
        seen.append(item)
        deadline = time.monotonic() + 5
        while len(made) < min(len(seen) + 1, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == list(range(min(len(seen) + 1, 5)))
    assert seen == [0, 1, 2, 3, 4]
    assert list(prefetch([], make)) == []


def test_an_error_in_the_making_comes_where_its_item_would() -> None:
    def make(i: int) -> int:
        if i == 1:
            raise ValueError("item 1 is broken")
        return i

    coming = prefetch(range(3), make)
    assert next(coming) == (0, 0)
    with pytest.raises(ValueError, match="item 1 is broken"):
        next(coming)


# Settings and lines


def test_settings_are_kept_or_compared(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.json"
    guard_settings(path, {"a": (1, 2), "b": None})
    guard_settings(path, {"a": [1, 2], "b": None})
    told = rf"{tmp_path}/new was begun with other settings \(a: \[1, 2\] there, 3 now; c: None"
    with pytest.raises(ValueError, match=told):
        guard_settings(path, {"a": 3, "b": None, "c": 4})
    with pytest.raises(ValueError, match="mine was begun"):
        guard_settings(path, {}, Path("mine"))


def test_a_torn_line_is_ended_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_lines(path, ["one", "zwölf"])
    append_lines(path, [])
    assert path.read_text() == "one\nzwölf\n"
    path.write_text("one\ntw")
    append_lines(path, ["three"])
    assert path.read_text() == "one\ntw\nthree\n"
    path.write_text("one\ntw")
    assert drop_incomplete_line(path) == [b"one"]
    assert path.read_text() == "one\n"
