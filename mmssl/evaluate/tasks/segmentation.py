"""Zero-shot segmentation: every patch gets the class whose prompts it is most similar to (Zhou et al. 2022)."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import DecodeError, EvalView, decoding
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, read
from mmssl.evaluate.encode import RenderingEncoder, gather_values
from mmssl.evaluate.metrics import segmentation
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.stats import Rows, bootstrap
from mmssl.types import Sample

IGNORED = 255
"""Value of the pixels of a mask that do not count, as in Pascal VOC, Cityscapes and ADE20K."""
RESAMPLES = 200
MOST_IMAGES = 32
"""Images encoded at a time; each has hundreds of patches."""
_INDEX_MODES = ("1", "L", "P", "I;16", "I")
"""Modes of Pillow in which a pixel is one number."""


@runtime_checkable
class PatchEncoder(RenderingEncoder, Protocol):
    """An encoder that also gives one vector for each patch."""

    view: EvalView
    """What it sees of an image."""

    def encode_rendered(self, images: Tensor, patches: bool = False) -> Tensor:
        """Rendered images [N, 3, S, S] -> features [N, D], of patches [N, rows, columns, D]."""
        ...


@dataclass(frozen=True)
class _Masked:
    """An image and its mask."""

    row: int
    """Its number among the images of the evaluation."""
    sample: Sample
    mask: Tensor
    """The class of each pixel, int64 [H, W]."""


class Segmentation(Task):
    """A class for each pixel, by prompts."""

    name = "segmentation"
    label = "zero-shot segmentation"
    description = "The class of each pixel by the similarity of its patch to prompts of the class names."
    main_metrics = ("mean_iou", "pixel_accuracy")

    def ready(self, dataset: Dataset) -> None:
        """Require class names."""
        if dataset.classnames is None:
            raise UserError(
                f"task 'segmentation' of dataset {dataset.name!r} needs the names of the classes; write classnames.txt "
                "beside the shards (line 1 is the class of value 0 in the masks), or give --classnames FILE"
            )

    def run(self, context: TaskContext) -> Metrics:
        """Compare at the resolution of the masks, and write per_class.csv.

        Raises:
            UserError: the model shows no patches, no sample has a mask, or a mask fits neither its image nor the names.
        """
        encoder, names = context.encoder, context.dataset.classnames or ()
        if not isinstance(encoder, PatchEncoder):
            raise UserError("task 'segmentation' needs a model of mmssl: this one shows no patches")
        weights = context.class_weights(names)
        counts, problem = torch.zeros(len(context.images.samples), 3, len(names), dtype=torch.int64), None
        try:
            _count(context, encoder, weights, counts)
        except UserError as error:  # raised on all ranks below, as the others would wait
            problem = str(error)
        problem = next((text for text in gather_values(context.world, problem) if text is not None), None)
        if problem is not None:
            raise UserError(problem)
        counts = context.world.sum(counts)
        masked = counts[:, segmentation.LABELLED].sum(dim=1) > 0
        if not bool(masked.any()):
            raise UserError(
                f"no sample of dataset {context.name!r} has a mask that can be read: a PNG KEY.mask.png or KEY.seg.png "
                f"beside KEY.jpg, each pixel the number of its class, {IGNORED} where it does not count"
            )
        return _report(context, counts[masked], names) | (
            {} if bool(masked.all()) else {"samples_without_mask": int((~masked).sum())}
        )


def _count(context: TaskContext, encoder: PatchEncoder, weights: Tensor, counts: Tensor) -> None:
    """Fill in the pixel counts of this rank's images, [N, 3, C]."""
    stream = _masked(context, len(weights))
    done = 0
    while batch := list(islice(stream, min(context.batch_size, MOST_IMAGES))):
        rendered = torch.stack([encoder.render(item.sample.image) for item in batch])
        patches = encoder.encode_rendered(rendered, patches=True)[..., : weights.shape[1]]
        for item, found in zip(batch, torch.nn.functional.normalize(patches, dim=-1), strict=True):
            mask = visible(item.mask, encoder.view.fit)
            counted = mask != IGNORED
            predictions = segmentation.segment(found, weights, *mask.shape)
            counts[item.row] = segmentation.pixel_counts(predictions[counted], mask[counted], len(weights))
        done += len(batch)
        if context.progress is not None:
            context.progress("masks", done * context.world.size)


def _masked(context: TaskContext, classes: int) -> Iterator[_Masked]:
    """This rank's usable images that have a mask.

    Raises:
        UserError: a mask has another size than its image, or a class without a name.
    """
    rows = {(sample.shard, sample.key): row for row, sample in enumerate(context.images.samples)}
    for sample in read(context.dataset):
        row = rows.get((sample.shard, sample.key))
        if row is None or row % context.world.size != context.world.rank or not sample.mask:
            continue
        try:
            mask = read_mask(sample.mask)
        except DecodeError:
            continue
        header, place = decoding.read_header(sample.image), f"the mask of {sample.key} in {sample.shard}"
        if mask.shape != (header.height, header.width):
            raise UserError(
                f"{place} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {header.width} x {header.height}; "
                "give masks the size of their images"
            )
        highest = int(mask[mask != IGNORED].max()) if bool((mask != IGNORED).any()) else 0
        if highest >= classes:
            raise UserError(
                f"{place} has class {highest}, but {context.dataset.classnames_source} names {classes}, from 0 on; "
                f"name all classes, or write {IGNORED} where a pixel does not count"
            )
        yield _Masked(row, sample, mask)


def read_mask(content: bytes) -> Tensor:
    """The class of each pixel, int64 [H, W], of a PNG in gray or with a palette.

    Raises:
        DecodeError: it is no such image, or too large.
    """
    decoding.read_header(content)
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG",))
        pixels = np.array(image)
    except Exception as error:  # Pillow's readers raise any kind of exception on broken bytes
        raise DecodeError(f"the mask is no PNG that can be read: {error}") from error
    if image.mode not in _INDEX_MODES:
        raise DecodeError(f"the mask is in colour ({image.mode}); its pixels must be numbers of classes")
    return torch.from_numpy(pixels.astype(np.int64))


def visible(mask: Tensor, fit: str) -> Tensor:
    """The part of a mask that a model sees of the image: the square in the middle, or all where it is squashed."""
    if fit == "squash":
        return mask
    side = min(mask.shape)
    top, left = ((length - side) // 2 for length in mask.shape)
    return mask[top : top + side, left : left + side]


def _report(context: TaskContext, counts: Tensor, names: Sequence[str]) -> Metrics:
    total = counts.sum(dim=0)
    if context.folder is not None:
        overlap = segmentation.intersection_over_union(total).tolist()
        rows = zip(names, overlap, *total.tolist(), strict=True)
        write_csv(context.folder / "per_class.csv", ("class", "iou", "hit", "predicted", "labelled"), rows)

    def measure(rows: Rows) -> dict[str, float]:
        return segmentation.summarize(counts[rows].sum(dim=0))

    return {
        **segmentation.summarize(total),
        "samples": len(counts),
        "classes": int((total[segmentation.LABELLED] > 0).sum()),
        **list_intervals(bootstrap(measure, len(counts), resamples=RESAMPLES)),
        **list_baselines(segmentation.baselines(total[segmentation.LABELLED])),
    }
