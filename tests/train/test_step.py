"""A step's gradient is that of the whole batch, whatever the micro-batch."""

import pytest
import torch
from accelerate import Accelerator

from mmssl.config import ObjectiveConfig
from mmssl.distributed import Processes
from mmssl.models.dual_encoder import build_dual_encoder
from mmssl.objectives import find_objective
from mmssl.objectives.base import Vocabulary
from mmssl.objectives.mixer import Mixer
from mmssl.rng import torch_seed
from mmssl.train.step import backward
from mmssl.types import Batch
from tests.conftest import tiny_model_config

ROWS = 10


def mixer(dropout: float) -> Mixer:
    torch.manual_seed(0)
    encoder = build_dual_encoder(tiny_model_config(dropout, dropout), 100, 0)
    kind = find_objective("contrastive")
    vocabulary = Vocabulary(100, 4, (0, 1, 2, 3, 4), torch.zeros(100, dtype=torch.bool))
    return Mixer(encoder, {"contrastive": kind(kind.Options(), encoder, vocabulary)}, Processes()).train()


def batch() -> Batch:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 100, (ROWS, 6), generator=g)
    mask = torch.arange(6) < torch.randint(3, 7, (ROWS, 1), generator=g)
    views = {"main": torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=g)}
    return Batch(views, tokens * mask, mask, torch.arange(ROWS), [f"k{i}" for i in range(ROWS)])


def gradients(module: Mixer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def by_hand(module: Mixer, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch with one graph: encodings made part by part with each part's dropout, then CLIP's loss."""
    data = batch()
    images, texts = [], []
    for a in range(0, ROWS, size):
        part = data.slice(a, a + size)
        torch.manual_seed(torch_seed(1, "step", 2, "dropout", a))
        images.append(module.encoder.encode_image(part.views["main"]))
        texts.append(module.encoder.encode_text(part.tokens, part.token_mask))
    logits = module.encoder.logit_scale * torch.cat(images) @ torch.cat(texts).T
    target = torch.arange(ROWS)
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return float(loss.detach()), gradients(module)


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 5, 10, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_micro_batch_gives_the_whole_batchs_gradient(micro_batch: int | None, dropout: float) -> None:
    """With dropout and drop-path on, and a leftover micro-batch, loss and gradients equal one graph over the batch."""
    module = mixer(dropout)
    expected_loss, expected = by_hand(module, min(micro_batch or ROWS, ROWS))
    module.zero_grad()
    tally = backward(module, module, batch(), {"contrastive": 1.0}, (1, "step", 2), micro_batch, Accelerator(cpu=True))
    total, count = tally.sums["contrastive.loss"]
    assert float(total / count) == pytest.approx(expected_loss, rel=1e-5)
    found = gradients(module)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_weight_scales_the_gradient_and_a_resting_objective_gives_none() -> None:
    """Weight 2 doubles the gradient of weight 1; the options refuse what they do not know."""
    results = []
    for weight in (1.0, 2.0):
        module = mixer(0.0)
        backward(module, module, batch(), {"contrastive": weight}, (1, "step", 2), None, Accelerator(cpu=True))
        results.append(gradients(module))
    for name in results[0]:
        torch.testing.assert_close(2 * results[0][name], results[1][name])
    assert ObjectiveConfig(weight=0.5).weight == 0.5
