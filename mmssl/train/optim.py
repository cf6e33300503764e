"""The optimizer and its parameter groups, the learning-rate schedule, updates, and the EMA of the weights."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mmssl.config import OptimConfig
from mmssl.distributed import full_tensor, local_tensor
from mmssl.models import DualEncoder
from mmssl.objectives import TrainingTask

_EMBEDDINGS = (
    "position_embed",
    "positional_embed",
    "pos_embed",
    "class_embedding",
    "cls_token",
    "token_type_embed",
)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups by tower and by weight decay from the task's named parameters; the schedule scales `lr_peak`.

    Biases, norms, the temperature and embeddings of position, class and segment are not decayed.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    peaks = {"vision": config.vision_lr or config.lr, "text": config.text_lr or config.lr, "rest": config.lr}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        tower = next((t for t in ("vision", "text") if name.startswith(f"encoder.{t}.")), "rest")
        decays = parameter.ndim > 1 and not any(part in name for part in _EMBEDDINGS)
        decay, peak = (config.weight_decay if decays else 0.0), peaks[tower]
        new: dict[str, Any] = {"params": [], "lr": peak, "lr_peak": peak, "weight_decay": decay}
        group = groups.setdefault((tower, decays), new)
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in its fused form."""
    return torch.optim.AdamW(
        parameter_groups(named, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def lr_factor(config: OptimConfig, fraction: float, step: int, steps: int | None) -> float:
    """Learning rate of update `step` (from 0) relative to its peak; the curve is OpenCLIP's.

    Args:
        fraction: fraction of the training done before this update, 0 to 1.
        steps: length of the training in updates, or None where it is measured in minutes.
    """
    if steps is None:
        ramp, warmup = fraction, config.warmup
    else:
        ramp = (step + 1) / steps
        warmup = min(config.warmup if config.warmup < 1 else config.warmup / steps, 1.0)
    if ramp < warmup:
        return ramp / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        left = min((1 - fraction) / config.decay, 1.0)
    else:
        rest = min(max((fraction - warmup) / max(1 - warmup, 1e-9), 0.0), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * rest))
    return config.final_lr + (1 - config.final_lr) * max(left, 0.0)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_peak"] * factor


def update(
    accelerator: Any, task: TrainingTask, optimizer: torch.optim.Optimizer, prepared: Any, clip_norm: float | None
) -> Tensor:
    """Clip, step and clear the gradients; an update that is not finite is skipped on the device.

    Args:
        prepared: `optimizer` as Accelerate prepared it.

    Returns: the norm of the whole gradient, before clipping.
    """
    if clip_norm is not None:
        norm = full_tensor(accelerator.clip_grad_norm_(task.parameters(), clip_norm))
    else:
        accelerator.unscale_gradients()
        # The norm that clipping computes, without writing every gradient again.
        norm = full_tensor(get_total_norm([p.grad for p in task.parameters() if p.grad is not None]))
    if accelerator.scaler is None:
        # AdamW's fused kernel leaves everything as it is where this is 1, without asking the host.
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    prepared.step()
    prepared.zero_grad()
    task.encoder.clamp_temperature()
    return norm


class Ema:
    """Exponential moving average of the dual encoder's weights; batch-norm statistics are copied.

    Attributes:
        weights: by the names of the encoder's state dict; sharded as the encoder's are.
    """

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, encoder: DualEncoder, step: int, finite: Tensor) -> None:
        """Move towards `encoder` after update `step` (from 0); no change if the update was not `finite`.

        Early on the decay is (1 + step) / (10 + step), so that the random initial weights fade quickly.
        """
        pull = (1 - min(self.decay, (1 + step) / (10 + step))) * finite.float()
        averaged = {name for name, _ in encoder.named_parameters(remove_duplicate=False)}
        for name, tensor in encoder.state_dict().items():
            own, other = local_tensor(self.weights[name]), local_tensor(tensor)
            if name in averaged:
                own.lerp_(other, pull)
            else:
                own.copy_(other)
