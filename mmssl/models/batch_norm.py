"""Batch norm with the statistics of the global batch, on CPU and GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmssl.distributed import World


class _OverProcesses(nn.BatchNorm2d):
    """Batch norm that trains on the statistics of all processes; torch's SyncBatchNorm needs a GPU."""

    world: World
    after: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            evaluated: Tensor = self.after(super().forward(x))
            return evaluated
        x32 = x.float()
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        variance, mean = torch.var_mean(x32, dim=(0, 2, 3), correction=0)
        gathered, _ = self.world.gather(torch.cat([count, mean, variance]).unsqueeze(0))
        n, (means, variances) = gathered[:, :1], gathered[:, 1:].chunk(2, dim=1)
        total = n.sum()
        mean = (n * means).sum(0) / total
        variance = (n * (variances + (means - mean) ** 2)).sum(0) / total
        self._update(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        scaled = (x32 - mean.view(1, -1, 1, 1)) * (variance.view(1, -1, 1, 1) + self.eps).rsqrt()
        if self.affine:
            scaled = scaled * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        result: Tensor = self.after(scaled.to(x.dtype))
        return result

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)


class _OverGpus(nn.SyncBatchNorm):
    after: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(super().forward(x))
        return result


def synchronize_batch_norm(module: nn.Module, world: World, device: torch.device) -> None:
    """Replace every 2-D batch norm inside `module` in place, with the same weights, buffers and names.

    The dropout and activation inside timm's batch norms are applied afterwards.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _replacement(child, world, device))
        else:
            synchronize_batch_norm(child, world, device)


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards as before: a forward pass that is run a second time must not count twice."""
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.copy_(before)


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Forward passes in here train on their own statistics, but leave the running ones, used in evaluation, alone."""
    # A momentum of 0 rather than no running statistics: activation checkpointing compares what both passes save.
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def has_local_statistics(module: nn.Module) -> bool:
    """True if a batch norm inside `module` uses the statistics of this process alone."""
    ours = (_OverProcesses, _OverGpus)
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(not isinstance(norm, ours) for norm in norms)


def _replacement(norm: nn.BatchNorm2d, world: World, device: torch.device) -> nn.Module:
    new: _OverProcesses | _OverGpus
    new = (_OverGpus if device.type == "cuda" else _OverProcesses)(
        norm.num_features, norm.eps, norm.momentum, norm.affine
    )
    if isinstance(new, _OverProcesses):
        new.world = world
    extras = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(m, nn.Module)]
    new.after = nn.Sequential(*extras)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.train(norm.training)
    return new
