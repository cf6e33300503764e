"""Objectives on images alone: rotation, jigsaw, colorization, denoising, vae, frames."""

import itertools

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from torch.distributions import Normal, kl_divergence

from mmssl.data.transforms.render import order_code
from mmssl.models import DualEncoder
from mmssl.objectives.colorization import color_bins, nearest_bins, rarity, rgb_to_lab, soft_bins
from mmssl.objectives.denoising import Denoising
from mmssl.objectives.frames import frame_order
from mmssl.objectives.jigsaw import cut_tiles, distant_permutations, lay_tiles
from mmssl.objectives.rotation import rotate
from mmssl.objectives.vae import Vae, VaeOptions, divergence_from_prior
from mmssl.rng import RowRandom, generator
from tests.helpers.objective_batch import ROWS, batch, tiny_task


def random_images(rows: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_rotations_are_quarter_turns() -> None:
    """Each image is torch.rot90 of itself by its own number of turns."""
    images, turns = random_images(8, 6), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    for image, turned, k in zip(images, rotate(images, turns), turns.tolist(), strict=True):
        assert torch.equal(turned, torch.rot90(image, k, (1, 2)))


def test_permutations_are_far_apart() -> None:
    """All are permutations, no two are the same, and 64 of 9 tiles differ pairwise in at least 7 places; taken at
    random some pairs would differ in fewer."""
    orders = distant_permutations(64, 9, generator("jigsaw"))
    assert (np.sort(orders, axis=1) == np.arange(9)).all()
    distances = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(orders.tolist(), 2)]
    assert min(distances) >= 7


