"""Cost of bringing an index up to date, beside building it."""

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmssl.apps.search import embed_shards
from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.inference import Model
from mmssl.types import Sample

SHARDS = 100


@dataclass(frozen=True)
class UpdateBench:
    """Seconds of `mmssl embed`, without loading the model."""

    images: int
    build: float
    """The first time."""
    changed: list[float]
    """After one of 100 shards was written again, with other captions."""
    unchanged: list[float]

    def text(self) -> str:
        """As lines."""
        lines = [f"{self.images:,} images in {SHARDS} shards: built in {self.build:.2f} s"]
        for name, seconds in (("1 shard changed", self.changed), ("nothing changed", self.unchanged)):
            middle = statistics.median(seconds)
            lines.append(
                f"{name}: {middle:.3f} s, {middle / self.build:.2%} of the build (median of {len(seconds)}, at most "
                f"{max(seconds) / self.build:.2%})"
            )
        return "\n".join(lines)


def bench_update(model: Model, shards: Sequence[str], images: int, rounds: int) -> UpdateBench:
    """Divide the first images of shards into 100 shards, embed these, change one, and embed again.

    Raises:
        UserError: the shards hold fewer than 100 images.
    """
    samples = list(islice(iter_samples(shards, need_text=False, on_bad=lambda bad: None), images))
    if len(samples) < SHARDS:
        raise UserError(f"the shards hold {len(samples)} images; give at least {SHARDS}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = [folder / f"{number:03}.tar" for number in range(SHARDS)]
        for number, path in enumerate(paths):
            _write(path, samples[number::SHARDS], "first")
        build, unchanged, changed = _seconds(model, paths), list[float](), list[float]()
        for turn in range(rounds):
            unchanged.append(_seconds(model, paths))
            number = turn % SHARDS
            _write(paths[number], samples[number::SHARDS], f"again {turn}")
            changed.append(_seconds(model, paths))
    return UpdateBench(len(samples), build, changed, unchanged)


def _seconds(model: Model, paths: Sequence[Path]) -> float:
    start = time.perf_counter()
    embed_shards(model, list(map(str, paths)), paths[0].parent / "index")
    return time.perf_counter() - start


def _write(path: Path, samples: Sequence[Sample], caption: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in (("png", sample.image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
