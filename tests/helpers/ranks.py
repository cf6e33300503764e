"""Run a function on several ranks of a gloo process group."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmssl.distributed import World, current_world


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(world, *arguments)` on each of `world_size` fresh processes, in rank order.

    `function` is a module's own (it travels by name); it returns anything but tensors.
    """
    # A server that has imported everything once forks the ranks: importing takes a rank 25 seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    # An executor, unlike a pool, raises an error when a process dies.
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world_size, context) as pool:
        # Each rank waits for all others to join, so no process can take two.
        meet = Path(folder) / "meet"
        ranks = [pool.submit(_run, meet, rank, world_size, function, arguments) for rank in range(world_size)]
        return [rank.result() for rank in ranks]


def _run(meet: Path, rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meet.as_uri(), rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        mine = current_world()
        assert mine == World(rank, world_size)
        return function(mine, *arguments)
    finally:
        dist.destroy_process_group()
