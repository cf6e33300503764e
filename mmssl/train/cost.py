"""What a training step costs in floating-point operations, counted on a step with two synthetic pairs.

Counted are matrix products, convolutions and attention, forward and backward, a multiplication and an addition as
two. Not counted are what a processor does beside them (norms, activations, optimizer), the part of a loss that grows
with the batch, and the second forward of `train.micro_batch`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmssl.build import build_objectives, describe_vocabulary, objective_options, placeholder_vocabulary
from mmssl.config import Config, ObjectiveConfig
from mmssl.data.transforms import load_tokenizer
from mmssl.distributed import World
from mmssl.models.dual_encoder import build_dual_encoder
from mmssl.models.lora import add_adapters
from mmssl.objectives._base import Vocabulary
from mmssl.objectives._task import TrainingTask, Weighted, encoder_passes, weight_at
from mmssl.rng import RowRandom, torch_generator
from mmssl.types import Batch

SAMPLES = 2
TOKENS = 16
"""Length of the synthetic captions."""
SCHEDULE_STEPS = 1000
"""Where a schedule follows the clock, it is followed for this many steps."""


class StepCosts:
    """Costs of the steps of one mixer, each kind of step counted once.

    Counting runs real steps on the mixer's device: it changes queues and running statistics, so give it a mixer that
    is not trained.
    """

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._known: dict[tuple[object, ...], float] = {}

    def of(self, objectives: Iterable[str], progress: float) -> float:
        """Operations a sample of a step after the part `progress` of the training, in which these objectives act."""
        names = tuple(sorted(objectives))
        chosen = [self._task.objective(name) for name in names]
        for objective in chosen:
            objective.on_step_start(progress)
        kind = names, encoder_passes(chosen)
        if kind not in self._known:
            self._known[kind] = predicted_cost(self._task, names, progress)
        return self._known[kind]

    def mean(self, schedules: Mapping[str, ObjectiveConfig], steps: int = SCHEDULE_STEPS) -> float:
        """Operations a sample of an average step of a training of `steps` steps."""
        total = 0.0
        for step in range(steps):
            progress = step / steps
            total += self.of([n for n, s in schedules.items() if weight_at(s, step, progress) > 0], progress)
        return total / steps


def predicted_cost(task: TrainingTask, objectives: Iterable[str], progress: float = 0.0, tokens: int = TOKENS) -> float:
    """Floating-point operations a sample of one training step, forward and backward, in which `objectives` act.

    Args:
        progress: the part of the training that is done, 0 to 1.
        tokens: length of the captions.
    """
    names = list(objectives)
    if not names:
        return 0.0
    batch = synthetic_batch(task, names, SAMPLES, tokens)

    def random(name: str) -> RowRandom:
        return RowRandom(torch_generator("cost", name, device=batch.ids.device), 0, SAMPLES, SAMPLES)

    task.train()
    # Fused attention has other names on other devices, and not all of them are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs = task.inputs(batch, names, random, progress)
        active = {n: Weighted(1.0, 1 / task.objective(n).num_terms(inputs).clamp(min=1)) for n in names}
        total, _ = task(inputs, active)
        if total.requires_grad:
            total.backward()
        task.on_step_end(inputs, names)
    task.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / SAMPLES


def untrained_task(config: Config) -> TrainingTask:
    """A configuration's modules with random weights; a vocabulary that would be learnt has its largest size.

    Raises:
        UserError: a tower or an objective cannot be built as configured.
    """
    vocabulary, pad_id = _vocabulary(config)
    vision = config.model.vision.model_copy(update={"pretrained": None})
    encoder = build_dual_encoder(config.model.model_copy(update={"vision": vision}), vocabulary.size, pad_id)
    add_adapters(encoder, config.model)
    return TrainingTask(encoder, build_objectives(objective_options(config), encoder, vocabulary), World())


def _vocabulary(config: Config) -> tuple[Vocabulary, int]:
    text = config.model.text
    if text.tokenizer == "train":
        return placeholder_vocabulary(text.vocab_size, text.max_tokens), 0
    tokenizer = load_tokenizer(str(text.tokenizer or text.name), text.max_tokens)
    return describe_vocabulary(tokenizer), tokenizer.pad_id


def synthetic_batch(task: TrainingTask, objectives: Iterable[str], samples: int, tokens: int) -> Batch:
    """Noise as images in every view that these objectives read, and captions of ordinary tokens, on the mixer's
    device."""
    device = task.encoder.log_logit_scale.device
    generator = torch_generator("synthetic batch")
    chosen = [task.objective(name) for name in objectives]
    views = {"main", *(name for objective in chosen for name in objective.views())}
    size, words = task.encoder.vision.image_size, int(task.encoder.text.encoder.config.vocab_size)
    images = torch.randint(256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)
    # Vocabularies keep their special tokens at the beginning or at the end.
    ids = torch.randint(words // 4, words // 2, (samples, tokens), generator=generator)
    return Batch(
        views={name: images.clone() for name in sorted(views)},
        tokens=ids,
        token_mask=torch.ones_like(ids, dtype=torch.bool),
        ids=torch.arange(samples),
        keys=[f"synthetic:{i}" for i in range(samples)],
    ).to(device)
