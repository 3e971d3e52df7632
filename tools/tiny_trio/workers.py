"""Training in two processes of one thread each, which share every step's gradients.

On a machine whose cores are busy with other work too, two threads of one process wait for one
another at every operation; two processes do once a step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _start(rank: int, job: Callable[..., None], world: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    job(*arguments)
    dist.destroy_process_group()


def in_parallel(job: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    """Run `job(*arguments)` in `world` processes; it finds its place by `rank()`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(_start, args=(job, world, port, arguments), nprocs=world)  # type: ignore[attr-defined]


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    if world() == 1:
        return
    some = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in some])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= world()
    for p, part in zip(some, flat.split([p.numel() for p in some]), strict=True):
        p.grad = part.view_as(p)
