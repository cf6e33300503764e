"""What is measured and said about the objectives of a run."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmssl.distributed import World
from mmssl.losses import info_nce, siglip
from mmssl.objectives import find_objective, mixing
from mmssl.rng import RowRandom
from mmssl.train.diagnostics import Alarms, objective_gradients, objective_images, write_image_grid
from tests.helpers.objective_batch import ROWS, Plain, batch, tiny_task

MIX = ["contrastive", "mlm", "rotation"]


def test_gradient_norms_and_cosines_by_hand() -> None:
    """The norm is that of the mean loss's gradient on both towers and projections; the cosine with the contrastive one
    is taken over the weights both touch. Nothing of the model changes."""
    task = tiny_task(MIX)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    inputs = task.inputs(batch(task), MIX, lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    found = objective_gradients(task, inputs, MIX, Plain())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert task.training
    task.eval()
    gradients = {}
    for name in MIX:
        task.zero_grad()
        objective = task.objective(name)
        output = objective.loss(task.predict(inputs, [name])[name], inputs, World())
        (output.total / objective.num_terms(inputs)).backward()
        gradients[name] = {n: p.grad.clone() for n, p in task.encoder.named_parameters() if p.grad is not None}
    for name in MIX:
        expected = math.sqrt(sum(float(g.square().sum()) for g in gradients[name].values()))
        assert found[f"{name}.gradient_norm"] == pytest.approx(expected, rel=1e-4)
    first, second = gradients["rotation"], gradients["contrastive"]
    both = first.keys() & second.keys()
    a, b = (torch.cat([g[n].flatten() for n in sorted(both)]) for g in (first, second))
    assert found["rotation.gradient_cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-4)
    assert sum(found[f"{name}.time_share"] for name in MIX) == pytest.approx(1)
    assert 1 <= found["image_effective_rank"] <= ROWS


def test_images_are_drawn(tmp_path: Path) -> None:
    """One row a sample: the image, what was seen, the reconstruction; objectives without images are left out."""
    task = tiny_task(["contrastive", "mae"])
    names = ["contrastive", "mae"]
    inputs = task.inputs(batch(task), names, lambda _: RowRandom(torch.Generator(), 0, ROWS, ROWS), 0.0)
    (name, images), *rest = objective_images(task, inputs, names, Plain()).items()
    assert (name, rest) == ("mae", [])
    write_image_grid(tmp_path / "deep" / "sheet.png", images)
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.size == (3 * 24, 8 * 24)
        first = torch.tensor(list(sheet.crop((0, 0, 24, 24)).get_flattened_data()), dtype=torch.uint8)
    assert torch.equal(first.view(24, 24, 3), inputs["view.main"][0].permute(1, 2, 0))


HEALTHY = {
    "step": 50,
    "contrastive.loss": 1.0,
    "contrastive.logit_scale": 20.0,
    "image_effective_rank": 20.0,
    "mlm.loss": 3.0,
}


@pytest.mark.parametrize(
    ("change", "progress", "said"),
    [
        ({}, 0.3, ""),
        (
            {"contrastive.loss": math.log(256)},
            0.3,
            "the contrastive loss 5.55 is no better than guessing, 5.55",
        ),
        ({"contrastive.loss": math.log(256)}, 0.05, ""),
        ({"contrastive.loss": 5.5, "contrastive.chance_loss": 5.9}, 0.3, ""),
        ({"contrastive.loss": 4.9, "contrastive.chance_loss": 4.9}, 0.3, "is no better than guessing, 4.90"),
        ({"contrastive.loss": math.log(256), "step": 1}, 1.0, ""),
        ({"contrastive.logit_scale": 100.0}, 0.3, "temperature reached its clamp"),
        ({"contrastive.logit_scale": 100.0}, 0.8, ""),
        ({"image_effective_rank": 1.3}, 0.3, "collapsed"),
        ({"mlm.loss": math.nan}, 0.3, "no caption had a token to mask"),
    ],
)
def test_alarms_are_said_once_in_words(change: dict[str, float], progress: float, said: str) -> None:
    """Each sign of trouble is named with what to do, once; a healthy record says nothing."""
    alarms = Alarms({name: find_objective(name) for name in ("contrastive", "mlm")}, 256, 100.0, [])
    record = {**HEALTHY, **change}
    lines = alarms.look(record, progress)
    assert len(lines) == (said != "")
    assert said in "".join(lines)
    assert alarms.look(record, progress) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"siglip.loss": 6.5}, "the siglip loss 6.50 is no better than guessing, 6.54"),
        ({"siglip.loss": 6.0}, ""),
        ({"siglip.logit_scale": 100.0}, "temperature reached its clamp"),
    ],
)
def test_alarms_look_at_siglip(change: dict[str, float], said: str) -> None:
    """Where siglip pairs images with captions, its loss and temperature are watched, against its own guessing."""
    record = {"step": 50, "siglip.loss": 2.0, "siglip.logit_scale": 20.0, "image_effective_rank": 20.0, **change}
    lines = Alarms({"siglip": find_objective("siglip")}, 256, 100.0, []).look(record, 0.3)
    assert len(lines) == (said != "")
    assert said in "".join(lines)


@pytest.mark.parametrize("n", [1, 2, 7, 256])
def test_guessing_knows_nothing_of_the_pair(n: int) -> None:
    """With features that are all the same, InfoNCE is the value given, and SigLIP's best over all biases."""
    same = torch.ones(n, 4, dtype=torch.float64) / 2
    scale = torch.tensor(3.0, dtype=torch.float64)
    assert find_objective("contrastive").chance_loss(n) == pytest.approx(float(info_nce(same, same, scale)), abs=1e-12)
    low, high = -20.0, 40.0
    for _ in range(4):  # the loss is convex in the bias: nearer and nearer to its least value
        grid = torch.linspace(low, high, 31, dtype=torch.float64)
        losses = [float(siglip(same, same, scale, bias)) for bias in grid]
        least = losses.index(min(losses))
        low, high = float(grid[max(least - 1, 0)]), float(grid[min(least + 1, 30)])
    assert find_objective("siglip").chance_loss(n) == pytest.approx(min(losses), abs=1e-6)


def test_siglip_is_a_reference_too() -> None:
    """Contrastive is the reference where it is there, else siglip; other objectives are none."""
    assert mixing.find_reference(["mlm", "siglip"]) == "siglip"
    assert mixing.find_reference(["mlm", "siglip", "contrastive"]) == "contrastive"
    assert mixing.find_reference(["mlm"]) is None
