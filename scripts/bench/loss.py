"""Time and memory of a contrastive loss, forward and backward, beside open_clip's on the same features."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmssl.losses import info_nce, siglip
from mmssl.system import peak_memory

Loss = Literal["contrastive", "siglip"]
Form = Literal["auto", "plain", "blocked", "triton"]
LossForm = Form | Literal["open_clip"]
GOALS = {"cpu": "; goals 0.5 and 0.025"}
"""Of InfoNCE's ratios to open_clip's at N = 16,384 on this device."""
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One case to measure."""

    loss: Loss
    form: LossForm
    batch: int
    dim: int
    device: str
    threads: int | None
    """CPU threads; None: torch's default."""


@dataclass(frozen=True)
class LossMeasurement:
    """One forward and backward in a process of its own."""

    seconds: float
    extra_bytes: int
    """Peak memory above what the process held with features and libraries in place."""
    loss: float
    gradient_norm: float
    """Of both features and the scale together."""


@dataclass(frozen=True)
class LossComparison:
    """Measurements of ours and of open_clip, taken in turn; none of theirs where they were left out."""

    case: Case
    ours: list[LossMeasurement]
    theirs: list[LossMeasurement]


def bench_loss(
    batches: Sequence[int] = (4096, 8192, 16384),
    *,
    loss: Loss = "contrastive",
    form: Form = "auto",
    dim: int = 512,
    rounds: int = 3,
    device: str = "cpu",
    threads: int | None = None,
    peer_up_to: int = 16384,
) -> list[LossComparison]:
    """Measure ours and open_clip's loss `rounds` times in turn at each batch size, float32.

    Each measurement has a fresh process. open_clip holds several [N, N] matrices (4.2 GB at N = 16,384), so
    batches above `peer_up_to` are measured for ours alone.
    """
    comparisons = []
    for batch in batches:
        case = Case(loss, form, batch, dim, device, threads)
        peer = Case(loss, "open_clip", batch, dim, device, threads)
        comparison = LossComparison(case, [], [])
        for _ in range(rounds):
            comparison.ours.append(measure(case))
            if batch <= peer_up_to:
                comparison.theirs.append(measure(peer))
        comparisons.append(comparison)
    return comparisons


def table(comparisons: Sequence[LossComparison]) -> str:
    """The comparisons as text: medians, and the ratio's range over rounds in brackets."""
    lines = [f"{'batch':>8} {'':9} {'seconds':>8} {'extra MiB':>10} {'loss':>12} {'gradient norm':>14}"]
    for comparison in comparisons:
        for name, measurements in (("mmssl", comparison.ours), ("open_clip", comparison.theirs)):
            if measurements:
                lines.append(f"{comparison.case.batch:>8} {name:9} {_medians(measurements)}")
        if comparison.theirs:
            pairs = list(zip(comparison.ours, comparison.theirs, strict=True))
            seconds = _ratio([ours.seconds / theirs.seconds for ours, theirs in pairs])
            memory = _ratio([ours.extra_bytes / theirs.extra_bytes for ours, theirs in pairs])
            goals = GOALS.get(comparison.case.device, "") if comparison.case.loss == "contrastive" else ""
            lines.append(f"{'':8} {'ratio':9} time {seconds}, memory {memory}{goals}")
    return "\n".join(lines)


def _medians(measurements: Sequence[LossMeasurement]) -> str:
    seconds = statistics.median(m.seconds for m in measurements)
    extra = statistics.median(m.extra_bytes for m in measurements) / 2**20
    first = measurements[0]
    return f"{seconds:8.3f} {extra:10.1f} {first.loss:12.7f} {first.gradient_norm:14.7g}"


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def measure(case: Case) -> LossMeasurement:
    """Measure one case in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (case,))


def _measure(case: Case) -> LossMeasurement:
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    loss = _open_clip(case.loss) if case.form == "open_clip" else _ours(case.loss, case.form)
    _run(loss, _features(64, case))  # libraries load and set up on first use
    features = _features(case.batch, case)
    before = _peak_bytes(case.device)
    if case.device != "cpu":  # memory is taken from the driver once; a training has it from its second step on
        _run(loss, features)
        for feature in features:
            feature.grad = None
    start = time.perf_counter()
    value = _run(loss, features)
    seconds = time.perf_counter() - start
    extra = _peak_bytes(case.device) - before
    gradients = [feature.grad for feature in features if feature.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    return LossMeasurement(seconds, extra, value, norm)


def _run(loss: LossFunction, features: tuple[Tensor, ...]) -> float:
    value = loss(*features)
    value.backward()  # type: ignore[no-untyped-call]
    return value.item()  # also waits for the device


def _features(batch: int, case: Case) -> tuple[Tensor, ...]:
    """Image and text features that know a little of each other, scale 1 / 0.07 and SigLIP's bias -10."""
    generator = torch.Generator(case.device).manual_seed(0)
    image = torch.randn(batch, case.dim, generator=generator, device=case.device)
    text = torch.randn(batch, case.dim, generator=generator, device=case.device).add_(image, alpha=0.3)
    for feature in (image, text):  # in place, so that the peak so far is what stays
        feature.div_(feature.norm(dim=1, keepdim=True)).requires_grad_()
    scale = torch.tensor(1 / 0.07, device=case.device, requires_grad=True)
    return image, text, scale, torch.tensor(-10.0, device=case.device, requires_grad=True)


def _ours(loss: Loss, form: Form) -> LossFunction:
    if loss == "siglip":
        return lambda image, text, scale, bias: siglip(image, text, scale, bias, form=form)
    return lambda image, text, scale, bias: info_nce(image, text, scale, form=form)


def _open_clip(loss: Loss) -> LossFunction:
    # Here and not above: the process that measures ours must not hold it.
    from open_clip.loss import ClipLoss, SigLipLoss

    if loss == "siglip":
        peer: LossFunction = SigLipLoss()
        return peer
    clip = ClipLoss()
    return lambda image, text, scale, bias: clip(image, text, scale)


def _peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
