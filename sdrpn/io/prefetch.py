"""Work made ready in a thread while the last piece is worked on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Iterable[T], make: Callable[[T], R]) -> Generator[tuple[T, R], None, None]:
    """Each item with what `make` makes of it; the next one's is made meanwhile, and no further.

    An error in the making is raised where its item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming: tuple[T, Future[R]] | None = None
        for item in items:
            following = item, pool.submit(make, item)
            if coming is not None:
                yield coming[0], coming[1].result()
            coming = following
        if coming is not None:
            yield coming[0], coming[1].result()
