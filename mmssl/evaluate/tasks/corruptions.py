"""Zero-shot accuracy on corrupted images: the 15 common corruptions of ImageNet-C at 5 severities.

Hendrycks & Dietterich 2019. As in the paper, images are first resized to 224 pixels, so that a severity is comparable
between images and models. The imagecorruptions library makes the corruptions. The content of an image is the key of its
randomness, so every evaluation corrupts it in the same way.
"""

import hashlib
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import EvalView, Pixels
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, read_images
from mmssl.evaluate.encode import Encoder
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.metrics.baselines import Baselines
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals, write_outcomes
from mmssl.files import write_csv
from mmssl.plotting import GRAY, MUTED, sheet, shrink
from mmssl.rng import generator, torch_seed
from mmssl.stats import Interval, Rows, bootstrap
from mmssl.types import Sample

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""Noise, blur, weather and digital, in the paper's order."""
SEVERITIES = (1, 2, 3, 4, 5)
EVALUATED_SIDE = 224
"""Side of the images that are corrupted, in pixels."""
SAMPLES = 500
"""Largest number of images, drawn at random: each is corrupted 75 times, which takes more than a second."""
_SEEDED = ("impulse_noise", "glass_blur")
"""Corruptions that take a seed."""
_GLOBAL = ("gaussian_noise", "shot_noise", "motion_blur", "snow", "frost", "fog", "elastic_transform")
"""Corruptions that draw from NumPy's global generator."""
_GLOBAL_GENERATOR = threading.Lock()
SHOWN_SIDE = 112
"""Side of the images on the page, in pixels."""


class Corruptions(Task):
    """Classify up to 500 images under every corruption."""

    name = "corruptions"
    label = "robustness to corruptions"
    description = "Zero-shot accuracy under the 15 corruptions of ImageNet-C at 5 severities."
    main_metrics = ("acc1_corrupted",)
    paired = True

    def ready(self, dataset: Dataset) -> None:
        """Require the library of corruptions."""
        if find_spec("imagecorruptions") is None:
            raise UserError(
                f"task 'corruptions' of dataset {dataset.name!r} needs the library imagecorruptions: "
                "pip install 'mmssl[corruptions]'"
            )

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Write corruptions.csv, and corruptions.png: one sample under every corruption, with the accuracies."""
        found, images = evaluate(context)
        write_outcomes(context, images, found.right)
        if context.folder is not None:
            write_table(context.folder / "corruptions.csv", found)
            if context.draw:
                draw(context.folder / "corruptions.png", context.name, images[0], found)
        return found.metrics | list_intervals(found.intervals) | list_baselines(found.baselines)


@dataclass(frozen=True)
class Robustness:
    """Zero-shot accuracy of N images, clean and under every corruption."""

    metrics: dict[str, float]
    """`acc1_clean`, `acc1_corrupted` (mean over corruptions and severities), `acc1_kept` (the second as a fraction of
    the first), `acc1_NAME` of a corruption, `acc1_severityK`, and `samples` N."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over images."""
    accuracies: NDArray[np.float64]
    """[15, 5], in the order of `CORRUPTIONS` and `SEVERITIES`."""
    low: NDArray[np.float64]
    """Lower ends of their intervals, [15, 5]."""
    high: NDArray[np.float64]
    right: dict[str, NDArray[Any]]
    """`acc1_clean` and `acc1_corrupted` of each image, [N]."""
    baselines: Baselines = field(default_factory=dict)
    """`majority` and `chance` of both."""


