"""Images per second from shards to features, beside clip_benchmark's own loop on the same model and shards."""

import contextlib
import importlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmssl.data.shards import is_remote
from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode
from mmssl.inference import Model

Embed = Callable[[], Tensor]


@dataclass(frozen=True)
class EmbedBench:
    """Seconds of each round, in turn."""

    images: int
    ours: list[float]
    theirs: list[float]
    likeness: float
    """Mean cosine between our features and theirs; below 1 because images are decoded and resized by other
    libraries."""

    @property
    def ratios(self) -> list[float]:
        """Our throughput as a multiple of theirs, one per round."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def text(self) -> str:
        """A table for a terminal."""
        lines = [f"{'':15} {'images/s':>10} {'seconds':>8}"]
        for name, seconds in (("mmssl", self.ours), ("clip_benchmark", self.theirs)):
            middle = statistics.median(seconds)
            lines.append(f"{name:15} {self.images / middle:10.1f} {middle:8.2f}")
        low, high = min(self.ratios), max(self.ratios)
        lines.append(f"ratio {statistics.median(self.ratios):.2f} [{low:.2f}, {high:.2f}] over {len(self.ours)} rounds")
        lines.append(f"{self.images:,} images; mean cosine between both sides' features {self.likeness:.5f}")
        return "\n".join(lines)


def bench_embed(model: Model, dataset: datasets.Dataset, *, batch_size: int, workers: int, rounds: int) -> EmbedBench:
    """Embed all images of a dataset by both, in turn, after an unmeasured pass of each.

    Args:
        workers: processes of clip_benchmark's loader, at most one a shard: it gives each worker whole shards.

    Raises:
        UserError: clip_benchmark is not installed, or a shard is not a local file.
    """
    if any(is_remote(shard) for shard in dataset.shards):
        raise UserError(f"bench embed reads local shards only; copy {dataset.shards[0]} to a disk")
    with tempfile.TemporaryDirectory() as folder:
        sides = (ours(model, dataset, batch_size), theirs(model, dataset, Path(folder), batch_size, workers))
        features = [side() for side in sides]
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for side, measured in zip(sides, seconds, strict=True):
                start = time.perf_counter()
                side()
                measured.append(time.perf_counter() - start)
    return EmbedBench(len(features[0]), *seconds, likeness=_likeness(*features))


def ours(model: Model, dataset: datasets.Dataset, batch_size: int) -> Embed:
    """The features [N, D] of all images, as `mmssl eval` computes them."""

    def embed() -> Tensor:
        return encode.encode_images(model, datasets.read(dataset, lambda bad: None), batch_size=batch_size).features

    return embed


def theirs(model: Model, dataset: datasets.Dataset, folder: Path, batch_size: int, workers: int) -> Embed:
    """clip_benchmark's builder, loader and zero-shot loop with OpenCLIP's preprocessing: features [N, D].

    Args:
        folder: where the shards are laid out as it wants them.
    """
    try:
        builder = importlib.import_module("clip_benchmark.datasets.builder")
        loop = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
    except ImportError as error:
        raise UserError(f"bench embed needs clip_benchmark ({error}): pip install clip-benchmark") from None
    _lay_out(dataset, folder)
    device = str(model.device)
    peer = NormalizedInput(model).to(device)
    mean, std = (tuple((s.flatten() / 255).tolist()) for s in (model.vision.mean, model.vision.std))
    transform = open_clip.image_transform(model.vision.image_size, is_train=False, mean=mean, std=std)
    # The identity as classifier: what their loop returns is then the features, times 100.
    classifier = torch.eye(model.config.embed_dim, device=device)

    def embed() -> Tensor:
        with warnings.catch_warnings():
            # webdataset requires an explicit setting for unshuffled shards.
            warnings.filterwarnings("ignore", message=r"WebDataset\(shardshuffle")
            data = builder.build_wds_dataset("wds", transform, split="test", data_dir=str(folder))
        loader: Any = DataLoader(
            data.batched(batch_size),
            batch_size=None,
            shuffle=False,
            num_workers=min(workers, len(dataset.shards)),
        )
        batches = _without_texts(loader)
        with contextlib.redirect_stderr(io.StringIO()):
            found: Tensor = loop.run_classification(peer, classifier, batches, device, amp=False)[0]
        return found / 100

    return embed


class NormalizedInput(nn.Module):
    """The model's image side, for what OpenCLIP's preprocessing gives."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = model.encoder.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> unit vectors [B, D]."""
        # The tower normalises by itself.
        return self.encoder.encode_image(torch.addcmul(self.encoder.vision.mean, images, self.encoder.vision.std))


def _lay_out(dataset: datasets.Dataset, folder: Path) -> None:
    """The shards as test/0.tar ...; captioned ones as a retrieval set, so that they need no labels."""
    (folder / "test").mkdir()
    for number, shard in enumerate(dataset.shards):
        (folder / "test" / f"{number}.tar").symlink_to(Path(shard).resolve())
    (folder / "test" / "nshards.txt").write_text(str(len(dataset.shards)))
    first = next(datasets.read(dataset, lambda bad: None), None)
    if first is None or not {"cls", "txt"} & first.fields.keys():
        raise UserError(f"{dataset.shards[0]} has neither .cls nor .txt members, which clip_benchmark needs")
    (folder / "classnames.txt").write_text("")
    (folder / "zeroshot_classification_templates.txt").write_text("")
    (folder / "dataset_type.txt").write_text("classification" if "cls" in first.fields else "retrieval")


def _without_texts(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for images, _ in loader:
        yield images, torch.zeros(len(images))


def _likeness(first: Tensor, second: Tensor) -> float:
    """Their loader's workers give the shards in turn, so some of our rows are each compared with their nearest."""
    return float((first[:1000] @ second.T).amax(dim=1).mean())
