"""Features of images on disk, so that a second evaluation of the same model on the same shards does not encode again.

A dataset's features are FOLDER/KEY.safetensors, its records FOLDER/KEY.json. KEY is a hash of the model's fingerprint,
the versions of the libraries that render and encode, and the paths, sizes and modification times of the shards: when
one of these changes, the old features are not found."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmssl.data.shards import BadSample, is_remote
from mmssl.data.storage import Fetcher
from mmssl.errors import UserError
from mmssl.evaluate.encode import EncodedImages
from mmssl.files import atomic_write
from mmssl.types import PipeCommand, Sample

FORMAT = 3
LIBRARIES = ("mmssl", "torch", "timm", "open_clip_torch", "pillow", "imagecorruptions")
"""Libraries whose versions may change the features."""


@dataclass(frozen=True)
class FeatureCache:
    """The stored features of one model."""

    folder: Path
    model: str
    """Fingerprint of the weights and the preprocessing."""

    def key(self, shards: Sequence[str], variant: str = "") -> str | None:
        """The key of features of these shards; None for pipes, whose changes cannot be detected.

        Args:
            variant: name of a change made to the images.
        """
        states = [(shard, shard_state(shard)) for shard in shards]
        if any(state is None for _, state in states):
            return None
        states = [(_place(shard), state) for shard, state in states]
        words = repr((FORMAT, self.model, states, variant, [_version(name) for name in LIBRARIES]))
        return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def load(self, key: str, shards: Sequence[str]) -> EncodedImages | None:
        """The features under a key of these shards; None if missing or incomplete."""
        try:
            record = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
            features = load_file(self._path(key, "safetensors"))["features"]
            samples = [Sample(image=b"", **_placed(sample, shards)) for sample in record["samples"]]
            bad = [BadSample(**_placed(entry, shards)) for entry in record["bad"]]
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            return None
        return EncodedImages(features, samples, bad) if len(samples) == len(features) else None

    def store(self, key: str, shards: Sequence[str], images: EncodedImages) -> None:
        """Store features under a key of these shards, atomically.

        Shards are stored as numbers, because the next evaluation may name them differently.

        Raises:
            UserError: the folder cannot be written.
        """
        place = {shard: index for index, shard in enumerate(shards)}
        content = ("image", "more_images", "mask")
        samples = [{k: v for k, v in asdict(s).items() if k not in content} for s in images.samples]
        entries = {"samples": samples, "bad": [asdict(bad) for bad in images.bad]}
        record = {kind: [{**e, "shard": place[e["shard"]]} for e in listed] for kind, listed in entries.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Features are written last: records without features are ignored.
            atomic_write(self._path(key, "json"), lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
            atomic_write(
                self._path(key, "safetensors"),
                lambda path: save_file({"features": images.features.contiguous()}, path),
            )
        except OSError as error:
            raise UserError(
                f"features cannot be written to {self.folder}: {error}; give another --cache, or --no-cache"
            ) from None

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"


def default_folder() -> Path:
    """XDG_CACHE_HOME/mmssl/features, by default in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "mmssl" / "features"


def _placed(entry: dict[str, Any], shards: Sequence[str]) -> dict[str, Any]:
    """A stored entry, with the current name of its shard."""
    return {**entry, "shard": shards[entry["shard"]]}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def shard_state(shard: str) -> list[int] | None:
    """Size and modification time of a shard (remote: size alone); None for a pipe, whose changes cannot be detected.

    Raises:
        UserError: the shard is out of reach.
    """
    if isinstance(shard, PipeCommand):
        return None
    if is_remote(shard):
        return [Fetcher().size(shard)]
    try:
        status = Path(shard).stat()
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror}; correct the path, or restore it") from None
    return [status.st_size, status.st_mtime_ns]


def _place(shard: str) -> str:
    """The full path of a shard; the address of a remote one without its query."""
    return shard.partition("?")[0] if is_remote(shard) else str(Path(shard).resolve())
