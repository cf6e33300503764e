"""Prediction of the order of shuffled tiles of the image (Noroozi and Favaro 2016)."""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.rng import RowRandom, generator

TILES = 3
"""Tiles per side."""
CANDIDATES = 100_000
"""Number of random permutations to pick distant ones from."""
SPREAD = 50.0
"""Standard deviation of the standardised values of a tile in each colour."""
SHUFFLED_IMAGE = base.EncoderPass("vision", "jigsaw.image")


class JigsawOptions(base.ObjectiveOptions):
    """Options of the jigsaw puzzle."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    permutations: int = Field(64, ge=2, le=1000)
    """Number of classes, each an order of the tiles."""
    tile: float = Field(0.85, gt=0, le=1)
    """Side of a tile as a fraction of its cell. Its position in the cell is random, so that edges do not meet."""


class Jigsaw(base.Objective):
    """Classify the permutation of the main view's 3 x 3 tiles in a shuffled image.

    To prevent shortcuts, each tile is cut at a random position of its cell, separated from its neighbours by a gap,
    and standardised in each colour.
    """

    Options = JigsawOptions

    def __init__(self, options: JigsawOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        orders = distant_permutations(options.permutations, TILES**2, generator("jigsaw"))
        self.register_buffer("orders", torch.from_numpy(orders), persistent=False)
        self.head = nn.Linear(encoder.vision.width, options.permutations)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        which = random.integers(self.options.permutations)
        order = self.get_buffer("orders")[which]
        cell = inputs["view.main"].shape[-1] // TILES
        size = max(1, round(cell * self.options.tile))
        tiles = cut_tiles(inputs["view.main"], random.uniform(TILES**2, 2), size)
        image = lay_tiles(tiles, order, inputs["view.main"].shape[-1])
        return {"jigsaw.order": which, "jigsaw.image": image}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (SHUFFLED_IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {"logits": self.head(features[SHUFFLED_IMAGE].pooled)}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        return base.classification(predictions["logits"], inputs["jigsaw.order"])


def distant_permutations(
    count: int, length: int, rng: np.random.Generator
) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Permutations of 0..length-1 with large Hamming distances, int64 [count, length].

    Each is the random candidate farthest from all earlier ones (the paper's algorithm 1 on a sample).
    """
    candidates = rng.permuted(np.tile(np.arange(length), (CANDIDATES, 1)), axis=1)
    chosen = [candidates[0]]
    nearest = (candidates != chosen[0]).sum(1)
    while len(chosen) < count:
        chosen.append(candidates[nearest.argmax()])
        nearest = np.minimum(nearest, (candidates != chosen[-1]).sum(1))
    return np.stack(chosen).astype(np.int64)


def cut_tiles(images: Tensor, places: Tensor, size: int) -> Tensor:
    """Standardised tiles [B, TILES**2, 3, size, size] of images [B, 3, S, S].

    `places` [B, TILES**2, 2] are the vertical and horizontal positions of the tiles in their cells, in 0..1.
    """
    cell = images.shape[-1] // TILES
    corners = (places * (cell - size + 1)).long()
    along = torch.arange(size, device=images.device)
    grid = torch.arange(TILES**2, device=images.device)
    rows = (grid // TILES * cell + corners[..., 0]).unsqueeze(-1) + along
    columns = (grid % TILES * cell + corners[..., 1]).unsqueeze(-1) + along
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    tiles = images[samples, :, rows.unsqueeze(-1), columns.unsqueeze(-2)].movedim(-1, 2).float()
    mean, deviation = tiles.mean((-2, -1), keepdim=True), tiles.std((-2, -1), keepdim=True)
    return 127.5 + SPREAD * (tiles - mean) / deviation.clamp(min=1)


def lay_tiles(tiles: Tensor, order: Tensor, side: int) -> Tensor:
    """A gray image [B, 3, side, side] with tile order[:, i] in the middle of its i-th cell."""
    size, cell = tiles.shape[-1], side // TILES
    shuffled = tiles[torch.arange(len(tiles), device=tiles.device).unsqueeze(1), order]
    image = tiles.new_full((len(tiles), 3, side, side), 127.5)
    gap = (cell - size) // 2
    for i in range(TILES**2):
        top, left = i // TILES * cell + gap, i % TILES * cell + gap
        image[:, :, top : top + size, left : left + size] = shuffled[:, i]
    return image