def corrupt(pixels: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """One image under a corruption, uint8 [H, W, 3] of at least 32 pixels per side; the seed fixes its randomness."""
    import imagecorruptions

    options = {"seed": seed} if name in _SEEDED else {}
    changed: Pixels
    if name not in _GLOBAL:
        changed = imagecorruptions.corrupt(pixels, severity, name, **options)
        return changed
    with _GLOBAL_GENERATOR:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            changed = imagecorruptions.corrupt(pixels, severity, name)
        finally:
            np.random.set_state(state)
    return changed


def corrupted(image: bytes, name: str, severity: int) -> Pixels:
    """An uncompressed image under a corruption; its content fixes the randomness."""
    content = hashlib.blake2b(image, digest_size=16).hexdigest()
    seed = torch_seed("corruption", name, severity, content) % 2**32
    return corrupt(np.asarray(Image.open(io.BytesIO(image))), name, severity, seed)


class CorruptingEncoder:
    """An encoder that corrupts every image first."""

    def __init__(self, encoder: Encoder, name: str, severity: int) -> None:
        self._encoder = encoder
        self._name = name
        self._severity = severity

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """Uncompressed images -> features of their corrupted versions [N, D]."""
        with ThreadPoolExecutor() as pool:
            changed = pool.map(lambda image: bitmap(corrupted(image, self._name, self._severity)), images)
            return self._encoder.encode_image(list(changed))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> features [N, D], unchanged."""
        return self._encoder.encode_text(texts)


def evaluate(context: TaskContext) -> tuple[Robustness, list[Sample]]:
    """Classify images of a dataset under each corruption. Also returns these images, uncompressed.

    Raises:
        UserError: labels do not fit the class names.
    """
    samples = choose_samples(context)
    # Classes come from all images, as in `zero_shot`, not only from the chosen ones.
    names, indices = class_indices(context.dataset, context.images.samples)
    label = {sample.id: index for sample, index in zip(context.images.samples, indices.tolist(), strict=True)}
    labels = torch.tensor([label[sample.id] for sample in samples])
    weights = context.class_weights(names)

    def right(encoder: Encoder, variant: str) -> NDArray[np.bool_]:
        # The name identifies the chosen images in the cache.
        features = context.encode_variant(encoder, samples, f"{variant}, {len(samples)} images").features
        hits: NDArray[np.bool_] = ((features @ weights.T).argmax(1) == labels).numpy()
        return hits

    clean = right(context.encoder, f"{EVALUATED_SIDE} pixels")
    under = np.stack(
        [
            [right(CorruptingEncoder(context.encoder, name, severity), f"{name} {severity}") for severity in SEVERITIES]
            for name in CORRUPTIONS
        ]
    )
    known = baselines.of_classes(labels, ["acc1_clean", "acc1_corrupted"])
    return replace(robustness(clean, under), baselines=known), samples


def robustness(clean: NDArray[np.bool_], under: NDArray[np.bool_]) -> Robustness:
    """Metrics from 1 where an image is right: clean [N], and under each corruption [15, 5, N]."""
    flat = under.reshape(-1, under.shape[-1])

    def measure(rows: Rows) -> dict[str, float]:
        table = under[:, :, rows].mean(axis=2)
        found = {"acc1_clean": float(clean[rows].mean()), "acc1_corrupted": float(table.mean())}
        if clean.any():
            # A resample may have no correct image.
            found["acc1_kept"] = found["acc1_corrupted"] / found["acc1_clean"] if found["acc1_clean"] > 0 else np.nan
        found |= {f"acc1_{name}": float(rate) for name, rate in zip(CORRUPTIONS, table.mean(axis=1), strict=True)}
        return found | {
            f"acc1_severity{k}": float(rate) for k, rate in zip(SEVERITIES, table.mean(axis=0), strict=True)
        }

    found = measure(np.arange(len(clean)))
    fractions = {name: len(clean) for name in found if name != "acc1_kept"}

    def rates(rows: Rows) -> dict[str, float]:
        return {str(i): float(rate) for i, rate in enumerate(flat[:, rows].mean(axis=1))}

    cells = dict.fromkeys(map(str, range(len(flat))), len(clean))
    ends = np.array(list(bootstrap(rates, len(clean), fractions=cells).values())).reshape(*under.shape[:2], 2)
    return Robustness(
        metrics=found | {"samples": len(clean)},
        intervals=bootstrap(measure, len(clean), fractions=fractions),
        accuracies=under.mean(axis=2),
        low=ends[:, :, 0],
        high=ends[:, :, 1],
        right={"acc1_clean": clean, "acc1_corrupted": under.mean(axis=(0, 1))},
    )


def choose_samples(context: TaskContext) -> list[Sample]:
    """The samples to corrupt, their images resized to 224 pixels and uncompressed, in the order of the dataset."""
    samples = context.images.samples
    if len(samples) > SAMPLES:
        ids = [sample.id for sample in samples]
        chosen = set(generator(0, "corruptions").choice(ids, SAMPLES, replace=False).tolist())
        samples = [sample for sample in samples if sample.id in chosen]
    view = EvalView(EVALUATED_SIDE)
    return [replace(sample, image=bitmap(view(sample.image).movedim(0, -1).numpy())) for sample in read_images(samples)]


def write_table(path: Path, found: Robustness) -> None:
    """corruption, severity, accuracy and its interval."""
    rows = (
        (name, severity, found.accuracies[i, j], found.low[i, j], found.high[i, j])
        for i, name in enumerate(CORRUPTIONS)
        for j, severity in enumerate(SEVERITIES)
    )
    write_csv(path, ("corruption", "severity", "acc1", "low", "high"), rows)


def bitmap(pixels: Pixels) -> bytes:
    """An image as an uncompressed file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def draw(path: Path, name: str, shown: Sample, found: Robustness) -> None:
    """Rows: corruptions, columns: severities; below each image the accuracy, as number and bar.

    Args:
        shown: an uncompressed image of the dataset.
    """
    clean = found.metrics["acc1_clean"]
    title = (
        f"{name}: {100 * clean:.1f} % of {found.metrics['samples']:,} images right, "
        f"{100 * found.metrics['acc1_corrupted']:.1f} % when corrupted"
    )
    left, top, width, height = 2.3, 0.75, 1.25, 1.45
    with sheet(path, left + len(SEVERITIES) * width + 0.2, top + len(CORRUPTIONS) * height + 0.1, title) as page:
        for j, severity in enumerate(SEVERITIES):
            page.text(left + (j + 0.46) * width, 0.55, f"severity {severity}", ha="center", color=MUTED)
        for i, corruption in enumerate(CORRUPTIONS):
            y = top + i * height
            page.text(left - 0.15, y + 0.55, corruption.replace("_", " "), ha="right", weight="bold")
            share = f"{100 * float(found.accuracies[i].mean()):.1f} %"
            page.text(left - 0.15, y + 0.8, share, ha="right", color=MUTED)
            for j, severity in enumerate(SEVERITIES):
                x, accuracy = left + j * width, float(found.accuracies[i, j])
                page.image(x, y, 1.13, shrink(corrupted(shown.image, corruption, severity), SHOWN_SIDE))
                page.bar(x, y + 1.17, 1.13, 0.18, "#eef1f4")
                page.bar(x, y + 1.17, 1.13 * min(1.0, accuracy / clean if clean > 0 else 0.0), 0.18, GRAY)
                page.text(x + 0.565, y + 1.265, f"{100 * accuracy:.1f} %", ha="center", fontsize=8)
