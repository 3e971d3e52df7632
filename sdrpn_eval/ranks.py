"""Several processes: when one fails, none may wait for it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger


@contextmanager
def ending_all(world_size: int) -> Iterator[None]:
    """Make an error in one of several processes end that process with exit code 1.

    lmms-eval logs an error and ends with 0, which a launcher takes for success while the other
    processes go on and then wait for this one, on GPUs for hours. On exit code 1 torchrun and
    accelerate end them within seconds.
    """
    try:
        yield
    except Exception as error:
        if world_size == 1:
            raise
        told = "".join(traceback.format_exception(error))
        logger.error(f"{told}Ending all {world_size} processes.")
        raise SystemExit(1) from error
