"""Learning-rate curves and parameter groups are the field's."""

import math

import pytest

from mmssl.config import OptimConfig
from mmssl.models import DualEncoder
from mmssl.train.optim import build_optimizer, lr_factor, set_lr


@pytest.mark.parametrize("warmup", [0, 7, 0.25])
def test_cosine_is_openclips_curve_written_as_a_loop(warmup: float) -> None:
    """Every step's factor equals OpenCLIP's cosine_lr: (step+1)/warmup, then 0.5 (1 + cos(pi e / es))."""
    steps = 40
    config = OptimConfig(warmup=warmup)
    length = warmup if warmup >= 1 else warmup * steps
    for step in range(steps):
        if step + 1 <= length - 1 + 1e-9 and step < length:
            expected = (step + 1) / length
        else:
            e, es = max(step - length, 0), steps - length
            expected = 0.5 * (1 + math.cos(math.pi * e / es))
        assert lr_factor(config, step / steps, step, steps) == pytest.approx(expected), step


def test_other_schedules_by_hand() -> None:
    """Constant stays at the peak; wsd stays and falls linearly over its last part; the end honours final_lr."""
    constant = OptimConfig(schedule="constant", warmup=0)
    assert [lr_factor(constant, p, 0, None) for p in (0, 0.5, 1)] == [1, 1, 1]
    wsd = OptimConfig(schedule="wsd", warmup=0.1, decay=0.2, final_lr=0.1)
    assert [lr_factor(wsd, p, 0, None) for p in (0, 0.05, 0.1, 0.8, 0.9, 1)] == pytest.approx([0, 0.5, 1, 1, 0.55, 0.1])
    cosine = OptimConfig(warmup=0, final_lr=0.2)
    assert [lr_factor(cosine, p, 0, None) for p in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])


def test_groups_decay_matrices_only_and_know_their_tower(tiny_encoder: DualEncoder) -> None:
    """Every weight is in exactly one group; biases, norms, position embeddings and the temperature are not decayed."""
    named = {f"encoder.{name}": p for name, p in tiny_encoder.named_parameters()}
    config = OptimConfig(lr=1.0, vision_lr=0.5, text_lr=0.25, weight_decay=0.3)
    optimizer = build_optimizer(named.items(), config)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(found) == len(named)
    for name, parameter in named.items():
        group = found[id(parameter)]
        plain = parameter.ndim < 2 or any(
            w in name for w in ("position_embeddings", "pos_embed", "cls_token", "token_type")
        )
        assert group["weight_decay"] == (0 if plain else 0.3), name
        peak = 0.5 if ".vision." in name else 0.25 if ".text." in name else 1.0
        assert group["lr_peak"] == peak, name
    set_lr(optimizer, 0.1)
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.05, 0.025}
