"""Runs a function in several processes that talk over gloo on this machine.

Children start fresh (spawn), so `function` must live in a module that they can import: one in tests/support,
tests/parity or tests/property, not a test file.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` ranks; a failing rank's traceback is raised here."""
    with tempfile.TemporaryDirectory(prefix="rorqual-test-ranks-") as folder:
        mp.spawn(_rank, args=(function, world, folder, args), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
