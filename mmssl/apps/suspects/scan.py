"""From a model and shards to ranked suspects, and their contact sheet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from mmssl.apps.suspects.ranking import Suspect, rank_samples
from mmssl.data import iter_samples
from mmssl.data.health import browse
from mmssl.data.shards import BadSample
from mmssl.data.transforms import DecodeError, decoding
from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode
from mmssl.types import Sample

if TYPE_CHECKING:
    from mmssl.inference import Model

LABEL_FIELDS = ("label", "cls")
"""Fields that are taken as labels if every sample has them, in order of preference."""


@dataclass(frozen=True)
class Scan:
    """The samples of shards, ranked."""

    samples: list[Sample]
    """Without image bytes."""
    suspects: list[Suspect]
    """All samples, most suspicious first."""
    label: str | None
    """The field of the labels, if there are labels."""
    bad: list[BadSample]
    """Samples that could not be used."""


def scan(
    model: "Model",
    shards: Sequence[str],
    caption: str = "txt",
    label: str | None = None,
    *,
    neighbours: int = 10,
    progress: Callable[[str, int], None] | None = None,
) -> Scan:
    """Rank the samples of shards by the suspicion that their caption or label is wrong.

    Args:
        caption: field with the caption.
        label: field with the label. None: `label` or `cls`, if every sample has it.
        neighbours: number of nearest images whose labels are compared.
        progress: called with the name of the work and the number of items done.

    Raises:
        UserError: a sample lacks a field, or no image can be encoded.
    """
    bad: list[BadSample] = []
    images = encode.encode_images(model, iter_samples(shards, on_bad=bad.append), progress=progress)
    samples = images.samples
    if label is None:
        label = next((name for name in LABEL_FIELDS if all(name in sample.fields for sample in samples)), None)
    for name in (caption, *([] if label is None else [label])):
        if (lacking := next((s for s in samples if name not in s.fields), None)) is not None:
            known = ", ".join(sorted(lacking.fields))
            raise UserError(f"{lacking.shard}:{lacking.key} has no field {name!r}; it has: {known}")
    captions = [str(sample.fields[caption]) for sample in samples]
    labels = None if label is None else [str(sample.fields[label]) for sample in samples]
    texts = model.encode_text(captions)
    suspects = rank_samples(images.features, texts, captions, labels, neighbours=neighbours, progress=progress)
    return Scan(samples, suspects, label, bad + images.bad)


def sheet(found: Scan, caption: str, count: int, columns: int = 8) -> Image.Image:
    """Draw the most suspicious images with their rank, their caption and what the neighbours are labelled."""
    shown = found.suspects[:count]
    images = {s.id: s.image for s in datasets.read_images(found.samples[suspect.row] for suspect in shown)}
    entries = []
    for rank, suspect in enumerate(shown, start=1):
        sample = found.samples[suspect.row]
        text = f"{rank}. {sample.fields[caption]}"
        if found.label is not None and suspect.neighbours_label != str(sample.fields[found.label]):
            label = f"{sample.fields[found.label]} (neighbours: {suspect.neighbours_label})"
            text = f"{rank}. {label} {sample.fields[caption]}"
        try:
            pixels = decoding.decode(images[sample.id]) if sample.id in images else None
        except DecodeError:
            pixels = None  # the sheet shows a frame in its place
        entries.append(browse.SheetEntry(pixels, text))
    return browse.contact_sheet(entries, min(columns, max(1, len(entries))))
