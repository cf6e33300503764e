"""Embeddings of the images (and captions) of shards, stored shard by shard, and of queries. Finished shards are kept;
ranks share the shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from mmssl.apps.search.fields import field_columns
from mmssl.apps.search.index import GRAPH, seal
from mmssl.data import USUAL_MEMBERS, MemberNames, account_of, iter_samples
from mmssl.data.shards import IMAGES, BadSample, SampleLimits, is_remote
from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.errors import UserError
from mmssl.evaluate.metrics import composed
from mmssl.inference import stored

if TYPE_CHECKING:
    from mmssl.inference import ImageInput, Model


_Kind = tuple[MemberNames, bool, stored.Dtype | None, list[str] | None]
"""The members of the shards, whether captions are embedded too, the number format, and the fields."""


@dataclass
class Embedded:
    """Work done by this rank."""

    images: int = 0
    """Images embedded now."""
    kept: int = 0
    """Shards that were stored already, as they are now."""
    renewed: int = 0
    """Shards that changed since they were stored."""
    removed: int = 0
    """Shards that were stored and are no longer among the data."""
    had_graph: bool = False
    """The index had a graph that no longer fits."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be used."""


def embed_shards(
    model: "Model",
    shards: Sequence[str],
    out: Path,
    *,
    batch_size: int = 256,
    members: MemberNames = USUAL_MEMBERS,
    bad_samples: float = 0.1,
    with_text: bool = False,
    dtype: stored.Dtype | None = None,
    fields: Sequence[str] | None = None,
    world: World = SINGLE_PROCESS,
    progress: Callable[[int, int], None] | None = None,
) -> Embedded:
    """Store the embedding of every image.

    A second call stores what is missing: new shards, shards whose size or time changed, and parts that are damaged. It
    removes the parts of shards that are no longer given. Rank r of n embeds shards r, r + n, ...; all ranks return when
    all shards are stored.

    Args:
        members: members of the shards that hold the image and the caption, beside the usual ones.
        bad_samples: largest fraction of unusable samples; of fewer than 100, it is that of 100. Beyond it, this rank
            stops after the shard, which is kept.
        with_text: store the embeddings of the captions too; samples without a caption are unusable then.
        dtype: number format of the stored embeddings. Default: float16, or that of the folder.
        fields: names of the fields of samples to store. Default: all with short values, or those of the folder.
        progress: called as `progress(shards done, images embedded)`, of this rank.

    Raises:
        UserError: the folder holds an index of another model or of other data, or cannot be written; or too many
            samples are unusable.
    """
    names = [shard if is_remote(shard) else str(Path(shard).resolve()) for shard in shards]
    done = Embedded()
    chosen = None if fields is None else sorted(set(fields))
    record = _prepare(model, names, out, (members, with_text, dtype, chosen), world, done)
    own = list(zip(record.shards, record.parts, strict=True))[world.rank :: world.size]
    for place, (name, number) in enumerate(own):
        report = None if progress is None else partial(progress, place)
        if stored.is_whole(out, number, record):
            done.kept += 1
            continue
        try:
            _embed_shard(model, name, out, number, batch_size, record, done, report)
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror}; finished shards are kept, call again to resume"
            ) from None
        account_of(done.images, done.bad).limit(bad_samples, "raise that limit, --bad-samples, and embed again")
    if progress is not None:
        progress(len(own), done.images)
    world.barrier()
    return done


def _embed_shard(
    model: "Model",
    shard: str,
    out: Path,
    number: int,
    batch_size: int,
    record: stored.EmbeddingRecord,
    done: Embedded,
    progress: Callable[[int], None] | None,
) -> None:
    from mmssl.evaluate import encode

    with_text, limits = record.text_model is not None, SampleLimits(members=record.members)
    samples_read = iter_samples([shard], limits, need_text=with_text, on_bad=done.bad.append)
    found = (row for sample in samples_read for row in sample.each_image())
    before = done.images

    def report(_: str, count: int) -> None:
        if progress is not None:
            progress(before + count)

    images = encode.encode_images(model, found, batch_size=batch_size, required=False, progress=report)
    samples, features = images.samples, images.features.reshape(-1, model.config.embed_dim)
    columns = {
        "shard": [sample.shard for sample in samples],
        "key": [sample.key for sample in samples],
        "caption": [sample.caption for sample in samples],
    }
    texts = (
        stored.rounded(model.encode_text(columns["caption"], batch_size).numpy(), record.dtype) if with_text else None
    )
    fields = field_columns(samples, record.fields)
    stored.write_part(out, number, stored.rounded(features.numpy(), record.dtype), columns, fields, texts)
    done.images += len(samples)
    done.bad += images.bad


