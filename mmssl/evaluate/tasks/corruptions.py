"""Zero-shot accuracy on corrupted images: the 15 common corruptions of ImageNet-C at 5 severities.

Hendrycks & Dietterich 2019. As there, images are first brought to 224 pixels, so that a severity means the same for
every image and every model. The corruptions are those of the imagecorruptions library; an image's randomness is
keyed by its content, so it looks the same in every evaluation.

An image under every corruption, with what each costs.
"""

import hashlib
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from mmssl.evaluate.datasets import Dataset, read_again
from mmssl.evaluate.encode import Encoder
from mmssl.evaluate.labels import class_indices
from mmssl.evaluate.task import TaskContext
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
"""Pixels of the images that are corrupted."""
SAMPLES = 500
"""So many images at most, drawn at random, for each is corrupted 75 times, which takes more than a second."""
_SEEDED = ("impulse_noise", "glass_blur")
"""Those that take a seed."""
_GLOBAL = ("gaussian_noise", "shot_noise", "motion_blur", "snow", "frost", "fog", "elastic_transform")
"""Those that draw from NumPy's global generator."""
_GLOBAL_GENERATOR = threading.Lock()


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


def corrupt(pixels: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """One image under a corruption, uint8 [H, W, 3] of at least 32 pixels a side; the seed fixes its randomness."""
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
    """What is shown of an uncompressed image; its content fixes the randomness."""
    content = hashlib.blake2b(image, digest_size=16).hexdigest()
    seed = torch_seed("corruption", name, severity, content) % 2**32
    return corrupt(np.asarray(Image.open(io.BytesIO(image))), name, severity, seed)


def installed(dataset: Dataset) -> None:
    """Whether the library of corruptions is there.

    Raises:
        UserError: it is not.
    """
    if find_spec("imagecorruptions") is None:
        raise UserError(
            f"task 'corruptions' of data set {dataset.name!r} needs the library imagecorruptions: "
            "pip install 'mmssl[corruptions]'"
        )


class CorruptingEncoder:
    """An encoder that sees every image under a corruption."""

    def __init__(self, encoder: Encoder, name: str, severity: int) -> None:
        self._encoder = encoder
        self._name = name
        self._severity = severity

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """Uncompressed images -> features of their corrupted versions [N, D]."""
        with ThreadPoolExecutor() as pool:
            seen = pool.map(lambda image: bitmap(corrupted(image, self._name, self._severity)), images)
            return self._encoder.encode_image(list(seen))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """As the encoder."""
        return self._encoder.encode_text(texts)


def evaluate(job: TaskContext) -> tuple[Robustness, list[Sample]]:
    """Classify images of a data set under each corruption; they are returned too, uncompressed.

    Raises:
        UserError: labels and class names do not fit.
    """
    samples = chosen(job)
    # The classes are those of all images, as in `zero_shot`, not only of the chosen ones.
    names, of_all = class_indices(job.dataset, job.embedded.samples)
    label = {sample.id: row for sample, row in zip(job.embedded.samples, of_all.tolist(), strict=True)}
    labels = torch.tensor([label[sample.id] for sample in samples])
    weights = job.class_weights(names)

    def right(encoder: Encoder, what: str) -> NDArray[np.bool_]:
        # Kept features must be those of the same choice of images.
        features = job.embed(encoder, samples, f"{what}, {len(samples)} images").features
        hits: NDArray[np.bool_] = ((features @ weights.T).argmax(1) == labels).numpy()
        return hits

    clean = right(job.encoder, f"{EVALUATED_SIDE} pixels")
    under = np.stack(
        [
            [right(CorruptingEncoder(job.encoder, name, severity), f"{name} {severity}") for severity in SEVERITIES]
            for name in CORRUPTIONS
        ]
    )
    return robustness(clean, under), samples


def robustness(clean: NDArray[np.bool_], under: NDArray[np.bool_]) -> Robustness:
    """Whether each image is right, [N], and right under each corruption, [15, 5, N]."""
    flat = under.reshape(-1, under.shape[-1])

    def figures(rows: Rows) -> dict[str, float]:
        rates = under[:, :, rows].mean(axis=2)
        found = {"acc1_clean": float(clean[rows].mean()), "acc1_corrupted": float(rates.mean())}
        if clean.any():
            # A resample may have nothing right.
            found["acc1_kept"] = found["acc1_corrupted"] / found["acc1_clean"] if found["acc1_clean"] > 0 else np.nan
        found |= {f"acc1_{name}": float(rate) for name, rate in zip(CORRUPTIONS, rates.mean(axis=1), strict=True)}
        return found | {
            f"acc1_severity{k}": float(rate) for k, rate in zip(SEVERITIES, rates.mean(axis=0), strict=True)
        }

    def cells(rows: Rows) -> dict[str, float]:
        return {str(i): float(rate) for i, rate in enumerate(flat[:, rows].mean(axis=1))}

    ends = np.array(list(bootstrap(cells, len(clean)).values())).reshape(*under.shape[:2], 2)
    return Robustness(
        metrics=figures(np.arange(len(clean))) | {"samples": len(clean)},
        intervals=bootstrap(figures, len(clean)),
        accuracies=under.mean(axis=2),
        low=ends[:, :, 0],
        high=ends[:, :, 1],
        right={"acc1_clean": clean, "acc1_corrupted": under.mean(axis=(0, 1))},
    )


def chosen(job: TaskContext) -> list[Sample]:
    """The images to corrupt, of 224 pixels and uncompressed, in the order of the data set."""
    usable = [sample.id for sample in job.embedded.samples]
    if len(usable) > SAMPLES:
        usable = generator(0, "corruptions").choice(usable, SAMPLES, replace=False).tolist()
    wanted, view = set(usable), EvalView(EVALUATED_SIDE)
    return [
        replace(sample, image=bitmap(view(sample.image).movedim(0, -1).numpy()))
        for sample in read_again(job.dataset)
        if sample.id in wanted
    ]


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


SAMPLE_SIDE = 112


def draw(path: Path, name: str, shown: Sample, found: Robustness) -> None:
    """Rows: corruptions, columns: severities; under each cell the accuracy of all images, as number and bar.

    Args:
        shown: an uncompressed image of the data set.
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
                page.image(x, y, 1.13, shrink(corrupted(shown.image, corruption, severity), SAMPLE_SIDE))
                page.bar(x, y + 1.17, 1.13, 0.18, "#eef1f4")
                page.bar(x, y + 1.17, 1.13 * min(1.0, accuracy / clean if clean > 0 else 0.0), 0.18, GRAY)
                page.text(x + 0.565, y + 1.265, f"{100 * accuracy:.1f} %", ha="center", fontsize=8)
