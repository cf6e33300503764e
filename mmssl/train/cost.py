"""The cost of a training step in floating-point operations and in memory, measured on synthetic pairs.

Operations are those of matrix products, convolutions and attention, forward and backward; a multiplication and an
addition count as two. Norms, activations, the optimizer, the part of a loss that grows with the batch, and the second
forward pass of `train.micro_batch` are not counted.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmssl import system
from mmssl.build import build_objectives, describe_vocabulary, placeholder_vocabulary
from mmssl.config import Config, ObjectiveConfig
from mmssl.data.transforms import load_tokenizer
from mmssl.distributed import World
from mmssl.models import build_dual_encoder, lora
from mmssl.objectives import ObjectiveOptions, TrainingTask, base, mixing
from mmssl.rng import RowRandom, torch_generator
from mmssl.train.step import Step, backward
from mmssl.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLES = 2
TOKENS = 16
"""Length of the synthetic captions."""
SCHEDULE_STEPS = 1000
"""Steps assumed for a training whose length is given in minutes."""
MEMORY_FRACTION = 0.7
"""Fraction of the memory left by weights, gradients and optimizer that activations may take. The rest is for
temporary tensors inside layers."""
MEMORY_SAMPLES = 4
"""Samples on which activations are measured."""


class StepCosts:
    """Costs of the steps of one training task; each kind of step is counted once.

    Counting runs real steps on the task's device. It changes queues and running statistics, so give it a task that is
    not trained.
    """

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._known: dict[tuple[object, ...], float] = {}

    def of(self, objectives: Iterable[str], fraction: float) -> float:
        """Operations per sample of a step with these objectives active, after `fraction` of the training."""
        names = tuple(sorted(objectives))
        chosen = [self._task.objective(name) for name in names]
        for objective in chosen:
            objective.on_step_start(fraction)
        kind = names, mixing.encoder_passes(chosen)
        if kind not in self._known:
            self._known[kind] = predicted_cost(self._task, names, fraction)
        return self._known[kind]

    def mean(self, schedules: Mapping[str, ObjectiveConfig], steps: int = SCHEDULE_STEPS) -> float:
        """Operations per sample of an average step of a training of `steps` steps."""
        total = 0.0
        for step in range(steps):
            fraction = step / steps
            total += self.of([n for n, s in schedules.items() if mixing.weight_at(s, step, fraction) > 0], fraction)
        return total / steps


def predicted_cost(task: TrainingTask, objectives: Iterable[str], fraction: float = 0.0, tokens: int = TOKENS) -> float:
    """Floating-point operations per sample of one training step, forward and backward, with `objectives` active.

    Args:
        fraction: fraction of the training done, 0 to 1.
        tokens: length of the captions.
    """
    names = list(objectives)
    if not names:
        return 0.0
    batch = synthetic_batch(task, names, SAMPLES, tokens)

    def random(name: str) -> RowRandom:
        return RowRandom(torch_generator("cost", name, device=batch.ids.device), 0, SAMPLES, SAMPLES)

    task.train()
    # Fused attention has different names on different devices, and the counter does not know all of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs = task.inputs(batch, names, random, fraction)
        active = {n: mixing.Weighted(1.0, 1 / task.objective(n).num_terms(inputs).clamp(min=1)) for n in names}
        total, _ = task(inputs, active)
        if total.requires_grad:
            total.backward()
        task.on_step_end(inputs, names)
    task.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / SAMPLES


def untrained_task(config: Config, objectives: Mapping[str, ObjectiveOptions]) -> TrainingTask:
    """A configuration's modules with random weights; a vocabulary to be trained has its largest size.

    Raises:
        UserError: a tower or an objective cannot be built as configured.
    """
    vocabulary, pad_id = _vocabulary(config)
    vision = config.model.vision.model_copy(update={"pretrained": None})
    encoder = build_dual_encoder(config.model.model_copy(update={"vision": vision}), vocabulary.size, pad_id)
    lora.add_adapters(encoder, config.model)
    return TrainingTask(encoder, build_objectives(objectives, encoder, vocabulary), World())


def _vocabulary(config: Config) -> tuple[base.Vocabulary, int]:
    text = config.model.text
    if text.tokenizer == "train":
        return placeholder_vocabulary(text.vocab_size, text.max_tokens), 0
    tokenizer = load_tokenizer(str(text.tokenizer or text.name), text.max_tokens)
    return describe_vocabulary(tokenizer), tokenizer.pad_id


def synthetic_batch(task: TrainingTask, objectives: Iterable[str], samples: int, tokens: int) -> Batch:
    """Noise as images in every view that these objectives read, and ordinary captions, on the task's device."""
    device = task.encoder.log_logit_scale.device
    generator = torch_generator("synthetic batch")
    chosen = [task.objective(name) for name in objectives]
    asked = {name: view for objective in chosen for name, view in objective.views().items()}
    groups = {field for objective in chosen for field in objective.groups()}
    own, words = task.encoder.vision.image_size, int(task.encoder.text.encoder.config.vocab_size)
    sizes = dict.fromkeys(["main", *mixing.further_views(chosen)], own)
    sizes |= {k: v.image_size if isinstance(v, base.Resized) else own for k, v in asked.items()}
    makers = (objective.sample_inputs() for objective in chosen)
    images = {
        size: torch.randint(256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)
        for size in dict.fromkeys([own, *sizes.values()])
    }
    # Special tokens are at the beginning or at the end of a vocabulary.
    ids = torch.randint(words // 4, words // 2, (samples, tokens), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    further = range(1, mixing.caption_count(chosen))
    return Batch(
        views={name: images[sizes[name]].clone() for name in sorted(sizes)},
        tokens=ids,
        token_mask=mask,
        ids=torch.arange(samples),
        keys=[f"synthetic:{i}" for i in range(samples)],
        groups={field: torch.arange(samples) for field in sorted(groups)},
        more_tokens={f"tokens.{i}": ids for i in further} | {f"token_mask.{i}": mask for i in further},
        extras={name: rows for maker in makers if maker is not None for name, rows in maker.example(samples).items()},
    ).to(device)


def fit_micro_batch(
    task: TrainingTask,
    rows: int,
    tokens: int,
    weights: Mapping[str, float],
    accelerator: "Accelerator",
    free_bytes: int | None = None,
) -> tuple[int, str]:
    """The largest micro-batch (a power of two, or all `rows`) whose activations fit; the same on every process.

    Args:
        task: on its device, before Accelerate prepares it.
        rows: samples per step on this process.
        tokens: length of the longest captions.
        weights: the objectives that may be active together.
        free_bytes: memory to use. Default: the free memory of this process's device.

    Returns: the micro-batch, and the reason for it in one line.
    """
    device = accelerator.device
    # Steps change queues and running statistics.
    task = copy.deepcopy(task)

    def saved(count: int) -> int:
        with _Counter() as counter:
            _one_step(task, count, tokens, weights, accelerator)
        task.zero_grad()
        return counter.most

    per_sample = max(1, (saved(MEMORY_SAMPLES) - saved(MEMORY_SAMPLES // 2)) // (MEMORY_SAMPLES - MEMORY_SAMPLES // 2))
    free = free_memory(device) if free_bytes is None else free_bytes
    free -= sum(3 * p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    fits = max(1, int(free * MEMORY_FRACTION) // per_sample)
    fits = min(rows, 1 << (fits.bit_length() - 1))
    everyone = task.world.gather(torch.tensor([fits], device=device))[0]
    fits = _largest_that_runs(int(everyone.min()), lambda n: _trial(task, n, tokens, weights, accelerator))
    return fits, f"{per_sample / 2**20:.1f} MiB per sample, {max(free, 0) / 2**30:.1f} GiB free: {fits} of {rows}"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return system.available_memory() // system.local_world_size()


def _largest_that_runs(count: int, trial: Callable[[int], None]) -> int:
    """`count`, halved until a step with that many samples does not run out of memory."""
    while count > 1:
        try:
            trial(count)
            return count
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            count //= 2
    return count


def _trial(
    task: TrainingTask, count: int, tokens: int, weights: Mapping[str, float], accelerator: "Accelerator"
) -> None:
    # Only a GPU can be tried: a CPU that runs out of memory kills the process. Several processes would have to try the
    # same sizes.
    if accelerator.device.type == "cuda" and task.world.size == 1:
        try:
            _one_step(task, count, tokens, weights, accelerator)
        finally:
            task.zero_grad()


def _one_step(
    task: TrainingTask, count: int, tokens: int, weights: Mapping[str, float], accelerator: "Accelerator"
) -> None:
    # Ordinary tokens, because masked words take memory too.
    batch = synthetic_batch(task, weights, count, tokens)
    backward(task, Step(task, batch, weights, fraction=0.5, seed=(0, "fit")), accelerator)


class _Counter:
    """Context manager that counts the bytes of tensors kept for the backward pass."""

    def __init__(self) -> None:
        self.most = 0
        self._held: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._held[storage.data_ptr()] = storage.nbytes()
        self.most = sum(self._held.values())
        return tensor

    def __enter__(self) -> "_Counter":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