@pytest.mark.parametrize("side", [24, 32, 64])
def test_the_inverse_permutation_puts_the_tiles_back(side: int) -> None:
    """Tiles laid by an order and read off by its inverse are the tiles in their places."""
    size = round(side // 3 * 0.85)
    places = torch.rand(4, 9, 2, generator=torch.Generator().manual_seed(1))
    tiles = cut_tiles(random_images(4, side), places, size)
    order = torch.stack([torch.randperm(9) for _ in range(4)])
    laid = lay_tiles(tiles, order, side)
    cell, gap = side // 3, (side // 3 - size) // 2
    for sample in range(4):
        inverse = order[sample].argsort()
        for tile in range(9):
            top, left = (int(i) * cell + gap for i in divmod(int(inverse[tile]), 3))
            assert torch.equal(laid[sample, :, top : top + size, left : left + size], tiles[sample, tile])


def test_tiles_are_cut_inside_their_cells_and_standardised() -> None:
    """At the corners of the range of places a tile is the one cut by hand; it has mean 127.5 and deviation 50."""
    images = random_images(1, 24)
    for place, top in ((0.0, 8), (0.999, 10)):
        tiles = cut_tiles(images, torch.full((1, 9, 2), place), 6)
        expected = images[0, :, top : top + 6, top : top + 6].float()  # the tile in the middle
        centred = expected - expected.mean((1, 2), keepdim=True)
        expected = 127.5 + 50 * centred / expected.std((1, 2), keepdim=True)
        torch.testing.assert_close(tiles[0, 4], expected)


def test_lab_agrees_with_skimage() -> None:
    """To 0.02 in L, a and b over random colours."""
    images = random_images(4, 32)
    expected = rgb2lab(images.permute(0, 2, 3, 1).numpy())
    assert np.abs(rgb_to_lab(images).permute(0, 2, 3, 1).numpy() - expected).max() < 0.02


def test_colour_bins() -> None:
    """261 squares of side 10 hold an sRGB colour; every colour's nearest bin is within half a diagonal of it."""
    bins = color_bins()
    assert len(bins) == 261
    ab = rgb_to_lab(random_images(4, 32))[:, 1:].flatten(2).mT
    nearest = bins[nearest_bins(ab, bins)]
    assert (nearest - ab).abs().max() <= 5 + 1e-3


def test_soft_bins_by_hand() -> None:
    """A colour is spread over its five nearest bins with Gaussian weights of sigma 5 that add up to one."""
    bins = color_bins()
    colour = torch.tensor([[12.0, -7.0]])
    target, nearest = soft_bins(colour, bins)
    distances = (bins - colour).square().sum(1)
    order = distances.argsort()[:5]
    weights = torch.exp(-distances[order] / 50)
    expected = torch.zeros(len(bins)).index_put((order,), weights / weights.sum())
    torch.testing.assert_close(target[0], expected, atol=1e-5, rtol=1e-4)
    assert nearest[0] == order[0]


def test_rare_colours_weigh_more() -> None:
    """Weights are 1 on average over the frequencies, all 1 when the mix is uniform, and fall with the frequency."""
    frequency = torch.tensor([0.7, 0.2, 0.1, 0.0])
    weights = rarity(frequency, 0.5)
    assert float((weights * frequency).sum()) == pytest.approx(1)
    assert weights.tolist() == sorted(weights.tolist())
    assert rarity(frequency, 1.0).tolist() == pytest.approx([1] * 4)


def test_the_noise_has_the_deviation_asked_for_and_the_target_is_clean() -> None:
    """The tower sees the main view plus noise of 64 steps of a byte; the target is the clean view."""
    task = tiny_task(["denoising"])
    inputs = task.inputs(batch(task), ["denoising"], lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    noise = inputs["denoising.image"] - inputs["view.main"]
    assert float(noise.std()) == pytest.approx(64, rel=0.02)
    assert abs(float(noise.mean())) < 2
    prediction = task.predict(inputs, ["denoising"])["denoising"]
    torch.testing.assert_close(prediction["target"], task.encoder.vision.normalize(inputs["view.main"]))
    perfect = {**prediction, "image": prediction["target"]}
    assert float(task.objective("denoising").loss(perfect, inputs, task.world).total) == 0


def test_images_of_a_reconstruction(tiny_encoder: DualEncoder) -> None:
    """Beside the image and what was seen stands the prediction in the image's own range."""
    task = tiny_task(["denoising"])
    inputs = task.inputs(batch(task), ["denoising"], lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    prediction = task.predict(inputs, ["denoising"])["denoising"]
    objective = task.objective("denoising")
    assert isinstance(objective, Denoising)
    perfect = {**prediction, "image": prediction["target"]}
    images = objective.visualize(perfect, inputs, task.encoder)
    assert torch.equal(images[:, 2], inputs["view.main"])


def test_the_divergence_is_torchs() -> None:
    """Value and gradients are those of torch.distributions between a normal distribution and the standard one; 0 for
    the standard one itself."""
    seeded = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 7, generator=seeded).double().requires_grad_() for _ in range(2))
    found = divergence_from_prior(mean, log_variance)
    prior = Normal(torch.zeros(5, 7).double(), torch.ones(5, 7).double())
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), prior).sum()
    torch.testing.assert_close(found, expected)
    leaves = (mean, log_variance)
    for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert float(divergence_from_prior(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_loss_of_the_vae_is_the_negative_bound(beta: float) -> None:
    """2 / D times -log p(x | z) + beta KL, without the constant, by torch.distributions; z is the mean plus the noise
    times the deviation."""
    task = tiny_task(["vae"], options={"beta": beta, "latent": 5})
    inputs = task.inputs(batch(task), ["vae"], lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    objective = task.objective("vae")
    assert isinstance(objective, Vae)
    found = task.predict(inputs, ["vae"])["vae"]
    posterior = Normal(found["mean"], (found["log_variance"] / 2).exp())
    sample = posterior.mean + posterior.stddev * inputs["vae.noise"]
    tokens = torch.nn.functional.gelu(objective.spread(sample)).view(ROWS, 64, 64)
    torch.testing.assert_close(found["image"], objective.decoder(tokens))
    values = found["target"][0].numel()
    constant = ROWS * values * 0.5 * np.log(2 * np.pi)
    likelihood = Normal(found["image"].double(), 1.0).log_prob(found["target"].double()).sum() + constant
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum()
    output = objective.loss(found, inputs, task.world)
    expected = 2 / values * (beta * divergence - likelihood)
    assert float(output.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(output.metrics["divergence"][0]) == pytest.approx(float(divergence.detach()), rel=1e-5)
    assert objective.visualize(found, inputs, task.encoder).shape[:2] == (ROWS, 2)
    assert VaeOptions().weight == 0.1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_orders_of_images_are_those_of_python(count: int) -> None:
    """The code of any shown order of five images gives the class whose permutation sorts the first ones as Python's
    sort does; samples with fewer images are not usable."""
    orders = torch.tensor(list(itertools.permutations(range(count))))
    shown = list(itertools.permutations(range(5)))
    usable, rows = frame_order(torch.tensor([order_code(order) for order in shown]), orders)
    assert usable.all()
    for order, row in zip(shown, rows.tolist(), strict=True):
        first = order[:count]
        assert orders[row].tolist() == [sorted(first).index(number) for number in first]
    few = [order_code(range(n)) for n in range(1, count)]
    assert not frame_order(torch.tensor(few), orders)[0].any()
    assert 0 < order_code(range(40)) < 2**63
