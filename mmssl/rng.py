"""Randomness as a pure function of words: the same words give the same generator on every machine and process."""

import hashlib

import numpy as np
import torch

Word = int | str


def _digest(words: tuple[Word, ...]) -> bytes:
    # repr keeps 1 and "1" apart and puts a separator between words.
    return hashlib.blake2b(repr(words).encode(), digest_size=16).digest()


def generator(*words: Word) -> np.random.Generator:
    """A Philox generator keyed by `words`, for example `generator(seed, "augment", epoch, sample_id)`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(words), "little")))


def torch_seed(*words: Word) -> int:
    """A 63-bit seed keyed by `words`."""
    return int.from_bytes(_digest(words)[:8], "little") >> 1


def torch_generator(*words: Word, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` keyed by `words`."""
    return torch.Generator(device).manual_seed(torch_seed(*words))


class RowRandom:
    """Random numbers for some rows of a batch of `total`, the same for a row on any process.

    Numbers are drawn for the whole batch and cut to rows [start, stop).
    """

    def __init__(self, generator: torch.Generator, start: int, stop: int, total: int) -> None:
        self._generator = generator
        self._rows = slice(start, stop)
        self._total = total
        self._noises = 0

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), float32 [rows, *shape]."""
        device = self._generator.device
        return torch.rand(self._total, *shape, generator=self._generator, device=device)[self._rows]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, float32 [rows, *shape]."""
        device = self._generator.device
        return torch.randn(self._total, *shape, generator=self._generator, device=device)[self._rows]

    def noise(self, *shape: int) -> torch.Tensor:
        """Like `normal`, but drawn row by row: only this process's rows take memory."""
        device = self._generator.device
        own = torch.Generator(device)
        words = self._generator.initial_seed(), "noise", self._noises
        self._noises += 1
        rows = range(self._rows.start, self._rows.stop)
        return torch.stack(
            [torch.randn(*shape, generator=own.manual_seed(torch_seed(*words, row)), device=device) for row in rows]
        )

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Uniform in 0..high-1, int64 [rows, *shape]."""
        device = self._generator.device
        return torch.randint(high, (self._total, *shape), generator=self._generator, device=device)[self._rows]
