"""Samples per CPU-second of the training loader with and without a cache of resized images, epoch by epoch."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmssl.data.transforms import views
from scripts.bench.data import cpu_seconds, loader_command, spread
from scripts.bench.mmssl_loader import LoaderSettings
from scripts.bench.photographs import write_shards

CASES = ("no cache", "first epoch", "second epoch")
_BATCH = 64


@dataclass(frozen=True)
class CacheRates:
    """All cases on the same photographs."""

    what: str
    per_cpu_second: dict[str, list[float]]
    """Case -> samples per CPU-second in each round."""
    original_bytes: int
    """Bytes of the shards."""
    kept_bytes: int
    """Bytes of the cache."""

    def text(self) -> str:
        """A table: medians with their range over rounds, and ratios to the loader without a cache."""
        bare = self.per_cpu_second[CASES[0]]
        lines = [f"{self.what}; median [least, most] of the rounds"]
        lines.append(f"{'':14} {'samples per CPU-second':>24} {'times no cache':>20}")
        for case, rates in self.per_cpu_second.items():
            ratios = [rate / other for rate, other in zip(rates, bare, strict=True)]
            lines.append(f"{case:14} {spread(rates, '.0f'):>24} {spread(ratios, '.2f'):>20}")
        lines.append(f"shards {self.original_bytes / 1e6:,.0f} MB, cache {self.kept_bytes / 1e6:,.0f} MB")
        return "\n".join(lines)

    def gain(self) -> float:
        """Median ratio of the second epoch to the loader without a cache."""
        pairs = zip(self.per_cpu_second[CASES[2]], self.per_cpu_second[CASES[0]], strict=True)
        return statistics.median(rate / other for rate, other in pairs)


def bench_cache(
    side: int,
    resize: int,
    samples: int,
    *,
    mode: views.DecodeMode = "quality",
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> CacheRates:
    """Measure one epoch of `samples` photographs of shorter side `side` in each case, each in a process of its own.

    The second epoch reads the cache that the first one of its round filled.
    """
    say = progress or (lambda what: None)
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"making {side}-px photographs")
        shards = write_shards(folder / "shards", side, samples, distinct=min(samples, 128), quality=75)
        cache = folder
        for number in range(rounds):
            cache = folder / f"cache-{number}"
            for case in CASES:
                say(f"round {number + 1} of {rounds}, {case}")
                settings = LoaderSettings("stream", shards, mode, 224, _BATCH, 1, 0, samples // _BATCH)
                if case != CASES[0]:
                    settings = _with_cache(settings, cache, resize)
                rates[case].append(samples / cpu_seconds(loader_command(settings), folder / "log.txt"))
        kept = sum(path.stat().st_size for path in cache.glob("*/*"))
        what = f"photographs of {side} px, quality 75, at 224 px with resize {resize}, decode {mode}"
        return CacheRates(what, rates, _size(shards), kept)


def _with_cache(settings: LoaderSettings, cache: Path, resize: int) -> LoaderSettings:
    return LoaderSettings(**{**vars(settings), "cache": str(cache), "resize": resize})


def _size(shards: Sequence[str]) -> int:
    return sum(Path(shard).stat().st_size for shard in shards)
