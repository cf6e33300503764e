"""Tests of explanation maps: dependence on the weights, and deletion curves."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmssl.apps.explain.maps import DEFAULT, image_maps, methods_of
from mmssl.apps.explain.occlusion import CELLS, covered, similarities
from mmssl.models.dual_encoder import DualEncoder
from mmssl.rng import torch_generator
from mmssl.stats import Interval, bootstrap

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
    """Patches a side."""
    default: str
    """The default method."""
    fractions: list[float]
    """Fraction of the patches covered at each point of the curves."""
    curves: dict[str, Curve]
    """By method, and of two controls: random order, and the contrast of the image (which knows no model)."""
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
    Petsiuk et al. 2018). Patches are covered with the image's ground, see `covered`.

    Args:
        images: uint8 [N, 3, S, S].
        texts: unit vectors [N, D].
        methods: default: all that can look at the tower.
    """
    names = list(methods) if methods is not None else methods_of(encoder.vision)
    other = shuffled(encoder)
    parts = list(zip(torch.split(images, batch), torch.split(texts, batch), strict=True))
    maps = {n: torch.cat([on_cells(image_maps(encoder, p, t, n), CELLS) for p, t in parts]) for n in names}
    blind = {n: torch.cat([on_cells(image_maps(other, p, t, n), CELLS) for p, t in parts]) for n in names}
    random = torch.rand(len(images), CELLS, CELLS, generator=torch_generator("random order"))
    ranked = {**maps, RANDOM: random, CONTRAST: contrast(images)}
    heights = {name: deletion(encoder, images, texts, relevance) for name, relevance in ranked.items()}
    return Sanity(
        images=len(images),
        cells=CELLS,
        default=DEFAULT,
        fractions=[step / STEPS for step in range(STEPS + 1)],
        curves={name: _curve(values, heights[RANDOM]) for name, values in heights.items()},
        shuffled={name: _follows(rank_correlations(maps[name], blind[name])) for name in names},
    )


def shuffled(encoder: DualEncoder) -> DualEncoder:
    """A copy whose every parameter has its values in random order: the same sizes of weights, nothing learned."""
    other = copy.deepcopy(encoder)
    generator = torch_generator("shuffled weights")
    with torch.no_grad():
        for parameter in other.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other


def deletion(encoder: DualEncoder, images: Tensor, texts: Tensor, relevance: Tensor) -> Values:
    """Similarities [N, STEPS + 1] while the patches are covered in falling order of relevance, [N, g, g].

    Equally relevant patches are covered in random order.
    """
    cells = relevance.shape[-1] ** 2
    rank = ranks(relevance).view(relevance.shape).to(images.device)
    heights = [
        similarities(encoder, covered(images, rank < round(step * cells / STEPS)), texts) for step in range(STEPS + 1)
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


def contrast(images: Tensor, cells: int = CELLS) -> Tensor:
    """How far each patch's pixels stray from the mean of the image's border, [N, cells, cells]: what stands out
    without any model."""
    everything = torch.ones(len(images), 1, 1, dtype=torch.bool, device=images.device)
    ground = covered(images, everything)
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
