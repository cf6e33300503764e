"""Tests of explanation maps: dependence on the weights, and deletion curves."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmssl import plotting
from mmssl.apps.explain import DEFAULT, image_maps, methods_of, occlusion
from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode, labels
from mmssl.inference import Model
from mmssl.models import DualEncoder
from mmssl.rng import generator, torch_generator
from mmssl.stats import Interval, bootstrap
from mmssl.types import Sample

STEPS = 16
"""Points of a deletion curve after its start."""
RANDOM, CONTRAST = "random order", "contrast of the image"
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Mean similarity while patches are covered, the most relevant first."""

    mean: list[float]
    low: list[float]
    high: list[float]
    area: float
    """Mean height of the curve: lower is better."""
    below_random: float
    """How much lower than in random order."""
    below_random_interval: Interval
    """95 % bootstrap interval of `below_random`, over images."""


@dataclass(frozen=True)
class Follows:
    """The rank correlation of maps before and after the weights are shuffled: 0 is best, 1 means that the maps do not
    depend on the weights."""

    correlation: float
    interval: Interval


@dataclass(frozen=True)
class Sanity:
    """Both tests of every method."""

    images: int
    cells: int
    """Patches per side."""
    default: str
    """The default method."""
    fractions: list[float]
    """Fraction of the patches covered at each point of the curves."""
    curves: dict[str, Curve]
    """By method, and of two controls: random order, and the contrast of the image (needs no model)."""
    shuffled: dict[str, Follows]

    def json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def text(self) -> str:
        """As a table for a terminal."""
        lines = [f"{'':24} mean similarity   below random order           shuffled weights: rank correlation"]
        for name, curve in self.curves.items():
            low, high = curve.below_random_interval
            line = f"{name:24} {curve.area:15.4f}   {curve.below_random:+.4f} ({low:+.4f} to {high:+.4f})"
            if name in self.shuffled:
                follows = self.shuffled[name]
                line += f"   {follows.correlation:+.3f} ({follows.interval[0]:+.3f} to {follows.interval[1]:+.3f})"
            lines.append(line)
        return "\n".join([*lines, f"{self.images} images, {self.cells} x {self.cells} patches"])


def sanity(
    encoder: DualEncoder, images: Tensor, texts: Tensor, methods: Sequence[str] | None = None, batch: int = 64
) -> Sanity:
    """Test explanation methods on images and the texts that belong to them.

    Two tests: maps must change when the weights are shuffled (Adebayo et al. 2018), and covering the patches that a
    map ranks first must lower the similarity faster than covering patches in random order (the deletion curve of
    Petsiuk et al. 2018). Patches are covered with the image's border colour, see `cover`.

    Args:
        images: uint8 [N, 3, S, S].
        texts: unit-length embeddings [N, D].
        methods: default: all that the tower supports.
    """
    names = list(methods) if methods is not None else methods_of(encoder.vision)
    other = shuffled(encoder)
    parts = list(zip(torch.split(images, batch), torch.split(texts, batch), strict=True))
    maps = {n: torch.cat([on_cells(image_maps(encoder, p, t, n), occlusion.GRID) for p, t in parts]) for n in names}
    blind = {n: torch.cat([on_cells(image_maps(other, p, t, n), occlusion.GRID) for p, t in parts]) for n in names}
    random = torch.rand(len(images), occlusion.GRID, occlusion.GRID, generator=torch_generator("random order"))
    ranked = {**maps, RANDOM: random, CONTRAST: contrast(images)}
    heights = {name: deletion(encoder, images, texts, relevance) for name, relevance in ranked.items()}
    return Sanity(
        images=len(images),
        cells=occlusion.GRID,
        default=DEFAULT,
        fractions=[step / STEPS for step in range(STEPS + 1)],
        curves={name: _curve(values, heights[RANDOM]) for name, values in heights.items()},
        shuffled={name: _follows(rank_correlations(maps[name], blind[name])) for name in names},
    )


def shuffled(encoder: DualEncoder) -> DualEncoder:
    """A copy whose every parameter has its values in random order: the same sizes of weights, nothing learned."""
    other = copy.deepcopy(encoder)
    shuffling = torch_generator("shuffled weights")
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=shuffling).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def deletion(encoder: DualEncoder, images: Tensor, texts: Tensor, relevance: Tensor) -> Values:
    """Similarities [N, STEPS + 1] while the patches are covered in falling order of relevance, [N, g, g].

    Equally relevant patches are covered in random order.
    """
    cells = relevance.shape[-1] ** 2
    rank = ranks(relevance).view(relevance.shape).to(images.device)
    heights = [
        occlusion.text_similarities(encoder, occlusion.cover(images, rank < round(step * cells / STEPS)), texts)
        for step in range(STEPS + 1)
    ]
    return torch.stack(heights, 1).double().cpu().numpy()


def ranks(relevance: Tensor) -> Tensor:
    """The place of each patch in falling order of relevance, equals in random order, int64 [N, P]."""
    values = relevance.flatten(1).cpu()
    mixed = torch.rand(values.shape, generator=torch_generator("equals")).argsort(1)
    order = mixed.gather(1, values.gather(1, mixed).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1)