def _prepare(
    model: "Model", shards: list[str], out: Path, kind: _Kind, world: World, done: Embedded
) -> stored.EmbeddingRecord:
    """Write the new index.json, and remove the parts of shards that changed or vanished. All ranks get the record.

    Raises:
        UserError: the folder holds an index of another model or of other data, or cannot be written.
    """
    (members, with_text, dtype, fields), fingerprint = kind, model.image_fingerprint()
    known = stored.read_record(out)
    if known is not None:  # a folder keeps what is not asked for anew
        with_text = with_text or known.text_model is not None
        dtype, fields = dtype or known.dtype, known.fields if fields is None else fields
    dtype = dtype or "float16"
    text_model = model.text_fingerprint() if with_text else None
    world.barrier()  # rank 0 must not write it before the other ranks have read it
    if known is not None and known.model != fingerprint:
        raise UserError(f"{out} holds an index of another model or other weights; choose another folder, or remove it")
    if known is not None and not set(known.shards) & set(shards):
        raise UserError(f"{out} holds an index of other shards; choose another folder, or remove it")
    if world.rank == 0:
        try:
            (out / stored.PARTS).mkdir(parents=True, exist_ok=True)
            # Parts of another kind are made anew.
            new = (members, text_model, dtype, fields)
            alike = known is not None and (known.members, known.text_model, known.dtype, known.fields) == new
            planned = _plan(shards, known, alike, done)
            dim, scale = model.config.embed_dim, model.logit_scale
            record = stored.EmbeddingRecord(
                fingerprint, dim, shards, *planned, members, text_model, scale, dtype, fields
            )
            record.write(out)
            _remove_parts(out, known, set(planned[0]), done)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}; pick another folder") from None
    world.barrier()
    found = stored.read_record(out)
    assert found is not None
    return found


def _plan(
    shards: Sequence[str], known: stored.EmbeddingRecord | None, alike: bool, done: Embedded
) -> tuple[list[int], list[stored.State]]:
    """The part and the state of each shard: those that it has if it did not change and is `alike`, else a new part."""
    from mmssl.evaluate import feature_cache

    before: dict[str, tuple[int, stored.State]] = {}
    if known is not None:
        before = dict(zip(known.shards, zip(known.parts, known.states, strict=True), strict=True))
    free = max((number for number, _ in before.values()), default=-1) + 1
    parts, states = [], []
    for shard in shards:
        state = feature_cache.shard_state(shard)
        number, old = before.get(shard, (-1, None))
        same = number >= 0 and old == state and alike
        if not same:
            done.renewed += number >= 0
            number, free = free, free + 1
        parts.append(number)
        states.append(state)
    done.removed = len(before.keys() - set(shards))
    return parts, states


def _remove_parts(out: Path, known: stored.EmbeddingRecord | None, kept: set[int], done: Embedded) -> None:
    """Remove the parts that no shard has any more, and the graph if the shards are not those that it was built of."""
    old = [] if known is None else known.parts
    for number in set(old) - kept:
        for path in (stored.vectors, stored.text_vectors, stored.table):
            path(out, number).unlink(missing_ok=True)
    if known is not None and set(old) != kept and (out / GRAPH).exists():
        done.had_graph = True
        seal(out / GRAPH).unlink(missing_ok=True)
        (out / GRAPH).unlink()


def encode_query(
    model: "Model", query: "ImageInput", text: str | None = None, text_weight: float = composed.HALF
) -> npt.NDArray[np.float32]:
    """The unit-length embedding of a text or an image, or of an image and a text together, float32 [1, D].

    Args:
        query: a text, the path of an image file, or an image.
        text: added to the query: the sum of both unit vectors. None: nothing.
        text_weight: share of the text in that sum, 0 to 1.

    Raises:
        UserError: the file is not an image; the text looks like an image file that does not exist; a text is empty, or
            the weight no share.
        DecodeError: an image that is not a file cannot be decoded.
    """
    if text is not None:
        if not 0 <= text_weight <= 1:
            raise UserError(f"the weight of the text is {text_weight}; give a number from 0 to 1")
        both = [torch.from_numpy(encode_query(model, part)) for part in (query, text)]
        return composed.compose(both[0], both[1], text_weight).numpy()
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
