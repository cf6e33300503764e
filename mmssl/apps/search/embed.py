"""Images of shards to an index, shard by shard; what is done stays, and processes share the shards."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmssl.apps.search.index import FORMAT, PARTS, RECORD, SAME, part, probe, read_record, write_part
from mmssl.data import iter_samples
from mmssl.data.shards import BadSample, is_remote
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.encode import ALONE, encode_images
from mmssl.inference import Model


@dataclass
class Embedded:
    """What this process did."""

    images: int = 0
    """Images embedded now."""
    kept: int = 0
    """Shards that were there already."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that were left out."""


def embed_shards(
    model: Model,
    shards: Sequence[str],
    out: Path,
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Store the vector of every image. Called again, it goes on with the shards that are missing.

    Of several processes each does every world-th shard; all return when all are done.

    Args:
        progress: called with the images done so far.

    Raises:
        UserError: the folder holds another index or cannot be written, or images cannot be encoded.
    """
    names = [shard if is_remote(shard) else str(Path(shard).resolve()) for shard in shards]
    _prepare(model, names, out, world)
    done = Embedded()
    for number in range(world.rank, len(names), world.size):
        if part(out, number).is_file():
            done.kept += 1
            continue
        try:
            _embed_shard(model, names[number], out, number, batch_size, done)
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror}; what is done stays, call again to go on"
            ) from None
        if progress is not None:
            progress(done.images)
    world.barrier()
    return done


def _embed_shard(model: Model, shard: str, out: Path, number: int, batch_size: int, done: Embedded) -> None:
    images = encode_images(model, iter_samples([shard], need_text=False, on_bad=done.bad.append), batch_size=batch_size)
    samples = images.samples
    columns = {
        "shard": [sample.shard for sample in samples],
        "key": [sample.key for sample in samples],
        "caption": [str(sample.fields.get("txt", "")) for sample in samples],
    }
    write_part(out, number, images.features.numpy().astype(np.float16), columns)
    done.images += len(samples)
    done.bad += images.bad


def _prepare(model: Model, shards: list[str], out: Path, world: World) -> None:
    """Write index.json, or find that the one that is there is of the same model and shards."""
    mark = probe(model)
    known = read_record(out)
    world.barrier()  # rank 0 must not write it before the others have looked
    if known is not None:
        same = len(known["probe"]) == len(mark) and float(np.array(known["probe"]) @ mark) >= SAME
        if known["shards"] != shards or not same:
            what = "other shards" if same else "another model"
            raise UserError(f"{out} holds an index of {what}; choose another folder, or remove it")
    elif world.rank == 0:
        try:
            (out / PARTS).mkdir(parents=True, exist_ok=True)
            record = {"format": FORMAT, "shards": shards, "probe": [float(value) for value in mark]}
            (out / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; pick another folder") from None
    world.barrier()
