"""Prediction of the features of hidden patches."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmssl.distributed import World
from mmssl.objectives._mixing import TrainingTask, encoder_passes
from mmssl.objectives.maskfeat import Maskfeat
from mmssl.rng import RowRandom
from tests.helpers.objective_batch import RESNET, ROWS, batch, tiny_task


def prepared(task: TrainingTask, name: str = "maskfeat") -> dict[str, torch.Tensor]:
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    return task.inputs(batch(task), [name], lambda _: random, 0.0)


def test_targets_are_the_momentum_encoders_features() -> None:
    """After slow = m slow + (1 - m) fast, the targets are its tokens of the whole image, each with mean 0 and variance
    1 over its values, without the student's dropout."""
    task = tiny_task(["maskfeat"], dropout=0.2)
    maskfeat = task.objective("maskfeat")
    assert isinstance(maskfeat, Maskfeat)
    before = copy.deepcopy(maskfeat.slow.average["vision"])
    with torch.no_grad():
        for parameter in task.encoder.vision.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs, fast = prepared(task), dict(task.encoder.vision.named_parameters())
    with torch.no_grad():
        for name, parameter in before.named_parameters():
            parameter.mul_(0.9).add_(0.1 * fast[name])
        tokens = before.eval()(inputs["view.main"]).tokens
    centred = tokens - tokens.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(inputs["maskfeat.features"], expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_data2vecs() -> None:
    """The mean over hidden patches and their values of 0.5 d^2 / beta where |d| < beta, else |d| - 0.5 beta, in a loop;
    no gradient at visible patches; and torch's SmoothL1Loss agrees."""
    task = tiny_task(["maskfeat"])
    objective, inputs = task.objective("maskfeat"), prepared(task)
    predicted = 3 * task.predict(inputs, ["maskfeat"])["maskfeat"]["features"].detach()[:2]
    few = {k: v[:2] for k, v in inputs.items()}
    leaf = predicted.clone().requires_grad_()
    loss = objective.loss({"features": leaf}, few, World()).total / objective.num_terms(few)
    hidden, target = few["maskfeat.hidden"], few["maskfeat.features"]
    assert hidden.sum(1).tolist() == [27, 27]
    terms = []
    for row, place in hidden.nonzero().tolist():
        for ours, wanted in zip(predicted[row, place].tolist(), target[row, place].tolist(), strict=True):
            d = abs(ours - wanted)
            terms.append(0.5 * d * d / 2.0 if d < 2.0 else d - 1.0)
    assert max(terms) > 1.0
    assert float(loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    peer = predicted.clone().requires_grad_()
    theirs = torch.nn.SmoothL1Loss(beta=2.0)(peer[hidden], target[hidden])
    own = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(own, torch.autograd.grad(theirs, peer)[0])
    assert not own[~hidden].any()


def test_mae_and_maskfeat_share_mask_and_pass() -> None:
    """With equal ratios there is one image pass, and both predict the same hidden patches."""
    task = tiny_task(["mae", "maskfeat"])
    assert len(encoder_passes(map(task.objective, task.names))) == 1
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    inputs = task.inputs(batch(task), task.names, lambda _: random, 0.0)
    assert torch.equal(inputs["mae.hidden"], inputs["maskfeat.hidden"])


def test_a_tower_without_patches_has_its_input_covered() -> None:
    """A ResNet sees the mean colour in covered squares; places of the feature map whose centres are covered are
    predicted, and hidden pixels do not reach the prediction."""
    task = tiny_task(["maskfeat"], {**RESNET, "image_size": 96}).eval()
    given = batch(task)
    given.views["main"] = F.interpolate(given.views["main"].float(), size=(96, 96)).to(torch.uint8)
    inputs = task.inputs(given, ["maskfeat"], lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    hidden, seen = inputs["maskfeat.hidden"], inputs["maskfeat.image"]
    assert hidden.shape == (ROWS, 9)
    assert 0.5 < hidden.float().mean() < 0.95
    mean = task.encoder.vision.mean.round().to(torch.uint8)
    for row in range(ROWS):
        for place in range(9):
            y, x = 16 + 32 * (place // 3), 16 + 32 * (place % 3)
            covered = bool((seen[row, :, y, x] == mean[0, :, 0, 0]).all())
            assert covered == bool(hidden[row, place])
    assert task.predict(inputs, ["maskfeat"])["maskfeat"]["features"].shape == inputs["maskfeat.features"].shape
