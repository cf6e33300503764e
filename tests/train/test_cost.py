"""Counted operations of training steps against the arithmetic of the towers."""

import pytest
import torch

from mmssl.build import build_objectives, placeholder_vocabulary
from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import find_objective
from mmssl.objectives._mixing import TrainingTask
from mmssl.train.cost import TOKENS, StepCosts, predicted_cost


def mixer_of(encoder: DualEncoder, *names: str) -> TrainingTask:
    options = {name: find_objective(name).Options() for name in names}
    return TrainingTask(encoder, build_objectives(options, encoder, placeholder_vocabulary(100, 77)), World())


def layer(tokens: int, width: int, hidden: int) -> int:
    """Operations of a transformer layer's forward: queries, keys, values and output; attention; the two of the MLP."""
    return 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden)


def test_a_contrastive_step_costs_what_its_layers_cost(tiny_encoder: DualEncoder) -> None:
    """Two layers of ViT (16 patches and a class token) and of BERT and both projections, three times (forward, and
    backward to inputs and to weights); the patch embedding twice, for images need no gradient. The loss of a batch
    of 2 is below a thousandth."""
    patches = 2 * 16 * (3 * 4 * 4) * 32
    forward = 2 * layer(17, 32, 128) + 2 * layer(TOKENS, 32, 64) + 2 * (2 * 32 * 24)
    expected = 3 * forward + 2 * patches
    assert predicted_cost(mixer_of(tiny_encoder, "contrastive"), ["contrastive"]) == pytest.approx(expected, rel=1e-3)


def test_text_costs_grow_with_its_length_as_layers_do(tiny_encoder: DualEncoder) -> None:
    """32 tokens against 16: exactly three times the difference of BERT's two layers."""
    task = mixer_of(tiny_encoder, "contrastive")
    found = predicted_cost(task, ["contrastive"], tokens=32) - predicted_cost(task, ["contrastive"], tokens=16)
    assert found == 3 * 2 * (layer(32, 32, 64) - layer(16, 32, 64))


def test_a_locked_tower_costs_its_forward_only(tiny_encoder: DualEncoder) -> None:
    """Locking the vision tower saves exactly its backward pass."""
    task = mixer_of(tiny_encoder, "contrastive")
    free = predicted_cost(task, ["contrastive"])
    tiny_encoder.vision.lock()
    # A locked tower still hands its output to a projection that learns, but needs no gradient back from it.
    saved = 2 * 2 * layer(17, 32, 128) + 2 * 16 * (3 * 4 * 4) * 32 + 2 * 32 * 24
    assert free - predicted_cost(task, ["contrastive"]) == saved


def test_the_mean_cost_follows_the_schedule(tiny_encoder: DualEncoder) -> None:
    """An objective that acts in the second half, at every second step, adds a quarter of what it costs."""
    costs = StepCosts(mixer_of(tiny_encoder, "contrastive", "mlm"))
    plain = find_objective("contrastive").Options()
    late = find_objective("mlm").Options(start=0.5, every=2)
    alone, both = costs.of(["contrastive"], 0.0), costs.of(["contrastive", "mlm"], 0.0)
    assert both > alone
    assert costs.mean({"contrastive": plain, "mlm": late}) == pytest.approx(0.75 * alone + 0.25 * both)
    assert costs.of([], 0.0) == 0


def test_hidden_patches_are_counted_while_they_are_hidden(tiny_encoder: DualEncoder) -> None:
    """With half of the patches hidden until the last tenth, a step costs less before it and the full price in it."""
    options = find_objective("contrastive").Options(mask_ratio=0.5, unmasked_finish=0.1)  # type: ignore[call-arg]
    objectives = build_objectives({"contrastive": options}, tiny_encoder, placeholder_vocabulary(100, 77))
    costs = StepCosts(TrainingTask(tiny_encoder, objectives, World()))
    full = predicted_cost(mixer_of(tiny_encoder, "contrastive"), ["contrastive"])
    assert costs.of(["contrastive"], 0.95) == full
    assert full - costs.of(["contrastive"], 0.5) == 3 * 2 * (layer(17, 32, 128) - layer(9, 32, 128))


def test_counting_leaves_no_gradients(tiny_encoder: DualEncoder) -> None:
    """Weights and gradients are as before."""
    before = {name: p.clone() for name, p in tiny_encoder.named_parameters()}
    predicted_cost(mixer_of(tiny_encoder, "contrastive"), ["contrastive"])
    for name, parameter in tiny_encoder.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
