"""An evaluation on several ranks, which are threads."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate import suite


class Board:
    """What the ranks of a pretended process group tell each other."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values: list[Any] = [None] * world_size


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads."""

    board: Board = field(default_factory=lambda: Board(1))

    def _exchange(self, value: Any) -> list[Any]:
        self.board.values[self.rank] = value
        self.board.barrier.wait()
        values = list(self.board.values)
        self.board.barrier.wait()
        return values

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self._exchange(value)[source]


def on_ranks(world_size: int, encoder: Callable[[], Any], *arguments: Any, **options: Any) -> list[Any]:
    """Results of `suite.run` on every rank with the encoder that it used, or its error."""
    board = Board(world_size)
    outcomes: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        own = encoder()
        try:
            ranks = Threads(rank, world_size, board=board)
            outcomes[rank] = (suite.run(own, *arguments, options=suite.SuiteOptions(world=ranks, **options)), own)
        except UserError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
