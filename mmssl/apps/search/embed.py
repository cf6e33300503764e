"""Embeddings of the images of shards, stored shard by shard, and of queries. Finished shards are kept; ranks share the
shards."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmssl.apps.search.index import FORMAT, PARTS, RECORD, SAME, part, probe, read_record, write_part
from mmssl.data import USUAL_MEMBERS, MemberNames, iter_samples
from mmssl.data.shards import IMAGES, BadSample, SampleLimits, is_remote
from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.inference import ImageInput, Model


@dataclass
class Embedded:
    """Work done by this rank."""

    images: int = 0
    """Images embedded now."""
    kept: int = 0
    """Shards that were stored already."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be used."""


def embed_shards(
    model: "Model",
    shards: Sequence[str],
    out: Path,
    *,
    batch_size: int = 256,
    members: MemberNames = USUAL_MEMBERS,
    world: World = SINGLE_PROCESS,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Store the embedding of every image. A second call resumes with the missing shards.

    Rank r of n embeds shards r, r + n, ...; all ranks return when all shards are stored.

    Args:
        members: members of the shards that hold the image and the caption, beside the usual ones.
        progress: called with the number of images embedded so far.

    Raises:
        UserError: the folder holds another index or cannot be written, or images cannot be encoded.
    """
    names = [shard if is_remote(shard) else str(Path(shard).resolve()) for shard in shards]
    _prepare(model, names, out, members, world)
    done = Embedded()
    for number in range(world.rank, len(names), world.size):
        if part(out, number).is_file():
            done.kept += 1
            continue
        try:
            _embed_shard(model, names[number], out, number, batch_size, members, done)
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror}; finished shards are kept, call again to resume"
            ) from None
        if progress is not None:
            progress(done.images)
    world.barrier()
    return done


def _embed_shard(
    model: "Model", shard: str, out: Path, number: int, batch_size: int, members: MemberNames, done: Embedded
) -> None:
    from mmssl.evaluate import encode

    found = iter_samples([shard], SampleLimits(members=members), need_text=False, on_bad=done.bad.append)
    images = encode.encode_images(model, found, batch_size=batch_size)
    samples = images.samples
    columns = {
        "shard": [sample.shard for sample in samples],
        "key": [sample.key for sample in samples],
        "caption": [str(sample.fields.get("txt", "")) for sample in samples],
    }
    write_part(out, number, images.features.numpy().astype(np.float16), columns)
    done.images += len(samples)
    done.bad += images.bad


def _prepare(model: "Model", shards: list[str], out: Path, members: MemberNames, world: World) -> None:
    """Write index.json, or check that the existing one names the same model and shards."""
    own_probe = probe(model)
    known = read_record(out)
    world.barrier()  # rank 0 must not write it before the other ranks have read it
    if known is not None:
        same = len(known["probe"]) == len(own_probe) and float(np.array(known["probe"]) @ own_probe) >= SAME
        if known["shards"] != shards or not same:
            what = "other shards" if same else "another model"
            raise UserError(f"{out} holds an index of {what}; choose another folder, or remove it")
    elif world.rank == 0:
        try:
            (out / PARTS).mkdir(parents=True, exist_ok=True)
            record = {"format": FORMAT, "shards": shards, "probe": [float(value) for value in own_probe]}
            record["members"] = asdict(members)
            (out / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; pick another folder") from None
    world.barrier()


def encode_query(model: "Model", query: "ImageInput") -> npt.NDArray[np.float32]:
    """The unit-length embedding of a text or an image, float32 [1, D].

    Args:
        query: a text, the path of an image file, or an image.

    Raises:
        UserError: the file is not an image; the text looks like an image file that does not exist; or the text is
            empty.
        DecodeError: an image that is not a file cannot be decoded.
    """
    if not isinstance(query, str) or _is_file(query):
        return model.encode_image(query).numpy()
    if Path(query).suffix.lower().lstrip(".") in IMAGES:
        raise UserError(f"no image at {query}; correct the path, or search for other words")
    if not query.strip():
        raise UserError("the query is empty; give words or an image")
    return model.encode_text(query).numpy()


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a file name
        return False