def on_cells(maps: Tensor, cells: int) -> Tensor:
    """Maps [N, h, w] on a grid of patches: finer ones averaged, coarser ones interpolated, [N, cells, cells]."""
    if min(maps.shape[1:]) >= cells:
        return F.adaptive_avg_pool2d(maps, cells)
    return F.interpolate(maps[:, None], size=(cells, cells), mode="bilinear", align_corners=False)[:, 0]


def contrast(images: Tensor, cells: int = occlusion.GRID) -> Tensor:
    """How far each patch's pixels stray from the mean of the image's border, [N, cells, cells]: what stands out
    without any model."""
    everything = torch.ones(len(images), 1, 1, dtype=torch.bool, device=images.device)
    ground = occlusion.cover(images, everything)
    return on_cells((images.float() - ground.float()).abs().mean(1), cells)


def _curve(values: Values, random: Values) -> Curve:
    gain = (random - values).mean(1)
    columns: Mapping[str, Interval] = bootstrap(
        lambda rows: {str(i): float(v) for i, v in enumerate(values[rows].mean(0))}, len(values)
    )
    interval = bootstrap(lambda rows: {"gain": float(gain[rows].mean())}, len(gain))["gain"]
    return Curve(
        mean=values.mean(0).tolist(),
        low=[low for low, _ in columns.values()],
        high=[high for _, high in columns.values()],
        area=float(values.mean()),
        below_random=float(gain.mean()),
        below_random_interval=interval,
    )


def rank_correlations(maps: Tensor, others: Tensor) -> Values:
    """Spearman's rank correlation of each image's two maps [N, h, w]; a flat map correlates with nothing, [N]."""
    pairs = (_average_ranks(m.flatten(1).double().cpu()) for m in (maps, others))
    first, second = (r - r.mean(1, keepdim=True) for r in pairs)
    scale = first.norm(dim=1) * second.norm(dim=1)
    found: Values = torch.where(scale > 0, (first * second).sum(1) / scale.clamp(min=1e-12), 0.0).numpy()
    return found


def _follows(correlations: Values) -> Follows:
    interval = bootstrap(lambda rows: {"mean": float(correlations[rows].mean())}, len(correlations))["mean"]
    return Follows(float(correlations.mean()), interval)


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks of each row's values, equals sharing the mean of their ranks, [N, P]."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return below.double() + (equal - 1).double() / 2


def sample_pairs(model: Model, dataset: datasets.Dataset, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Up to `count` random images of a dataset, rendered for the model, uint8 [N, 3, S, S], and the unit-length
    embeddings [N, D] of their texts: the first caption, or the prompts of the class if there is no caption.

    Raises:
        UserError: no sample has both.
    """
    total = sum(1 for _ in datasets.read(dataset))
    rows = set(generator(seed, "pairs").permutation(total)[:count].tolist())
    images, chosen = [], []
    for row, sample in enumerate(datasets.read(dataset)):
        if row not in rows:
            continue
        try:
            images.append(model.view(sample.image))
            chosen.append(sample)
        except DecodeError:
            continue
    if not chosen:
        raise UserError(f"no image of {dataset.name} can be used; run: mmssl shards check")
    return torch.stack(images).to(model.device), _text_embeddings(model, dataset, chosen).to(model.device)


def _text_embeddings(model: Model, dataset: datasets.Dataset, samples: list[Sample]) -> Tensor:
    if all("txt" in sample.fields for sample in samples):
        return model.encode_text([labels.image_captions(sample)[0] for sample in samples])
    names, indices = labels.class_indices(dataset, samples)
    return encode.class_weights(model, names, datasets.class_templates(dataset))[indices]


def draw_sanity(path: Path, found: Sanity) -> None:
    """Draw the deletion curves with their intervals."""
    with plotting.drawing(path, 8.2, 4.8) as canvas:
        axes = canvas.add_subplot()
        colors = iter((plotting.BLUE, plotting.PURPLE, plotting.TEAL, plotting.PINK, plotting.BROWN))
        for name, curve in found.curves.items():
            control = name in (RANDOM, CONTRAST)
            style: dict[str, Any] = {"color": plotting.MUTED, "linestyle": ":" if name == RANDOM else "--"}
            if not control:
                style = {"color": plotting.ORANGE if name == found.default else next(colors)}
            width = 2.4 if name == found.default else 1.5
            label = f"{name}{' (default)' if name == found.default else ''}: {curve.area:.3f}"
            axes.plot(found.fractions, curve.mean, linewidth=width, label=label, **style)
            axes.fill_between(found.fractions, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_xlabel("fraction of the patches covered, the most relevant first")
        axes.set_ylabel("similarity of image and text, mean and 95 % interval")
        axes.set_title(f"Deletion curves of {found.images} images, {found.cells} x {found.cells} patches", fontsize=10)
        axes.legend(title="mean height (lower is better)", fontsize=8.5, title_fontsize=8.5, frameon=False)
        axes.grid(color=plotting.GRID)
        plotting.hide_spines(axes, "top", "right")
